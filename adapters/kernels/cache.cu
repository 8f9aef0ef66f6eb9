// Rows of keys and values into the paged cache, whose blocks of 16 positions hold a head's keys as [head_dim, 16] and its
// values as [16, head_dim]. It must not know sequences: it gets the rows.

#include "device.cuh"

constexpr int CACHE_BLOCK = 16;

// One block a row. A negative row is nobody's: the tail of a captured step.
template <class T>
__device__ void store(const T* from, const int* rows, T* cache, int pitch, int kv_heads, int head_dim, bool turned) {
    const i64 row = rows[blockIdx.x];
    if (row < 0) return;
    const T* const numbers = from + static_cast<i64>(blockIdx.x) * pitch;
    T* const block = cache + row / CACHE_BLOCK * CACHE_BLOCK * kv_heads * head_dim;
    const int within = static_cast<int>(row % CACHE_BLOCK);
    for (int i = threadIdx.x; i < kv_heads * head_dim; i += blockDim.x) {
        const int head = i / head_dim, d = i % head_dim;
        const int place = turned ? d * CACHE_BLOCK + within : within * head_dim + d;
        block[head * head_dim * CACHE_BLOCK + place] = numbers[i];
    }
}

#define STORE(name, T)                                                                                              \
    KERNEL(store_keys_##name, 256, const T* from, const int* rows, T* cache, int pitch, int kv_heads, int head_dim) { \
        store(from, rows, cache, pitch, kv_heads, head_dim, true);                                                   \
    }                                                                                                               \
    KERNEL(store_values_##name, 256, const T* from, const int* rows, T* cache, int pitch, int kv_heads, int head_dim) { \
        store(from, rows, cache, pitch, kv_heads, head_dim, false);                                                  \
    }
FOR_NUMBERS(STORE)
