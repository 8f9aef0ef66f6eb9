// Sums and products of rows, and changes of type, element by element.

#include "device.cuh"

template <class T>
__device__ void add(const T* x, T* y, i64 count) {
    const i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const int left = static_cast<int>(count - at < 8 ? count - at : 8);
    float a[8], b[8];
    read_eight(x + at, 0, left, left == 8, a);
    read_eight(static_cast<const T*>(y) + at, 0, left, left == 8, b);
#pragma unroll
    for (int i = 0; i < 8; i++) b[i] += a[i];
    write_eight(b, y + at, 0, left, left == 8);
}

// One block a row: `y *= gain`, or `y += bias` where there is no gain.
template <class T>
__device__ void columns(const T* gain, const T* bias, T* y, int width) {
    T* const row = y + static_cast<i64>(blockIdx.x) * width;
    const bool whole = width % 8 == 0;
    for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
        float numbers[8], by[8];
        read_eight(static_cast<const T*>(row), column, width, whole, numbers);
        read_eight(gain != nullptr ? gain : bias, column, width, whole, by);
#pragma unroll
        for (int i = 0; i < 8; i++) numbers[i] = gain != nullptr ? numbers[i] * by[i] : numbers[i] + by[i];
        write_eight(numbers, row, column, width, whole);
    }
}

template <class From, class To>
__device__ void cast(const From* from, To* to, i64 count) {
    const i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const int left = static_cast<int>(count - at < 8 ? count - at : 8);
    float numbers[8];
    read_eight(from + at, 0, left, left == 8, numbers);
    write_eight(numbers, to + at, 0, left, left == 8);
}

#define SUM(name, T)                                                             \
    KERNEL(add_##name, 256, const T* x, T* y, i64 count) { add(x, y, count); }   \
    KERNEL(add_bias_##name, 256, const T* bias, T* y, int width) {               \
        columns<T>(nullptr, bias, y, width);                                     \
    }                                                                            \
    KERNEL(scale_columns_##name, 256, const T* gain, T* y, int width) {          \
        columns<T>(gain, nullptr, y, width);                                     \
    }
FOR_NUMBERS(SUM)

#define CAST(from, From, to, To)                                                       \
    KERNEL(cast_##from##_##to, 256, const From* x, To* y, i64 count) { cast(x, y, count); }
CAST(f32, float, bf16, bf16)
CAST(f32, float, f16, f16)
CAST(bf16, bf16, f32, float)
CAST(f16, f16, f32, float)
CAST(bf16, bf16, f16, f16)
CAST(f16, f16, bf16, bf16)
