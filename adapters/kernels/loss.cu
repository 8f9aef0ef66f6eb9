// Softmax statistics of rows of logits, and the loss with its gradient in one visit of a row. Logits are f32.

#include "device.cuh"

constexpr int LOSS_THREADS = 512;
constexpr int LOSS_WARPS = LOSS_THREADS / WARP;

// The highest number of a block's row and the sum of exp(x - highest): each thread's stretch, then the block's tree.
__device__ __forceinline__ void softmax_of(const float* row, int width, float& highest, float& sum) {
    float best = LOWEST;
    for (int i = threadIdx.x; i < width; i += LOSS_THREADS) best = fmaxf(best, row[i]);
    highest = block_max<LOSS_WARPS>(best);
    float total = 0;
    for (int i = threadIdx.x; i < width; i += LOSS_THREADS) total += expf(row[i] - highest);
    sum = block_sum<LOSS_WARPS>(total);
}

// One block a row: `statistics [rows, 2]` gets the highest logit and the logarithm of the softmax's denominator, which
// includes it: a log-probability is `logit - statistics[1]`.
KERNEL(softmax_statistics, LOSS_THREADS, const float* logits, float* statistics, int vocab) {
    float highest, sum;
    softmax_of(logits + static_cast<i64>(blockIdx.x) * vocab, vocab, highest, sum);
    if (threadIdx.x == 0) {
        statistics[2 * static_cast<i64>(blockIdx.x)] = highest;
        statistics[2 * static_cast<i64>(blockIdx.x) + 1] = highest + logf(sum);
    }
}

// One block a row: the row becomes `weights[row] * (softmax(row) - onehot(label))`, and `judged [rows, 2]` gets
// `-log softmax(row)[label]` and 1 where no logit is above the label's, else 0. The gradient may go elsewhere, in another
// type, where a product reads it next.
template <class T>
__device__ void cross_entropy(const float* logits, const unsigned* labels, const float* weights, T* gradient, float* judged, int vocab) {
    const i64 at = static_cast<i64>(blockIdx.x) * vocab;
    const int label = static_cast<int>(labels[blockIdx.x]);
    const float weight = weights[blockIdx.x];
    float highest, sum;
    softmax_of(logits + at, vocab, highest, sum);
    if (threadIdx.x == 0) {
        const float score = logits[at + label];
        judged[2 * static_cast<i64>(blockIdx.x)] = highest + logf(sum) - score;
        judged[2 * static_cast<i64>(blockIdx.x) + 1] = score == highest ? 1.0f : 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < vocab; i += LOSS_THREADS) {
        const float probability = expf(logits[at + i] - highest) / sum;
        gradient[at + i] = narrow<T>(i == label ? weight * probability - weight : weight * probability);
    }
}

#define CROSS_ENTROPY(name, T)                                                                                              \
    KERNEL(cross_entropy_##name, LOSS_THREADS, const float* logits, const unsigned* labels, const float* weights, T* gradient, \
           float* judged, int vocab) {                                                                                      \
        cross_entropy(logits, labels, weights, gradient, judged, vocab);                                                    \
    }
FOR_NUMBERS(CROSS_ENTROPY)
