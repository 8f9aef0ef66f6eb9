// Rows of a table by their ids, widened or as they are. It must not know tokens.

#include "device.cuh"

constexpr unsigned NO_ROW = 0xffffffffu;

// One block a row. The id NO_ROW is nobody's: the tail of a captured step, which becomes zeros.
template <class W, class T>
__device__ void gather(const W* table, const f16* scales, const unsigned* ids, T* out, int width) {
    const i64 row = ids[blockIdx.x];
    const bool empty = ids[blockIdx.x] == NO_ROW;
    const bool whole = width % 8 == 0;
    for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
        float numbers[8] = {};
        if (!empty) {
            read_eight(table + row * width, column, width, whole, numbers);
            if constexpr (is_same<W, int8_t>) {
                const float scale = widen(scales[row * div_up(width, 32) + column / 32]);
#pragma unroll
                for (int i = 0; i < 8; i++) numbers[i] *= scale;
            }
        }
        write_eight(numbers, out + static_cast<i64>(blockIdx.x) * width, column, width, whole);
    }
}

#define GATHER(from, W, to, T)                                                                                  \
    KERNEL(gather_##from##_##to, 256, const W* table, const f16* scales, const unsigned* ids, T* out, int width) { \
        gather(table, scales, ids, out, width);                                                                  \
    }

GATHER(f32, float, f32, float)
GATHER(bf16, bf16, bf16, bf16)
GATHER(f16, f16, f16, f16)
GATHER(bf16, bf16, f32, float)
GATHER(f16, f16, f32, float)
GATHER(q8, int8_t, f32, float)
GATHER(q8, int8_t, bf16, bf16)
GATHER(q8, int8_t, f16, f16)
