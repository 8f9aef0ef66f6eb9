// The low-rank updates of a step: two launches for all projections that share an input, however many adapters there are.
//
// What belongs to whom stands in tables in device memory: the grid is as large as the tables may become, and blocks beyond
// what they hold return at once, so a captured graph stays right when its tables change. Factors stay where they are and as
// they were stored. It must not know adapters or sites: it sees rows, factors and outputs.

#include "product.cuh"

// `y[rows] += scale * (x[rows] A^T) Bt`. `A x` of the segment's row `i` lies at `h + i * rank` in the scratch.
struct Update {
    const void* a;
    const void* bt;
    i64 h;
    int rank;
    float scale;
    int a_type, bt_type;
};

// Rows `row..row + rows` of the batch, at most 64, all of one segment, whose row number `offset` the first of them is.
struct Chunk {
    int segment, row, rows, offset;
};

// Three places, one for each projection of a group; those that a group has not are never looked at.
template <class T>
struct Three {
    T* at0;
    T* at1;
    T* at2;
    int width0, width1, width2;

    __device__ __forceinline__ T* at(int site) const { return site == 0 ? at0 : site == 1 ? at1 : at2; }
    __device__ __forceinline__ int width(int site) const { return site == 0 ? width0 : site == 1 ? width1 : width2; }
};

enum FactorType { FACTOR_F32, FACTOR_BF16, FACTOR_F16 };

// === shrink ===

constexpr int SHRINK_WARPS = 8;
// Eights of rows that a warp multiplies at once: as many as its registers hold.
template <class X>
constexpr int SHRINK_TILES = sizeof(X) == 4 ? 2 : 4;

template <int N_TILES, class X, class A>
__device__ __forceinline__ void shrink_rows(const Update& update, const Chunk& chunk, int begin, const X* x, int inputs, int rank0,
                                            float* h, float* parts) {
    const Weight<A> weight{static_cast<const A*>(update.a), nullptr, update.rank, inputs};
    float* const to = h + update.h + static_cast<i64>(chunk.offset + begin) * update.rank;
    few_rows<SHRINK_WARPS, 1, N_TILES>(
        weight, rank0, x + static_cast<i64>(chunk.row + begin) * inputs, min(chunk.rows - begin, N_TILES * 8), parts,
        [&](int j, int row, float sum) { to[static_cast<i64>(row) * update.rank + j] = sum; });
}

template <class X, class A>
__device__ __forceinline__ void shrink_update(const Update& update, const Chunk& chunk, const X* x, int inputs, float* h, float* parts) {
    for (int rank0 = blockIdx.z * 16; rank0 < update.rank; rank0 += gridDim.z * 16) {
        if (chunk.rows <= 8) {
            shrink_rows<1, X, A>(update, chunk, 0, x, inputs, rank0, h, parts);
        } else {
            for (int begin = 0; begin < chunk.rows; begin += SHRINK_TILES<X> * 8) {
                shrink_rows<SHRINK_TILES<X>, X, A>(update, chunk, begin, x, inputs, rank0, h, parts);
            }
        }
    }
}

// `first[segment * sites + site]` is the first of a segment's updates of a site, and the next entry the end of them. A block
// takes a chunk and every `gridDim.y`-th update of its segment.
template <class X>
__device__ void shrink(const Chunk* chunks, const int* first, const Update* updates, int sites, const Three<const X>& x, float* h) {
    typedef float Parts[FEW_ROWS_PARTS<SHRINK_WARPS, 1, SHRINK_TILES<X>>];
    SHARED(Parts, parts);
    const Chunk chunk = chunks[blockIdx.x];
    if (chunk.rows == 0) return;
    const int* const bounds = first + static_cast<i64>(chunk.segment) * sites;
    for (int i = bounds[0] + blockIdx.y; i < bounds[sites]; i += gridDim.y) {
        int site = 0;
        while (site + 1 < sites && i >= bounds[site + 1]) site++;
        const Update update = updates[i];
        if (update.a_type == FACTOR_F32) {
            shrink_update<X, float>(update, chunk, x.at(site), x.width(site), h, parts);
        } else if (update.a_type == FACTOR_BF16) {
            shrink_update<X, bf16>(update, chunk, x.at(site), x.width(site), h, parts);
        } else {
            shrink_update<X, f16>(update, chunk, x.at(site), x.width(site), h, parts);
        }
    }
}

// === expand ===

constexpr int EXPAND_WARPS = 4, EXPAND_THREADS = EXPAND_WARPS * WARP, EXPAND_OUTPUTS = 128, EXPAND_RANKS = 32;
constexpr int EXPAND_H_STRIDE = EXPAND_RANKS + 4;

struct ExpandTiles {
    alignas(16) float h[64 * EXPAND_H_STRIDE];
    alignas(16) char bt[EXPAND_RANKS * (EXPAND_OUTPUTS + 4) * sizeof(float)];
};

// Adds one update to a warp's sums: 32 outputs by `8 N_TILES` rows.
template <int N_TILES, class B>
__device__ __forceinline__ void expand_update(const Update& update, const Chunk& chunk, const float* h, int output0, int width,
                                              ExpandTiles& tiles, float (&sums)[2][N_TILES][4]) {
    constexpr int STRIDE = EXPAND_OUTPUTS + 16 / sizeof(B), P = PIECES<bf16, B>;
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4, own = warp_of_thread() * 32;
    B* const bt = reinterpret_cast<B*>(tiles.bt);
    for (int rank0 = 0; rank0 < update.rank; rank0 += EXPAND_RANKS) {
        __syncthreads();
        bring<EXPAND_THREADS, N_TILES * 8, EXPAND_RANKS>(tiles.h, EXPAND_H_STRIDE, h + update.h + static_cast<i64>(chunk.offset) * update.rank,
                                                         0, chunk.rows, rank0, update.rank);
        bring<EXPAND_THREADS, EXPAND_RANKS, EXPAND_OUTPUTS>(bt, STRIDE, static_cast<const B*>(update.bt), rank0, update.rank, output0, width);
        copies_begun();
        copies_arrived<0>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < EXPAND_RANKS; k += 16) {
            if (rank0 + k >= update.rank) break;
            Left<P> lefts[2];
#pragma unroll
            for (int m = 0; m < 2; m++) lefts[m] = left_across<bf16>(bt + k * STRIDE + own + m * 16, STRIDE);
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                Right<3> right;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float* const at = tiles.h + (n * 8 + g) * EXPAND_H_STRIDE + k + 2 * t + 8 * i;
                    uint32_t pieces[3];
                    cut<bf16>(update.scale * at[0], update.scale * at[1], pieces);
#pragma unroll
                    for (int p = 0; p < 3; p++) right.pair[p][i] = pieces[p];
                }
#pragma unroll
                for (int m = 0; m < 2; m++) multiply<bf16>(sums[m][n], lefts[m], right);
            }
        }
    }
}

template <int N_TILES, class Y>
__device__ __forceinline__ void expand_rows(const int* bounds, const Update* updates, const Chunk& chunk, const float* h, Y* y, int output0,
                                            int width, ExpandTiles& tiles) {
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    float sums[2][N_TILES][4] = {};
    for (int i = bounds[0]; i < bounds[1]; i++) {
        const Update update = updates[i];
        if (update.bt_type == FACTOR_F32) {
            expand_update<N_TILES, float>(update, chunk, h, output0, width, tiles, sums);
        } else if (update.bt_type == FACTOR_BF16) {
            expand_update<N_TILES, bf16>(update, chunk, h, output0, width, tiles, sums);
        } else {
            expand_update<N_TILES, f16>(update, chunk, h, output0, width, tiles, sums);
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int output = output0 + warp_of_thread() * 32 + m * 16 + g + i / 2 * 8, row = n * 8 + 2 * t + i % 2;
                if (output < width && row < chunk.rows) {
                    Y* const at = y + static_cast<i64>(chunk.row + row) * width + output;
                    *at = narrow<Y>(widen(*at) + sums[m][n][i]);
                }
            }
        }
    }
}

// A block takes a chunk and 128 outputs of one site: `blockIdx.y` counts them through all sites. What several updates add to
// the same outputs is summed in their order and rounded once.
template <class Y>
__device__ void expand(const Chunk* chunks, const int* first, const Update* updates, int sites, const float* h, const Three<Y>& y) {
    SHARED(ExpandTiles, tiles);
    const Chunk chunk = chunks[blockIdx.x];
    if (chunk.rows == 0) return;
    int site = 0, tile = blockIdx.y;
    while (site < sites && tile >= div_up(y.width(site), EXPAND_OUTPUTS)) tile -= div_up(y.width(site++), EXPAND_OUTPUTS);
    if (site >= sites) return;
    const int* const bounds = first + static_cast<i64>(chunk.segment) * sites + site;
    if (bounds[0] == bounds[1]) return;
    if (chunk.rows <= 8) {
        expand_rows<1>(bounds, updates, chunk, h, y.at(site), tile * EXPAND_OUTPUTS, y.width(site), tiles);
    } else {
        expand_rows<8>(bounds, updates, chunk, h, y.at(site), tile * EXPAND_OUTPUTS, y.width(site), tiles);
    }
}

#define LOW_RANK(name, T)                                                                                                      \
    KERNEL(shrink_##name, SHRINK_WARPS* WARP, const Chunk* chunks, const int* first, const Update* updates, int sites,          \
           const T* x0, const T* x1, const T* x2, int inputs0, int inputs1, int inputs2, float* h) {                            \
        shrink<T>(chunks, first, updates, sites, {x0, x1, x2, inputs0, inputs1, inputs2}, h);                                  \
    }                                                                                                                          \
    KERNEL(expand_##name, EXPAND_THREADS, const Chunk* chunks, const int* first, const Update* updates, int sites,              \
           const float* h, T* y0, T* y1, T* y2, int outputs0, int outputs1, int outputs2) {                                     \
        expand<T>(chunks, first, updates, sites, h, {y0, y1, y2, outputs0, outputs1, outputs2});                               \
    }
FOR_NUMBERS(LOW_RANK)
