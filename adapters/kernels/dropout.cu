// Training's dropout: a mask that is a function of counters, the same as the processor's. It must not know what a key is
// made of.

#include "mix.cuh"

// One block a row: `out = mask * x * keep`, or `out += ...` where `add`; kept is what mixes to `bar` or more.
template <class T>
__device__ void dropout(const T* x, const uint64_t* keys, uint64_t site, uint64_t bar, float keep, T* out, int width, int add) {
    const i64 at = static_cast<i64>(blockIdx.x) * width;
    const uint64_t key = mix(keys[blockIdx.x] ^ mix(site));
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
        const bool kept = mix(key + static_cast<uint64_t>(column)) >= bar;
        const float value = kept ? widen(x[at + column]) * keep : 0.0f;
        out[at + column] = narrow<T>(add ? widen(out[at + column]) + value : value);
    }
}

#define DROPOUT(name, T)                                                                                                 \
    KERNEL(dropout_##name, 256, const T* x, const uint64_t* keys, uint64_t site, uint64_t bar, float keep, T* out, int width, \
           int add) {                                                                                                    \
        dropout(x, keys, site, bar, keep, out, width, add);                                                              \
    }
FOR_NUMBERS(DROPOUT)
