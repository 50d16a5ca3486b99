// CUDA's execution on one core of a CPU, so that tests run the kernels of csrc/ where there is no GPU.
//
// Blocks run one after another. The threads of a block are fibres: each runs until it waits at a barrier or a shuffle,
// and then another one of those that can run goes on. Nothing preempts, so a thread that needs no barrier would see what
// others wrote by luck; the order in which threads run is therefore a setting (set_order), and a kernel must give the
// same bits in each. Lowest first lets the first warp run as far ahead as barriers allow, highest first the last warp.
//
// Errors, with file and line: threads of a block at different barriers, or at none because they have ended; a shuffle
// that not all lanes of a warp reach, or whose mask is not the whole warp. So is a misaligned vector. Shared memory
// begins as 0xFF, which is NaN, and is of the size that was asked for, so that an address-sanitised build sees what is
// beyond it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// nvcc's own headers may have emptied these
#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

// fibres ---------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves what a call must keep on this stack, and goes on where the other one was left. swapcontext would ask the kernel
// for its signal mask each time.
extern "C" void redline_emulation_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
    .weak redline_emulation_switch
    .hidden redline_emulation_switch
    .type redline_emulation_switch, @function
redline_emulation_switch:
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
#endif

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t STACK = 256 * 1024;
#else
constexpr std::size_t STACK = 64 * 1024;
#endif

// A stack on which a function runs in pieces.
class Fibre {
public:
    Fibre() : stack_(static_cast<char*>(std::aligned_alloc(16, STACK))) {}
    Fibre(Fibre&& other) noexcept : stack_(std::exchange(other.stack_, nullptr)) {}
    ~Fibre() { std::free(stack_); }

    void begin(void (*entry)()) {
#if defined(__x86_64__)
        void** top = reinterpret_cast<void**>(stack_ + STACK);
        *--top = nullptr;  // where a caller's address would be
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        here_ = top;
#else
        getcontext(&here_);
        here_.uc_stack.ss_sp = stack_;
        here_.uc_stack.ss_size = STACK;
        here_.uc_link = nullptr;
        makecontext(&here_, entry, 0);
#endif
    }

    // From the scheduler into the fibre, until it leaves.
    void enter() {
#if defined(__SANITIZE_ADDRESS__)
        void* mine = nullptr;
        __sanitizer_start_switch_fiber(&mine, stack_, STACK);
#endif
#if defined(__x86_64__)
        redline_emulation_switch(&outside_, here_);
#else
        swapcontext(&outside_, &here_);
#endif
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
    }

    // From the fibre back to the scheduler; `last` if it will not be entered again.
    void leave(bool last) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, outside_stack_, outside_size_);
#else
        (void)last;
#endif
#if defined(__x86_64__)
        redline_emulation_switch(&here_, outside_);
#else
        swapcontext(&here_, &outside_);
#endif
        arrived();
    }

    // The first thing on this side of a switch.
    void arrived() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack_, &outside_stack_, &outside_size_);
#endif
    }

private:
    char* stack_;
#if defined(__x86_64__)
    void *here_ = nullptr, *outside_ = nullptr;
#else
    ucontext_t here_{}, outside_{};
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack_ = nullptr;
    const void* outside_stack_ = nullptr;
    std::size_t outside_size_ = 0;
#endif
};

// threads and blocks ---------------------------------------------------------------------------------------------------

struct Site {
    const char* file;
    int line;
};

inline std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

enum class State { ready, at_barrier, at_shuffle, ended };

struct Thread {
    uint3 index{};
    unsigned id = 0;  // x first, then y, then z
    State state = State::ready;
    Site site{};  // where it waits
    unsigned shuffles = 0;
    Fibre fibre;
};

constexpr unsigned WARP = 32;

struct Block {
    dim3 grid, size;
    uint3 index{};
    unsigned threads = 0;
    const std::function<void()>* body = nullptr;
    std::vector<std::pair<const void*, char*>> shared;  // by the place that declares it
    char* dynamic = nullptr;
    std::vector<std::uint64_t> slots[2];  // what each thread gives to a shuffle: while a slow lane still reads, a quick
                                          // one may be at the next shuffle, but not at the one after
    std::exception_ptr error;
};

inline std::vector<Thread> pool;  // stacks are kept from launch to launch
inline Block block;
inline Thread* current = nullptr;
inline std::string order = "lowest first";
inline std::mt19937_64 random_numbers;

[[gnu::used]] inline void set_order(const std::string& name, std::uint64_t seed) {
    if (name != "lowest first" && name != "highest first" && name != "in turn" && name != "random")
        throw std::invalid_argument("order is " + name + "; expected lowest first, highest first, in turn or random");
    order = name;
    random_numbers.seed(seed);
}

[[noreturn]] inline void fail(const std::string& what) {
    const uint3& b = block.index;
    throw std::runtime_error("block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) +
                             "): " + what);
}

inline void entry() {
    Thread* self = current;
    self->fibre.arrived();
    try {
        (*block.body)();
    } catch (...) {
        if (!block.error) block.error = std::current_exception();
    }
    self->state = State::ended;
    self->fibre.leave(true);
}

inline void wait(State state, Site site) {
    Thread* self = current;
    self->state = state;
    self->site = site;
    self->fibre.leave(false);
}

// Which thread goes on: those that can, in the order that is set.
class Ready {
public:
    explicit Ready(unsigned n) : words_((n + 63) / 64, 0), n_(n) {}
    void add(unsigned id) { words_[id / 64] |= 1ull << (id % 64); }
    void remove(unsigned id) { words_[id / 64] &= ~(1ull << (id % 64)); }

    // n if there is none.
    unsigned next() {
        if (order == "lowest first") return from(0);
        if (order == "highest first") {
            for (std::size_t w = words_.size(); w-- > 0;)
                if (words_[w]) return static_cast<unsigned>(w * 64 + 63 - std::countl_zero(words_[w]));
            return n_;
        }
        const unsigned start = order == "random" ? random_numbers() % n_ : (last_ + 1) % n_;
        const unsigned found = from(start);
        return last_ = found < n_ ? found : from(0);
    }

private:
    unsigned from(unsigned start) const {
        for (std::size_t w = start / 64; w < words_.size(); ++w) {
            const std::uint64_t word = w == start / 64 ? words_[w] & (~0ull << (start % 64)) : words_[w];
            if (word) return static_cast<unsigned>(w * 64 + std::countr_zero(word));
        }
        return n_;
    }
    std::vector<std::uint64_t> words_;
    unsigned n_, last_ = 0;
};

// Those of first, first + 1, … that wait in this state, if all of them do and at one place; else an error.
inline void all_at_one_place(unsigned first, unsigned n, const char* what) {
    for (unsigned id = first + 1; id < first + n; ++id) {
        const Site a = pool[first].site, b = pool[id].site;
        if (a.line != b.line || std::strcmp(a.file, b.file) != 0)
            fail(std::string(what) + ": thread " + std::to_string(first) + " is at " + text(a) + ", thread " +
                 std::to_string(id) + " at " + text(b));
    }
}

[[noreturn]] inline void report_deadlock() {
    for (unsigned id = 0; id < block.threads; ++id) {
        const Thread& t = pool[id];
        if (t.state == State::ended) continue;
        const bool barrier = t.state == State::at_barrier;
        const unsigned first = barrier ? 0 : id / WARP * WARP, end = barrier ? block.threads : first + WARP;
        for (unsigned other = first; other < end; ++other) {
            const Thread& o = pool[other];
            if (o.state == t.state) continue;
            fail("thread " + std::to_string(id) + " waits at " + text(t.site) + " for thread " + std::to_string(other) +
                 (o.state == State::ended ? ", which has ended" : ", which waits at " + text(o.site)));
        }
    }
    fail("all threads wait");
}

inline void run_threads() {
    const unsigned n = block.threads;
    Ready ready(n);
    std::vector<unsigned> at_shuffle(n / WARP, 0);
    unsigned at_barrier = 0, left = n;
    for (unsigned id = 0; id < n; ++id) {
        Thread& t = pool[id];
        t.id = id;
        t.index = {id % block.size.x, id / block.size.x % block.size.y, id / block.size.x / block.size.y};
        t.state = State::ready;
        t.shuffles = 0;
        t.fibre.begin(entry);
        ready.add(id);
    }
    auto release = [&](unsigned first, unsigned count) {
        for (unsigned id = first; id < first + count; ++id) {
            pool[id].state = State::ready;
            ready.add(id);
        }
    };
    while (left) {
        const unsigned id = ready.next();
        if (id == n) report_deadlock();
        current = &pool[id];
        current->fibre.enter();
        if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
        switch (pool[id].state) {
            case State::ready: break;
            case State::ended:
                ready.remove(id);
                --left;
                break;
            case State::at_barrier:
                ready.remove(id);
                if (++at_barrier == n) {
                    all_at_one_place(0, n, "a divergent barrier");
                    at_barrier = 0;
                    release(0, n);
                }
                break;
            case State::at_shuffle:
                ready.remove(id);
                if (++at_shuffle[id / WARP] == WARP) {
                    const unsigned first = id / WARP * WARP;
                    all_at_one_place(first, WARP, "a divergent shuffle");
                    at_shuffle[id / WARP] = 0;
                    release(first, WARP);
                }
                break;
        }
    }
}

inline void free_shared() {
    for (auto& [site, bytes] : block.shared) delete[] bytes;
    block.shared.clear();
    delete[] block.dynamic;
    block.dynamic = nullptr;
}

inline char* poisoned(std::size_t bytes) {
    char* memory = new char[bytes];  // aligned to 16 bytes, as CUDA's
    std::memset(memory, 0xff, bytes);
    return memory;
}

inline void run(dim3 grid, dim3 size, std::size_t shared, const std::function<void()>& body) {
    const unsigned threads = size.x * size.y * size.z;
    if (threads == 0 || threads > 1024 || threads % WARP)
        throw std::invalid_argument(std::to_string(threads) + " threads a block; expected 32 to 1024, in whole warps");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u)
        throw std::invalid_argument("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                                    std::to_string(grid.z) + " blocks");
    if (shared > 227 * 1024) throw std::invalid_argument(std::to_string(shared) + " bytes of shared memory");
    while (pool.size() < threads) pool.emplace_back();
    block.grid = grid;
    block.size = size;
    block.threads = threads;
    block.body = &body;
    for (auto& slots : block.slots) slots.assign(threads, 0);
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        // blocks have no order either
        const std::uint64_t b = order == "highest first" ? blocks - 1 - i : i;
        block.index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y)};
        if (shared) block.dynamic = poisoned(shared);
        try {
            run_threads();
        } catch (...) {
            free_shared();
            throw;
        }
        free_shared();
    }
}

inline void check_alignment(const void* address, std::size_t alignment) {
    const auto rest = reinterpret_cast<std::uintptr_t>(address) % alignment;
    if (rest) fail("an access at " + std::to_string(rest) + " bytes beyond a multiple of " + std::to_string(alignment));
}

inline void* static_shared(const void* site, std::size_t bytes) {
    for (auto& [known, memory] : block.shared)
        if (known == site) return memory;
    block.shared.emplace_back(site, poisoned(bytes));
    return block.shared.back().second;
}

inline void* dynamic_shared() { return block.dynamic; }

// What the lane `source` gives to this shuffle.
template <typename T>
T shuffle(unsigned mask, T x, unsigned source, Site site) {
    static_assert(sizeof(T) <= 8);
    if (mask != 0xffffffffu) fail("the mask of the shuffle at " + text(site) + " is not the whole warp");
    Thread* self = current;
    auto& slots = block.slots[self->shuffles++ % 2];
    std::memcpy(&slots[self->id], &x, sizeof(T));
    wait(State::at_shuffle, site);
    std::memcpy(&x, &slots[self->id / WARP * WARP + source % WARP], sizeof(T));
    return x;
}

// conversions, to nearest even -----------------------------------------------------------------------------------------

inline std::uint16_t to_bf16(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    if (std::isnan(x)) return 0x7fff;  // as cvt.rn.bf16.f32
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Bits of a number with so many of exponent and mantissa, saturated at `largest`; NaN stays one.
inline std::uint8_t to_fp8(float x, int exponent_bits, int mantissa_bits, std::uint8_t largest) {
    const std::uint8_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return 0x7f;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const float size = std::fabs(x);
    if (size == 0) return sign;
    if (std::isinf(size)) return sign | largest;
    const int exponent = std::max(std::ilogb(size), 1 - bias);  // below, numbers are denormal
    const float steps = std::nearbyint(std::ldexp(size, mantissa_bits - exponent));  // exact but for this rounding
    // steps of a normal number include its leading one; a carry runs into the exponent, as it should
    const int bits = static_cast<int>(steps) + ((exponent + bias - 1) << mantissa_bits);
    return sign | static_cast<std::uint8_t>(std::min(bits, static_cast<int>(largest)));
}

}  // namespace emulation

// CUDA's names ---------------------------------------------------------------------------------------------------------

#define threadIdx (::emulation::current->index)
#define blockIdx (::emulation::block.index)
#define blockDim (::emulation::block.size)
#define gridDim (::emulation::block.grid)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::wait(emulation::State::at_barrier, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::shuffle(mask, 0, 0, {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emulation::shuffle(mask, x, (emulation::current->id % 32) ^ lanes, {file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T x, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emulation::shuffle(mask, x, lane, {file, line});
}

template <typename T>
T atomicAdd(T* to, T x) {
    return std::exchange(*to, *to + x);
}

template <typename T>
T atomicMax(T* to, T x) {
    return std::exchange(*to, std::max(*to, x));
}

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
// The bytes of b and a, b's first, that the four digits of `which` name.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
    const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
    unsigned picked = 0;
    for (int i = 0; i < 4; ++i) picked |= static_cast<unsigned>(bytes >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return picked;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
