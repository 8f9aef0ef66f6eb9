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

template <class X>
__device__ void multiply(const X* x, float* y, i64 count) {
    const i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const int left = static_cast<int>(count - at < 8 ? count - at : 8);
    float a[8], b[8];
    read_eight(x + at, 0, left, left == 8, a);
    read_eight(static_cast<const float*>(y) + at, 0, left, left == 8, b);
#pragma unroll
    for (int i = 0; i < 8; i++) b[i] *= a[i];
    write_eight(b, y + at, 0, left, left == 8);
}

// One block a row of x: row `rows[i]` of y += row `i` of x. Rows differ; a negative one is nobody's.
template <class T>
__device__ void add_rows(const T* x, const int* rows, T* y, int width) {
    const i64 row = rows[blockIdx.x];
    if (row < 0) return;
    const T* const from = x + static_cast<i64>(blockIdx.x) * width;
    T* const to = y + row * width;
    const bool whole = width % 8 == 0;
    for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
        float a[8], b[8];
        read_eight(from, column, width, whole, a);
        read_eight(static_cast<const T*>(to), column, width, whole, b);
#pragma unroll
        for (int i = 0; i < 8; i++) b[i] += a[i];
        write_eight(b, to, column, width, whole);
    }
}

// One block a row: `y *= by`, or `y += by`.
template <bool SCALE, class By, class T>
__device__ void columns(const By* by, T* y, int width) {
    T* const row = y + static_cast<i64>(blockIdx.x) * width;
    const bool whole = width % 8 == 0;
    for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
        float numbers[8], others[8];
        read_eight(static_cast<const T*>(row), column, width, whole, numbers);
        read_eight(by, column, width, whole, others);
#pragma unroll
        for (int i = 0; i < 8; i++) numbers[i] = SCALE ? numbers[i] * others[i] : numbers[i] + others[i];
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

#define SUM(name, T)                                                                                            \
    KERNEL(add_##name, 256, const T* x, T* y, i64 count) { add(x, y, count); }                                  \
    KERNEL(multiply_##name, 256, const T* x, float* y, i64 count) { multiply(x, y, count); }                    \
    KERNEL(add_rows_##name, 256, const T* x, const int* rows, T* y, int width) { add_rows(x, rows, y, width); } \
    KERNEL(add_bias_##name, 256, const T* bias, T* y, int width) { columns<false>(bias, y, width); }            \
    KERNEL(scale_columns_##name, 256, const float* gain, T* y, int width) { columns<true>(gain, y, width); }
FOR_NUMBERS(SUM)

#define CAST(from, From, to, To)                                                       \
    KERNEL(cast_##from##_##to, 256, const From* x, To* y, i64 count) { cast(x, y, count); }
CAST(f32, float, bf16, bf16)
CAST(f32, float, f16, f16)
CAST(bf16, bf16, f32, float)
CAST(f16, f16, f32, float)
CAST(bf16, bf16, f16, f16)
CAST(f16, f16, bf16, bf16)
