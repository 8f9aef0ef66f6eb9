// Rotary positions, in halves as Hugging Face lays them out. It must not know positions: it gets their angles.

#include "device.cuh"

// One block a row; `pitch` numbers lie between rows, so that the queries of a joined row rotate where they are. `turn` is 1,
// or -1 for the way back.
template <class T>
__device__ void rope(T* x, const float* cos, const float* sin, int pitch, int heads, int head_dim, float turn) {
    const int half = head_dim / 2;
    T* const row = x + static_cast<i64>(blockIdx.x) * pitch;
    for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
        T* const at = row + i / half * head_dim + i % half;
        const float c = cos[static_cast<i64>(blockIdx.x) * half + i % half];
        const float s = turn * sin[static_cast<i64>(blockIdx.x) * half + i % half];
        const float a = widen(at[0]), b = widen(at[half]);
        at[0] = narrow<T>(a * c - b * s);
        at[half] = narrow<T>(b * c + a * s);
    }
}

#define ROPE(name, T)                                                                                        \
    KERNEL(rope_##name, 256, T* x, const float* cos, const float* sin, int pitch, int heads, int head_dim, float turn) { \
        rope(x, cos, sin, pitch, heads, head_dim, turn);                                                     \
    }
FOR_NUMBERS(ROPE)
