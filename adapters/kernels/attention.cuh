// What attention's kernels share: who sees what, and how parts of a softmax join.
//
// A query's positions are walked by steps of 32 within splits of 128, both counted from position 0. A split has a softmax of
// its own, online over its steps, and splits are merged ascending. All of it is fixed by the query's position alone, and a
// step that a query does not see changes no bit of it: so decode, which gives every split a block, and prefill, which walks
// them, agree bit for bit, and so does any cutting of a prompt.

#pragma once

#include "device.cuh"

constexpr int STEP = 32, SPLIT = 128, POSITIONS_IN_BLOCK = 16;
constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.69314718055994530942f;

// Rows `row..row + rows` of the queries: positions `start..` of one sequence, whose keys begin at `kv`: an entry of the block
// tables where the cache is paged, a row where keys are flat. One without rows is the tail of a captured step.
struct Span {
    int row, rows, start, kv;
};

struct Heads {
    int heads, kv_heads, head_dim, window;
    float scale;

    __device__ __forceinline__ int group() const { return heads / kv_heads; }
    // The first position that one sees; a window of 0 is none.
    __device__ __forceinline__ int first_visible(int position) const { return window > 0 ? max(position + 1 - window, 0) : 0; }
};

// The state of one softmax: the highest score (times log2 e) and the sum of powers of two below it.
struct Mark {
    float highest, sum;
};

__device__ __forceinline__ float power(float exponent, float highest) {
    return exp2f(exponent - (highest == LOWEST ? 0.0f : highest));
}

// `total` gets what both stand for; sums under the old marks are to be scaled by `old` and `fresh`.
__device__ __forceinline__ void merge(Mark& total, const Mark& part, float& old, float& fresh) {
    const float highest = fmaxf(total.highest, part.highest);
    old = power(total.highest, highest);
    fresh = power(part.highest, highest);
    total.sum = fmaf(part.sum, fresh, total.sum * old);
    total.highest = highest;
}

// Queries of one key head: row by row, and the group's heads within a row.
struct Query {
    int row, head;
    bool there;
};

__device__ __forceinline__ Query query_of(const Span& span, const Heads& heads, int kv_head, int index) {
    const int group = heads.group(), row = index / group;
    return {span.row + row, kv_head * group + index % group, row < span.rows};
}

// Begins to bring one head of `COUNT` packed queries from `first` into a tile; those that are not there become zeros.
template <int THREADS, int COUNT, int HEAD_DIM, class T>
__device__ __forceinline__ void bring_queries(T* tile, int stride, const T* q, const Span& span, const Heads& heads, int kv_head, int first) {
    constexpr int EACH = 16 / sizeof(T), ACROSS = HEAD_DIM / EACH;
    const bool aligned = heads.head_dim % EACH == 0;
#pragma unroll(HEAD_DIM * sizeof(T) > 512 ? 1 : 4)
    for (int i = threadIdx.x; i < COUNT * ACROSS; i += THREADS) {
        const int d = i % ACROSS * EACH;
        const Query query = query_of(span, heads, kv_head, first + i / ACROSS);
        const int left = query.there ? heads.head_dim - d : 0;
        const T* const from = q + (static_cast<i64>(query.row) * heads.heads + query.head) * heads.head_dim + d;
        bring_16(tile + i / ACROSS * stride + d, left > 0 ? from : q, left, aligned);
    }
}

// Begins to bring one head of flat keys or values of positions `first..first + COUNT`, of which `begin..end` are there.
template <int THREADS, int COUNT, int HEAD_DIM, class T>
__device__ __forceinline__ void bring_flat(T* tile, int stride, const T* kv, const Span& span, const Heads& heads, int kv_head, int first,
                                           int begin, int end) {
    constexpr int EACH = 16 / sizeof(T), ACROSS = HEAD_DIM / EACH;
    const bool aligned = heads.head_dim % EACH == 0;
#pragma unroll(HEAD_DIM * sizeof(T) > 512 ? 1 : 4)
    for (int i = threadIdx.x; i < COUNT * ACROSS; i += THREADS) {
        const int d = i % ACROSS * EACH, position = first + i / ACROSS;
        const int left = position >= begin && position < end ? heads.head_dim - d : 0;
        const T* const from = kv + ((static_cast<i64>(span.kv) + position) * heads.kv_heads + kv_head) * heads.head_dim + d;
        bring_16(tile + i / ACROSS * stride + d, left > 0 ? from : kv, left, aligned);
    }
}
