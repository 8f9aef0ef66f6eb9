// Every kernel against plain loops in double precision, on the emulator, and the row rule bit for bit.
//
// Each launch runs twice, in opposite orders of blocks, warps and lanes: other bits mean a race. Each buffer has canaries.
// Run without arguments for everything, or with the names of some checks.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <latch>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cuda.h"

using bf16 = __nv_bfloat16;
using f16 = __half;
using i64 = long long;
using u64 = unsigned long long;

extern "C" int espalier_emulator_launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                                        void** arguments, int count, int order, char* error, size_t error_bytes);
extern "C" int espalier_emulator_arguments(const char* name);
extern "C" int espalier_emulator_argument_bytes(const char* name, int index);

namespace {

int failures = 0, comparisons = 0;
std::string subject;

void report(const std::string& what) {
    if (++failures <= 40) std::printf("FAILED %s: %s\n", subject.c_str(), what.c_str());
}

// === random numbers ===

u64 state = 1;
u64 next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return state >> 16;
}
double uniform() { return static_cast<double>(next() & 0xffffffffffull) / static_cast<double>(1ull << 40); }
double normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * 1.7; }
int below(int n) { return static_cast<int>(next() % static_cast<u64>(n)); }

// === buffers ===

struct Bytes {
    std::vector<char> memory;
    char* at = nullptr;
    size_t size = 0;
};
std::vector<Bytes*> buffers;
constexpr size_t EDGE = 256;

float widen(float x) { return x; }
float widen(bf16 x) { return __bfloat162float(x); }
float widen(f16 x) { return __half2float(x); }
template <class T>
T narrow(double x) {
    if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(static_cast<float>(x));
    else if constexpr (std::is_same_v<T, f16>) return __float2half_rn(static_cast<float>(x));
    else return static_cast<T>(x);
}
template <class T>
constexpr double EPSILON = std::is_same_v<T, bf16> ? 1.0 / 256 : std::is_same_v<T, f16> ? 1.0 / 2048 : 1e-7;
template <class T>
const char* NAME = std::is_same_v<T, bf16> ? "bf16" : std::is_same_v<T, f16> ? "f16" : std::is_same_v<T, int8_t> ? "q8" : "f32";

// Aligned as a device's allocations are, filled with a pattern that is no number, watched by the checker.
template <class T>
struct Buffer {
    std::unique_ptr<Bytes> bytes = std::make_unique<Bytes>();
    explicit Buffer(size_t count) {
        bytes->size = count * sizeof(T);
        bytes->memory.assign(bytes->size + 2 * EDGE + 256, static_cast<char>(0xff));
        const size_t raw = reinterpret_cast<size_t>(bytes->memory.data()) + EDGE;
        bytes->at = bytes->memory.data() + EDGE + ((raw + 255) / 256 * 256 - raw);
        buffers.push_back(bytes.get());
    }
    Buffer(Buffer&&) = default;
    ~Buffer() {
        if (bytes) buffers.erase(std::find(buffers.begin(), buffers.end(), bytes.get()));
    }
    static Buffer random(size_t count, double size = 1) {
        Buffer buffer(count);
        for (size_t i = 0; i < count; i++) buffer[i] = narrow<T>(normal() * size);
        return buffer;
    }
    static Buffer zeros(size_t count) {
        Buffer buffer(count);
        std::memset(buffer.bytes->at, 0, buffer.bytes->size);
        return buffer;
    }
    static Buffer of(const std::vector<T>& values) {
        Buffer buffer(values.size());
        std::copy(values.begin(), values.end(), buffer.data());
        return buffer;
    }
    Buffer copy() const {
        Buffer other(size());
        std::memcpy(other.bytes->at, bytes->at, bytes->size);
        return other;
    }
    T* data() const { return reinterpret_cast<T*>(bytes->at); }
    size_t size() const { return bytes->size / sizeof(T); }
    T& operator[](size_t i) const { return data()[i]; }
    double value(size_t i) const { return widen(data()[i]); }
};

// === launches ===

struct Grid {
    unsigned x = 1, y = 1, z = 1;
};

bool edges_hold(const Bytes& bytes) {
    for (const char* at = bytes.at - EDGE / 2; at < bytes.at; at++) {
        if (*at != static_cast<char>(0xff)) return false;
    }
    for (const char* at = bytes.at + bytes.size; at < bytes.at + bytes.size + EDGE / 2; at++) {
        if (*at != static_cast<char>(0xff)) return false;
    }
    return true;
}

template <class... A>
void launch(const std::string& name, Grid grid, unsigned threads, unsigned shared, A... arguments) {
    void* pointers[] = {static_cast<void*>(&arguments)...};
    const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {threads, 1, 1};
    char error[512] = "";
    std::vector<std::vector<char>> before, backwards;
    for (const Bytes* bytes : buffers) before.emplace_back(bytes->at, bytes->at + bytes->size);
    for (int order = 1; order >= 0; order--) {
        if (espalier_emulator_launch(name.c_str(), g, b, shared, pointers, sizeof...(A), order, error, sizeof error)) {
            report(error);
            return;
        }
        for (size_t i = 0; i < buffers.size(); i++) {
            Bytes& bytes = *buffers[i];
            if (!edges_hold(bytes)) report(name + " wrote beyond a buffer");
            if (order == 1) {
                backwards.emplace_back(bytes.at, bytes.at + bytes.size);
                std::memcpy(bytes.at, before[i].data(), bytes.size);
            } else if (std::memcmp(bytes.at, backwards[i].data(), bytes.size) != 0) {
                report(name + " depends on the order of its threads");
            }
        }
    }
}

unsigned up(i64 a, i64 b) { return static_cast<unsigned>((a + b - 1) / b); }

void near(const std::string& what, double got, double want, double tolerance) {
    comparisons++;
    if (!(std::fabs(got - want) <= tolerance)) {
        char text[200];
        std::snprintf(text, sizeof text, "%s is %.9g, should be %.9g (+- %.2g)", what.c_str(), got, want, tolerance);
        report(text);
    }
}

template <class T>
void same_bits(const std::string& what, const T* a, const T* b, size_t count) {
    comparisons++;
    if (std::memcmp(a, b, count * sizeof(T)) != 0) report(what + " has other bits");
}

std::string text(const char* format, auto... values) {
    char out[200];
    std::snprintf(out, sizeof out, format, values...);
    return out;
}

template <class F>
void for_numbers(F f) {
    f(float{});
    f(bf16{});
    f(f16{});
}

// === weights ===

// A weight as the kernels take it, and the numbers that it stands for.
template <class W>
struct TestWeight {
    Buffer<W> numbers;
    Buffer<f16> scales;
    std::vector<double> values;

    TestWeight(int outputs, int inputs) : numbers(static_cast<size_t>(outputs) * inputs), scales(static_cast<size_t>(outputs) * up(inputs, 32)), values(numbers.size()) {
        for (size_t i = 0; i < scales.size(); i++) scales[i] = narrow<f16>(0.002 + 0.02 * uniform());
        for (int o = 0; o < outputs; o++) {
            for (int k = 0; k < inputs; k++) {
                const size_t i = static_cast<size_t>(o) * inputs + k;
                if constexpr (std::is_same_v<W, int8_t>) {
                    numbers[i] = static_cast<int8_t>(below(255) - 127);
                    values[i] = numbers[i] * static_cast<double>(widen_f16(scales[static_cast<size_t>(o) * up(inputs, 32) + k / 32]));
                } else {
                    numbers[i] = narrow<W>(normal());
                    values[i] = widen(numbers[i]);
                }
            }
        }
    }
    static float widen_f16(f16 x) { return __half2float(x); }
};

// === row by row ===

void check_gather() {
    const auto one = [](auto w, auto t, const char* name) {
        using W = decltype(w);
        using T = decltype(t);
        for (int width : {1, 8, 40, 77, 2304}) {
            TestWeight<W> weight(9, width);
            const auto ids = Buffer<unsigned>::of({8, 0, 0xffffffff, 3, 3, 7, 0xffffffff});
            Buffer<T> out(7 * width);
            launch(text("gather_%s", name), {7}, 256, 0, weight.numbers.data(), weight.scales.data(), ids.data(), out.data(), width);
            for (int i = 0; i < 7 * width; i++) {
                const unsigned id = ids[i / width];
                const double want = id == 0xffffffff ? 0 : weight.values[id * width + i % width];
                near(text("%s width %d [%d]", name, width, i), out.value(i), want, std::fabs(want) * EPSILON<T>);
            }
        }
    };
    one(float{}, float{}, "f32_f32");
    one(bf16{}, bf16{}, "bf16_bf16");
    one(f16{}, f16{}, "f16_f16");
    one(bf16{}, float{}, "bf16_f32");
    one(f16{}, float{}, "f16_f32");
    one(int8_t{}, float{}, "q8_f32");
    one(int8_t{}, bf16{}, "q8_bf16");
    one(int8_t{}, f16{}, "q8_f16");
}

void check_norm() {
    for_numbers([](auto t) {
        using T = decltype(t);
        const double eps = 1e-5;
        for (int width : {1, 8, 33, 576, 4100}) {
            for (int rows : {1, 3}) {
                const auto x = Buffer<T>::random(rows * width, 2), weight = Buffer<T>::random(width), dy = Buffer<T>::random(rows * width);
                auto residual = Buffer<T>::random(rows * width, 3), dx = Buffer<T>::random(rows * width);
                const auto old = residual.copy(), dx_old = dx.copy();
                Buffer<T> y(rows * width), y_sum(rows * width);
                launch(text("rms_norm_%s", NAME<T>), {unsigned(rows)}, 256, 0, x.data(), weight.data(), float(eps), y.data(), width);
                launch(text("add_rms_norm_%s", NAME<T>), {unsigned(rows)}, 256, 0, x.data(), residual.data(), weight.data(), float(eps), y_sum.data(), width);
                launch(text("rms_norm_backward_%s", NAME<T>), {unsigned(rows)}, 256, 0, x.data(), weight.data(), float(eps), dy.data(), dx.data(), width);
                for (int r = 0; r < rows; r++) {
                    double squares = 0, along = 0, squares_sum = 0;
                    for (int i = 0; i < width; i++) {
                        const size_t at = r * width + i;
                        squares += x.value(at) * x.value(at);
                        along += dy.value(at) * weight.value(i) * x.value(at);
                        near(text("residual width %d", width), residual.value(at), old.value(at) + x.value(at),
                             EPSILON<T> * std::fabs(old.value(at) + x.value(at)) + 1e-6);
                        squares_sum += residual.value(at) * residual.value(at);
                    }
                    const double inverse = 1 / std::sqrt(squares / width + eps), inverse_sum = 1 / std::sqrt(squares_sum / width + eps);
                    for (int i = 0; i < width; i++) {
                        const size_t at = r * width + i;
                        const double want = weight.value(i) * x.value(at) * inverse, want_sum = weight.value(i) * residual.value(at) * inverse_sum;
                        near(text("%s width %d", NAME<T>, width), y.value(at), want, (EPSILON<T> + 1e-6) * std::fabs(want) + 1e-6);
                        near(text("add %s width %d", NAME<T>, width), y_sum.value(at), want_sum, (EPSILON<T> + 1e-6) * std::fabs(want_sum) + 1e-6);
                        const double slope = inverse * (dy.value(at) * weight.value(i) - inverse * inverse * along / width * x.value(at));
                        near(text("backward %s width %d", NAME<T>, width), dx.value(at), dx_old.value(at) + slope,
                             EPSILON<T> * std::fabs(dx_old.value(at) + slope) + 1e-5 * (1 + std::fabs(slope)));
                    }
                }
            }
        }
    });
}

void check_rope() {
    for_numbers([](auto t) {
        using T = decltype(t);
        for (int half : {1, 5, 32}) {
            const int rows = 3, heads = 3, d = 2 * half, pitch = heads * d + 4;
            const auto cos = Buffer<float>::random(rows * half), sin = Buffer<float>::random(rows * half);
            for (float turn : {1.0f, -1.0f}) {
                auto x = Buffer<T>::random(rows * pitch);
                const auto old = x.copy();
                launch(text("rope_%s", NAME<T>), {unsigned(rows)}, 256, 0, x.data(), cos.data(), sin.data(), pitch, heads, d, turn);
                for (int r = 0; r < rows; r++) {
                    for (int i = 0; i < pitch; i++) {
                        const size_t at = r * pitch + i;
                        double want = old.value(at);
                        if (i < heads * d) {
                            const int j = i % d % half;
                            const double a = old.value(at - i % d + j), b = old.value(at - i % d + j + half);
                            const double c = cos.value(r * half + j), s = turn * sin.value(r * half + j);
                            want = i % d < half ? a * c - b * s : b * c + a * s;
                        }
                        near(text("%s half %d", NAME<T>, half), x.value(at), want, EPSILON<T> * std::fabs(want) + 1e-6);
                    }
                }
            }
        }
    });
}

void check_swiglu() {
    for_numbers([](auto t) {
        using T = decltype(t);
        for (i64 count : {1, 8, 2047, 5000}) {
            auto gate = Buffer<T>::random(count, 3), up_ = Buffer<T>::random(count), dy = Buffer<T>::random(count);
            const auto g = gate.copy(), u = up_.copy();
            Buffer<T> y(count);
            launch(text("swiglu_%s", NAME<T>), {up(count, 2048)}, 256, 0, gate.data(), up_.data(), y.data(), count);
            launch(text("swiglu_backward_%s", NAME<T>), {up(count, 2048)}, 256, 0, gate.data(), up_.data(), dy.data(), count);
            for (i64 i = 0; i < count; i++) {
                const double s = 1 / (1 + std::exp(-g.value(i))), want = g.value(i) * s * u.value(i);
                const double dgate = dy.value(i) * u.value(i) * s * (1 + g.value(i) * (1 - s)), dup = dy.value(i) * g.value(i) * s;
                near("y", y.value(i), want, (EPSILON<T> + 2e-6) * std::fabs(want) + 1e-7);
                near("dgate", gate.value(i), dgate, (EPSILON<T> + 2e-6) * std::fabs(dgate) + 1e-6);
                near("dup", up_.value(i), dup, (EPSILON<T> + 2e-6) * std::fabs(dup) + 1e-7);
            }
        }
    });
}

void check_sum() {
    for_numbers([](auto t) {
        using T = decltype(t);
        for (int width : {1, 24, 2051}) {
            const int rows = 3;
            const i64 count = rows * width;
            const auto x = Buffer<T>::random(count), row = Buffer<T>::random(width), y = Buffer<T>::random(count);
            const auto gain = Buffer<float>::random(width);
            const auto factor = Buffer<float>::random(count);
            auto sum = y.copy(), biased = y.copy(), scaled = y.copy();
            auto product = factor.copy();
            launch(text("multiply_%s", NAME<T>), {up(count, 2048)}, 256, 0, x.data(), product.data(), count);
            launch(text("add_%s", NAME<T>), {up(count, 2048)}, 256, 0, x.data(), sum.data(), count);
            launch(text("add_bias_%s", NAME<T>), {unsigned(rows)}, 256, 0, row.data(), biased.data(), width);
            launch(text("scale_columns_%s", NAME<T>), {unsigned(rows)}, 256, 0, gain.data(), scaled.data(), width);
            for (i64 i = 0; i < count; i++) {
                const auto close = [&](const char* what, double got, double want) { near(what, got, want, EPSILON<T> * std::fabs(want) + 1e-7); };
                close("add", sum.value(i), y.value(i) + x.value(i));
                close("add_bias", biased.value(i), y.value(i) + row.value(i % width));
                near("multiply", product.value(i), widen(narrow<float>(x.value(i) * factor.value(i))), 0);
                near("scale_columns", scaled.value(i), widen(narrow<T>(y.value(i) * gain.value(i % width))), 0);
            }
            const std::vector<int> places = {4, -1, 0, 2, -7};
            const auto more = Buffer<T>::random(places.size() * width), whole = Buffer<T>::random(6 * width);
            const auto to = Buffer<int>::of(places);
            auto added = whole.copy();
            launch(text("add_rows_%s", NAME<T>), {unsigned(places.size())}, 256, 0, more.data(), to.data(), added.data(), width);
            for (int i = 0; i < 6 * width; i++) {
                const auto from = std::find(places.begin(), places.end(), i / width) - places.begin();
                const bool named = from < static_cast<i64>(places.size());
                const double by = named ? more.value(from * width + i % width) : 0;
                near(text("add_rows %s width %d [%d]", NAME<T>, width, i), added.value(i), widen(narrow<T>(whole.value(i) + by)), 0);
            }
        }
    });
    const auto cast = [](auto from, auto to) {
        using From = decltype(from);
        using To = decltype(to);
        for (i64 count : {1, 4099}) {
            const auto x = Buffer<From>::random(count);
            Buffer<To> y(count);
            launch(text("cast_%s_%s", NAME<From>, NAME<To>), {up(count, 2048)}, 256, 0, x.data(), y.data(), count);
            for (i64 i = 0; i < count; i++) near("cast", y.value(i), widen(narrow<To>(x.value(i))), 0);
        }
    };
    cast(float{}, bf16{});
    cast(float{}, f16{});
    cast(bf16{}, float{});
    cast(f16{}, float{});
    cast(bf16{}, f16{});
    cast(f16{}, bf16{});
}

u64 mixed(u64 value) {
    u64 z = value + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

void check_fill() {
    // The first numbers of SplitMix64 from 0, as its authors' program gives them.
    const u64 known[] = {0xe220a8397b1dcdafull, 0x6e789e6aa1b965f4ull, 0x06c45d188009454full};
    Buffer<float> few(3);
    launch("fill_uniform_f32", {1}, 256, 0, few.data(), i64{0}, i64{3}, u64{0}, 1.0f);
    for (int i = 0; i < 3; i++) near("known number", few[i], static_cast<double>(known[i] >> 40) / (1 << 23) - 1, 0);
    for_numbers([](auto t) {
        using T = decltype(t);
        const float bound = 0.3f;
        const u64 seed = 0x123456789abcdef0ull;
        for (i64 first : {i64{0}, i64{5}, i64{1} << 40}) {
            for (i64 count : {1, 8, 4099}) {
                Buffer<T> out(count);
                launch(text("fill_uniform_%s", NAME<T>), {up(count, 2048)}, 256, 0, out.data(), first, count, seed, bound);
                double sum = 0, squares = 0;
                for (i64 i = 0; i < count; i++) {
                    const u64 steps = mixed(seed + static_cast<u64>(first + i) * 0x9e3779b97f4a7c15ull) >> 40;
                    const double want = bound * (static_cast<double>(steps) / (1 << 23) - 1);
                    near(text("%s from %lld [%lld]", NAME<T>, first, i), out.value(i), widen(narrow<T>(want)), 0);
                    comparisons++;
                    if (!(want >= -bound && static_cast<float>(want) < bound)) report("a number beyond its bounds");
                    sum += out.value(i);
                    squares += out.value(i) * out.value(i);
                }
                if (count < 4000) continue;
                near("mean", sum / count, 0, 0.01);
                near("mean square", squares / count, bound * bound / 3, 0.002);
                const std::vector<i64> cuts = {0, 1, 10, 2058, 2059, count};
                for (size_t c = 0; c + 1 < cuts.size(); c++) {
                    const i64 here = cuts[c + 1] - cuts[c];
                    Buffer<T> part(here);
                    launch(text("fill_uniform_%s", NAME<T>), {up(here, 2048)}, 256, 0, part.data(), first + cuts[c], here, seed, bound);
                    same_bits(text("%s numbers %lld to %lld of a range", NAME<T>, cuts[c], cuts[c + 1]), part.data(), out.data() + cuts[c], here);
                }
            }
        }
    });
}

void check_cache() {
    for_numbers([](auto t) {
        using T = decltype(t);
        const int kv_heads = 3, head_dim = 10, width = kv_heads * head_dim, pitch = width + 7;
        const auto rows = Buffer<int>::of({5, -1, 47, -16, 16, 0, -1000});
        const auto from = Buffer<T>::random(rows.size() * pitch), old = Buffer<T>::random(3 * 16 * width);
        auto keys = old.copy(), values = old.copy(), want_keys = old.copy(), want_values = old.copy();
        launch(text("store_keys_%s", NAME<T>), {unsigned(rows.size())}, 256, 0, from.data(), rows.data(), keys.data(), pitch, kv_heads, head_dim);
        launch(text("store_values_%s", NAME<T>), {unsigned(rows.size())}, 256, 0, from.data(), rows.data(), values.data(), pitch, kv_heads, head_dim);
        for (size_t r = 0; r < rows.size(); r++) {
            for (int c = 0; c < width && rows[r] >= 0; c++) {
                const int head = rows[r] / 16 * kv_heads + c / head_dim, d = c % head_dim, within = rows[r] % 16;
                want_keys[(head * head_dim + d) * 16 + within] = from[r * pitch + c];
                want_values[(head * 16 + within) * head_dim + d] = from[r * pitch + c];
            }
        }
        same_bits(text("%s keys", NAME<T>), keys.data(), want_keys.data(), keys.size());
        same_bits(text("%s values", NAME<T>), values.data(), want_values.data(), values.size());
    });
}

void check_dropout() {
    for_numbers([](auto t) {
        using T = decltype(t);
        const int rows = 3, width = 301;
        const auto x = Buffer<T>::random(rows * width);
        const auto keys = Buffer<u64>::of({7, 1ull << 60, 99});
        const u64 site = 13, bar = static_cast<u64>(0.25 * static_cast<double>(~0ull));
        auto out = Buffer<T>::random(rows * width);
        const auto old = out.copy();
        launch(text("dropout_%s", NAME<T>), {rows}, 256, 0, x.data(), keys.data(), site, bar, 4.0f / 3, out.data(), width, 1);
        for (int i = 0; i < rows * width; i++) {
            const bool kept = mixed(mixed(keys[i / width] ^ mixed(site)) + i % width) >= bar;
            const double want = old.value(i) + (kept ? x.value(i) * 4 / 3 : 0);
            near("dropout", out.value(i), want, EPSILON<T> * std::fabs(want) + 1e-6);
        }
    });
}

// === matrix products ===

struct MatmulForm {
    const char* suffix;
    int rows, outputs;
};
constexpr MatmulForm FORMS[] = {{"8", 8, 16}, {"16", 16, 16}, {"32", 32, 32}, {"64", 64, 32}};

template <class X, class W, class Y>
void matmul(const std::string& form, const X* x, const TestWeight<W>& weight, Y* y, int rows, int inputs, int outputs) {
    const std::string name = text("matmul_%s_%s_%s_%s", NAME<X>, NAME<W>, NAME<Y>, form.c_str());
    for (const MatmulForm& few : FORMS) {
        if (form == few.suffix) {
            launch(name, {up(outputs, few.outputs), up(rows, few.rows)}, 256, 8 * few.rows * few.outputs * 4, x, weight.numbers.data(),
                   weight.scales.data(), y, rows, inputs, outputs);
            return;
        }
    }
    const int tile = sizeof(X) == 4 ? 64 : 128;
    launch(name, {up(rows, 128), up(outputs, tile)}, 256, 3 * 32 * (128 * sizeof(X) + tile * sizeof(W)), x, weight.numbers.data(),
           weight.scales.data(), y, rows, inputs, outputs);
}

template <class F>
void for_weights(F f) {
    f(bf16{}, bf16{}, bf16{});
    f(bf16{}, bf16{}, float{});
    f(bf16{}, int8_t{}, bf16{});
    f(bf16{}, int8_t{}, float{});
    f(f16{}, f16{}, f16{});
    f(f16{}, f16{}, float{});
    f(f16{}, int8_t{}, f16{});
    f(f16{}, int8_t{}, float{});
    f(float{}, float{}, float{});
    f(float{}, bf16{}, float{});
    f(float{}, f16{}, float{});
    f(float{}, int8_t{}, float{});
}

void check_matmul() {
    for_weights([](auto x_, auto w_, auto y_) {
        using X = decltype(x_);
        using W = decltype(w_);
        using Y = decltype(y_);
        struct Shape {
            int rows, inputs, outputs;
        };
        for (const Shape s : {Shape{1, 1, 1}, Shape{2, 64, 17}, Shape{7, 33, 40}, Shape{33, 1064, 70}, Shape{65, 531, 9}, Shape{130, 96, 150}}) {
            const auto x = Buffer<X>::random(s.rows * s.inputs);
            const TestWeight<W> weight(s.outputs, s.inputs);
            Buffer<Y> first(s.rows * s.outputs);
            for (const char* form : {"many", "8", "16", "32", "64"}) {
                Buffer<Y> y(s.rows * s.outputs);
                matmul(form, x.data(), weight, y.data(), s.rows, s.inputs, s.outputs);
                if (std::string(form) != "many") {
                    same_bits(text("%s %s %s form %s beside many, %dx%dx%d", NAME<X>, NAME<W>, NAME<Y>, form, s.rows, s.inputs, s.outputs), y.data(), first.data(), y.size());
                    continue;
                }
                std::memcpy(first.data(), y.data(), y.size() * sizeof(Y));
                for (int r = 0; r < s.rows; r++) {
                    for (int o = 0; o < s.outputs; o++) {
                        double want = 0, size = 0;
                        for (int k = 0; k < s.inputs; k++) {
                            const double term = x.value(r * s.inputs + k) * weight.values[o * s.inputs + k];
                            want += term;
                            size += std::fabs(term);
                        }
                        near(text("%s %s %s %dx%dx%d [%d, %d]", NAME<X>, NAME<W>, NAME<Y>, s.rows, s.inputs, s.outputs, r, o), y.value(r * s.outputs + o), want,
                             EPSILON<Y> * std::fabs(want) + 1e-6 * size);
                    }
                }
            }
        }
    });
}

// A row alone and among others, through whatever program their number chooses.
void check_matmul_rows() {
    for_weights([](auto x_, auto w_, auto y_) {
        using X = decltype(x_);
        using W = decltype(w_);
        using Y = decltype(y_);
        const int inputs = 1600, outputs = 48;
        const auto x = Buffer<X>::random(130 * inputs);
        const TestWeight<W> weight(outputs, inputs);
        Buffer<Y> all(130 * outputs);
        matmul("many", x.data(), weight, all.data(), 130, inputs, outputs);
        for (int rows : {1, 2, 7, 33}) {
            const int first = below(130 - rows);
            const std::string form = rows <= 8 ? "8" : "64";
            Buffer<Y> y(rows * outputs);
            matmul(form, x.data() + first * inputs, weight, y.data(), rows, inputs, outputs);
            same_bits(text("%s %s %s: %d rows of 130", NAME<X>, NAME<W>, NAME<Y>, rows), y.data(), all.data() + first * outputs, y.size());
        }
    });
}

void check_matmul_backward() {
    const auto one = [](auto x_, auto w_, int m_tiles) {
        using X = decltype(x_);
        using W = decltype(w_);
        const size_t v = sizeof(W) == 1 ? 4 : sizeof(W), tile = 32 * m_tiles;
        const unsigned shared = 2 * (128 * (32 + 16 / sizeof(X)) * sizeof(X) + 32 * (tile + 16 / v) * v);
        struct Shape {
            int rows, inputs, outputs;
        };
        for (const Shape s : {Shape{1, 1, 1}, Shape{3, 40, 33}, Shape{131, 136, 520}, Shape{20, 67, 1100}}) {
            const auto dy = Buffer<X>::random(s.rows * s.outputs);
            const TestWeight<W> weight(s.outputs, s.inputs);
            auto dx = Buffer<X>::random(s.rows * s.inputs);
            const auto old = dx.copy();
            const auto run = [&](int rows, const X* dy, X* dx) {
                launch(text("matmul_backward_%s_%s", NAME<X>, NAME<W>), {up(rows, 128), up(s.inputs, tile)}, 256, shared, dy, weight.numbers.data(),
                       weight.scales.data(), dx, rows, s.inputs, s.outputs);
            };
            run(s.rows, dy.data(), dx.data());
            for (int r = 0; r < s.rows; r++) {
                for (int i = 0; i < s.inputs; i++) {
                    double want = old.value(r * s.inputs + i), size = std::fabs(want);
                    for (int o = 0; o < s.outputs; o++) {
                        const double term = dy.value(r * s.outputs + o) * weight.values[o * s.inputs + i];
                        want += term;
                        size += std::fabs(term);
                    }
                    near(text("%s %s %dx%dx%d [%d, %d]", NAME<X>, NAME<W>, s.rows, s.inputs, s.outputs, r, i), dx.value(r * s.inputs + i), want,
                         EPSILON<X> * std::fabs(want) + 1e-6 * size);
                }
            }
            const int row = below(s.rows);
            Buffer<X> alone(s.inputs);
            std::memcpy(alone.data(), old.data() + row * s.inputs, s.inputs * sizeof(X));
            run(1, dy.data() + row * s.outputs, alone.data());
            same_bits("a row alone", alone.data(), dx.data() + row * s.inputs, s.inputs);
        }
    };
    one(bf16{}, bf16{}, 4);
    one(bf16{}, int8_t{}, 2);
    one(f16{}, f16{}, 4);
    one(f16{}, int8_t{}, 2);
    one(float{}, float{}, 2);
    one(float{}, bf16{}, 2);
    one(float{}, f16{}, 2);
    one(float{}, int8_t{}, 2);
}

// === low-rank updates ===

struct Update {
    const void* a;
    const void* bt;
    i64 h;
    int rank;
    float scale;
    int a_type, bt_type;
};
struct Chunk {
    int segment, row, rows, offset;
};

// A factor in one of three types, and its numbers.
struct Factor {
    Buffer<float> f32;
    Buffer<bf16> b16;
    Buffer<f16> h16;
    int type;
    std::vector<double> values;
    Factor(size_t count, int type) : f32(type == 0 ? count : 0), b16(type == 1 ? count : 0), h16(type == 2 ? count : 0), type(type), values(count) {
        for (size_t i = 0; i < count; i++) {
            const double x = normal() * 0.5;
            if (type == 0) values[i] = f32[i] = static_cast<float>(x);
            if (type == 1) values[i] = widen(b16[i] = narrow<bf16>(x));
            if (type == 2) values[i] = widen(h16[i] = narrow<f16>(x));
        }
    }
    const void* data() const { return type == 0 ? static_cast<const void*>(f32.data()) : type == 1 ? static_cast<const void*>(b16.data()) : h16.data(); }
};

struct TestUpdate {
    int segment, site, rank;
    float scale;
    std::shared_ptr<Factor> a, bt;
};

// A step's segments and updates in tables with empty tails.
struct Tables {
    std::vector<Chunk> chunks;
    std::vector<int> first;
    std::vector<Update> updates;
    i64 scratch = 0;
};

Tables tables_of(const std::vector<int>& starts, const std::vector<TestUpdate>& updates, int sites, int chunk_rows) {
    Tables tables;
    const int segments = static_cast<int>(starts.size()) - 1;
    for (int s = 0; s < segments; s++) {
        for (int row = starts[s]; row < starts[s + 1]; row += chunk_rows) {
            tables.chunks.push_back({s, row, std::min(chunk_rows, starts[s + 1] - row), row - starts[s]});
        }
        for (int site = 0; site < sites; site++) {
            tables.first.push_back(static_cast<int>(tables.updates.size()));
            for (const TestUpdate& update : updates) {
                if (update.segment != s || update.site != site) continue;
                tables.updates.push_back({update.a->data(), update.bt->data(), tables.scratch, update.rank, update.scale, update.a->type, update.bt->type});
                tables.scratch += (static_cast<i64>(starts[s + 1] - starts[s]) * update.rank + 3) / 4 * 4;
            }
        }
    }
    tables.first.push_back(static_cast<int>(tables.updates.size()));
    for (int i = 0; i < 3; i++) tables.chunks.push_back({-1, -1, 0, 0});
    return tables;
}

template <class T>
struct Group {
    int sites, inputs;
    int outputs[3];
};

template <class T>
void low_rank(const Group<T>& group, const Buffer<T>& x, const std::vector<int>& starts, const std::vector<TestUpdate>& updates, int chunk_rows,
              unsigned grid_y, Buffer<T>* const (&y)[3]) {
    const Tables tables = tables_of(starts, updates, group.sites, chunk_rows);
    const auto chunks = Buffer<Chunk>::of(tables.chunks);
    const auto first = Buffer<int>::of(tables.first);
    const auto table = Buffer<Update>::of(tables.updates);
    Buffer<float> h(tables.scratch + 4);
    T* ys[3];
    unsigned tiles = 0;
    for (int i = 0; i < 3; i++) {
        ys[i] = i < group.sites ? y[i]->data() : nullptr;
        if (i < group.sites) tiles += up(group.outputs[i], 128);
    }
    const unsigned size = static_cast<unsigned>(tables.chunks.size());
    launch(text("shrink_%s", NAME<T>), {size, grid_y, 2}, 256, 0, chunks.data(), first.data(), table.data(), group.sites, x.data(), x.data(), x.data(),
           group.inputs, group.inputs, group.inputs, h.data());
    launch(text("expand_%s", NAME<T>), {size, tiles + 1}, 128, 0, chunks.data(), first.data(), table.data(), group.sites, h.data(), ys[0], ys[1], ys[2],
           group.outputs[0], group.outputs[1], group.outputs[2]);
}

template <class T>
void low_rank_case(const Group<T>& group, const std::vector<int>& starts, const std::vector<TestUpdate>& updates) {
    const int rows = starts.back();
    const auto x = Buffer<T>::random(static_cast<size_t>(rows) * group.inputs);
    std::vector<Buffer<T>> old, y, cut, alone;
    for (int s = 0; s < 3; s++) {
        old.push_back(Buffer<T>::random(s < group.sites ? static_cast<size_t>(rows) * group.outputs[s] : 0));
        y.push_back(old.back().copy());
        cut.push_back(old.back().copy());
        alone.push_back(old.back().copy());
    }
    low_rank<T>(group, x, starts, updates, 64, 8, {&y[0], &y[1], &y[2]});
    // Other chunks and another grid: other neighbours in a block, and the same bits.
    low_rank<T>(group, x, starts, updates, 5, 1, {&cut[0], &cut[1], &cut[2]});
    for (int s = 0; s < group.sites; s++) same_bits(text("%s cut in chunks of 5", NAME<T>), cut[s].data(), y[s].data(), y[s].size());
    for (int s = 0; s < group.sites; s++) {
        for (int segment = 0; segment + 1 < static_cast<int>(starts.size()); segment++) {
            for (int r = starts[segment]; r < starts[segment + 1]; r++) {
                std::vector<double> want(group.outputs[s]), size(group.outputs[s]);
                bool any = false;
                for (const TestUpdate& update : updates) {
                    if (update.segment != segment || update.site != s) continue;
                    any = true;
                    for (int j = 0; j < update.rank; j++) {
                        double h = 0, h_size = 0;
                        for (int k = 0; k < group.inputs; k++) {
                            const double term = x.value(static_cast<size_t>(r) * group.inputs + k) * update.a->values[static_cast<size_t>(j) * group.inputs + k];
                            h += term;
                            h_size += std::fabs(term);
                        }
                        for (int o = 0; o < group.outputs[s]; o++) {
                            const double b = update.scale * update.bt->values[static_cast<size_t>(j) * group.outputs[s] + o];
                            want[o] += h * b;
                            size[o] += std::fabs(h_size * b);
                        }
                    }
                }
                for (int o = 0; o < group.outputs[s]; o++) {
                    const size_t at = static_cast<size_t>(r) * group.outputs[s] + o;
                    const double all = old[s].value(at) + want[o];
                    near(text("%s segment %d site %d row %d output %d", NAME<T>, segment, s, r, o), y[s].value(at), all,
                         any ? EPSILON<T> * std::fabs(all) + 2e-6 * size[o] + 1e-6 : 0);
                }
            }
        }
    }
}

void check_low_rank() {
    for_numbers([](auto t) {
        using T = decltype(t);
        // Ragged, empty and single-row segments; a segment of two adapters; one that adapts not every site; every rank and type.
        {
            const Group<T> group{3, 136, {130, 40, 33}};
            const std::vector<int> starts = {0, 1, 1, 9, 75, 77, 80, 80};
            std::vector<TestUpdate> updates;
            const int ranks[] = {1, 3, 8, 16, 64, 20, 5};
            for (int s = 0; s < 7; s++) {
                for (int site = 0; site < 3; site++) {
                    if (s == 4 && site == 1) continue;
                    for (int part = 0; part < (s == 2 ? 2 : 1); part++) {
                        const int rank = ranks[(s + part) % 7];
                        updates.push_back({s, site, rank, 0.5f + 0.25f * s, std::make_shared<Factor>(rank * group.inputs, (s + site + part) % 3),
                                           std::make_shared<Factor>(rank * group.outputs[site], (s + part) % 3)});
                    }
                }
            }
            low_rank_case<T>(group, starts, updates);
        }
        // Rank 256, odd widths, inputs over more than a round of slices.
        {
            const Group<T> group{1, 5 * 512 * 2 + 37, {37}};
            std::vector<TestUpdate> updates;
            updates.push_back({0, 0, 3, 2.0f, std::make_shared<Factor>(3 * group.inputs, 1), std::make_shared<Factor>(3 * 37, 1)});
            low_rank_case<T>(group, {0, 2}, updates);
            const Group<T> wide{2, 48, {64, 72}};
            updates = {{0, 1, 256, 0.1f, std::make_shared<Factor>(256 * 48, 1), std::make_shared<Factor>(256 * 72, 1)},
                       {1, 0, 256, 0.1f, std::make_shared<Factor>(256 * 48, 0), std::make_shared<Factor>(256 * 64, 2)}};
            low_rank_case<T>(wide, {0, 12, 14}, updates);
        }
        // 128 adapters of one row each.
        {
            const Group<T> group{1, 64, {48}};
            std::vector<int> starts;
            std::vector<TestUpdate> updates;
            for (int s = 0; s <= 128; s++) starts.push_back(s);
            for (int s = 0; s < 128; s++) {
                updates.push_back({s, 0, 1 + s % 16, 1.5f, std::make_shared<Factor>((1 + s % 16) * 64, s % 3), std::make_shared<Factor>((1 + s % 16) * 48, s % 3)});
            }
            low_rank_case<T>(group, starts, updates);
        }
    });
}

struct Outer {
    i64 h;
    float* dw;
    int row, rows, rank, site;
    float scale;
    int unused;
};

void check_outer() {
    for_numbers([](auto t) {
        using T = decltype(t);
        const int rows = 90, widths[3] = {33, 136, 8};
        const Buffer<T> x[3] = {Buffer<T>::random(rows * widths[0]), Buffer<T>::random(rows * widths[1]), Buffer<T>::random(rows * widths[2])};
        const auto h = Buffer<float>::random(rows * 64 * 4);
        const Outer plan[] = {{0, nullptr, 0, 1, 1, 0, 1, 0}, {64, nullptr, 1, 70, 3, 1, 0.5f, 0}, {1000, nullptr, 71, 0, 8, 2, 1, 0},
                              {2000, nullptr, 71, 19, 16, 1, -2, 0}, {4000, nullptr, 3, 33, 20, 2, 1, 0}};
        std::vector<Buffer<float>> dw, old, parts;
        std::vector<Outer> entries;
        for (Outer entry : plan) {
            old.push_back(Buffer<float>::random(entry.rank * widths[entry.site]));
            dw.push_back(old.back().copy());
            parts.push_back(old.back().copy());
            entry.dw = dw.back().data();
            entries.push_back(entry);
        }
        const auto run = [&](const std::vector<Outer>& entries) {
            const auto table = Buffer<Outer>::of(entries);
            launch(text("outer_%s", NAME<T>), {up(136, 128), 2, unsigned(entries.size())}, 128, 0, table.data(), x[0].data(), x[1].data(), x[2].data(), widths[0],
                   widths[1], widths[2], h.data());
        };
        run(entries);
        for (size_t e = 0; e < entries.size(); e++) {
            const Outer& entry = entries[e];
            const int width = widths[entry.site];
            for (int j = 0; j < entry.rank; j++) {
                for (int c = 0; c < width; c++) {
                    double want = old[e].value(j * width + c), size = std::fabs(want);
                    for (int r = 0; r < entry.rows; r++) {
                        const double term = entry.scale * h.value(entry.h + r * entry.rank + j) * x[entry.site].value((entry.row + r) * width + c);
                        want += term;
                        size += std::fabs(term);
                    }
                    near(text("%s entry %zu [%d, %d]", NAME<T>, e, j, c), dw[e].value(j * width + c), want, 1e-6 * size);
                }
            }
        }
        // Cut in two launches: the same bits.
        for (int half = 0; half < 2; half++) {
            std::vector<Outer> cut;
            for (size_t e = 0; e < entries.size(); e++) {
                Outer entry = entries[e];
                const int at = entry.rows / 3;
                entry.dw = parts[e].data();
                if (half == 1) {
                    entry.h += static_cast<i64>(at) * entry.rank;
                    entry.row += at;
                }
                entry.rows = half == 0 ? at : entry.rows - at;
                cut.push_back(entry);
            }
            run(cut);
        }
        for (size_t e = 0; e < entries.size(); e++) same_bits("rows cut elsewhere", parts[e].data(), dw[e].data(), dw[e].size());
    });
}

// === attention ===

struct Span {
    int row, rows, start, kv;
};

struct HeadsShape {
    int heads, kv_heads, head_dim, window;
    int tile() const { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
    float scale() const { return 1 / std::sqrt(static_cast<float>(head_dim)); }
    int first(int position) const { return window > 0 ? std::max(position + 1 - window, 0) : 0; }
};

unsigned tiles_bytes(size_t number, int dim, int warps, bool paged) {
    const size_t pad = 16 / number, stages = dim * number <= 512 ? 2 : 1;
    return static_cast<unsigned>(number * (stages * (paged ? dim * (32 + pad) : 32 * (dim + pad)) + stages * 32 * (dim + pad) + warps * 16 * (dim + pad)));
}
unsigned walk_bytes(size_t number, int dim, bool paged) { return tiles_bytes(number, dim, 4, paged) + dim / 8 * 4 * 128 * 4; }
unsigned back_bytes(size_t number, int dim) { return static_cast<unsigned>(number * 2 * (64 + 32) * (dim + 16 / number) + 2 * 32 * 4); }

// One query's head in double precision; `key(p, d)` and `value(p, d)`.
template <class Key, class Value>
double attend_one(const HeadsShape& s, int position, const std::vector<double>& q, Key key, Value value, std::vector<double>& out, std::vector<double>& size) {
    std::vector<double> scores;
    double highest = -1e300, total = 0;
    for (int p = s.first(position); p <= position; p++) {
        double score = 0;
        for (int d = 0; d < s.head_dim; d++) score += q[d] * key(p, d);
        scores.push_back(score * s.scale());
        highest = std::max(highest, scores.back());
    }
    for (double& score : scores) total += score = std::exp(score - highest);
    out.assign(s.head_dim, 0);
    size.assign(s.head_dim, 0);
    for (int p = s.first(position); p <= position; p++) {
        for (int d = 0; d < s.head_dim; d++) {
            const double term = scores[p - s.first(position)] / total * value(p, d);
            out[d] += term;
            size[d] += std::fabs(term);
        }
    }
    return highest + std::log(total);
}

// Weights are rounded to the type before they meet values, so that is what an answer may be off.
template <class T>
constexpr double ATTENTION_TOLERANCE = std::is_same_v<T, float> ? 4e-6 : EPSILON<T> * 1.5;

template <class T>
void paged_case(const HeadsShape& s, const std::vector<int>& lengths, const std::vector<int>& queries) {
    const int sequences = static_cast<int>(lengths.size());
    int blocks = 0, rows = 0, splits = 1;
    for (int i = 0; i < sequences; i++) {
        blocks += up(lengths[i], 16);
        rows += queries[i] + 1;
        splits = std::max(splits, static_cast<int>(up(lengths[i], 128)));
    }
    std::vector<int> order(blocks + 3), tables_flat, first_entry;
    std::iota(order.begin(), order.end(), 0);
    for (int i = blocks + 2; i > 0; i--) std::swap(order[i], order[below(i + 1)]);
    const int width = s.kv_heads * s.head_dim;
    // Blocks that nobody has written hold what is no number.
    Buffer<T> k((blocks + 3) * 16 * width), v((blocks + 3) * 16 * width);
    std::vector<Span> spans, single;
    int row = 0, block = 0;
    for (int i = 0; i < sequences; i++) {
        first_entry.push_back(static_cast<int>(tables_flat.size()));
        for (unsigned b = 0; b < up(lengths[i], 16); b++) tables_flat.push_back(order[block++]);
        const auto from_k = Buffer<T>::random(lengths[i] * width), from_v = Buffer<T>::random(lengths[i] * width);
        std::vector<int> places;
        for (int p = 0; p < lengths[i]; p++) places.push_back(tables_flat[first_entry[i] + p / 16] * 16 + p % 16);
        places.push_back(-1);
        const auto to = Buffer<int>::of(places);
        const Buffer<T> padded_k((lengths[i] + 1) * width), padded_v((lengths[i] + 1) * width);
        std::memcpy(padded_k.data(), from_k.data(), from_k.size() * sizeof(T));
        std::memcpy(padded_v.data(), from_v.data(), from_v.size() * sizeof(T));
        launch(text("store_keys_%s", NAME<T>), {unsigned(lengths[i] + 1)}, 256, 0, padded_k.data(), to.data(), k.data(), width, s.kv_heads, s.head_dim);
        launch(text("store_values_%s", NAME<T>), {unsigned(lengths[i] + 1)}, 256, 0, padded_v.data(), to.data(), v.data(), width, s.kv_heads, s.head_dim);
        for (int p = 0; p < lengths[i]; p++) {
            for (int c = 0; c < width; c++) {
                const i64 head = static_cast<i64>(places[p] / 16) * s.kv_heads + c / s.head_dim;
                const int d = c % s.head_dim;
                near("stored key", k.value((head * s.head_dim + d) * 16 + p % 16), from_k.value(p * width + c), 0);
                near("stored value", v.value((head * 16 + p % 16) * s.head_dim + d), from_v.value(p * width + c), 0);
            }
        }
        // Before it a row of nobody. Rows of one sequence in two spans where there are enough of them.
        row++;
        const int cut = queries[i] > 3 ? queries[i] / 3 : queries[i];
        spans.push_back({row, cut, lengths[i] - queries[i], first_entry[i]});
        if (cut < queries[i]) spans.push_back({row + cut, queries[i] - cut, lengths[i] - queries[i] + cut, first_entry[i]});
        // Decode: of a long prompt only some rows, each a span.
        for (int r = 0; r < queries[i]; r++) {
            if (r < 3 || r + 3 > queries[i] || r % 5 == 0) single.push_back({row + r, 1, lengths[i] - queries[i] + r, first_entry[i]});
        }
        row += queries[i];
    }
    spans.push_back({-1, 0, 0, 0});
    for (int i = static_cast<int>(single.size()) - 1; i > 0; i--) std::swap(single[i], single[below(i + 1)]);
    single.insert(single.end(), 2, {-1, 0, 0, 0});
    const auto q = Buffer<T>::random(rows * s.heads * s.head_dim);
    const auto tables = Buffer<int>::of(tables_flat);
    const auto table = Buffer<Span>::of(spans), single_table = Buffer<Span>::of(single);
    const int group = s.heads / s.kv_heads;
    int longest = 1;
    for (const Span& span : spans) longest = std::max(longest, span.rows);
    Buffer<T> walked(q.size()), split(q.size()), want_split(q.size());
    launch(text("attend_paged_%d_%s", s.tile(), NAME<T>), {unsigned(spans.size()), s.kv_heads * up(longest * group, 64)}, 128, walk_bytes(sizeof(T), s.tile(), true),
           q.data(), k.data(), v.data(), tables.data(), table.data(), s.heads, s.kv_heads, s.head_dim, s.window, s.scale(), walked.data());
    splits += 1;
    // Room for every row too, which must stay as it was.
    const size_t room = single.size() + rows;
    Buffer<float> parts(room * s.heads * splits * s.head_dim), marks(room * s.heads * splits * 2);
    launch(text("attend_split_%d_%s", s.tile(), NAME<T>), {unsigned(splits), s.kv_heads * up(group, 16), unsigned(single.size())}, 32,
           tiles_bytes(sizeof(T), s.tile(), 1, true), q.data(), k.data(), v.data(), tables.data(), single_table.data(), s.heads, s.kv_heads, s.head_dim, s.window,
           s.scale(), parts.data(), marks.data());
    // Under its number a span has the splits that it sees and no others; merged in double they are its row.
    for (size_t i = 0; i < room * s.heads; i++) {
        const Span span = i / s.heads < single.size() ? single[i / s.heads] : Span{-1, 0, 0, 0};
        const auto mark = [&](int j, int which) { return marks.value((i * splits + j) * 2 + which); };
        double highest = -1e300, total = 0;
        for (int j = 0; j < splits; j++) {
            const bool seen = span.rows > 0 && j >= s.first(span.start) / 128 && j <= span.start / 128;
            near(text("%s span %zu has split %d", NAME<T>, i / s.heads, j), !std::isnan(mark(j, 0)), seen, 0);
            if (seen) highest = std::max(highest, mark(j, 0));
        }
        if (span.rows == 0) continue;
        std::vector<double> sums(s.head_dim);
        for (int j = s.first(span.start) / 128; j <= span.start / 128; j++) {
            const double scale = std::exp2(mark(j, 0) - highest);
            total += mark(j, 1) * scale;
            for (int d = 0; d < s.head_dim; d++) sums[d] += parts.value((i * splits + j) * s.head_dim + d) * scale;
        }
        for (int d = 0; d < s.head_dim; d++) {
            const double want = walked.value((static_cast<i64>(span.row) * s.heads + i % s.heads) * s.head_dim + d);
            near(text("%s parts of span %zu, row %d, head %zu [%d]", NAME<T>, i / s.heads, span.row, i % s.heads, d), sums[d] / total, want, EPSILON<T> * std::fabs(want) + 1e-6);
        }
    }
    launch(text("attend_combine_%s", NAME<T>), {unsigned(single.size()), unsigned(s.heads)}, 128, 0, parts.data(), marks.data(), single_table.data(), s.heads, s.kv_heads,
           s.head_dim, s.window, splits, split.data());
    // Rows of no span stay as they were.
    for (const Span& span : single) {
        if (span.rows > 0) std::memcpy(want_split.data() + span.row * s.heads * s.head_dim, walked.data() + span.row * s.heads * s.head_dim, s.heads * s.head_dim * sizeof(T));
    }
    same_bits(text("%s heads %d/%d of %d, window %d: decode beside prefill", NAME<T>, s.heads, s.kv_heads, s.head_dim, s.window), split.data(), want_split.data(), q.size());
    row = 0;
    for (int i = 0; i < sequences; i++) {
        const auto key_at = [&](int p, int head, int d) { return k.value(((tables_flat[first_entry[i] + p / 16] * static_cast<i64>(s.kv_heads) + head) * s.head_dim + d) * 16 + p % 16); };
        const auto value_at = [&](int p, int head, int d) { return v.value(((tables_flat[first_entry[i] + p / 16] * static_cast<i64>(s.kv_heads) + head) * 16 + p % 16) * s.head_dim + d); };
        row++;
        for (int r = 0; r < queries[i]; r++, row++) {
            if (r > 3 && r + 3 < queries[i] && r % 7) continue;
            for (int h = 0; h < s.heads; h++) {
                std::vector<double> query(s.head_dim), out, size;
                const i64 at = (static_cast<i64>(row) * s.heads + h) * s.head_dim;
                for (int d = 0; d < s.head_dim; d++) query[d] = q.value(at + d);
                attend_one(s, lengths[i] - queries[i] + r, query, [&](int p, int d) { return key_at(p, h / group, d); }, [&](int p, int d) { return value_at(p, h / group, d); }, out, size);
                for (int d = 0; d < s.head_dim; d++) {
                    near(text("%s heads %d/%d of %d window %d sequence %d row %d head %d [%d]", NAME<T>, s.heads, s.kv_heads, s.head_dim, s.window, i, r, h, d),
                         walked.value(at + d), out[d], ATTENTION_TOLERANCE<T> * size[d] + EPSILON<T> * std::fabs(out[d]) + 1e-6);
                }
            }
        }
    }
    // The last row of the last sequence alone.
    const int last = sequences - 1;
    const auto alone = Buffer<Span>::of({{0, 1, lengths[last] - 1, first_entry[last]}});
    Buffer<T> one(s.heads * s.head_dim);
    launch(text("attend_paged_%d_%s", s.tile(), NAME<T>), {1, s.kv_heads * up(group, 64)}, 128, walk_bytes(sizeof(T), s.tile(), true),
           q.data() + (rows - 1) * s.heads * s.head_dim, k.data(), v.data(), tables.data(), alone.data(), s.heads, s.kv_heads, s.head_dim, s.window, s.scale(), one.data());
    same_bits("a row alone", one.data(), walked.data() + (rows - 1) * s.heads * s.head_dim, one.size());
}

void check_paged_attention() {
    for_numbers([](auto t) {
        using T = decltype(t);
        paged_case<T>({4, 2, 16, 0}, {1, 17, 300}, {1, 5, 40});
        paged_case<T>({3, 1, 64, 0}, {129, 40}, {1, 37});
        paged_case<T>({8, 2, 12, 50}, {200, 33, 64}, {70, 33, 1});
        paged_case<T>({20, 1, 128, 0}, {70, 130}, {2, 1});
        paged_case<T>({2, 2, 80, 16}, {140}, {9});
        paged_case<T>({2, 1, 256, 0}, {150}, {3});
    });
}

template <class T>
void flat_case(const HeadsShape& s, const std::vector<int>& lengths, bool cut) {
    int rows = 0;
    std::vector<Span> spans;
    for (const int length : lengths) {
        spans.push_back({rows, length, 0, rows});
        rows += length;
    }
    if (cut) spans.push_back({-1, 0, 0, 0});
    const int kv_width = s.kv_heads * s.head_dim, q_width = s.heads * s.head_dim, group = s.heads / s.kv_heads;
    const auto q = Buffer<T>::random(rows * q_width), k = Buffer<T>::random(rows * kv_width), v = Buffer<T>::random(rows * kv_width), dout = Buffer<T>::random(rows * q_width);
    const auto table = Buffer<Span>::of(spans);
    const int longest = *std::max_element(lengths.begin(), lengths.end());
    Buffer<T> out(q.size()), dq(q.size());
    Buffer<float> lse(rows * s.heads), means(rows * s.heads);
    launch(text("attend_flat_%d_%s", s.tile(), NAME<T>), {unsigned(spans.size()), s.kv_heads * up(longest * group, 64)}, 128, walk_bytes(sizeof(T), s.tile(), false),
           q.data(), k.data(), v.data(), table.data(), s.heads, s.kv_heads, s.head_dim, s.window, s.scale(), out.data(), lse.data());
    auto dk = Buffer<T>::random(k.size()), dv = Buffer<T>::random(v.size());
    const auto dk_old = dk.copy(), dv_old = dv.copy();
    launch(text("attention_mean_%s", NAME<T>), {up(rows * s.heads, 8)}, 256, 0, out.data(), dout.data(), means.data(), s.head_dim, i64(rows) * s.heads);
    launch(text("attention_backward_keys_%d_%s", s.tile(), NAME<T>), {up(longest, 64), unsigned(s.kv_heads), unsigned(spans.size()) * (s.tile() == 256 ? 2 : 1)}, 128,
           back_bytes(sizeof(T), s.tile()), q.data(), k.data(), v.data(), lse.data(), means.data(), dout.data(), table.data(), s.heads, s.kv_heads, s.head_dim, s.window,
           s.scale(), dk.data(), dv.data());
    launch(text("attention_backward_queries_%d_%s", s.tile(), NAME<T>), {unsigned(spans.size()), s.kv_heads * up(longest * group, 64)}, 128, back_bytes(sizeof(T), s.tile()),
           q.data(), k.data(), v.data(), lse.data(), means.data(), dout.data(), table.data(), s.heads, s.kv_heads, s.head_dim, s.window, s.scale(), dq.data());
    std::vector<double> want_dk(k.size()), want_dv(v.size()), size_dk(k.size()), size_dv(v.size());
    for (const Span& span : spans) {
        for (int r = 0; r < span.rows; r++) {
            for (int h = 0; h < s.heads; h++) {
                std::vector<double> query(s.head_dim), want, size;
                const int at = (span.row + r) * q_width + h * s.head_dim;
                for (int d = 0; d < s.head_dim; d++) query[d] = q.value(at + d);
                const auto kv = [&](int p, int d) { return (span.kv + p) * kv_width + h / group * s.head_dim + d; };
                const double denominator = attend_one(s, r, query, [&](int p, int d) { return k.value(kv(p, d)); }, [&](int p, int d) { return v.value(kv(p, d)); }, want, size);
                near("lse", lse.value((span.row + r) * s.heads + h), denominator, 1e-5 * (1 + std::fabs(denominator)));
                double mean = 0;
                for (int d = 0; d < s.head_dim; d++) {
                    near(text("%s flat out", NAME<T>), out.value(at + d), want[d], ATTENTION_TOLERANCE<T> * size[d] + EPSILON<T> * std::fabs(want[d]) + 1e-6);
                    mean += dout.value(at + d) * out.value(at + d);
                }
                std::vector<double> slope(s.head_dim), slope_size(s.head_dim);
                for (int p = s.first(r); p <= r; p++) {
                    double score = 0, along = 0;
                    for (int d = 0; d < s.head_dim; d++) {
                        score += query[d] * k.value(kv(p, d));
                        along += dout.value(at + d) * v.value(kv(p, d));
                    }
                    const double weight = std::exp(score * s.scale() - denominator), ds = s.scale() * weight * (along - mean);
                    for (int d = 0; d < s.head_dim; d++) {
                        slope[d] += ds * k.value(kv(p, d));
                        slope_size[d] += std::fabs(ds * k.value(kv(p, d)));
                        want_dk[kv(p, d)] += ds * query[d];
                        size_dk[kv(p, d)] += std::fabs(ds * query[d]);
                        want_dv[kv(p, d)] += weight * dout.value(at + d);
                        size_dv[kv(p, d)] += std::fabs(weight * dout.value(at + d));
                    }
                }
                for (int d = 0; d < s.head_dim; d++) {
                    near(text("%s dq heads %d/%d of %d row %d [%d]", NAME<T>, s.heads, s.kv_heads, s.head_dim, r, d), dq.value(at + d), slope[d],
                         ATTENTION_TOLERANCE<T> * slope_size[d] + EPSILON<T> * std::fabs(slope[d]) + 3e-6);
                }
            }
        }
    }
    for (size_t i = 0; i < k.size(); i++) {
        const double wk = dk_old.value(i) + want_dk[i], wv = dv_old.value(i) + want_dv[i];
        near(text("%s dk heads %d/%d of %d [%zu]", NAME<T>, s.heads, s.kv_heads, s.head_dim, i), dk.value(i), wk, ATTENTION_TOLERANCE<T> * size_dk[i] + EPSILON<T> * std::fabs(wk) + 3e-6);
        near(text("%s dv heads %d/%d of %d [%zu]", NAME<T>, s.heads, s.kv_heads, s.head_dim, i), dv.value(i), wv, ATTENTION_TOLERANCE<T> * size_dv[i] + EPSILON<T> * std::fabs(wv) + 3e-6);
    }
}

void check_flat_attention() {
    for_numbers([](auto t) {
        using T = decltype(t);
        flat_case<T>({4, 2, 16, 0}, {1, 70, 33}, true);
        flat_case<T>({3, 1, 64, 40}, {150}, false);
        flat_case<T>({2, 2, 12, 0}, {20, 5}, true);
        flat_case<T>({2, 1, 128, 0}, {66}, false);
        flat_case<T>({1, 1, 200, 0}, {37}, false);
    });
}

// === loss, sampling, optimizer ===

void check_loss() {
    for (int vocab : {1, 7, 1000, 4099}) {
        const int rows = 4;
        const auto logits = Buffer<float>::random(rows * vocab, 4);
        std::vector<unsigned> labels;
        // The label is the highest logit, one of two highest, one a bit below it, and any.
        for (int r = 0; r < rows; r++) {
            const float* const row = logits.data() + r * vocab;
            const int best = static_cast<int>(std::max_element(row, row + vocab) - row);
            labels.push_back(r == 0 ? best : r < 3 ? (best + vocab - 1) % vocab : below(vocab));
            if (r == 1) logits[r * vocab + labels[r]] = row[best];
            if (r == 2) logits[r * vocab + labels[r]] = std::nextafter(row[best], -INFINITY);
        }
        const auto label = Buffer<unsigned>::of(labels);
        const auto weights = Buffer<float>::random(rows);
        Buffer<float> judged(rows * 2), judged_again(rows * 2), statistics(rows * 2);
        launch("softmax_statistics", {rows}, 512, 0, logits.data(), statistics.data(), vocab);
        for_numbers([&](auto t) {
            using T = decltype(t);
            Buffer<T> gradient(rows * vocab);
            launch(text("cross_entropy_%s", NAME<T>), {rows}, 512, 0, logits.data(), label.data(), weights.data(), gradient.data(), judged.data(), vocab);
            for (int r = 0; r < rows; r++) {
                double highest = -1e300, total = 0;
                for (int i = 0; i < vocab; i++) highest = std::max(highest, logits.value(r * vocab + i));
                for (int i = 0; i < vocab; i++) total += std::exp(logits.value(r * vocab + i) - highest);
                near("highest", statistics[2 * r], highest, 0);
                near("denominator", statistics[2 * r + 1], highest + std::log(total), 1e-5);
                near("loss", judged[2 * r], highest + std::log(total) - logits.value(r * vocab + labels[r]), 1e-5);
                near("right", judged[2 * r + 1], logits.value(r * vocab + labels[r]) == highest, 0);
                for (int i = 0; i < vocab; i++) {
                    const double want = weights.value(r) * (std::exp(logits.value(r * vocab + i) - highest) / total - (i == static_cast<int>(labels[r])));
                    near(text("gradient %s", NAME<T>), gradient.value(r * vocab + i), want, (EPSILON<T> + 2e-6) * std::fabs(want) + 1e-7);
                }
            }
        });
        auto in_place = logits.copy();
        Buffer<float> gradient(rows * vocab);
        launch("cross_entropy_f32", {rows}, 512, 0, logits.data(), label.data(), weights.data(), gradient.data(), judged.data(), vocab);
        launch("cross_entropy_f32", {rows}, 512, 0, in_place.data(), label.data(), weights.data(), in_place.data(), judged_again.data(), vocab);
        same_bits("gradient in place", in_place.data(), gradient.data(), gradient.size());
        same_bits("judged in place", judged_again.data(), judged.data(), judged.size());
    }
}

struct Draw {
    float temperature, top_p, min_p;
    int top_k;
    u64 seed, counter;
};

// What may be drawn, by sorting.
std::vector<std::pair<int, double>> kept_tokens(const float* logits, int vocab, const Draw& draw) {
    std::vector<int> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    const float best = logits[order[0]];
    if (draw.top_k > 0 && draw.top_k < vocab) order.resize(draw.top_k);
    const auto mass = [&](int token) { return std::floor(static_cast<double>(std::exp((logits[token] - best) / draw.temperature)) * 1099511627776.0); };
    double total = 0, sum = 0;
    for (int token : order) total += mass(token);
    std::vector<std::pair<int, double>> kept;
    for (int token : order) {
        if (!kept.empty() && draw.top_p < 1 && sum >= std::floor(static_cast<double>(draw.top_p) * total)) break;
        sum += mass(token);
        const bool enough = std::exp((logits[token] - best) / draw.temperature) >= draw.min_p;
        if (enough || token == order[0]) kept.push_back({token, mass(token)});
    }
    std::sort(kept.begin(), kept.end());
    return kept;
}

void check_sampler() {
    const int vocab = 3001, rows = 9;
    auto logits = Buffer<float>::random(rows * vocab, 2);
    for (int i = 0; i < vocab; i++) logits[vocab + i] = static_cast<float>(below(4));
    for (int i = 0; i < vocab; i++) logits[2 * vocab + i] = i % 3 ? -INFINITY : -1000.0f - i % 5;
    logits[7 * vocab + 17] = NAN;
    const std::vector<Draw> draws = {{0, 1, 0, 0, 1, 1}, {0.5f, 1, 0, 40, 1, 2}, {1, 0.9f, 0, 0, 3, 3}, {0.7f, 0.8f, 0.05f, 50, 4, 4}, {1.3f, 0.5f, 0, 0, 5, 5},
                                     {1, 1, 0.2f, 0, 6, 6}, {0.01f, 0.95f, 0, 1, 7, 7}, {1, 1, 0, 0, 8, 8}, {2, 1, 0, 0, 9, 9}};
    std::vector<int> counts(rows * vocab);
    for (int round = 0; round < 12; round++) {
        std::vector<Draw> now = draws;
        for (Draw& draw : now) draw.counter += round * 1000;
        const auto table = Buffer<Draw>::of(now);
        Buffer<int> tokens(rows);
        launch("sample", {rows}, 1024, 0, logits.data(), table.data(), tokens.data(), vocab);
        for (int r = 0; r < rows; r++) {
            comparisons++;
            const float* const row = logits.data() + r * vocab;
            if (r == 7) {
                if (tokens[r] != -1) report("NaN was drawn from");
                continue;
            }
            if (now[r].temperature == 0) {
                if (tokens[r] != static_cast<int>(std::max_element(row, row + vocab) - row)) report("greedy is not the best");
                continue;
            }
            const auto kept = kept_tokens(row, vocab, now[r]);
            double total = 0, before = 0;
            for (const auto& [token, mass] : kept) total += mass;
            const u64 random = mixed(now[r].seed ^ mixed(now[r].counter));
            const double target = std::floor(static_cast<double>(random) / 18446744073709551616.0 * total);
            int want = -1;
            for (const auto& [token, mass] : kept) {
                if (target < before + mass) {
                    want = token;
                    break;
                }
                before += mass;
            }
            if (tokens[r] != want) report(text("row %d round %d: token %d, should be %d of %zu", r, round, tokens[r], want, kept.size()));
        }
    }
    const int n = 5;
    Buffer<float> statistics(rows * 2), chosen(rows), logprobs(rows * n);
    Buffer<int> ids(rows * n);
    const auto tokens = Buffer<int>::of({0, 1, 3, 5, 7, 9, 11, 13, 15});
    launch("softmax_statistics", {rows}, 512, 0, logits.data(), statistics.data(), vocab);
    launch("top_logprobs", {rows}, 1024, 0, logits.data(), statistics.data(), tokens.data(), chosen.data(), ids.data(), logprobs.data(), vocab, n);
    for (int r = 0; r < rows; r++) {
        if (r == 7) continue;
        const float* const row = logits.data() + r * vocab;
        std::vector<int> order(vocab);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
        double total = 0;
        for (int i = 0; i < vocab; i++) total += std::exp(static_cast<double>(row[i]) - row[order[0]]);
        const double denominator = row[order[0]] + std::log(total);
        near("chosen", chosen[r], row[tokens[r]] - denominator, 2e-4);
        for (int i = 0; i < n; i++) {
            near("top id", ids[r * n + i], order[i], 0);
            near("top logprob", logprobs[r * n + i], row[order[i]] - denominator, 2e-4);
        }
    }
}

void check_optimizer() {
    for (i64 count : {1, 300, 9000}) {
        auto p = Buffer<float>::random(count), m = Buffer<float>::random(count), v = Buffer<float>::random(count);
        const auto g = Buffer<float>::random(count);
        for (i64 i = 0; i < count; i++) v[i] = std::fabs(v[i]);
        const auto p0 = p.copy(), m0 = m.copy(), v0 = v.copy();
        launch("adamw", {up(count, 256)}, 256, 0, p.data(), g.data(), m.data(), v.data(), count, 0.5f, 0.9f, 0.1f, 0.99f, 0.01f, 0.3f, 1e-8f, 0.999f, 0.01f);
        for (i64 i = 0; i < count; i++) {
            const double grad = g[i] * 0.5, mean = 0.9 * m0[i] + 0.1 * grad, square = 0.99 * v0[i] + 0.01 * grad * grad;
            near("mean", m[i], mean, 1e-6);
            near("square", v[i], square, 1e-6);
            const double size = 0.01 * mean / (std::sqrt(square) / 0.3 + 1e-8);
            near("parameter", p[i], 0.999 * p0[i] - size, 1e-6 + 1e-5 * std::fabs(size));
        }
        const i64 stretches = up(count, 4096);
        Buffer<double> sums(stretches), total(1);
        launch("sum_of_squares", {unsigned(stretches)}, 256, 0, g.data(), count, sums.data());
        launch("sum_of_sums", {1}, 256, 0, sums.data(), stretches, total.data());
        double want = 0;
        for (i64 i = 0; i < count; i++) want += static_cast<double>(g[i]) * g[i];
        near("norm", total[0], want, 1e-10 * want);
    }
}

// === the emulator itself ===

void check_errors() {
    const auto refused = [](const char* name, int count, unsigned threads) {
        void* arguments[16] = {};
        const unsigned grid[3] = {1, 1, 1}, block[3] = {threads, 1, 1};
        char error[256] = "";
        comparisons++;
        if (!espalier_emulator_launch(name, grid, block, 0, arguments, count, 0, error, sizeof error) || !*error) report(std::string(name) + " ran");
    };
    refused("rms_norm_f64", 5, 256);
    refused("rms_norm_f32", 4, 256);
    refused("rms_norm_f32", 5, 257);
    refused("rms_norm_f32", 5, 512);
    near("arguments of fill_uniform_f32", espalier_emulator_arguments("fill_uniform_f32"), 5, 0);
    near("arguments of no kernel", espalier_emulator_arguments("rms_norm_f64"), -1, 0);
    // `T* out, i64 first, i64 count, u64 seed, float bound`, and none on either side.
    const int bytes[] = {-1, 8, 8, 8, 8, 4, -1};
    for (int i = 0; i < 7; i++) near(text("bytes of argument %d", i - 1), espalier_emulator_argument_bytes("fill_uniform_f32", i - 1), bytes[i], 0);
    near("bytes of no kernel", espalier_emulator_argument_bytes("rms_norm_f64", 0), -1, 0);
}

// Launches from several threads at once.
void check_threads() {
    constexpr int THREADS = 4, ROWS = 200, WIDTH = 300;
    const auto x = Buffer<float>::random(THREADS * ROWS * WIDTH), weight = Buffer<float>::random(WIDTH);
    Buffer<float> y(x.size());
    std::string errors[THREADS];
    std::vector<std::thread> threads;
    std::latch ready(THREADS);
    for (int i = 0; i < THREADS; i++) {
        threads.emplace_back([&, i] {
            ready.arrive_and_wait();
            for (int r = i * ROWS; r < (i + 1) * ROWS; r++) {
                const float *from = x.data() + r * WIDTH, *by = weight.data();
                float *to = y.data() + r * WIDTH, eps = 1e-5f;
                int width = WIDTH;
                void* arguments[] = {&from, &by, &eps, &to, &width};
                const unsigned grid[3] = {1, 1, 1}, block[3] = {256, 1, 1};
                char error[512] = "";
                if (espalier_emulator_launch("rms_norm_f32", grid, block, 0, arguments, 5, r % 2, error, sizeof error)) errors[i] = error;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& error : errors) {
        if (!error.empty()) report(error);
    }
    for (int r = 0; r < THREADS * ROWS; r++) {
        double squares = 0;
        for (int i = 0; i < WIDTH; i++) squares += x.value(r * WIDTH + i) * x.value(r * WIDTH + i);
        for (int i = 0; i < WIDTH; i++) {
            const double want = weight.value(i) * x.value(r * WIDTH + i) / std::sqrt(squares / WIDTH + 1e-5);
            near(text("row %d [%d]", r, i), y.value(r * WIDTH + i), want, 2e-6 * (1 + std::fabs(want)));
        }
    }
}

struct Check {
    const char* name;
    void (*run)();
};
constexpr Check CHECKS[] = {
    {"errors", check_errors},
    {"threads", check_threads},
    {"gather", check_gather},
    {"norm", check_norm},
    {"rope", check_rope},
    {"swiglu", check_swiglu},
    {"sum", check_sum},
    {"fill", check_fill},
    {"cache", check_cache},
    {"dropout", check_dropout},
    {"matmul", check_matmul},
    {"matmul_rows", check_matmul_rows},
    {"matmul_backward", check_matmul_backward},
    {"low_rank", check_low_rank},
    {"outer", check_outer},
    {"paged_attention", check_paged_attention},
    {"flat_attention", check_flat_attention},
    {"loss", check_loss},
    {"sampler", check_sampler},
    {"optimizer", check_optimizer},
};

}  // namespace

int main(int count, char** names) {
    for (const Check& check : CHECKS) {
        if (count > 1 && std::none_of(names + 1, names + count, [&](const char* name) { return std::string(name) == check.name; })) continue;
        subject = check.name;
        state = 1;
        const int failed = failures, compared = comparisons;
        const auto begin = std::chrono::steady_clock::now();
        check.run();
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        std::printf("%-18s %8d comparisons %6d failures %7.1f s\n", check.name, comparisons - compared, failures - failed, seconds);
        std::fflush(stdout);
    }
    return failures ? 1 : 0;
}
