// Gradients of the factors by segment: dw += scale h^T x, row after row onto what dw holds, so that cutting the rows
// elsewhere changes no bit. It must not know which factor dw is the gradient of.

#include "device.cuh"

// Rows `row..row + rows` of x of site `site`; h lies in the scratch at `h`, `[rows, rank]`. An entry without rows does nothing.
struct Outer {
    i64 h;
    float* dw;
    int row, rows, rank, site;
    float scale;
    int unused;
};

constexpr int OUTER_THREADS = 128, OUTER_RANKS = 8, OUTER_ROWS = 32;

// A block takes 128 columns of one entry, and every `gridDim.y`-th eight ranks; a thread has a column.
template <class X>
__device__ void outer(const Outer* entries, const X* const (&xs)[3], const int (&widths)[3], const float* h) {
    struct Rows {
        alignas(16) float h[OUTER_ROWS][OUTER_RANKS];
    };
    SHARED(Rows, tile);
    const Outer entry = entries[blockIdx.z];
    if (entry.rows == 0) return;
    const int width = entry.site == 0 ? widths[0] : entry.site == 1 ? widths[1] : widths[2];
    const X* const x = (entry.site == 0 ? xs[0] : entry.site == 1 ? xs[1] : xs[2]) + static_cast<i64>(entry.row) * width;
    const int column = blockIdx.x * OUTER_THREADS + threadIdx.x;
    if (static_cast<int>(blockIdx.x) * OUTER_THREADS >= width) return;
    const int read = min(column, width - 1);
    for (int rank0 = blockIdx.y * OUTER_RANKS; rank0 < entry.rank; rank0 += gridDim.y * OUTER_RANKS) {
        const int ranks = min(entry.rank - rank0, OUTER_RANKS);
        float sums[OUTER_RANKS];
#pragma unroll
        for (int j = 0; j < OUTER_RANKS; j++) sums[j] = j < ranks ? entry.dw[static_cast<i64>(rank0 + j) * width + read] : 0;
        for (int begin = 0; begin < entry.rows; begin += OUTER_ROWS) {
            __syncthreads();
            for (int i = threadIdx.x; i < OUTER_ROWS * OUTER_RANKS; i += OUTER_THREADS) {
                const int row = begin + i / OUTER_RANKS, j = i % OUTER_RANKS;
                const bool there = row < entry.rows && j < ranks;
                tile.h[i / OUTER_RANKS][j] = there ? entry.scale * h[entry.h + static_cast<i64>(row) * entry.rank + rank0 + j] : 0;
            }
            __syncthreads();
            const int rows = min(entry.rows - begin, OUTER_ROWS);
#pragma unroll 8
            for (int i = 0; i < rows; i++) {
                const float number = widen(x[static_cast<i64>(begin + i) * width + read]);
#pragma unroll
                for (int j = 0; j < OUTER_RANKS; j++) sums[j] = fmaf(tile.h[i][j], number, sums[j]);
            }
        }
        if (column < width) {
#pragma unroll
            for (int j = 0; j < OUTER_RANKS; j++) {
                if (j < ranks) entry.dw[static_cast<i64>(rank0 + j) * width + column] = sums[j];
            }
        }
    }
}

#define OUTER(name, T)                                                                                                      \
    KERNEL(outer_##name, OUTER_THREADS, const Outer* entries, const T* x0, const T* x1, const T* x2, int width0, int width1, \
           int width2, const float* h) {                                                                                    \
        outer<T>(entries, {x0, x1, x2}, {width0, width1, width2}, h);                                                       \
    }
FOR_NUMBERS(OUTER)
