// From a row of logits to a token: the best one, or a draw after temperature, top-k, top-p and min-p; and the best tokens'
// log-probabilities. It must not know requests: bias, penalties and masks are in the logits already.
//
// Nothing is sorted. What may be drawn is all that stands before a boundary in the order (logit descending, id ascending),
// and a boundary is found by histograms, coarse and then digit by digit. Weights are whole numbers of 2^-40, so sums of them
// are exact in any order, and a token is the same on every run and in any company.

#include "mix.cuh"

constexpr int SAMPLE_THREADS = 1024, SAMPLE_WARPS = SAMPLE_THREADS / WARP, BINS = 1024;
using u64 = unsigned long long;

// How one row is drawn. A temperature of 0 takes the best token; a top_k of 0 and a top_p of 1 cut nothing off.
struct Draw {
    float temperature, top_p, min_p;
    int top_k;
    u64 seed, counter;
};

// Bits in the order of the numbers.
__device__ __forceinline__ unsigned key_of(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Everything with a greater key, and of those with this key the ids up to `id`.
struct Boundary {
    unsigned key;
    int id;

    __device__ __forceinline__ bool holds(unsigned other, int token) const { return other > key || (other == key && token <= id); }
};

constexpr Boundary NOTHING{0xffffffffu, -1};

struct SamplerShared {
    u64 bins[BINS];
    u64 warps[SAMPLE_WARPS];
    unsigned keys[SAMPLE_WARPS];
    int ids[SAMPLE_WARPS];
    u64 before, total;
    int chosen;
};

struct Row {
    const float* logits;
    int vocab;
    SamplerShared& shared;

    // The first of those that `passed` does not hold, for every thread; id -1 where there is none.
    __device__ __forceinline__ Boundary best(Boundary passed) const {
        unsigned key = 0;
        int id = -1;
        const auto take = [&](unsigned other, int token) {
            if (token >= 0 && (id < 0 || other > key || (other == key && token < id))) {
                key = other;
                id = token;
            }
        };
        for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) {
            const unsigned other = key_of(logits[i]);
            if (!passed.holds(other, i)) take(other, i);
        }
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            const unsigned other = __shfl_xor_sync(ALL_LANES, key, step);
            take(other, __shfl_xor_sync(ALL_LANES, id, step));
        }
        __syncthreads();
        if (lane_of_thread() == 0) {
            shared.keys[warp_of_thread()] = key;
            shared.ids[warp_of_thread()] = id;
        }
        __syncthreads();
        for (int i = 0; i < SAMPLE_WARPS; i++) take(shared.keys[i], shared.ids[i]);
        return {key, id};
    }

    // The sum of whole numbers over all threads.
    __device__ __forceinline__ u64 sum(u64 x) const {
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
        __syncthreads();
        if (lane_of_thread() == 0) shared.warps[warp_of_thread()] = x;
        __syncthreads();
        u64 total = 0;
        for (int i = 0; i < SAMPLE_WARPS; i++) total += shared.warps[i];
        return total;
    }

    // The token with which amounts, added by id, first exceed `target`: each warp sums a stretch of the row, and the warp
    // in whose stretch it lies walks it. Amounts of all tokens together exceed `target`.
    template <class Amount>
    __device__ __forceinline__ int reach(u64 target, Amount amount) const {
        const int stretch = div_up(div_up(vocab, SAMPLE_WARPS), WARP) * WARP, lane = lane_of_thread();
        const int from = warp_of_thread() * stretch, to = min(from + stretch, vocab);
        u64 own = 0;
        for (int i = from + lane; i < to; i += WARP) own += amount(i);
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) own += __shfl_xor_sync(ALL_LANES, own, step);
        __syncthreads();
        if (lane == 0) shared.warps[warp_of_thread()] = own;
        __syncthreads();
        u64 before = 0;
        for (int i = 0; i < warp_of_thread(); i++) before += shared.warps[i];
        if (before <= target && target < before + own) {
            for (int first = from; first < to; first += WARP) {
                u64 upto = first + lane < to ? amount(first + lane) : 0;
#pragma unroll
                for (int step = 1; step < WARP; step *= 2) {
                    const u64 other = __shfl_up_sync(ALL_LANES, upto, step);
                    if (lane >= step) upto += other;
                }
                const unsigned beyond = __ballot_sync(ALL_LANES, before + upto > target);
                if (beyond != 0) {
                    if (lane == 0) shared.chosen = first + 31 - __clz(beyond & (0u - beyond));
                    break;
                }
                before += __shfl_sync(ALL_LANES, upto, WARP - 1);
            }
        }
        __syncthreads();
        return shared.chosen;
    }

    // The shortest beginning of what `within` holds whose amounts reach `wanted`; `within` itself where all of it is less. An
    // amount is a function of the key.
    template <class Amount>
    __device__ __forceinline__ Boundary cut(const Boundary& within, float highest, u64 wanted, Amount amount) const {
        // Logits crowd in few binades, so the first histogram is by their distance from the best.
        const auto coarse = [=](float x) {
            const float distance = (highest - x) * 32.0f;
            return distance < static_cast<float>(BINS - 1) ? static_cast<int>(distance) : BINS - 1;
        };
        constexpr int SHIFTS[4] = {22, 12, 2, 0}, WIDTHS[4] = {10, 10, 10, 2};
        u64 before = 0;
        unsigned key = 0, known = 0;
        int bin = -1;
#pragma unroll
        for (int level = -1; level < 4; level++) {
            for (int i = threadIdx.x; i < BINS; i += SAMPLE_THREADS) shared.bins[i] = 0;
            __syncthreads();
            for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) {
                const unsigned other = key_of(logits[i]);
                if (!within.holds(other, i)) continue;
                const int far = coarse(logits[i]);
                if (level < 0) {
                    atomicAdd(&shared.bins[far], amount(other));
                } else if (far == bin && (other & known) == key) {
                    // Digits ascend with the logit, bins descend from it.
                    const unsigned digit = other >> SHIFTS[level < 0 ? 0 : level] & ((1u << WIDTHS[level < 0 ? 0 : level]) - 1);
                    atomicAdd(&shared.bins[BINS - 1 - digit], amount(other));
                }
            }
            __syncthreads();
            const int at = crossing(before, wanted);
            if (at < 0) return within;
            before = shared.before;
            if (level < 0) {
                bin = at;
            } else {
                key |= static_cast<unsigned>(BINS - 1 - at) << SHIFTS[level < 0 ? 0 : level];
                known |= ((1u << WIDTHS[level < 0 ? 0 : level]) - 1) << SHIFTS[level < 0 ? 0 : level];
            }
            __syncthreads();
        }
        const u64 each = amount(key);
        const u64 ties = (wanted - before + each - 1) / each;
        const auto tied = [=, *this](int i) { return static_cast<u64>(key_of(logits[i]) == key && within.holds(key, i)); };
        return {key, reach(ties - 1, tied)};
    }

    // The bin in which `before` and the bins up to it reach `wanted`, or -1; leaves what lies before it in `shared.before`.
    __device__ __forceinline__ int crossing(u64 before, u64 wanted) const {
        if (warp_of_thread() == 0) {
            constexpr int EACH = BINS / WARP;
            const int lane = lane_of_thread();
            u64 own = 0;
            for (int i = 0; i < EACH; i++) own += shared.bins[lane * EACH + i];
            u64 upto = own;
#pragma unroll
            for (int step = 1; step < WARP; step *= 2) {
                const u64 other = __shfl_up_sync(ALL_LANES, upto, step);
                if (lane >= step) upto += other;
            }
            const unsigned beyond = __ballot_sync(ALL_LANES, before + upto >= wanted);
            if (lane == 0) shared.chosen = -1;
            __syncwarp();
            if (beyond != 0 && lane == 31 - __clz(beyond & (0u - beyond))) {
                u64 sum = before + upto - own;
                int at = lane * EACH;
                while (sum + shared.bins[at] < wanted) sum += shared.bins[at++];
                shared.before = sum;
                shared.chosen = at;
            }
        }
        __syncthreads();
        return shared.chosen;
    }
};

// One block a row. The token is -1 where a logit is NaN or plus infinity, or all are minus infinity.
KERNEL(sample, SAMPLE_THREADS, const float* logits, const Draw* draws, int* tokens, int vocab) {
    SHARED(SamplerShared, shared);
    const Row row{logits + static_cast<i64>(blockIdx.x) * vocab, vocab, shared};
    const Draw draw = draws[blockIdx.x];
    u64 wrong = 0;
    for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) wrong += !(row.logits[i] < INFINITY);
    const Boundary best = row.best(NOTHING);
    const float highest = row.logits[best.id];
    if (row.sum(wrong) > 0 || highest == LOWEST) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = -1;
        return;
    }
    if (draw.temperature <= 0) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = best.id;
        return;
    }
    const auto weight = [=](float x) { return expf((x - highest) / draw.temperature); };
    const auto mass = [=](unsigned key) {
        const unsigned bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
        return static_cast<u64>(weight(__uint_as_float(bits)) * 1099511627776.0f);
    };
    Boundary kept{0, vocab};
    if (draw.top_k > 0 && draw.top_k < vocab) {
        kept = row.cut(kept, highest, static_cast<u64>(draw.top_k), [](unsigned) { return u64{1}; });
    }
    if (draw.top_p < 1) {
        u64 total = 0;
        for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) {
            const unsigned key = key_of(row.logits[i]);
            if (kept.holds(key, i)) total += mass(key);
        }
        total = row.sum(total);
        const u64 wanted = static_cast<u64>(static_cast<double>(draw.top_p) * static_cast<double>(total));
        kept = row.cut(kept, highest, wanted > 0 ? wanted : 1, mass);
    }
    const auto amount = [=](int i) {
        const unsigned key = key_of(row.logits[i]);
        if (!kept.holds(key, i) || (weight(row.logits[i]) < draw.min_p && i != best.id)) return u64{0};
        return mass(key);
    };
    u64 total = 0;
    for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) total += amount(i);
    total = row.sum(total);
    const u64 target = __umul64hi(mix(draw.seed ^ mix(draw.counter)), total);
    const int token = row.reach(target, amount);
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

// One block a row: the best `count` tokens, best first and lower ids first among equals, and their log-probabilities;
// `chosen` gets that of the row's token. `statistics` are those of softmax_statistics. Ids of -1 fill up a short vocabulary.
KERNEL(top_logprobs, SAMPLE_THREADS, const float* logits, const float* statistics, const int* tokens, float* chosen, int* ids, float* logprobs,
       int vocab, int count) {
    SHARED(SamplerShared, shared);
    const Row row{logits + static_cast<i64>(blockIdx.x) * vocab, vocab, shared};
    const float denominator = statistics[2 * static_cast<i64>(blockIdx.x) + 1];
    const int token = tokens[blockIdx.x];
    if (threadIdx.x == 0) chosen[blockIdx.x] = token >= 0 ? row.logits[token] - denominator : LOWEST;
    Boundary last = NOTHING;
    for (int i = 0; i < count; i++) {
        last = row.best(last);
        if (threadIdx.x == 0) {
            ids[static_cast<i64>(blockIdx.x) * count + i] = last.id;
            logprobs[static_cast<i64>(blockIdx.x) * count + i] = last.id >= 0 ? row.logits[last.id] - denominator : LOWEST;
        }
        if (last.id < 0) last = {0, vocab};
    }
}
