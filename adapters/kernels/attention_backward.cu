// The way back through flat attention, without the score matrix: scores are computed again from queries, keys and the saved
// denominators. One kernel walks queries for each stretch of keys, one walks keys for each stretch of queries, so every
// gradient has one owner and its sum one order. It must not know a paged cache: nothing trains on one.

#include "attention.cuh"

constexpr int BACK_WARPS = 4, BACK_THREADS = BACK_WARPS * WARP, BACK_ROWS = BACK_WARPS * 16;

// `means [rows, heads]` gets each query's dout . out. A warp has a query's head; `count` is rows times heads.
template <class T>
__device__ void attention_mean(const T* out, const T* dout, float* means, int head_dim, i64 count) {
    const i64 at = static_cast<i64>(blockIdx.x) * (blockDim.x / WARP) + warp_of_thread();
    float sum = 0;
    if (at < count) {
        for (int d = lane_of_thread(); d < head_dim; d += WARP) sum = fmaf(widen(out[at * head_dim + d]), widen(dout[at * head_dim + d]), sum);
    }
    sum = warp_sum(sum);
    if (at < count && lane_of_thread() == 0) means[at] = sum;
}

template <class T, int HEAD_DIM>
struct BackTiles {
    static constexpr int STRIDE = HEAD_DIM + 16 / sizeof(T);
    // What the block owns, 16 rows a warp, and what it walks.
    alignas(16) T own[2][BACK_ROWS * STRIDE];
    alignas(16) T walked[2][STEP * STRIDE];
    float lse[STEP], means[STEP];
};

// Products of 16 owned rows with the walked ones: `result[j]` has walked rows `8 j..8 j + 8`.
template <class N, class T, int HEAD_DIM>
__device__ __forceinline__ void all_products(const T* own, const T* walked, int stride, float (&result)[STEP / 8][4]) {
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
        const auto left = left_along<N>(own + d, stride);
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) multiply<N>(result[j], left, right_along<N>(walked + j * 8 * stride + d, stride));
    }
}

// sums += weights walked, over `COLUMNS` columns.
template <class N, class T, int COLUMNS>
__device__ __forceinline__ void add_weighted(const float (&weights)[STEP / 8][4], const T* walked, int stride, float (&sums)[COLUMNS / 8][4]) {
    constexpr int P = PIECES<N, T>;
#pragma unroll
    for (int j = 0; j < STEP / 8; j += 2) {
        const Left<P> left = left_of<N, P>(weights[j], weights[j + 1]);
#pragma unroll
        for (int d = 0; d < COLUMNS; d += 16) {
            Right<P> rights[2];
            rights_across<N>(walked + j * 8 * stride + d, stride, rights);
            multiply<N>(sums[d / 8], left, rights[0]);
            multiply<N>(sums[d / 8 + 1], left, rights[1]);
        }
    }
}

// dv_j += p_ij dout_i and dk_j += ds_ij q_i, where ds = scale p (dout . v - mean). Blocks: (64 positions, key head, span and
// 128 columns of the head). Spans of one launch share no keys.
template <class T, int HEAD_DIM>
__device__ void attention_backward_keys(const T* q, const T* k, const T* v, const float* lse, const float* means, const T* dout,
                                        const Span* spans, const Heads& heads, T* dk, T* dv) {
    using Tiles = BackTiles<T, HEAD_DIM>;
    using N = typename Meet<T, T>::Number;
    constexpr int COLUMNS = HEAD_DIM < 128 ? HEAD_DIM : 128, SHARES = HEAD_DIM / COLUMNS, STRIDE = Tiles::STRIDE;
    DYNAMIC_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Span span = spans[blockIdx.z / SHARES];
    const int column0 = blockIdx.z % SHARES * COLUMNS, kv_head = blockIdx.y, position0 = blockIdx.x * BACK_ROWS;
    const int positions = span.start + span.rows, group = heads.group();
    if (span.rows == 0 || position0 >= positions || column0 >= heads.head_dim) return;
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4, own = warp_of_thread() * 16;
    bring_flat<BACK_THREADS, BACK_ROWS, HEAD_DIM>(tiles.own[0], STRIDE, k, span, heads, kv_head, position0, 0, positions);
    bring_flat<BACK_THREADS, BACK_ROWS, HEAD_DIM>(tiles.own[1], STRIDE, v, span, heads, kv_head, position0, 0, positions);
    float keys[COLUMNS / 8][4] = {}, values[COLUMNS / 8][4] = {};
    // Rows that see any of the positions.
    const int first_row = max(position0 - span.start, 0);
    const int beyond = heads.window > 0 ? min(span.rows, max(position0 + BACK_ROWS - 1 + heads.window - span.start, 0)) : span.rows;
    for (int at = first_row * group; at < beyond * group; at += STEP) {
        __syncthreads();
        bring_queries<BACK_THREADS, STEP, HEAD_DIM>(tiles.walked[0], STRIDE, q, span, heads, kv_head, at);
        bring_queries<BACK_THREADS, STEP, HEAD_DIM>(tiles.walked[1], STRIDE, dout, span, heads, kv_head, at);
        copies_begun();
        if (threadIdx.x < STEP) {
            const Query query = query_of(span, heads, kv_head, at + threadIdx.x);
            const i64 from = static_cast<i64>(query.row) * heads.heads + query.head;
            tiles.lse[threadIdx.x] = query.there ? lse[from] : 0;
            tiles.means[threadIdx.x] = query.there ? means[from] : 0;
        }
        copies_arrived<0>();
        __syncthreads();
        float p[STEP / 8][4] = {}, ds[STEP / 8][4] = {};
        all_products<N, T, HEAD_DIM>(tiles.own[0] + own * STRIDE, tiles.walked[0], STRIDE, p);
        all_products<N, T, HEAD_DIM>(tiles.own[1] + own * STRIDE, tiles.walked[1], STRIDE, ds);
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = j * 8 + 2 * t + i % 2, row = (at + query) / group;
                const int position = position0 + own + g + i / 2 * 8, last = span.start + row;
                const bool seen = row < span.rows && position <= last && position >= heads.first_visible(last);
                const float weight = seen ? exp2f(p[j][i] * (heads.scale * LOG2_E) - tiles.lse[query] * LOG2_E) : 0.0f;
                p[j][i] = weight;
                ds[j][i] = seen ? heads.scale * weight * (ds[j][i] - tiles.means[query]) : 0.0f;
            }
        }
        add_weighted<N, T, COLUMNS>(p, tiles.walked[1] + column0, STRIDE, values);
        add_weighted<N, T, COLUMNS>(ds, tiles.walked[0] + column0, STRIDE, keys);
    }
#pragma unroll
    for (int d = 0; d < COLUMNS / 8; d++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int position = position0 + own + g + i / 2 * 8, column = column0 + d * 8 + 2 * t + i % 2;
            if (position < positions && column < heads.head_dim) {
                const i64 to = ((static_cast<i64>(span.kv) + position) * heads.kv_heads + kv_head) * heads.head_dim + column;
                dk[to] = narrow<T>(widen(dk[to]) + keys[d][i]);
                dv[to] = narrow<T>(widen(dv[to]) + values[d][i]);
            }
        }
    }
}

// dq_i = sum of ds_ij k_j. Blocks: (span, key head and 64 of its queries).
template <class T, int HEAD_DIM>
__device__ void attention_backward_queries(const T* q, const T* k, const T* v, const float* lse, const float* means, const T* dout,
                                           const Span* spans, const Heads& heads, T* dq) {
    using Tiles = BackTiles<T, HEAD_DIM>;
    using N = typename Meet<T, T>::Number;
    constexpr int STRIDE = Tiles::STRIDE;
    DYNAMIC_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Span span = spans[blockIdx.x];
    const int shares = gridDim.y / heads.kv_heads, kv_head = blockIdx.y / shares, first_query = blockIdx.y % shares * BACK_ROWS;
    const int group = heads.group();
    if (first_query >= span.rows * group) return;
    const int t = lane_of_thread() % 4, own = warp_of_thread() * 16;
    const int last_query = min(first_query + BACK_ROWS, span.rows * group) - 1;
    const int begin = heads.first_visible(span.start + first_query / group), end = span.start + last_query / group + 1;
    bring_queries<BACK_THREADS, BACK_ROWS, HEAD_DIM>(tiles.own[0], STRIDE, q, span, heads, kv_head, first_query);
    bring_queries<BACK_THREADS, BACK_ROWS, HEAD_DIM>(tiles.own[1], STRIDE, dout, span, heads, kv_head, first_query);
    float denominator[2], mean[2];
    int last[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Query query = query_of(span, heads, kv_head, min(first_query + own + lane_of_thread() / 4 + i * 8, last_query));
        const i64 at = static_cast<i64>(query.row) * heads.heads + query.head;
        denominator[i] = lse[at] * LOG2_E;
        mean[i] = means[at];
        last[i] = span.start + query.row - span.row;
    }
    float sums[HEAD_DIM / 8][4] = {};
    for (int at = begin / STEP * STEP; at < end; at += STEP) {
        __syncthreads();
        bring_flat<BACK_THREADS, STEP, HEAD_DIM>(tiles.walked[0], STRIDE, k, span, heads, kv_head, at, begin, end);
        bring_flat<BACK_THREADS, STEP, HEAD_DIM>(tiles.walked[1], STRIDE, v, span, heads, kv_head, at, begin, end);
        copies_begun();
        copies_arrived<0>();
        __syncthreads();
        float p[STEP / 8][4] = {}, ds[STEP / 8][4] = {};
        all_products<N, T, HEAD_DIM>(tiles.own[0] + own * STRIDE, tiles.walked[0], STRIDE, p);
        all_products<N, T, HEAD_DIM>(tiles.own[1] + own * STRIDE, tiles.walked[1], STRIDE, ds);
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int position = at + j * 8 + 2 * t + i % 2;
                const bool seen = position <= last[i / 2] && position >= heads.first_visible(last[i / 2]);
                const float weight = exp2f(p[j][i] * (heads.scale * LOG2_E) - denominator[i / 2]);
                ds[j][i] = seen ? heads.scale * weight * (ds[j][i] - mean[i / 2]) : 0.0f;
            }
        }
        add_weighted<N, T, HEAD_DIM>(ds, tiles.walked[0], STRIDE, sums);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Query query = query_of(span, heads, kv_head, first_query + own + lane_of_thread() / 4 + i * 8);
        if (!query.there) continue;
        const i64 to = (static_cast<i64>(query.row) * heads.heads + query.head) * heads.head_dim;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = d * 8 + 2 * t + e;
                if (column < heads.head_dim) dq[to + column] = narrow<T>(sums[d][i * 2 + e]);
            }
        }
    }
}

#define ATTENTION_BACKWARD(name, T, DIM)                                                                                                        \
    KERNEL(attention_backward_keys_##DIM##_##name, BACK_THREADS, const T* q, const T* k, const T* v, const float* lse,                  \
           const float* means, const T* dout, const Span* spans, int heads, int kv_heads, int head_dim, int window, float scale, T* dk, \
           T* dv) {                                                                                                                   \
        attention_backward_keys<T, DIM>(q, k, v, lse, means, dout, spans, {heads, kv_heads, head_dim, window, scale}, dk, dv);         \
    }                                                                                                                                 \
    KERNEL(attention_backward_queries_##DIM##_##name, BACK_THREADS, const T* q, const T* k, const T* v, const float* lse,               \
           const float* means, const T* dout, const Span* spans, int heads, int kv_heads, int head_dim, int window, float scale,        \
           T* dq) {                                                                                                                   \
        attention_backward_queries<T, DIM>(q, k, v, lse, means, dout, spans, {heads, kv_heads, head_dim, window, scale}, dq);          \
    }
#define ATTENTIONS_BACKWARD(name, T)                                                                                                  \
    ATTENTION_BACKWARD(name, T, 64)                                                                                                   \
    ATTENTION_BACKWARD(name, T, 128)                                                                                                  \
    ATTENTION_BACKWARD(name, T, 256)                                                                                                  \
    KERNEL(attention_mean_##name, 256, const T* out, const T* dout, float* means, int head_dim, i64 count) {                  \
        attention_mean(out, dout, means, head_dim, count);                                                                  \
    }
FOR_NUMBERS(ATTENTIONS_BACKWARD)
