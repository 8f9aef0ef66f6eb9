// dx += dy W, the way back through a frozen weight. A row's sum runs over outputs ascending in the order of `product.cuh`'s
// slices, alone, and is then added to what the row holds.

#include "product.cuh"

constexpr int BACKWARD_THREADS = 256;
constexpr int BACKWARD_STAGES = 2;

// A block computes 128 rows by `32 M_TILES` inputs. Bytes are widened on their way into shared memory, where their scales,
// which change along the sum, are still at hand.
template <int M_TILES, class X, class W>
__device__ void matmul_backward(const X* dy, const W* w, const f16* scales, X* dx, int rows, int inputs, int outputs) {
    constexpr bool SCALED = is_same<W, int8_t>;
    using V = std::conditional_t<SCALED, float, W>;
    using N = typename Meet<X, V>::Number;
    constexpr int ROWS = 128, INPUTS = 32 * M_TILES, N_TILES = 4;
    constexpr int DY_STRIDE = 32 + 16 / sizeof(X), W_STRIDE = INPUTS + 16 / sizeof(V);
    struct Stage {
        alignas(16) X dy[ROWS * DY_STRIDE];
        alignas(16) V w[32 * W_STRIDE];
    };
    DYNAMIC_SHARED(memory);
    Stage* const stages = reinterpret_cast<Stage*>(memory);
    const int row0 = blockIdx.x * ROWS, input0 = blockIdx.y * INPUTS;
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    const int own_input = warp_of_thread() % 2 * M_TILES * 16, own_row = warp_of_thread() / 2 * N_TILES * 8;
    const int steps = div_up(outputs, 32);
    const auto fill = [&](int step) {
        if (step < steps) {
            Stage& stage = stages[step % BACKWARD_STAGES];
            bring<BACKWARD_THREADS, ROWS, 32>(stage.dy, DY_STRIDE, dy, row0, rows, step * 32, outputs);
            if constexpr (SCALED) {
                for (int i = threadIdx.x; i < 32 * INPUTS; i += BACKWARD_THREADS) {
                    const int output = min(step * 32 + i / INPUTS, outputs - 1), input = min(input0 + i % INPUTS, inputs - 1);
                    const float scale = widen(scales[static_cast<i64>(output) * div_up(inputs, 32) + input / 32]);
                    stage.w[i / INPUTS * W_STRIDE + i % INPUTS] = scale * static_cast<float>(w[static_cast<i64>(output) * inputs + input]);
                }
            } else {
                bring<BACKWARD_THREADS, 32, INPUTS>(stage.w, W_STRIDE, w, step * 32, outputs, input0, inputs);
            }
        }
        copies_begun();
    };
    float totals[M_TILES][N_TILES][4] = {}, sums[M_TILES][N_TILES][4] = {};
    fill(0);
    for (int step = 0; step < steps; step++) {
        copies_arrived<0>();
        __syncthreads();
        fill(step + 1);
        const Stage& stage = stages[step % BACKWARD_STAGES];
#pragma unroll
        for (int k = 0; k < 32; k += 16) {
            Right<PIECES<N, X>> rights[N_TILES];
#pragma unroll
            for (int n = 0; n < N_TILES; n++) rights[n] = right_along<N>(stage.dy + (own_row + n * 8) * DY_STRIDE + k, DY_STRIDE);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                const auto left = left_across<N>(stage.w + k * W_STRIDE + own_input + m * 16, W_STRIDE);
#pragma unroll
                for (int n = 0; n < N_TILES; n++) multiply<N>(sums[m][n], left, rights[n]);
            }
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
                const int input = input0 + own_input + m * 16 + g + i / 2 * 8;
                const int row = row0 + own_row + n * 8 + 2 * t + i % 2;
                if (row < rows && input < inputs) {
                    X* const at = dx + static_cast<i64>(row) * inputs + input;
                    *at = narrow<X>(widen(*at) + totals[m][n][i]);
                }
            }
        }
    }
}

#define MATMUL_BACKWARD(name, X, W, M_TILES)                                                                                            \
    LONE_KERNEL(name, BACKWARD_THREADS, const X* dy, const W* w, const f16* scales, X* dx, int rows, int inputs, int outputs) {        \
        matmul_backward<M_TILES>(dy, w, scales, dx, rows, inputs, outputs);                                                      \
    }
MATMUL_BACKWARD(matmul_backward_bf16_bf16, bf16, bf16, 4)
MATMUL_BACKWARD(matmul_backward_bf16_q8, bf16, int8_t, 2)
MATMUL_BACKWARD(matmul_backward_f16_f16, f16, f16, 4)
MATMUL_BACKWARD(matmul_backward_f16_q8, f16, int8_t, 2)
MATMUL_BACKWARD(matmul_backward_f32_f32, float, float, 2)
MATMUL_BACKWARD(matmul_backward_f32_bf16, float, bf16, 2)
MATMUL_BACKWARD(matmul_backward_f32_f16, float, f16, 2)
MATMUL_BACKWARD(matmul_backward_f32_q8, float, int8_t, 2)
