// The order of every product `y = x W^T`, and the program for few rows, which `matmul.cu` and `low_rank.cu` share.
//
// An output's sum runs over slices of 512 inputs, each in one accumulator by steps of 16 on tensor cores, and the slices are
// added ascending. Warps that share the slices of few rows and warps that walk all slices of many rows therefore get the
// same bits: the row rule. Which 16 inputs make a step is chosen so that a lane's numbers lie side by side in memory (of 32
// inputs, lane `4 g + t` has `8 t..8 t + 8`, pairs 0 and 1 of them in the first step, 2 and 3 in the second).

#pragma once

#include "device.cuh"

constexpr int SLICE = 512;

// A weight `[outputs, inputs]`, row-major; bytes have a scale for each 32 inputs of a row.
template <class W>
struct Weight {
    const W* numbers;
    const f16* scales;
    int outputs, inputs;

    __device__ __forceinline__ const W* row(int output) const {
        return numbers + static_cast<i64>(min(output, outputs - 1)) * inputs;
    }
    __device__ __forceinline__ float scale(int output, int input) const {
        return widen(scales[static_cast<i64>(min(output, outputs - 1)) * div_up(inputs, 32) + input / 32]);
    }
};

// Both steps' left factors from a lane's numbers of rows `g` and `g + 8`.
template <class N, class W>
__device__ __forceinline__ void lefts_of(const Eight<W>& upper, const Eight<W>& lower, Left<PIECES<N, W>> (&lefts)[2]) {
    constexpr int P = PIECES<N, W>;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t above[P], below[P];
        cut_pair<N>(upper, i, above);
        cut_pair<N>(lower, i, below);
#pragma unroll
        for (int p = 0; p < P; p++) {
            lefts[i / 2].pair[p][i % 2 * 2] = above[p];
            lefts[i / 2].pair[p][i % 2 * 2 + 1] = below[p];
        }
    }
}

template <class N, class X>
__device__ __forceinline__ void rights_of(const Eight<X>& eight, Right<PIECES<N, X>> (&rights)[2]) {
    constexpr int P = PIECES<N, X>;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t pieces[P];
        cut_pair<N>(eight, i, pieces);
#pragma unroll
        for (int p = 0; p < P; p++) rights[i / 2].pair[p][i % 2] = pieces[p];
    }
}

// Adds 32 inputs. Bytes are summed alone, as whole numbers, and then scaled: `above` for row `g`, `below` for `g + 8`.
template <class W, class N, int P, int Q>
__device__ __forceinline__ void add_32(float (&sum)[4], const Left<P> (&lefts)[2], const Right<Q> (&rights)[2], float above,
                                       float below) {
    if constexpr (is_same<W, int8_t>) {
        float part[4] = {};
        multiply<N>(part, lefts[0], rights[0]);
        multiply<N>(part, lefts[1], rights[1]);
        sum[0] = fmaf(above, part[0], sum[0]);
        sum[1] = fmaf(above, part[1], sum[1]);
        sum[2] = fmaf(below, part[2], sum[2]);
        sum[3] = fmaf(below, part[3], sum[3]);
    } else {
        multiply<N>(sum, lefts[0], rights[0]);
        multiply<N>(sum, lefts[1], rights[1]);
    }
}

// Floats of shared memory that `few_rows` works in.
template <int WARPS, int M_TILES, int N_TILES>
inline constexpr int FEW_ROWS_PARTS = WARPS * M_TILES * 16 * N_TILES * 8;

// Outputs `first..first + 16 M_TILES` of up to `8 N_TILES` rows by one block, straight from memory into registers: for what
// bandwidth bounds. Each warp takes slices of its own. `take(output, row, sum)` gets every sum once.
template <int WARPS, int M_TILES, int N_TILES, class X, class W, class Take>
__device__ __forceinline__ void few_rows(const Weight<W>& weight, int first, const X* x, int rows, float* parts, Take take) {
    using N = typename Meet<X, W>::Number;
    constexpr int OUTPUTS = M_TILES * 16, TILE = OUTPUTS * N_TILES * 8, THREADS = WARPS * WARP;
    [[maybe_unused]] constexpr int UNROLL = M_TILES * N_TILES == 1 ? 4 : N_TILES == 2 ? 2 : 1;
    const int lane = lane_of_thread(), warp = warp_of_thread(), g = lane / 4, t = lane % 4;
    const int inputs = weight.inputs;
    const bool aligned = inputs % 8 == 0;
    float total[div_up(TILE, THREADS)] = {};
    for (int begin = 0; begin < inputs; begin += WARPS * SLICE) {
        float sums[M_TILES][N_TILES][4] = {};
        const auto step = [&](int k, auto read) {
            Right<PIECES<N, X>> rights[N_TILES][2];
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                rights_of<N>(read(x + static_cast<i64>(min(n * 8 + g, rows - 1)) * inputs, k + 8 * t), rights[n]);
            }
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                const int output = first + m * 16 + g;
                Left<PIECES<N, W>> lefts[2];
                lefts_of<N>(read(weight.row(output), k + 8 * t), read(weight.row(output + 8), k + 8 * t), lefts);
                float above = 1, below = 1;
                if constexpr (is_same<W, int8_t>) {
                    above = weight.scale(output, k);
                    below = weight.scale(output + 8, k);
                }
#pragma unroll
                for (int n = 0; n < N_TILES; n++) add_32<W, N>(sums[m][n], lefts, rights[n], above, below);
            }
        };
        const int from = begin + warp * SLICE, to = min(from + SLICE, inputs);
        int k = from;
        if (aligned) {
#pragma unroll UNROLL
            for (; k + 32 <= to; k += 32) step(k, [](const auto* row, int column) { return eight_at(row + column); });
        }
        for (; k < to; k += 32) {
            step(k, [inputs](const auto* row, int column) { return some_at(row + column, inputs - column); });
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int output = m * 16 + g + i / 2 * 8, row = n * 8 + 2 * t + i % 2;
                    parts[warp * TILE + row * OUTPUTS + output] = sums[m][n][i];
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < div_up(TILE, THREADS); i++) {
            const int at = i * THREADS + threadIdx.x;
            for (int w = 0; w < WARPS && at < TILE && begin + w * SLICE < inputs; w++) total[i] += parts[w * TILE + at];
        }
    }
#pragma unroll
    for (int i = 0; i < div_up(TILE, THREADS); i++) {
        const int at = i * THREADS + threadIdx.x, output = first + at % OUTPUTS, row = at / OUTPUTS;
        if (at < TILE && output < weight.outputs && row < rows) take(output, row, total[i]);
    }
}
