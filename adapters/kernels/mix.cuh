// Random bits that are a function of a counter. It must not know what is drawn.

#pragma once

#include "device.cuh"

// SplitMix64's finaliser: every input bit changes every output bit (Steele, Lea and Flood, 2014). Number `i` of the generator
// that starts at `seed` is `mix(seed + i * GOLDEN)`.
constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15ull;

__device__ __forceinline__ uint64_t mix(uint64_t value) {
    uint64_t z = value + GOLDEN;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}
