// AdamW (Loshchilov and Hutter, 2019; as torch.optim.AdamW computes it) over flat f32 arrays, and the gradient's norm.
// What depends on the step alone comes computed. It must not know what the parameters mean.

#include "device.cuh"

// One number a thread. `scale` multiplies gradients first (clipping); `shrink` is 1 - rate * decay, `size` rate over the
// first moment's correction, `root` the square root of the second's.
KERNEL(adamw, 256, float* parameters, const float* gradients, float* means, float* squares, i64 count, float scale, float keep1,
       float fresh1, float keep2, float fresh2, float root, float epsilon, float shrink, float size) {
    const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float g = gradients[i] * scale;
    const float m = keep1 * means[i] + fresh1 * g;
    const float v = keep2 * squares[i] + fresh2 * (g * g);
    means[i] = m;
    squares[i] = v;
    parameters[i] = shrink * parameters[i] - size * (m / (sqrtf(v) / root + epsilon));
}

constexpr int NORM_STRETCH = 4096, SQUARES_THREADS = 256;

// Sums in f64, in a tree that the place alone fixes.
__device__ __forceinline__ double block_sum_f64(double x) {
    typedef double Parts[SQUARES_THREADS];
    SHARED(Parts, parts);
    parts[threadIdx.x] = x;
    for (int step = SQUARES_THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < step) parts[threadIdx.x] += parts[threadIdx.x + step];
    }
    __syncthreads();
    return parts[0];
}

// `sums[i]` gets the sum of the squares of stretch `i` of 4096 numbers: a block each.
KERNEL(sum_of_squares, SQUARES_THREADS, const float* numbers, i64 count, double* sums) {
    const i64 first = static_cast<i64>(blockIdx.x) * NORM_STRETCH;
    double sum = 0;
    for (int i = threadIdx.x; i < NORM_STRETCH; i += SQUARES_THREADS) {
        if (first + i < count) sum += static_cast<double>(numbers[first + i]) * static_cast<double>(numbers[first + i]);
    }
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// `total` gets the sum of `count` stretches' sums: one block.
KERNEL(sum_of_sums, SQUARES_THREADS, const double* sums, i64 count, double* total) {
    double sum = 0;
    for (i64 i = threadIdx.x; i < count; i += SQUARES_THREADS) sum += sums[i];
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) *total = sum;
}
