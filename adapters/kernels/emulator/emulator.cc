// Runs the kernels on a processor: a fibre for every thread of a block, blocks one after another.
//
// Warps run as far apart as barriers allow: one runs until it meets the block's barrier, then the next. A launch has an
// order, and a kernel that gives other bits in the opposite order has a race. Launches may come from any thread and run one
// at a time. It must not know any kernel.

#include "cuda.h"

#include <sys/mman.h>

#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__x86_64__)
// Leaves one fibre's stack, whose place it notes, for another's. What a call must keep is kept on the stacks.
extern "C" void espalier_switch(void** from, void* to);
asm(R"(
.text
.globl espalier_switch
.type espalier_switch, @function
espalier_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#include <ucontext.h>
#endif

namespace emulator {

Place* place = nullptr;

namespace {

constexpr size_t STACK = 128 << 10;
constexpr size_t STATIC_LIMIT = 48 << 10, LIMIT = 227 << 10;
constexpr size_t CANARY = 64;

// === fibres ===

#if defined(__x86_64__)
struct Context {
    void* stack = nullptr;
};
void prepare(Context& context, char* stack, void (*run)()) {
    // `run` begins as if called: the stack is 8 beyond a multiple of 16.
    void** top = reinterpret_cast<void**>(stack + STACK) - 1;
    *--top = reinterpret_cast<void*>(run);
    top -= 6;
    context.stack = top;
}
void change(Context& from, Context& to) { espalier_switch(&from.stack, to.stack); }
#else
struct Context {
    ucontext_t state;
};
void prepare(Context& context, char* stack, void (*run)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = STACK;
    context.state.uc_link = nullptr;
    makecontext(&context.state, run, 0);
}
void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

struct Copy {
    void* to;
    char bytes[16];
    const void* from;
    int read;
    int group;
};

enum class State { READY, MEETING, BARRIER, DONE };

struct Fibre {
    Context context;
    Place place;
    State state = State::READY;
    unsigned meetings = 0;
    int group = 0;
    std::vector<Copy> copies;
};

struct Warp {
    alignas(64) char slots[2][32 * SLOT];
    int met = 0, kind = 0;
};

struct Region {
    const void* key;
    size_t bytes;
    std::unique_ptr<char[]> memory;
    char* at;
};

struct Run {
    const Entry* entry;
    void** arguments;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    std::vector<Region> regions;
    Context scheduler;
    Fibre* current = nullptr;
    std::string error;
};

Run* run = nullptr;

std::map<std::string, const Entry*>& entries() {
    static std::map<std::string, const Entry*> all;
    return all;
}

char* stack_of(size_t thread) {
    static std::vector<char*> stacks;
    while (stacks.size() <= thread) {
        void* memory = mmap(nullptr, STACK + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(memory, 4096, PROT_NONE);
        stacks.push_back(static_cast<char*>(memory) + 4096);
    }
    return stacks[thread];
}

void pause() {
    Fibre* const self = run->current;
    change(self->context, run->scheduler);
}

[[noreturn]] void fail(const std::string& why) {
    if (run->error.empty()) run->error = why;
    run->current->state = State::DONE;
    for (;;) pause();
}

void begin() {
    run->entry->call(run->arguments);
    run->current->state = State::DONE;
    for (;;) pause();
}

void poison(Region& region) {
    std::memset(region.at, 0xff, region.bytes);
    std::memset(region.at + region.bytes, 0xa5, CANARY);
}

char* region_of(const void* key, size_t bytes) {
    for (Region& region : run->regions) {
        if (region.key == key) return region.at;
    }
    Region region{key, bytes, std::make_unique<char[]>(bytes + CANARY + 128), nullptr};
    const size_t at = reinterpret_cast<size_t>(region.memory.get());
    region.at = region.memory.get() + ((at + 127) / 128 * 128 - at);
    poison(region);
    run->regions.push_back(std::move(region));
    return run->regions.back().at;
}

// One lane moves until it waits for others.
void step(Fibre& fibre) {
    run->current = &fibre;
    place = &fibre.place;
    change(run->scheduler, fibre.context);
}

bool run_warp(size_t warp, bool backwards) {
    bool moved = false;
    for (;;) {
        bool any = false;
        for (int i = 0; i < 32; i++) {
            Fibre& fibre = run->fibres[warp * 32 + (backwards ? 31 - i : i)];
            if (fibre.state == State::READY) {
                step(fibre);
                any = moved = true;
                if (!run->error.empty()) return false;
            }
        }
        if (!any) return moved;
    }
}

void run_block(bool backwards) {
    const size_t warps = run->warps.size();
    for (;;) {
        bool moved = false;
        for (size_t i = 0; i < warps; i++) moved |= run_warp(backwards ? warps - 1 - i : i, backwards);
        if (!run->error.empty()) return;
        size_t done = 0, waiting = 0;
        for (const Fibre& fibre : run->fibres) {
            done += fibre.state == State::DONE;
            waiting += fibre.state == State::BARRIER;
        }
        if (done == run->fibres.size()) return;
        if (waiting == run->fibres.size()) {
            for (Fibre& fibre : run->fibres) fibre.state = State::READY;
        } else if (!moved) {
            run->error = "threads wait for others that have left or wait elsewhere: " + std::to_string(waiting) +
                         " at the barrier, " + std::to_string(done) + " done of " + std::to_string(run->fibres.size());
            return;
        }
    }
}

void check_regions() {
    for (const Region& region : run->regions) {
        for (size_t i = 0; i < CANARY; i++) {
            if (region.at[region.bytes + i] != static_cast<char>(0xa5)) run->error = "shared memory was written beyond its end";
        }
    }
}

std::string launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared_bytes, void** arguments,
                   int count, bool backwards) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const auto found = entries().find(name);
    if (found == entries().end()) return std::string("no kernel ") + name;
    const Entry& entry = *found->second;
    const size_t threads = static_cast<size_t>(block[0]) * block[1] * block[2];
    if (count != entry.arguments) {
        return std::string(name) + " takes " + std::to_string(entry.arguments) + " arguments, not " + std::to_string(count);
    }
    if (block[1] != 1 || block[2] != 1 || threads == 0 || threads % 32 || threads > static_cast<size_t>(entry.threads)) {
        return std::string(name) + " runs in blocks of whole warps in a row, at most " + std::to_string(entry.threads) + " threads";
    }
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[1] > 65535 || grid[2] > 65535) {
        return std::string(name) + ": a grid that no device takes";
    }
    Run here;
    here.entry = &entry;
    here.arguments = arguments;
    here.fibres.resize(threads);
    here.warps.resize(threads / 32);
    run = &here;
    region_of(nullptr, shared_bytes);
    const size_t blocks = static_cast<size_t>(grid[0]) * grid[1] * grid[2];
    for (size_t b = 0; b < blocks && here.error.empty(); b++) {
        const size_t at = backwards ? blocks - 1 - b : b;
        const uint3 here_block{static_cast<unsigned>(at % grid[0]), static_cast<unsigned>(at / grid[0] % grid[1]),
                               static_cast<unsigned>(at / grid[0] / grid[1])};
        for (Region& region : here.regions) poison(region);
        for (Warp& warp : here.warps) warp.met = 0;
        for (size_t t = 0; t < threads; t++) {
            Fibre& fibre = here.fibres[t];
            fibre.place = {{static_cast<unsigned>(t), 0, 0}, here_block, {block[0], 1, 1}, {grid[0], grid[1], grid[2]}};
            fibre.state = State::READY;
            fibre.meetings = 0;
            fibre.group = 0;
            fibre.copies.clear();
            prepare(fibre.context, stack_of(t), begin);
        }
        run_block(backwards);
        check_regions();
        size_t fixed = 0;
        for (const Region& region : here.regions) fixed += region.key ? region.bytes : 0;
        if (fixed > STATIC_LIMIT || fixed + shared_bytes > LIMIT) here.error = "more shared memory than a device has";
    }
    run = nullptr;
    return here.error.empty() ? "" : std::string(name) + ": " + here.error;
}

}  // namespace

void Entry::enter() { entries()[name] = this; }

void* shared(const void* key, size_t bytes) { return region_of(key, bytes); }
char* dynamic_shared() { return region_of(nullptr, 0); }

void block_barrier() {
    run->current->state = State::BARRIER;
    pause();
}

const char* meet(int kind, const void* mine, size_t bytes, const std::function<void(char*)>& combine) {
    Fibre& self = *run->current;
    const unsigned thread = self.place.thread.x;
    Warp& warp = run->warps[thread / 32];
    char* const slots = warp.slots[self.meetings++ % 2];
    if (warp.met > 0 && warp.kind != kind) fail("lanes of one warp meet in different operations");
    warp.kind = kind;
    std::memcpy(slots + thread % 32 * SLOT, mine, bytes);
    if (++warp.met < 32) {
        self.state = State::MEETING;
        pause();
        return slots;
    }
    warp.met = 0;
    if (combine) combine(slots);
    for (unsigned lane = 0; lane < 32; lane++) {
        Fibre& other = run->fibres[thread / 32 * 32 + lane];
        if (&other != &self) other.state = State::READY;
    }
    return slots;
}

// A copy arrives as late as it may: when its thread waits for it.
void copy_16(void* to, const void* from, int bytes) {
    if (reinterpret_cast<size_t>(to) % 16 || reinterpret_cast<size_t>(from) % 16) fail("a copy of 16 bytes is not aligned");
    if (bytes < 0 || bytes > 16) fail("a copy of 16 bytes reads another number of them");
    Copy copy{to, {}, from, bytes, run->current->group};
    run->current->copies.push_back(copy);
}

void copies_begun() { run->current->group++; }

void copies_arrived(int pending) {
    Fibre& self = *run->current;
    std::vector<Copy> later;
    for (Copy& copy : self.copies) {
        if (copy.group >= self.group - pending) {
            later.push_back(copy);
            continue;
        }
        std::memset(copy.bytes, 0, 16);
        std::memcpy(copy.bytes, copy.from, copy.read);
        std::memcpy(copy.to, copy.bytes, 16);
    }
    self.copies.swap(later);
}

}  // namespace emulator

// As cuLaunchKernel: a grid, a block, dynamic shared bytes and pointers to the arguments. `order` 0 runs blocks, warps and
// lanes upwards, 1 downwards. Returns 0, or 1 with the reason in `error`.
extern "C" int espalier_emulator_launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                                        void** arguments, int count, int order, char* error, size_t error_bytes) {
    const std::string why = emulator::launch(name, grid, block, shared_bytes, arguments, count, order != 0);
    if (why.empty()) return 0;
    if (error_bytes > 0) std::snprintf(error, error_bytes, "%s", why.c_str());
    return 1;
}

// How many arguments a kernel takes, or -1 where there is none of that name.
extern "C" int espalier_emulator_arguments(const char* name) {
    const auto found = emulator::entries().find(name);
    return found == emulator::entries().end() ? -1 : found->second->arguments;
}

// How many bytes one of them has.
extern "C" int espalier_emulator_argument_bytes(const char* name, int index) {
    const auto found = emulator::entries().find(name);
    if (found == emulator::entries().end() || index < 0 || index >= found->second->arguments) return -1;
    return found->second->bytes[index];
}
