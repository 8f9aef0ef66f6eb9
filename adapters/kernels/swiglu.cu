// The gated activation of a feed-forward block, forward and backward, element by element.

#include "device.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class T>
__device__ void swiglu(const T* gate, const T* up, T* y, i64 count) {
    const i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const int left = static_cast<int>(count - at < 8 ? count - at : 8);
    float g[8], u[8];
    read_eight(gate + at, 0, left, left == 8, g);
    read_eight(up + at, 0, left, left == 8, u);
#pragma unroll
    for (int i = 0; i < 8; i++) g[i] = g[i] * sigmoid(g[i]) * u[i];
    write_eight(g, y + at, 0, left, left == 8);
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
template <class T>
__device__ void swiglu_backward(T* gate, T* up, const T* dy, i64 count) {
    const i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const int left = static_cast<int>(count - at < 8 ? count - at : 8);
    float g[8], u[8], d[8];
    read_eight(static_cast<const T*>(gate) + at, 0, left, left == 8, g);
    read_eight(static_cast<const T*>(up) + at, 0, left, left == 8, u);
    read_eight(dy + at, 0, left, left == 8, d);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float s = sigmoid(g[i]);
        const float dgate = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
        u[i] = d[i] * g[i] * s;
        g[i] = dgate;
    }
    write_eight(g, gate + at, 0, left, left == 8);
    write_eight(u, up + at, 0, left, left == 8);
}

#define SWIGLU(name, T)                                                                     \
    KERNEL(swiglu_##name, 256, const T* gate, const T* up, T* y, i64 count) {               \
        swiglu(gate, up, y, count);                                                         \
    }                                                                                       \
    KERNEL(swiglu_backward_##name, 256, T* gate, T* up, const T* dy, i64 count) {           \
        swiglu_backward(gate, up, dy, count);                                               \
    }
FOR_NUMBERS(SWIGLU)
