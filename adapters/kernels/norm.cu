// Root mean square norms of rows, forward and backward. A block has a row, and sums in an order that the width alone
// fixes. It must not know what the rows are.

#include "device.cuh"

constexpr int NORM_THREADS = 256;
constexpr int NORM_WARPS = NORM_THREADS / WARP;

// With `residual`, the row is first `residual + x`, which takes the residual's place: what a block adds to its stream, and
// the norm of the next one, in one pass. Sums are of the rounded stream, so that the norm is that of what was stored.
template <class T>
__device__ void rms_norm(const T* x, T* residual, const T* weight, float eps, T* y, int width) {
    const i64 at = static_cast<i64>(blockIdx.x) * width;
    const bool whole = width % 8 == 0;
    float squares = 0;
    for (int column = threadIdx.x * 8; column < width; column += NORM_THREADS * 8) {
        float numbers[8];
        read_eight(x + at, column, width, whole, numbers);
        if (residual != nullptr) {
            float stream[8];
            read_eight(static_cast<const T*>(residual) + at, column, width, whole, stream);
#pragma unroll
            for (int i = 0; i < 8; i++) numbers[i] = widen(narrow<T>(stream[i] + numbers[i]));
            write_eight(numbers, residual + at, column, width, whole);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) squares = fmaf(numbers[i], numbers[i], squares);
    }
    const float inverse = 1.0f / sqrtf(block_sum<NORM_WARPS>(squares) / static_cast<float>(width) + eps);
    const T* const row = residual != nullptr ? residual + at : x + at;
    for (int column = threadIdx.x * 8; column < width; column += NORM_THREADS * 8) {
        float numbers[8], gains[8];
        read_eight(row, column, width, whole, numbers);
        read_eight(weight, column, width, whole, gains);
#pragma unroll
        for (int i = 0; i < 8; i++) numbers[i] = gains[i] * (numbers[i] * inverse);
        write_eight(numbers, y + at, column, width, whole);
    }
}

// With r = 1/sqrt(mean(x^2) + eps) and g = dy * w: dx += r g - r^3 x (g . x) / n.
template <class T>
__device__ void rms_norm_backward(const T* x, const T* weight, float eps, const T* dy, T* dx, int width) {
    const i64 at = static_cast<i64>(blockIdx.x) * width;
    const bool whole = width % 8 == 0;
    float squares = 0, along = 0;
    for (int column = threadIdx.x * 8; column < width; column += NORM_THREADS * 8) {
        float numbers[8], gains[8], slopes[8];
        read_eight(x + at, column, width, whole, numbers);
        read_eight(weight, column, width, whole, gains);
        read_eight(dy + at, column, width, whole, slopes);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            squares = fmaf(numbers[i], numbers[i], squares);
            along = fmaf(slopes[i] * gains[i], numbers[i], along);
        }
    }
    const float n = static_cast<float>(width);
    const float inverse = 1.0f / sqrtf(block_sum<NORM_WARPS>(squares) / n + eps);
    const float back = inverse * inverse * block_sum<NORM_WARPS>(along) / n;
    for (int column = threadIdx.x * 8; column < width; column += NORM_THREADS * 8) {
        float numbers[8], gains[8], slopes[8], sums[8];
        read_eight(x + at, column, width, whole, numbers);
        read_eight(weight, column, width, whole, gains);
        read_eight(dy + at, column, width, whole, slopes);
        read_eight(static_cast<const T*>(dx) + at, column, width, whole, sums);
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i] += inverse * (slopes[i] * gains[i] - back * numbers[i]);
        write_eight(sums, dx + at, column, width, whole);
    }
}

#define NORM(name, T)                                                                                                  \
    KERNEL(rms_norm_##name, NORM_THREADS, const T* x, const T* weight, float eps, T* y, int width) {                    \
        rms_norm<T>(x, nullptr, weight, eps, y, width);                                                                \
    }                                                                                                                  \
    KERNEL(add_rms_norm_##name, NORM_THREADS, const T* x, T* residual, const T* weight, float eps, T* y, int width) {   \
        rms_norm<T>(x, residual, weight, eps, y, width);                                                               \
    }                                                                                                                  \
    KERNEL(rms_norm_backward_##name, NORM_THREADS, const T* x, const T* weight, float eps, const T* dy, T* dx, int width) { \
        rms_norm_backward<T>(x, weight, eps, dy, dx, width);                                                           \
    }
FOR_NUMBERS(NORM)
