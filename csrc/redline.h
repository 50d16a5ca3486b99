// The language of every kernel in csrc/: types, vectors of 16 bytes, reductions, launches, checks.
//
// nvcc compiles a .cu file for GPUs; g++ compiles the same file for the CPU with REDLINE_EMULATION, where emulation.h
// supplies what CUDA has and C++ lacks. What keeps a file fit for both:
//   - this header comes first, and a kernel starts through launch(), never <<<>>>
//   - shared memory comes through SHARED and DYNAMIC_SHARED
//   - no thread returns before a barrier or a shuffle that others of its block or warp reach
//   - arithmetic is in float, PTX stands in small functions with a plain branch beside it
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef REDLINE_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#endif

// the host's side ------------------------------------------------------------------------------------------------------

using Pointer = std::uintptr_t;  // of a tensor's first element; 0 where there is none

struct Where {
    int device;
    Pointer stream;  // a cudaStream_t
};

// std::invalid_argument, a ValueError in Python, unless it holds. The parts are one sentence with the values.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << parts);
    throw std::invalid_argument(text.str());
}

inline std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// Whether every pointer, and every number of bytes from one row to the next, is a multiple of 16.
template <typename... Numbers>
bool by_16_bytes(Numbers... numbers) {
    return ((static_cast<std::uint64_t>(numbers) % 16 == 0) && ...);
}

#ifdef REDLINE_EMULATION

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, Where, A... args) {
    emulation::run(grid, block, shared, [=] { kernel(static_cast<P>(args)...); });
}

inline std::int64_t shared_memory(int) { return 226 * 1024; }  // as an H100

#define SHARED(T, name, count)            \
    static const char name##_site = 0;    \
    T* const name = static_cast<T*>(emulation::static_shared(&name##_site, sizeof(T) * (count)))
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulation::dynamic_shared())

#else

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would find it, and be blamed
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Bytes of dynamic shared memory that a block can have, beside 1 KiB that its kernel declares.
inline std::int64_t shared_memory(int device) {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return bytes - 1024;
}

// Launches on the device that the tensors are on, whichever the caller's is. More than 48 KiB of shared memory, what the
// kernel declares included, have to be asked for, once a kernel and device.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, Where where, A... args) {
    int before = 0;
    check_cuda(cudaGetDevice(&before), "cudaGetDevice");
    if (before != where.device) check_cuda(cudaSetDevice(where.device), "cudaSetDevice");
    cudaError_t status = cudaSuccess;
    if (shared > 47 * 1024)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status == cudaSuccess) {
        kernel<<<grid, block, shared, reinterpret_cast<cudaStream_t>(where.stream)>>>(static_cast<P>(args)...);
        status = cudaGetLastError();
    }
    if (before != where.device) cudaSetDevice(before);
    check_cuda(status, "launch");
}

#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                   \
    extern __shared__ __align__(16) unsigned char dynamic_bytes[]; \
    T* const name = reinterpret_cast<T*>(dynamic_bytes)

#endif

// numbers --------------------------------------------------------------------------------------------------------------

struct bf16 { std::uint16_t bits; };
struct e4m3 { std::uint8_t bits; };
struct e5m2 { std::uint8_t bits; };

constexpr float E4M3_MAX = 448.0f;
constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr float INFINITE = __builtin_huge_valf();

// Calls f with a number of the element type of that name, for f to be compiled once a type.
template <typename F>
void with_type(const std::string& dtype, F f) {
    if (dtype == "bfloat16") return f(bf16{});
    if (dtype == "float32") return f(float{});
    require(false, "dtype is ", dtype, "; expected bfloat16 or float32");
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }

#ifdef REDLINE_EMULATION
__device__ inline void convert_pair(float a, float b, bf16* to) {
    to[0].bits = emulation::to_bf16(a);
    to[1].bits = emulation::to_bf16(b);
}
__device__ inline void convert_pair(float a, float b, e4m3* to) {
    to[0].bits = emulation::to_fp8(a, 4, 3, 0x7e);
    to[1].bits = emulation::to_fp8(b, 4, 3, 0x7e);
}
__device__ inline void convert_pair(float a, float b, e5m2* to) {
    to[0].bits = emulation::to_fp8(a, 5, 2, 0x7b);
    to[1].bits = emulation::to_fp8(b, 5, 2, 0x7b);
}
// exact, where a GPU is off by an ulp, as PyTorch's own exponentials are there
__device__ inline float power_of_two(float x) { return std::exp2(x); }
__device__ inline float reciprocal(float x) { return 1.0f / x; }
#else
__device__ inline void convert_pair(float a, float b, bf16* to) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    to[0].bits = __bfloat16_as_ushort(pair.x);
    to[1].bits = __bfloat16_as_ushort(pair.y);
}
__device__ inline void convert_pair(float a, float b, e4m3* to) {
    const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
    to[0].bits = pair & 0xff;
    to[1].bits = pair >> 8;
}
__device__ inline void convert_pair(float a, float b, e5m2* to) {
    const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E5M2);
    to[0].bits = pair & 0xff;
    to[1].bits = pair >> 8;
}
// One instruction of the special function unit each, to about one ulp; denormal numbers are zero.
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
__device__ inline void convert_pair(float a, float b, float* to) {
    to[0] = a;
    to[1] = b;
}

// x rounded to nearest even; fp8 saturates, as torch does after a clamp, and keeps NaN.
template <typename T>
__device__ inline T rounded(float x) {
    T pair[2];
    convert_pair(x, x, pair);
    return pair[0];
}
template <>
__device__ inline float rounded<float>(float x) {
    return x;
}

// vectors --------------------------------------------------------------------------------------------------------------

// N elements that are read and written at a time: 16 bytes, or several times that.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T at[N];
};

// Elements of T in 16 bytes.
template <typename T>
constexpr int WIDE = 16 / sizeof(T);

// The N elements from an address on, which must be a multiple of the vector's alignment: a GPU would stop there.
template <int N, typename T>
__device__ inline const Vector<T, N>& vector_at(const T* address) {
#ifdef REDLINE_EMULATION
    emulation::check_alignment(address, alignof(Vector<T, N>));
#endif
    return *reinterpret_cast<const Vector<T, N>*>(address);
}
template <int N, typename T>
__device__ inline Vector<T, N>& vector_at(T* address) {
    return const_cast<Vector<T, N>&>(vector_at<N>(static_cast<const T*>(address)));
}

template <int N, typename T>
__device__ inline void load(const T* from, float (&x)[N]) {
    const Vector<T, N> v = vector_at<N>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(v.at[i]);
}

template <int N, typename T>
__device__ inline void store(T* to, const float (&x)[N]) {
    Vector<T, N> v;
    if constexpr (N == 1) {
        v.at[0] = rounded<T>(x[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2) convert_pair(x[i], x[i + 1], &v.at[i]);
    }
    vector_at<N>(to) = v;
}

// What store() makes of x, as numbers again.
template <typename T, int N>
__device__ inline void round_all(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(rounded<T>(x[i]));
}

// reductions -----------------------------------------------------------------------------------------------------------

struct Sum {
    static constexpr float NOTHING = 0.0f;
    __device__ static float join(float a, float b) { return a + b; }
};

// The larger; NaN counts as infinite, so that it is not lost.
struct Largest {
    static constexpr float NOTHING = -INFINITE;
    __device__ static float join(float a, float b) { return fmaxf(a, b); }
};

// Over a warp, in the same order in each of its threads; all of them get the result.
template <typename Join = Sum>
__device__ inline float warp_reduce(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = Join::join(x, __shfl_xor_sync(FULL_WARP, x, lanes));
    return x;
}

// Over all warps of a block, in order; all threads get the result. scratch holds a float a warp, at most 32, and may be
// used again at once: the second barrier keeps the next use from overwriting what a slow warp still reads.
template <typename Join = Sum>
__device__ inline float block_reduce(float x, float* scratch) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    x = warp_reduce<Join>(x);
    if (warps == 1) return x;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < warps ? scratch[lane] : Join::NOTHING;
    __syncthreads();
    return warp_reduce<Join>(x);
}

// The threads of a block that hold one row together: a warp, of which the block then has several, or all.
struct Team {
    int threads, index, rank, of_block;  // threads of a team, which team of the block, which thread of it, teams

    __device__ explicit Team(int threads_)
        : threads(threads_), index(threadIdx.x / threads_), rank(threadIdx.x % threads_),
          of_block(blockDim.x / threads_) {}

    // All threads of the team get the sum. A branch that a whole block takes alike.
    __device__ float sum(float x, float* scratch) const {
        return threads == 32 ? warp_reduce(x) : block_reduce(x, scratch);
    }
};

// tensors of many shapes and types in one launch -----------------------------------------------------------------------

// fp32 or bf16 numbers; which of them is known when the kernel runs, and the same for a whole block.
struct Numbers {
    void* data;
    bool half;  // bf16

    template <int N>
    __device__ void read(std::int64_t i, float (&x)[N]) const {
        half ? load(static_cast<const bf16*>(data) + i, x) : load(static_cast<const float*>(data) + i, x);
    }
    template <int N>
    __device__ void write(std::int64_t i, const float (&x)[N]) const {
        half ? store(static_cast<bf16*>(data) + i, x) : store(static_cast<float*>(data) + i, x);
    }
};

inline Numbers numbers(Pointer data, const std::string& dtype) {
    require(dtype == "float32" || dtype == "bfloat16", "dtype is ", dtype, "; expected bfloat16 or float32");
    return {reinterpret_cast<void*>(data), dtype == "bfloat16"};
}

// Up to MOST of whatever a kernel works on, and which blocks of the launch work on which. It is an argument, in constant
// memory: nothing is copied to the device before a launch, and a CUDA graph keeps it.
template <typename Item, int MOST>
struct Table {
    Item items[MOST];
    unsigned first[MOST + 1];  // block of each item; behind the last one, of all
    int n;

    // The item of this block.
    __device__ int item() const {
        int i = 0;
        while (blockIdx.x >= first[i + 1]) ++i;
        return i;
    }
};

constexpr std::size_t ARGUMENT_BYTES = 4096;  // of a kernel, on every architecture

// Launches the kernel on all items, MOST at a time, with blocks(item) blocks for each.
template <int MOST, typename Item, typename Items, typename Blocks, typename... A>
void launch_all(void (*kernel)(Table<Item, MOST>, A...), const Items& items, Blocks blocks, unsigned threads,
                std::size_t shared, Where where, A... args) {
    static_assert(sizeof(Table<Item, MOST>) + 64 <= ARGUMENT_BYTES);
    Table<Item, MOST> table{};
    auto flush = [&] {
        if (table.n) launch(kernel, table.first[table.n], threads, shared, where, table, args...);
        table.n = 0;
    };
    for (const Item& item : items) {
        const std::int64_t more = blocks(item), before = table.n ? table.first[table.n] : 0;
        require(before + more < (std::int64_t{1} << 31), "a launch of ", before + more, " blocks; expected fewer than 2^31");
        if (!more) continue;
        table.items[table.n] = item;
        table.first[table.n] = static_cast<unsigned>(before);
        table.first[++table.n] = static_cast<unsigned>(before + more);
        if (table.n == MOST) flush();
    }
    flush();
}

// an exact fp32 master in two halves: kernels/master.py ------------------------------------------------------------------

struct Halves {
    bf16 high;
    std::int16_t low;
};

__device__ inline Halves split_master(float x) {
    const std::uint32_t bits = __float_as_uint(x), high = (bits + 0x8000u) >> 16;  // wraps for some NaNs, and back again
    return {{static_cast<std::uint16_t>(high)}, static_cast<std::int16_t>(bits - (high << 16))};
}

__device__ inline float join_master(bf16 high, std::int16_t low) {
    return __uint_as_float((static_cast<std::uint32_t>(high.bits) << 16) + static_cast<std::uint32_t>(std::int32_t{low}));
}

// Weights: fp32, bf16, or bf16 with the low bits of a master.
struct Weights {
    Numbers p;
    std::int16_t* low;  // null unless a master

    // p[i…] and, of a master, low[j…]
    template <int N>
    __device__ void read(std::int64_t i, std::int64_t j, float (&x)[N]) const {
        if (!low) return p.read(i, x);
        const Vector<bf16, N> high = vector_at<N>(static_cast<const bf16*>(p.data) + i);
        const Vector<std::int16_t, N> rest = vector_at<N>(low + j);
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = join_master(high.at[k], rest.at[k]);
    }
    template <int N>
    __device__ void write(std::int64_t i, std::int64_t j, const float (&x)[N]) const {
        if (!low) return p.write(i, x);
        Vector<bf16, N> high;
        Vector<std::int16_t, N> rest;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const Halves halves = split_master(x[k]);
            high.at[k] = halves.high;
            rest.at[k] = halves.low;
        }
        vector_at<N>(static_cast<bf16*>(p.data) + i) = high;
        vector_at<N>(low + j) = rest;
    }
};
