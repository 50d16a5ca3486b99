// Loss of each row of logits and its gradient: what `_row_kernel` in kernels/lm_head_loss.py computes, by the same laws.
//
// A block holds one row. Its first pass sums the terms of the softmax, its second writes the gradient, over the logits or
// elsewhere in e5m2. Where the row fits in shared memory (resident), logits are read from memory once; else both passes
// read them, the second mostly from the L2 cache.
//
// What bounds it on an H100, in clocks of a multiprocessor: 14.5 bytes of memory each, 16 results of the special function
// unit. A row of 50,304 in bf16, read and written, is 13.9 k clocks; one such result an element 3.1 k. A sigmoid and an
// exponential in both passes would be 6 of them, 18.9 k. So with a cap of fixed height the row that stays is not that of
// the logits but of the sigmas, in 16 bits of fixed point, and the second pass needs 1 for 3: 12.6 k. A sigma is off by
// 2^-17, y at height 30 by 2.3e-4 and its term as much of itself: an eighth of what rounding the gradient to bf16 does.
// Every other exponential of that pass is a cubic, off by 7.5e-5: 11.0 k, and 9.8 k for the 25 instructions an element.
// Sums, losses and the gradients of targets are made of sigmas as they were. In e5m2 a row is 10.4 k clocks of memory:
// there the special functions bound it. In fp32 memory does, and without a cap there is one function a pass: such rows
// keep their logits.
//
// Hazards. In place, a target's logit must be read before the second pass overwrites it: the first warp reads it before
// the barriers of block_reduce, that of the sum's. A target's column belongs to a thread of any warp: it is written over
// after a barrier. The padding of a row is no logit, may be NaN, and must become 0: products read it.
#include "redline.h"

#include "api.h"

namespace {

constexpr int MAX_TARGETS = 16;  // one lane of the first warp each
constexpr int ALIGNED = 16;      // rows are so many elements long, padding included, and apart
constexpr int BATCH = 4;         // vectors of 16 bytes that a thread has under way
constexpr float LOWEST = -3.402823466e38f;  // of all finite numbers: a difference from it is no NaN
constexpr float LN2 = 0.6931471805599453f, LOG2E = 1.4426950408889634f;
constexpr float LEVELS = 65535.0f;    // of a sigma of 16 bits: 0 and 1 are exact
constexpr float TO_24 = 8388608.0f;   // 2^23: the float TO_24 + n has n in its low bits
constexpr std::uint32_t TO_24_BITS = 0x4b000000u;

enum class Cap { none, fixed, tall };  // fixed: terms are relative to the cap, so that no largest one is looked for

// Two blocks a multiprocessor at 50,304 columns of bf16, three at 32,768; in fp32 shared memory has room for one.
template <typename T> constexpr int MOST_THREADS = sizeof(T) == 2 ? 512 : 1024;
template <typename T> constexpr int BLOCKS = sizeof(T) == 2 ? 3 : 1;

template <typename T, typename Out>
struct Rows {
    const T* z;
    Out* out;  // z again where the gradient takes its place
    float* losses;
    const std::int64_t* targets;
    const float *weights, *factor;
    std::int64_t stride_z, stride_out;
    int vocab, columns, K;
    float gain, offset, height2, steep, limit;
};

struct Term {
    float x, sigma;
};

// The exponent of a term, that of 2 under a cap, of e without, and sigma. In a sum and in a loss it is the same to the
// last bit: no compiler chooses what is fused.
template <Cap CAP, typename P>
__device__ Term term(float z, const P& p) {
    if constexpr (CAP == Cap::none) return {z, 1.0f};
    const float sigma = reciprocal(1.0f + power_of_two(__fmaf_rn(z, p.gain, p.offset)));
    return {__fmaf_rn(sigma, p.height2, -p.height2), sigma};
}

template <Cap CAP>
__device__ float relative(float x, float top) {
    if constexpr (CAP == Cap::fixed) return x;
    if constexpr (CAP == Cap::tall) return x - top;
    return (x - top) * LOG2E;
}

// A sigma in 16 bits: adding TO_24 rounds to a whole number. NaN is some number; the row's sum is NaN and its gradient.
__device__ std::uint16_t to_fixed(float sigma) {
    return static_cast<std::uint16_t>(__float_as_uint(__fmaf_rn(sigma, LEVELS, TO_24)));
}
__device__ float from_fixed(std::uint16_t bits) {
    constexpr float STEP = 1.0f / LEVELS;
    return __fmaf_rn(__uint_as_float(TO_24_BITS | bits), STEP, -TO_24 * STEP);  // exact but for its last rounding
}

// 2^x for |x| < 126, by what adds and multiplies: a whole power of two and a cubic, whose relative error is least.
__device__ float cheap_power_of_two(float x) {
    constexpr float WHOLE = 1.5f * TO_24;  // adding it rounds to a whole number, negative ones too
    const float shifted = x + WHOLE, f = x - (shifted - WHOLE);
    const float y = __fmaf_rn(__fmaf_rn(__fmaf_rn(0.05517168f, f, 0.24261117f), f, 0.69326097f), f, 0.99992806f);
    return __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
}

// Where vector v of a row lies in shared memory, when a thread of the second pass takes GROUP neighbours: eight threads
// that read at once, GROUP vectors apart, then find eight different places of 16 bytes in 128, as those that write do.
template <int GROUP>
__device__ int place(int v) {
    return v ^ (v / 8 % GROUP);
}

// NaN stays NaN, where fminf and fmaxf would lose it.
__device__ float clamped(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

template <typename T, typename Out, Cap CAP, bool GRAD, bool RESIDENT>
__global__ void __launch_bounds__(MOST_THREADS<T>, BLOCKS<T>) rows(const Rows<T, Out> p) {
    constexpr int VEC = WIDE<T>, WIDTH = WIDE<Out> < VEC ? VEC : WIDE<Out>, GROUP = WIDTH / VEC;
    constexpr bool SIGMAS = RESIDENT && CAP == Cap::fixed && sizeof(T) == 2;
    using Raw = Vector<T, VEC>;
    using Fixed = Vector<std::uint16_t, 8>;
    DYNAMIC_SHARED(Raw, kept);
    SHARED(float, scratch, 32);
    SHARED(float, sum_of_weights, 1);
    const int thread = threadIdx.x, threads = blockDim.x;
    const std::int64_t row = blockIdx.x;
    const T* const z = p.z + row * p.stride_z;
    const Raw* const vectors = reinterpret_cast<const Raw*>(z);
    auto vector = [&](int v) { return vector_at<VEC>(&vectors[v].at[0]); };

    int target = -1;  // that of this lane; one that is not in the vocabulary is not addressed
    float weight = 0.0f, z_t = 0.0f;
    if (thread < p.K) {
        const std::int64_t given = p.targets[row * p.K + thread];
        weight = p.weights[row * p.K + thread];
        if (given >= 0 && given < p.vocab) target = static_cast<int>(given);
        if (target >= 0) z_t = to_float(z[target]);
    }
    if (thread < 32) {
        const float sum = warp_reduce(weight);
        if (thread == 0) *sum_of_weights = sum;
    }

    float top = CAP == Cap::fixed ? 0.0f : LOWEST, total = 0.0f;
    auto add = [&](int v, const Raw& raw, int inside) {
        float x[VEC];
        Fixed fixed;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const Term t = term<CAP>(to_float(raw.at[j]), p);
            x[j] = j < inside ? t.x : -INFINITE;
            if constexpr (SIGMAS) fixed.at[j] = to_fixed(t.sigma);
        }
        if constexpr (CAP != Cap::fixed) {
            float larger = top;
#pragma unroll
            for (int j = 0; j < VEC; ++j) larger = fmaxf(larger, x[j]);  // NaN is not lost: its term is NaN
            total *= power_of_two(relative<CAP>(top, larger));
            top = larger;
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) total += power_of_two(relative<CAP>(x[j], top));
        if constexpr (SIGMAS) {
            reinterpret_cast<Fixed*>(kept)[place<GROUP>(v)] = fixed;
        } else if constexpr (RESIDENT) {
            kept[place<GROUP>(v)] = raw;
        }
    };
    const int full = p.vocab / VEC;
    for (int first = thread; first < full; first += BATCH * threads) {
        Raw raw[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (first + i * threads < full) raw[i] = vector(first + i * threads);
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (first + i * threads < full) add(first + i * threads, raw[i], VEC);
    }
    if (p.vocab % VEC && thread == full % threads) add(full, vector(full), p.vocab % VEC);
    if constexpr (CAP != Cap::fixed) {
        const float largest = block_reduce<Largest>(top, scratch);
        total *= power_of_two(relative<CAP>(top, largest));
        top = largest;
    }
    total = block_reduce(total, scratch);

    const float S = *sum_of_weights;
    float gradient = 0.0f;  // of this lane's target
    if (thread < 32) {
        const Term t = term<CAP>(z_t, p);
        const float x_t = target >= 0 || thread >= p.K ? relative<CAP>(t.x, top) : NAN;
        const float e_t = power_of_two(x_t);
        // Under a fixed cap the logarithm of total and the exponent are both far from 0: their difference would lose a
        // confident row's small loss, the logarithm of the quotient does not.
        const float loss = CAP == Cap::fixed ? log2f(__fdiv_rn(total, e_t)) : log2f(total) - x_t;
        const float sum = warp_reduce(weight == 0.0f ? 0.0f : weight * (loss * LN2));
        if (thread == 0) p.losses[row] = sum;
        if constexpr (GRAD) {
            float same = 0.0f;  // a target may be there several times: each lane of it writes the same number
            for (int k = 0; k < p.K; ++k) {
                const int other = __shfl_sync(FULL_WARP, target, k);
                const float more = __shfl_sync(FULL_WARP, weight, k);
                if (other == target) same += more;
            }
            gradient = (__fdiv_rn(e_t, total) * S - same) * (*p.factor * p.steep);
            if constexpr (CAP != Cap::none) gradient *= t.sigma - t.sigma * t.sigma;
        }
    }
    if constexpr (GRAD) {
        const float scale = __fdiv_rn(S * (*p.factor * p.steep), total);
        Out* const out = p.out + row * p.stride_out;
        for (int u = thread; u < p.columns / WIDTH; u += threads) {
            float g[WIDTH];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                const int v = u * GROUP + i;
                Raw raw;
                if constexpr (RESIDENT) {
                    raw = kept[place<GROUP>(v)];
                } else {
                    raw = vector(v);
                }
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    float sigma, e;
                    if constexpr (SIGMAS) {
                        sigma = from_fixed(raw.at[j].bits);
                        const float x = __fmaf_rn(sigma, p.height2, -p.height2);
                        e = j % 2 ? cheap_power_of_two(x) : power_of_two(x);
                    } else {
                        const Term t = term<CAP>(to_float(raw.at[j]), p);
                        sigma = t.sigma;
                        e = power_of_two(relative<CAP>(t.x, top));
                    }
                    g[i * VEC + j] = e * scale;
                    if constexpr (CAP != Cap::none) g[i * VEC + j] *= sigma - sigma * sigma;
                }
            }
            if ((u + 1) * WIDTH > p.vocab) {
#pragma unroll
                for (int j = 0; j < WIDTH; ++j)
                    if (u * WIDTH + j >= p.vocab) g[j] = 0.0f;
            }
            store(out + u * WIDTH, g);
        }
        __syncthreads();  // before it another warp's store of the same column could follow the target's
        // the others cannot exceed the limit
        if (target >= 0) out[target] = rounded<Out>(clamped(gradient, p.limit));
    }
}

// Calls f with the constant of that value.
template <typename F>
void with_bool(bool value, F f) {
    if (value) return f(std::true_type{});
    f(std::false_type{});
}
template <typename F>
void with_cap(Cap cap, F f) {
    if (cap == Cap::none) return f(std::integral_constant<Cap, Cap::none>{});
    if (cap == Cap::fixed) return f(std::integral_constant<Cap, Cap::fixed>{});
    f(std::integral_constant<Cap, Cap::tall>{});
}

}  // namespace

void lm_head_loss_rows(
    int device, Pointer stream, const std::string& dtype, const std::string& out_dtype, Pointer z, Pointer out,
    Pointer losses, Pointer targets, Pointer weights, Pointer factor, std::int64_t stride_z, std::int64_t stride_out,
    std::int64_t M, int vocab, int columns, int K, float gain, float offset, float height2, float steep, float limit,
    bool cap, bool fixed, std::int64_t most_shared) {
    const char* const name = "lm_head_loss_rows";
    require(M >= 1 && M < (std::int64_t{1} << 31), name, ": M is ", M, "; expected 1 to 2^31 - 1 rows");
    require(K >= 1 && K <= MAX_TARGETS, name, ": K is ", K, "; expected 1 to ", MAX_TARGETS, " targets a row");
    require(columns % ALIGNED == 0 && vocab >= 1 && vocab <= columns, name, ": ", vocab, " columns of ", columns,
            "; expected 1 or more, and with their padding a multiple of ", ALIGNED);
    require(by_16_bytes(z, out) && stride_z % ALIGNED == 0 && stride_out % ALIGNED == 0 && stride_z >= columns &&
                (!out || stride_out >= columns),
            name, ": rows of ", columns, " columns are ", stride_z, " and ", stride_out, " elements apart, at ", z,
            " and ", out, "; expected multiples of ", ALIGNED, " elements and of 16 bytes");
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        require(!out || out_dtype == dtype || out_dtype == "float8_e5m2", name, ": the gradient of ", dtype, " is ",
                out_dtype, "; expected the same or float8_e5m2");
        const bool resident = out && columns * std::int64_t{sizeof(T)} <= std::min(most_shared, shared_memory(device));
        const Cap kind = !cap ? Cap::none : fixed ? Cap::fixed : Cap::tall;
        // two warps at least: block_reduce has no barrier for one
        const int vectors = static_cast<int>(ceil_div(columns, WIDE<T>));
        const int threads = std::clamp<int>(static_cast<int>(ceil_div(vectors, 32)) * 32, 64, MOST_THREADS<T>);
        auto start = [&](auto result, auto kind, auto grad, auto resident) {
            using Out = decltype(result);
            const Rows<T, Out> p{
                reinterpret_cast<const T*>(z), reinterpret_cast<Out*>(out), reinterpret_cast<float*>(losses),
                reinterpret_cast<const std::int64_t*>(targets), reinterpret_cast<const float*>(weights),
                reinterpret_cast<const float*>(factor), stride_z, stride_out, vocab, columns, K, gain, offset, height2,
                steep, limit};
            launch(rows<T, Out, kind, grad, resident>, static_cast<unsigned>(M), threads,
                   resident ? columns * sizeof(T) : 0, {device, stream}, p);
        };
        with_cap(kind, [&](auto kind) {
            if (!out) return start(T{}, kind, std::false_type{}, std::false_type{});
            with_bool(resident, [&](auto resident) {
                if (out_dtype == dtype) return start(T{}, kind, std::true_type{}, resident);
                start(e5m2{}, kind, std::true_type{}, resident);
            });
        });
    });
}
