// Numbers drawn evenly between two bounds, element by element.

#include "mix.cuh"

// `out[i]` is number `first + i`: one of 2^24 even steps from -bound up to below bound, by the upper bits of the seed's
// number of that place, then rounded to the type. So a range may be filled in any parts.
template <class T>
__device__ void fill_uniform(T* out, i64 first, i64 count, uint64_t seed, float bound) {
    const i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const int left = static_cast<int>(count - at < 8 ? count - at : 8);
    float numbers[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int steps = static_cast<int>(mix(seed + static_cast<uint64_t>(first + at + i) * GOLDEN) >> 40);
        numbers[i] = bound * (static_cast<float>(steps - (1 << 23)) * 0x1p-23f);
    }
    write_eight(numbers, out + at, 0, left, left == 8);
}

#define FILL(name, T)                                                                                    \
    KERNEL(fill_uniform_##name, 256, T* out, i64 first, i64 count, uint64_t seed, float bound) {         \
        fill_uniform(out, first, count, seed, bound);                                                    \
    }
FOR_NUMBERS(FILL)
