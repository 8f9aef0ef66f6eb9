// Causal attention over a paged cache or flat rows, forward. See `attention.cuh` for the order of its sums.
//
// The queries of all heads that read one key head stand together as the rows of a matrix, so that decode too multiplies on
// tensor cores and reads a key once. It must not know why a row is computed.

#include "attention.cuh"

// The keys of a cache block are turned, so a paged tile holds them as [head_dim, positions].
template <class T, int HEAD_DIM, int WARPS, bool PAGED>
struct AttentionTiles {
    static constexpr int PAD = 16 / sizeof(T), STAGES = HEAD_DIM * sizeof(T) <= 512 ? 2 : 1;
    static constexpr int K_STRIDE = PAGED ? STEP + PAD : HEAD_DIM + PAD, STRIDE = HEAD_DIM + PAD;
    alignas(16) T k[STAGES][(PAGED ? HEAD_DIM : STEP) * K_STRIDE];
    alignas(16) T v[STAGES][STEP * STRIDE];
    alignas(16) T q[WARPS * 16 * STRIDE];
};

// Sums of a warp's 16 queries: lane `4 g + t` has rows `g` and `g + 8`.
template <int HEAD_DIM>
struct Attended {
    float out[HEAD_DIM / 8][4];
    Mark marks[2];
};

template <class T, int HEAD_DIM, int WARPS, bool PAGED>
struct Attention {
    using Tiles = AttentionTiles<T, HEAD_DIM, WARPS, PAGED>;
    using N = typename Meet<T, T>::Number;
    static constexpr int THREADS = WARPS * WARP, QUERIES = WARPS * 16, P = PIECES<N, T>;

    const T* k;
    const T* v;
    const int* tables;
    Heads heads;
    Span span;
    Tiles* tiles;
    int kv_head, first_query;
    // Positions that any of the block's queries sees.
    int begin, end;
    // Of the lane's two queries: whom they see, `first..=last`.
    int first[2], last[2];

    __device__ __forceinline__ Attention(const T* k, const T* v, const int* tables, const Heads& heads, const Span& span, Tiles* tiles,
                                         int kv_head, int first_query)
        : k(k), v(v), tables(tables), heads(heads), span(span), tiles(tiles), kv_head(kv_head), first_query(first_query) {
        const int group = heads.group();
        const int last_query = min(first_query + QUERIES, span.rows * group) - 1;
        begin = heads.first_visible(span.start + first_query / group);
        end = span.start + last_query / group + 1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            last[i] = span.start + min(query(i), last_query) / group;
            first[i] = heads.first_visible(last[i]);
        }
    }

    // The lane's query `i` of its two, as it is packed.
    __device__ __forceinline__ int query(int i) const { return first_query + warp_of_thread() * 16 + lane_of_thread() / 4 + i * 8; }

    __device__ __forceinline__ void bring_q(const T* q) const {
        bring_queries<THREADS, QUERIES, HEAD_DIM>(tiles->q, Tiles::STRIDE, q, span, heads, kv_head, first_query);
    }

    // Begins to bring the step at `at`. What no query sees is zeros: it may be memory that was never written.
    __device__ __forceinline__ void bring_step(int at) const {
        T* const to_k = tiles->k[at / STEP % Tiles::STAGES];
        T* const to_v = tiles->v[at / STEP % Tiles::STAGES];
        if constexpr (!PAGED) {
            bring_flat<THREADS, STEP, HEAD_DIM>(to_k, Tiles::K_STRIDE, k, span, heads, kv_head, at, begin, end);
            bring_flat<THREADS, STEP, HEAD_DIM>(to_v, Tiles::STRIDE, v, span, heads, kv_head, at, begin, end);
        } else {
            constexpr int EACH = 16 / sizeof(T), K_ACROSS = STEP / EACH, V_ACROSS = HEAD_DIM / EACH;
            // The sums of a wide head leave no registers for addresses in advance.
            [[maybe_unused]] constexpr int UNROLL = HEAD_DIM > 128 || sizeof(T) == 4 ? 1 : 2;
            const int d = heads.head_dim;
#pragma unroll UNROLL
            for (int i = threadIdx.x; i < HEAD_DIM * K_ACROSS; i += THREADS) {
                const int row = i / K_ACROSS, column = i % K_ACROSS * EACH;
                // A block is there as soon as one of its positions is; others of it are masked.
                const int block = (at + column) / POSITIONS_IN_BLOCK * POSITIONS_IN_BLOCK;
                const bool there = row < d && block < end && block + POSITIONS_IN_BLOCK > begin;
                const T* const from = there ? k + (head_of(at + column) * d + row) * POSITIONS_IN_BLOCK + column % POSITIONS_IN_BLOCK : k;
                bring_16(to_k + row * Tiles::K_STRIDE + column, from, there ? EACH : 0, true);
            }
            const bool aligned = d % EACH == 0;
#pragma unroll UNROLL
            for (int i = threadIdx.x; i < STEP * V_ACROSS; i += THREADS) {
                const int position = at + i / V_ACROSS, column = i % V_ACROSS * EACH;
                const int left = position >= begin && position < end ? d - column : 0;
                const T* const from = left > 0 ? v + (head_of(position) * POSITIONS_IN_BLOCK + position % POSITIONS_IN_BLOCK) * d + column : v;
                bring_16(to_v + i / V_ACROSS * Tiles::STRIDE + column, from, left, aligned);
            }
        }
    }

    // Which head of the cache, counted through its blocks, holds a position.
    __device__ __forceinline__ i64 head_of(int position) const {
        return static_cast<i64>(tables[span.kv + position / POSITIONS_IN_BLOCK]) * heads.kv_heads + kv_head;
    }

    // Attends to the positions of the step at `at`, which lie in shared memory.
    __device__ __forceinline__ void attend(int at, Attended<HEAD_DIM>& sums) const {
        const T* const tile_k = tiles->k[at / STEP % Tiles::STAGES];
        const T* const tile_v = tiles->v[at / STEP % Tiles::STAGES];
        const T* const tile_q = tiles->q + warp_of_thread() * 16 * Tiles::STRIDE;
        float scores[STEP / 8][4] = {};
#pragma unroll(HEAD_DIM > 128 ? 2 : 8)
        for (int d = 0; d < HEAD_DIM; d += 16) {
            const auto left = left_along<N>(tile_q + d, Tiles::STRIDE);
#pragma unroll
            for (int j = 0; j < STEP / 8; j += 2) {
                Right<P> rights[2];
                if constexpr (PAGED) {
                    rights_across<N>(tile_k + d * Tiles::K_STRIDE + j * 8, Tiles::K_STRIDE, rights);
                } else {
                    rights[0] = right_along<N>(tile_k + j * 8 * Tiles::K_STRIDE + d, Tiles::K_STRIDE);
                    rights[1] = right_along<N>(tile_k + (j * 8 + 8) * Tiles::K_STRIDE + d, Tiles::K_STRIDE);
                }
                multiply<N>(scores[j], left, rights[0]);
                multiply<N>(scores[j + 1], left, rights[1]);
            }
        }
        soften(at, scores, sums);
#pragma unroll
        for (int j = 0; j < STEP / 8; j += 2) {
            const Left<P> left = left_of<N, P>(scores[j], scores[j + 1]);
#pragma unroll
            for (int d = 0; d < HEAD_DIM; d += 16) {
                Right<P> rights[2];
                rights_across<N>(tile_v + j * 8 * Tiles::STRIDE + d, Tiles::STRIDE, rights);
                multiply<N>(sums.out[d / 8], left, rights[0]);
                multiply<N>(sums.out[d / 8 + 1], left, rights[1]);
            }
        }
    }

    // Scores become weights under the new highest score, and what was summed before is scaled down to it.
    __device__ __forceinline__ void soften(int at, float (&scores)[STEP / 8][4], Attended<HEAD_DIM>& sums) const {
        const int t = lane_of_thread() % 4;
        float highest[2] = {sums.marks[0].highest, sums.marks[1].highest};
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int position = at + j * 8 + 2 * t + i % 2;
                const bool seen = position >= first[i / 2] && position <= last[i / 2];
                scores[j][i] = seen ? scores[j][i] * (heads.scale * LOG2_E) : LOWEST;
                highest[i / 2] = fmaxf(highest[i / 2], scores[j][i]);
            }
        }
        float old[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(ALL_LANES, highest[i], 1));
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(ALL_LANES, highest[i], 2));
            old[i] = power(sums.marks[i].highest, highest[i]);
            sums.marks[i] = {highest[i], sums.marks[i].sum * old[i]};
        }
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[j][i] = power(scores[j][i], highest[i / 2]);
                sums.marks[i / 2].sum += scores[j][i];
            }
        }
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums.out[d][i] *= old[i / 2];
        }
    }

    // Before a split.
    __device__ __forceinline__ void clear(Attended<HEAD_DIM>& sums) const {
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums.out[d][i] = 0;
        }
        sums.marks[0] = sums.marks[1] = {LOWEST, 0};
    }

    // After a split: a query's sum stands in parts in four lanes until here.
    __device__ __forceinline__ void finish(Attended<HEAD_DIM>& sums) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float& sum = sums.marks[i].sum;
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        }
    }

    // Attends to positions from step `from` up to `to`; `ended` is called with the sums after every split but the last, whose
    // sums are left.
    template <class Ended>
    __device__ __forceinline__ void walk(int from, int to, Attended<HEAD_DIM>& sums, Ended ended) const {
        clear(sums);
        if (Tiles::STAGES > 1) {
            bring_step(from);
            copies_begun();
        }
        for (int at = from; at < to; at += STEP) {
            if (Tiles::STAGES == 1) {
                __syncthreads();
                bring_step(at);
                copies_begun();
            }
            copies_arrived<0>();
            __syncthreads();
            if (Tiles::STAGES > 1 && at + STEP < to) {
                bring_step(at + STEP);
                copies_begun();
            }
            attend(at, sums);
            if ((at + STEP) % SPLIT == 0 && at + STEP < to) {
                finish(sums);
                ended(sums);
                clear(sums);
            }
        }
        finish(sums);
    }
};

// === decode: a block has a split ===

// A span has one row here, which may be any. Its sums lie under its number and not under its row's, so that scratch is as
// large as what decodes: `parts [spans, heads, gridDim.x, head_dim]`, and their marks `[spans, heads, gridDim.x]`. Blocks:
// (split, key head and 16 of its queries, span).
template <class T, int HEAD_DIM>
__device__ void attend_split(const T* q, const T* k, const T* v, const int* tables, const Span* spans, const Heads& heads, float* parts,
                             Mark* marks) {
    using Part = Attention<T, HEAD_DIM, 1, true>;
    DYNAMIC_SHARED(memory);
    const Span span = spans[blockIdx.z];
    const int shares = gridDim.y / heads.kv_heads, first_query = blockIdx.y % shares * Part::QUERIES;
    if (first_query >= span.rows * heads.group()) return;
    const Part part(k, v, tables, heads, span, reinterpret_cast<typename Part::Tiles*>(memory), blockIdx.y / shares, first_query);
    const int split = blockIdx.x * SPLIT;
    if (split >= part.end || split + SPLIT <= part.begin) return;
    part.bring_q(q);
    Attended<HEAD_DIM> sums;
    part.walk(max(split, part.begin / STEP * STEP), min(split + SPLIT, part.end), sums, [](const Attended<HEAD_DIM>&) {});
    const int t = lane_of_thread() % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int in_group = part.query(i);
        if (in_group >= heads.group()) continue;
        const int head = part.kv_head * heads.group() + in_group;
        const i64 at = (static_cast<i64>(blockIdx.z) * heads.heads + head) * gridDim.x + blockIdx.x;
        if (t == 0) marks[at] = sums.marks[i];
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = d * 8 + 2 * t + e;
                if (column < heads.head_dim) parts[at * heads.head_dim + column] = sums.out[d][i * 2 + e];
            }
        }
    }
}

// Merges the splits that a query sees, into its row. Blocks: (span, head).
template <class T>
__device__ void attend_combine(const float* parts, const Mark* marks, const Span* spans, const Heads& heads, int splits, T* out) {
    const Span span = spans[blockIdx.x];
    if (span.rows == 0) return;
    const i64 from = (static_cast<i64>(blockIdx.x) * heads.heads + blockIdx.y) * splits;
    const i64 to = (static_cast<i64>(span.row) * heads.heads + blockIdx.y) * heads.head_dim;
    for (int d = threadIdx.x; d < heads.head_dim; d += blockDim.x) {
        Mark total{LOWEST, 0};
        float sum = 0;
        for (int split = heads.first_visible(span.start) / SPLIT; split <= span.start / SPLIT; split++) {
            float old, fresh;
            merge(total, marks[from + split], old, fresh);
            sum = fmaf(parts[(from + split) * heads.head_dim + d], fresh, sum * old);
        }
        out[to + d] = narrow<T>(sum / total.sum);
    }
}

// === many rows: a block walks its splits ===

template <class T, int HEAD_DIM, bool PAGED>
struct WalkTiles {
    AttentionTiles<T, HEAD_DIM, 4, PAGED> tiles;
    // Each thread's merged sums. They rest here and not in registers, which the split's own sums need.
    float totals[HEAD_DIM / 8 * 4][4 * WARP];
};

// Blocks: (span, key head and 64 of its queries). `lse [rows, heads]` may be missing.
template <class T, int HEAD_DIM, bool PAGED>
__device__ void attend_walk(const T* q, const T* k, const T* v, const int* tables, const Span* spans, const Heads& heads, T* out, float* lse) {
    using Whole = Attention<T, HEAD_DIM, 4, PAGED>;
    DYNAMIC_SHARED(memory);
    auto* const shared = reinterpret_cast<WalkTiles<T, HEAD_DIM, PAGED>*>(memory);
    const Span span = spans[blockIdx.x];
    const int shares = gridDim.y / heads.kv_heads, first_query = blockIdx.y % shares * Whole::QUERIES;
    if (first_query >= span.rows * heads.group()) return;
    const Whole whole(k, v, tables, heads, span, &shared->tiles, blockIdx.y / shares, first_query);
    Mark totals[2] = {{LOWEST, 0}, {LOWEST, 0}};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8 * 4; i++) shared->totals[i][threadIdx.x] = 0;
    whole.bring_q(q);
    const auto join = [&](const Attended<HEAD_DIM>& sums) {
        float old[2], fresh[2];
        merge(totals[0], sums.marks[0], old[0], fresh[0]);
        merge(totals[1], sums.marks[1], old[1], fresh[1]);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& total = shared->totals[d * 4 + i][threadIdx.x];
                total = fmaf(sums.out[d][i], fresh[i / 2], total * old[i / 2]);
            }
        }
    };
    Attended<HEAD_DIM> sums;
    whole.walk(whole.begin / STEP * STEP, whole.end, sums, join);
    join(sums);
    const int t = lane_of_thread() % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Query query = query_of(span, heads, whole.kv_head, whole.query(i));
        if (!query.there) continue;
        const i64 at = static_cast<i64>(query.row) * heads.heads + query.head;
        if (lse != nullptr && t == 0) lse[at] = (totals[i].highest + log2f(totals[i].sum)) * LN_2;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = d * 8 + 2 * t + e;
                if (column < heads.head_dim) {
                    out[at * heads.head_dim + column] = narrow<T>(shared->totals[d * 4 + i * 2 + e][threadIdx.x] / totals[i].sum);
                }
            }
        }
    }
}

#define ATTENTION(name, T, DIM)                                                                                                    \
    KERNEL(attend_split_##DIM##_##name, WARP, const T* q, const T* k, const T* v, const int* tables, const Span* spans, int heads,   \
           int kv_heads, int head_dim, int window, float scale, float* parts, Mark* marks) {                                       \
        attend_split<T, DIM>(q, k, v, tables, spans, {heads, kv_heads, head_dim, window, scale}, parts, marks);                     \
    }                                                                                                                              \
    KERNEL(attend_paged_##DIM##_##name, 4 * WARP, const T* q, const T* k, const T* v, const int* tables, const Span* spans,          \
           int heads, int kv_heads, int head_dim, int window, float scale, T* out) {                                               \
        attend_walk<T, DIM, true>(q, k, v, tables, spans, {heads, kv_heads, head_dim, window, scale}, out, nullptr);                \
    }                                                                                                                              \
    KERNEL(attend_flat_##DIM##_##name, 4 * WARP, const T* q, const T* k, const T* v, const Span* spans, int heads, int kv_heads,     \
           int head_dim, int window, float scale, T* out, float* lse) {                                                            \
        attend_walk<T, DIM, false>(q, k, v, nullptr, spans, {heads, kv_heads, head_dim, window, scale}, out, lse);                  \
    }
#define ATTENTIONS(name, T)                                                                                                       \
    ATTENTION(name, T, 64)                                                                                                        \
    ATTENTION(name, T, 128)                                                                                                       \
    ATTENTION(name, T, 256)                                                                                                       \
    KERNEL(attend_combine_##name, 128, const float* parts, const Mark* marks, const Span* spans, int heads, int kv_heads,           \
           int head_dim, int window, int splits, T* out) {                                                                        \
        attend_combine(parts, marks, spans, {heads, kv_heads, head_dim, window, 0}, splits, out);                                  \
    }
FOR_NUMBERS(ATTENTIONS)
