// Stands in for CUDA's headers, so that the kernels compile as plain C++ and run on a processor, thread by thread.
//
// It must not know any kernel. What it can find: a barrier or a copy that was not waited for (warps run one after another,
// in two orders), shared memory read before it was written (it begins as NaN), written beyond its end (canaries), lanes
// that do not meet in a warp's operation, a wrong name, a wrong number of arguments, too many threads, too much shared
// memory. What it cannot: races on global memory within one warp's step, and speed.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict

#define KERNEL(name, threads, ...)                                  \
    extern "C" void name(__VA_ARGS__);                              \
    static const emulator::Entry entry_of_##name(#name, threads, name); \
    extern "C" void name(__VA_ARGS__)
#define LONE_KERNEL KERNEL
#define SHARED(Type, name)      \
    static char key_of_##name;  \
    Type& name = *static_cast<Type*>(emulator::shared(&key_of_##name, sizeof(Type)))
#define DYNAMIC_SHARED(name) char* const name = emulator::dynamic_shared()

struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) int4 {
    int x, y, z, w;
};

namespace emulator {

struct Place {
    uint3 thread, block, block_size, grid_size;
};
extern Place* place;

// A kernel's name and how to call it with an array of pointers to its arguments.
struct Entry {
    template <class... A>
    Entry(const char* name, int threads, void (*kernel)(A...))
        : name(name), threads(threads), arguments(sizeof...(A)), bytes{static_cast<int>(sizeof(A))...}, call([kernel](void** at) {
              unpack<A...>(kernel, at, std::index_sequence_for<A...>());
          }) {
        enter();
    }
    const char* name;
    int threads, arguments;
    std::vector<int> bytes;
    std::function<void(void**)> call;

  private:
    template <class... A, size_t... I>
    static void unpack(void (*kernel)(A...), void** at, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_cv_t<A>*>(at[I])...);
    }
    void enter();
};

void* shared(const void* key, size_t bytes);
char* dynamic_shared();
void block_barrier();
// Brings `bytes` of this lane to its warp; `combine`, run once for all, may turn the 32 contributions into as many
// results. Returns where all of them lie, 64 bytes apart.
const char* meet(int kind, const void* mine, size_t bytes, const std::function<void(char*)>& combine = nullptr);
void copy_16(void* to, const void* from, int bytes);
void copies_begun();
void copies_arrived(int pending);

enum Kind { SHUFFLE = 1, VOTE, PRODUCT, LOAD, SYNC };
constexpr size_t SLOT = 64;

struct ProductIn {
    uint32_t a0, a1, a2, a3, b0, b1;
};

template <class Decode>
void multiply_16x8x16(float (&d)[4], const ProductIn& in, Decode decode) {
    const auto combine = [decode](char* slots) {
        float a[16][16], b[8][16], sums[16][8] = {};
        for (int lane = 0; lane < 32; lane++) {
            ProductIn in;
            std::memcpy(&in, slots + lane * SLOT, sizeof in);
            const int g = lane / 4, t = lane % 4;
            const uint32_t left[4] = {in.a0, in.a1, in.a2, in.a3}, right[2] = {in.b0, in.b1};
            for (int i = 0; i < 4; i++) {
                a[g + i % 2 * 8][2 * t + i / 2 * 8] = decode(left[i], false);
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = decode(left[i], true);
            }
            for (int i = 0; i < 2; i++) {
                b[g][2 * t + i * 8] = decode(right[i], false);
                b[g][2 * t + i * 8 + 1] = decode(right[i], true);
            }
        }
        for (int m = 0; m < 16; m++) {
            for (int n = 0; n < 8; n++) {
                for (int k = 0; k < 16; k++) sums[m][n] += a[m][k] * b[n][k];
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            const float out[4] = {sums[g][2 * t], sums[g][2 * t + 1], sums[g + 8][2 * t], sums[g + 8][2 * t + 1]};
            std::memcpy(slots + lane * SLOT, out, sizeof out);
        }
    };
    const char* all = meet(PRODUCT, &in, sizeof in, combine);
    float out[4];
    std::memcpy(out, all + (place->thread.x % 32) * SLOT, sizeof out);
    for (int i = 0; i < 4; i++) d[i] += out[i];
}

inline void load_turned(uint32_t (&tiles)[4], const void* row) {
    const char* all = meet(LOAD, &row, sizeof row);
    const int lane = place->thread.x % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (int k = 0; k < 2; k++) {
            const char* at;
            std::memcpy(&at, all + (8 * i + 2 * t + k) * SLOT, sizeof at);
            std::memcpy(&pair[k], at + 2 * g, 2);
        }
        tiles[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

template <class T>
T from_lane(T mine, int lane) {
    const char* all = meet(SHUFFLE, &mine, sizeof mine);
    T theirs;
    std::memcpy(&theirs, all + lane * SLOT, sizeof theirs);
    return theirs;
}

}  // namespace emulator

#define threadIdx (emulator::place->thread)
#define blockIdx (emulator::place->block)
#define blockDim (emulator::place->block_size)
#define gridDim (emulator::place->grid_size)

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::meet(emulator::SYNC, "", 1); }

template <class T>
T __shfl_xor_sync(unsigned, T mine, int mask) {
    return emulator::from_lane(mine, (threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T mine, int lane) {
    return emulator::from_lane(mine, lane % 32);
}
template <class T>
T __shfl_up_sync(unsigned, T mine, int by) {
    const int lane = threadIdx.x % 32;
    return emulator::from_lane(mine, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
    const char vote = mine;
    const char* all = emulator::meet(emulator::VOTE, &vote, 1);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= static_cast<unsigned>(all[lane * emulator::SLOT]) << lane;
    return votes;
}

// Threads run one at a time, so what is atomic on a device is plain here.
template <class T, class U>
T atomicAdd(T* at, U by) {
    const T old = *at;
    *at = old + static_cast<T>(by);
    return old;
}

// === numbers ===

inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) {
        const float small = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -small : small;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline __half __float2half_rn(float x) {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
    if (x != x) return {0x7fff};
    const float size = std::fabs(x);
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24f)))};
    const uint32_t kept = __float_as_uint(size) - (112u << 23);
    return {static_cast<uint16_t>(sign | (kept + 0xfff + (kept >> 13 & 1)) >> 13)};
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
