// What every kernel stands on: the three number types, a lane's registers for a matrix product, and the few instructions
// that C++ has no word for. Each of those has two bodies, PTX for nvcc and plain C++ for the emulator.
//
// It must not know what an operation computes.
//
// Every matrix product runs on tensor cores. They multiply 16-bit numbers exactly and add in f32, so a wider number goes in
// as the exact sum of bf16 pieces: one for bf16, two for f16, three for f32. Two f16 numbers multiply as they are. So one
// program serves every mix of types, and what an adapter stores is never rounded.
//
// nvcc compiles with -fmad=false: where a product and a sum are rounded once, the source says fmaf, so that two kernels
// with one formula have one result.

#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define KERNEL(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
// For tiles that fill a multiprocessor alone: without that word the compiler would rather spill than give up a second block.
#define LONE_KERNEL(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads, 1) name(__VA_ARGS__)
#define SHARED(Type, name) __shared__ Type name
#define DYNAMIC_SHARED(name)                       \
    extern __shared__ uint4 espalier_dynamic[];    \
    char* const name = reinterpret_cast<char*>(espalier_dynamic)
#else
#include "emulator/cuda.h"
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;
using i64 = long long;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOWEST = -INFINITY;

// What a kernel is compiled for. `M` gets a name's suffix and a type.
#define FOR_NUMBERS(M) M(f32, float) M(bf16, bf16) M(f16, f16)

template <class A, class B>
inline constexpr bool is_same = false;
template <class A>
inline constexpr bool is_same<A, A> = true;

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x / WARP; }
__host__ __device__ constexpr int div_up(int a, int b) { return (a + b - 1) / b; }

// === numbers ===

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
    if constexpr (is_same<T, float>) {
        return x;
    } else if constexpr (is_same<T, bf16>) {
        return __float2bfloat16_rn(x);
    } else {
        return __float2half_rn(x);
    }
}

// Two numbers, rounded to nearest, the first in the lower half.
template <class N>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (is_same<N, bf16>) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
               static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
    } else {
        return __half_as_ushort(__float2half_rn(low)) |
               static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
    }
}

template <class N>
__device__ __forceinline__ float low_of(uint32_t pair) {
    if constexpr (is_same<N, bf16>) {
        return __uint_as_float(pair << 16);
    } else {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu)));
    }
}

template <class N>
__device__ __forceinline__ float high_of(uint32_t pair) {
    if constexpr (is_same<N, bf16>) {
        return __uint_as_float(pair & 0xffff0000u);
    } else {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
    }
}

// Eight adjacent numbers of a row as they lie in memory.
template <class T>
struct alignas(8 * sizeof(T) < 16 ? 8 * sizeof(T) : 16) Eight {
    uint32_t word[2 * sizeof(T)];
};

template <class T>
__device__ __forceinline__ Eight<T> eight_at(const T* at) {
    return *reinterpret_cast<const Eight<T>*>(at);
}

// Numbers of a row from `at`, of which `left` are there; the others are zeros.
template <class T>
__device__ __forceinline__ Eight<T> some_at(const T* at, int left) {
    Eight<T> eight = {};
    T* const numbers = reinterpret_cast<T*>(eight.word);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i < left) numbers[i] = at[i];
    }
    return eight;
}

template <class T>
__device__ __forceinline__ float number_of(const Eight<T>& eight, int i) {
    if constexpr (is_same<T, float>) {
        return __uint_as_float(eight.word[i]);
    } else if constexpr (is_same<T, int8_t>) {
        return static_cast<float>(static_cast<int>(eight.word[i / 4] << (24 - 8 * (i % 4))) >> 24);
    } else {
        return i % 2 ? high_of<T>(eight.word[i / 2]) : low_of<T>(eight.word[i / 2]);
    }
}

template <class T>
__device__ __forceinline__ Eight<T> eight_of(const float (&numbers)[8]) {
    Eight<T> eight;
    if constexpr (is_same<T, float>) {
#pragma unroll
        for (int i = 0; i < 8; i++) eight.word[i] = __float_as_uint(numbers[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) eight.word[i] = pack<T>(numbers[2 * i], numbers[2 * i + 1]);
    }
    return eight;
}

// A row's numbers eight at a time, however wide the row is; `whole` says that every eight lies aligned.
template <class T>
__device__ __forceinline__ void read_eight(const T* row, int column, int width, bool whole, float (&numbers)[8]) {
    const Eight<T> eight = whole ? eight_at(row + column) : some_at(row + column, width - column);
#pragma unroll
    for (int i = 0; i < 8; i++) numbers[i] = number_of(eight, i);
}

template <class T>
__device__ __forceinline__ void write_eight(const float (&numbers)[8], T* row, int column, int width, bool whole) {
    if (whole) {
        *reinterpret_cast<Eight<T>*>(row + column) = eight_of<T>(numbers);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (column + i < width) row[column + i] = narrow<T>(numbers[i]);
    }
}

// === sums in a fixed order ===

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// Every thread of the block gets the sum over all of its `WARPS` warps.
template <int WARPS>
__device__ __forceinline__ float block_sum(float x) {
    typedef float Parts[WARPS];
    SHARED(Parts, parts);
    x = warp_sum(x);
    __syncthreads();
    if (lane_of_thread() == 0) parts[warp_of_thread()] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += parts[i];
    return sum;
}

template <int WARPS>
__device__ __forceinline__ float block_max(float x) {
    typedef float Parts[WARPS];
    SHARED(Parts, parts);
    x = warp_max(x);
    __syncthreads();
    if (lane_of_thread() == 0) parts[warp_of_thread()] = x;
    __syncthreads();
    float highest = parts[0];
#pragma unroll
    for (int i = 1; i < WARPS; i++) highest = fmaxf(highest, parts[i]);
    return highest;
}

// === instructions ===

// d[16, 8] += a[16, 16] b[16, 8]. Lane `4 g + t` holds d(g, 2t..), d(g + 8, 2t..); a(g, 2t..), a(g + 8, 2t..),
// a(g, 2t + 8..), a(g + 8, 2t + 8..); b(2t.., g), b(2t + 8.., g).
template <class N>
__device__ __forceinline__ void multiply_16x8x16(
    float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    if constexpr (is_same<N, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
#else
    emulator::multiply_16x8x16(d, {a0, a1, a2, a3, b0, b1}, [](uint32_t pair, bool high) {
        return high ? high_of<N>(pair) : low_of<N>(pair);
    });
#endif
}

// Four 8x8 tiles of 16-bit numbers, turned: lane `8 i + j` brings the address of row `j` of tile `i`, and lane `4 g + t`
// takes rows `2t`, `2t + 1` of column `g` of each.
__device__ __forceinline__ void load_turned(uint32_t (&tiles)[4], const void* row) {
#ifdef __CUDACC__
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(at)
                 : "memory");
#else
    emulator::load_turned(tiles, row);
#endif
}

// Begins to copy 16 bytes into shared memory, of which the first `bytes` are read and the others become zero.
__device__ __forceinline__ void copy_16(void* to, const void* from, int bytes) {
#ifdef __CUDACC__
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
#else
    emulator::copy_16(to, from, bytes);
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void copies_begun() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::copies_begun();
#endif
}

// Waits until all of this thread's groups but the latest `PENDING` have arrived.
template <int PENDING>
__device__ __forceinline__ void copies_arrived() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
    emulator::copies_arrived(PENDING);
#endif
}

// === pieces ===

// What numbers of types X and W are multiplied as.
template <class X, class W>
struct Meet {
    using Number = bf16;
};
template <>
struct Meet<f16, f16> {
    using Number = f16;
};
template <>
struct Meet<f16, int8_t> {
    using Number = f16;
};

template <class N, class T>
inline constexpr int PIECES = is_same<T, float> ? 3 : is_same<T, f16> && is_same<N, bf16> ? 2 : 1;

// Two adjacent numbers in the order of the sum, cut in pieces of 16 bits whose sum they are.
template <class N>
__device__ __forceinline__ void cut(float low, float high, uint32_t (&pieces)[3]) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
        const uint32_t l = __float_as_uint(low) & 0xffff0000u, h = __float_as_uint(high) & 0xffff0000u;
        pieces[i] = l >> 16 | h;
        low -= __uint_as_float(l);
        high -= __uint_as_float(h);
    }
}
template <class N>
__device__ __forceinline__ void cut(float low, float high, uint32_t (&pieces)[2]) {
    const uint32_t l = __float_as_uint(low) & 0xffff0000u, h = __float_as_uint(high) & 0xffff0000u;
    pieces[0] = l >> 16 | h;
    pieces[1] = pack<bf16>(low - __uint_as_float(l), high - __uint_as_float(h));
}
// One piece: a rounding, for numbers that are no exact operands but have just been computed.
template <class N>
__device__ __forceinline__ void cut(float low, float high, uint32_t (&pieces)[1]) {
    pieces[0] = pack<N>(low, high);
}

// Pair `i` of eight numbers.
template <class N, class T>
__device__ __forceinline__ void cut_pair(const Eight<T>& eight, int i, uint32_t (&pieces)[PIECES<N, T>]) {
    if constexpr (is_same<N, T>) {
        pieces[0] = eight.word[i];
    } else {
        cut<N>(number_of(eight, 2 * i), number_of(eight, 2 * i + 1), pieces);
    }
}

// A lane's part of a factor `[16, 16]` on the left, and of one `[16, 8]` on the right.
template <int P>
struct Left {
    uint32_t pair[P][4];
};
template <int P>
struct Right {
    uint32_t pair[P][2];
};

// d += left right. Products of pieces that lie below the last bit of f32 are left out.
template <class N, int P, int Q>
__device__ __forceinline__ void multiply(float (&d)[4], const Left<P>& left, const Right<Q>& right) {
#pragma unroll
    for (int i = 0; i < P; i++) {
#pragma unroll
        for (int j = 0; j < Q; j++) {
            if (i + j > 2) continue;
            const uint32_t(&a)[4] = left.pair[i];
            multiply_16x8x16<N>(d, a[0], a[1], a[2], a[3], right.pair[j][0], right.pair[j][1]);
        }
    }
}

// === factors out of tiles in shared memory ===
//
// `along`: the tile's rows run along the sum. `across`: its rows are the steps of the sum, as in a transposed matrix.

template <class N, class T>
__device__ __forceinline__ void pair_along(const T* at, uint32_t (&pieces)[PIECES<N, T>]) {
    if constexpr (is_same<N, T>) {
        pieces[0] = *reinterpret_cast<const uint32_t*>(at);
    } else {
        cut<N>(widen(at[0]), widen(at[1]), pieces);
    }
}

template <class N, class T>
__device__ __forceinline__ Left<PIECES<N, T>> left_along(const T* tile, int stride) {
    constexpr int P = PIECES<N, T>;
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    Left<P> left;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t pieces[P];
        pair_along<N>(tile + (g + i % 2 * 8) * stride + 2 * t + i / 2 * 8, pieces);
#pragma unroll
        for (int p = 0; p < P; p++) left.pair[p][i] = pieces[p];
    }
    return left;
}

template <class N, class T>
__device__ __forceinline__ Right<PIECES<N, T>> right_along(const T* tile, int stride) {
    constexpr int P = PIECES<N, T>;
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    Right<P> right;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t pieces[P];
        pair_along<N>(tile + g * stride + 2 * t + i * 8, pieces);
#pragma unroll
        for (int p = 0; p < P; p++) right.pair[p][i] = pieces[p];
    }
    return right;
}

// The four pairs of a lane in a 16 x 16 part of a tile whose rows are the steps of the sum: pair `i` belongs to steps
// `2t + 8 (i / 2)` and the next, and to column `g + 8 (i % 2)`.
template <class N, class T>
__device__ __forceinline__ void pairs_across(const T* tile, int stride, uint32_t (&pieces)[4][PIECES<N, T>]) {
    constexpr int P = PIECES<N, T>;
    const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
    if constexpr (sizeof(T) == 2) {
        uint32_t raw[4];
        const int i = lane / 8, j = lane % 8;
        load_turned(raw, tile + (j + i / 2 * 8) * stride + i % 2 * 8);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if constexpr (P == 1) {
                pieces[k][0] = raw[k];
            } else {
                cut<N>(low_of<T>(raw[k]), high_of<T>(raw[k]), pieces[k]);
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const T* const at = tile + (2 * t + k / 2 * 8) * stride + g + k % 2 * 8;
            cut<N>(widen(at[0]), widen(at[stride]), pieces[k]);
        }
    }
}

template <class N, class T>
__device__ __forceinline__ Left<PIECES<N, T>> left_across(const T* tile, int stride) {
    constexpr int P = PIECES<N, T>;
    uint32_t pieces[4][P];
    pairs_across<N>(tile, stride, pieces);
    Left<P> left;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int p = 0; p < P; p++) left.pair[p][i] = pieces[i][p];
    }
    return left;
}

// Two factors at once, of columns 0 to 7 and 8 to 15.
template <class N, class T>
__device__ __forceinline__ void rights_across(const T* tile, int stride, Right<PIECES<N, T>> (&rights)[2]) {
    constexpr int P = PIECES<N, T>;
    uint32_t pieces[4][P];
    pairs_across<N>(tile, stride, pieces);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int p = 0; p < P; p++) rights[i % 2].pair[p][i / 2] = pieces[i][p];
    }
}

// What a lane computed of two neighbouring 16 x 8 results is its part of a left factor `[16, 16]`.
template <class N, int P>
__device__ __forceinline__ Left<P> left_of(const float (&first)[4], const float (&second)[4]) {
    Left<P> left;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float(&half)[4] = i < 2 ? first : second;
        uint32_t pieces[P];
        cut<N>(half[i % 2 * 2], half[i % 2 * 2 + 1], pieces);
#pragma unroll
        for (int p = 0; p < P; p++) left.pair[p][i] = pieces[p];
    }
    return left;
}

// === tiles ===

// Begins to bring 16 bytes' worth of numbers, of which `left` are there; the others become zeros.
template <class T>
__device__ __forceinline__ void bring_16(T* to, const T* from, int left, bool aligned) {
    constexpr int EACH = 16 / sizeof(T);
    if (aligned) {
        copy_16(to, from, min(max(left, 0), EACH) * static_cast<int>(sizeof(T)));
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) to[i] = i < left ? from[i] : T{};
}

// Begins to bring columns `column..column + COLUMNS` of rows `row..row + ROWS` of `from [rows, width]` into a tile of that
// stride. Rows beyond the last are copies of it, whose results nobody takes; columns beyond the width are zeros.
template <int THREADS, int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void bring(T* tile, int stride, const T* from, int row, int rows, int column, int width) {
    constexpr int EACH = 16 / sizeof(T), ACROSS = COLUMNS / EACH;
    const bool aligned = width % EACH == 0;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * ACROSS; i += THREADS) {
        const int r = i / ACROSS, c = i % ACROSS * EACH, left = width - column - c;
        const T* const line = from + static_cast<i64>(min(row + r, rows - 1)) * width;
        bring_16(tile + r * stride + c, left > 0 ? line + column + c : from, left, aligned);
    }
}
