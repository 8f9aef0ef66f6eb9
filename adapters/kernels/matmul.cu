// y = x W^T: one program for few rows, which reads the weight once at the speed of memory, and one for many, which reuses it
// from shared memory. Both add in the order of `product.cuh`, so a row's bits do not depend on which of them ran.

#include "product.cuh"

constexpr int MATMUL_THREADS = 256;
constexpr int MATMUL_STAGES = 3;

// === few rows ===

template <int M_TILES, int N_TILES, class X, class W, class Y>
__device__ void matmul_few(const X* x, const W* w, const f16* scales, Y* y, int rows, int inputs, int outputs) {
    DYNAMIC_SHARED(memory);
    const Weight<W> weight{w, scales, outputs, inputs};
    const int first = blockIdx.x * M_TILES * 16, row = blockIdx.y * N_TILES * 8;
    Y* const to = y + static_cast<i64>(row) * outputs;
    few_rows<MATMUL_THREADS / WARP, M_TILES, N_TILES>(
        weight, first, x + static_cast<i64>(row) * inputs, min(rows - row, N_TILES * 8), reinterpret_cast<float*>(memory),
        [=](int output, int row, float sum) { to[static_cast<i64>(row) * outputs + output] = narrow<Y>(sum); });
}

// === many rows ===

// A block computes 128 rows by `32 M_TILES` outputs, its warps standing two by four; each has `16 M_TILES` outputs by 32 rows.
template <int M_TILES, class X, class W, class Y>
__device__ void matmul_many(const X* x, const W* w, const f16* scales, Y* y, int rows, int inputs, int outputs) {
    using N = typename Meet<X, W>::Number;
    constexpr int ROWS = 128, OUTPUTS = 32 * M_TILES, N_TILES = 4;
    struct Stage {
        alignas(16) X x[ROWS * 32];
        alignas(16) W w[OUTPUTS * 32];
    };
    DYNAMIC_SHARED(memory);
    Stage* const stages = reinterpret_cast<Stage*>(memory);
    const Weight<W> weight{w, scales, outputs, inputs};
    const int row0 = blockIdx.x * ROWS, output0 = blockIdx.y * OUTPUTS;
    const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
    const int own_output = warp_of_thread() % 2 * M_TILES * 16, own_row = warp_of_thread() / 2 * N_TILES * 8;
    const int steps = div_up(inputs, 32);
    const auto fill = [&](int step) {
        if (step < steps) {
            Stage& stage = stages[step % MATMUL_STAGES];
            bring<MATMUL_THREADS, ROWS, 32>(stage.x, 32, x, row0, rows, step * 32, inputs);
            bring<MATMUL_THREADS, OUTPUTS, 32>(stage.w, 32, w, output0, outputs, step * 32, inputs);
        }
        copies_begun();
    };
    float totals[M_TILES][N_TILES][4] = {}, sums[M_TILES][N_TILES][4] = {};
    for (int i = 0; i < MATMUL_STAGES - 1; i++) fill(i);
    for (int step = 0; step < steps; step++) {
        copies_arrived<MATMUL_STAGES - 2>();
        __syncthreads();
        fill(step + MATMUL_STAGES - 1);
        const Stage& stage = stages[step % MATMUL_STAGES];
        Right<PIECES<N, X>> rights[N_TILES][2];
#pragma unroll
        for (int n = 0; n < N_TILES; n++) rights_of<N>(eight_at(stage.x + (own_row + n * 8 + g) * 32 + 8 * t), rights[n]);
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
            const int output = own_output + m * 16 + g;
            Left<PIECES<N, W>> lefts[2];
            lefts_of<N>(eight_at(stage.w + output * 32 + 8 * t), eight_at(stage.w + (output + 8) * 32 + 8 * t), lefts);
            float above = 1, below = 1;
            if constexpr (is_same<W, int8_t>) {
                above = weight.scale(output0 + output, step * 32);
                below = weight.scale(output0 + output + 8, step * 32);
            }
#pragma unroll
            for (int n = 0; n < N_TILES; n++) add_32<W, N>(sums[m][n], lefts, rights[n], above, below);
        }
        if ((step + 1) % (SLICE / 32) == 0 || step + 1 == steps) {
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        totals[m][n][i] += sums[m][n][i];
                        sums[m][n][i] = 0;
                    }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int output = output0 + own_output + m * 16 + g + i / 2 * 8;
                const int row = row0 + own_row + n * 8 + 2 * t + i % 2;
                if (row < rows && output < outputs) y[static_cast<i64>(row) * outputs + output] = narrow<Y>(totals[m][n][i]);
            }
        }
    }
}

#define MATMUL_KERNEL(KERNEL, name, program, X, W, Y)                                                                                       \
    KERNEL(name, MATMUL_THREADS, const X* x, const W* w, const f16* scales, Y* y, int rows, int inputs, int outputs) {                      \
        program(x, w, scales, y, rows, inputs, outputs);                                                                                    \
    }
#define MATMUL(name, X, W, Y, M_TILES)                                                                                                      \
    MATMUL_KERNEL(KERNEL, name##_8, (matmul_few<1, 1>), X, W, Y)                                                                            \
    MATMUL_KERNEL(KERNEL, name##_16, (matmul_few<1, 2>), X, W, Y)                                                                           \
    MATMUL_KERNEL(KERNEL, name##_32, (matmul_few<2, 4>), X, W, Y)                                                                           \
    MATMUL_KERNEL(KERNEL, name##_64, (matmul_few<2, 8>), X, W, Y)                                                                           \
    MATMUL_KERNEL(LONE_KERNEL, name##_many, (matmul_many<M_TILES>), X, W, Y)

MATMUL(matmul_bf16_bf16_bf16, bf16, bf16, bf16, 4)
MATMUL(matmul_bf16_bf16_f32, bf16, bf16, float, 4)
MATMUL(matmul_bf16_q8_bf16, bf16, int8_t, bf16, 4)
MATMUL(matmul_bf16_q8_f32, bf16, int8_t, float, 4)
MATMUL(matmul_f16_f16_f16, f16, f16, f16, 4)
MATMUL(matmul_f16_f16_f32, f16, f16, float, 4)
MATMUL(matmul_f16_q8_f16, f16, int8_t, f16, 4)
MATMUL(matmul_f16_q8_f32, f16, int8_t, float, 4)
MATMUL(matmul_f32_f32_f32, float, float, float, 2)
MATMUL(matmul_f32_bf16_f32, float, bf16, float, 2)
MATMUL(matmul_f32_f16_f32, float, f16, float, 2)
MATMUL(matmul_f32_q8_f32, float, int8_t, float, 2)
