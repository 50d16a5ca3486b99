// AdamW on many tensors in one launch: the contract of each is that of kernels/adam_update.py.
//
// A block takes CHUNK elements of one tensor, a thread 8 at a time: one 16-byte access of a bf16 tensor, two of an fp32
// one, each tensor read and written once. Which types a tensor and its states have is a branch that a block takes alike,
// so that one launch serves them all.
#include "redline.h"

#include "api.h"

namespace {

constexpr int THREADS = 256;
constexpr int VEC = 8;
constexpr int CHUNK = THREADS * VEC;
constexpr int MOST = 32;  // tensors of a launch

struct Item {
    Weights p;
    Numbers g, m, v;
    const float* hyper;       // lr, beta1, beta2, weight decay, c1, c2; several such rows if `row` is there
    const std::int32_t* row;  // of each element, or null
    std::int64_t n;
    int rows;
    bool wide;
};

struct Hyper {
    float lr, beta1, beta2, weight_decay, c1, c2;
    __device__ explicit Hyper(const float* h)
        : lr(h[0]), beta1(h[1]), beta2(h[2]), weight_decay(h[3]), c1(h[4]), c2(h[5]) {}
};

// Each fused multiply-add is written out: a master's bits must not depend on where a compiler fuses.
__device__ void step(const Hyper& h, float eps, float g, float& p, float& m, float& v) {
    m = __fmaf_rn(__fsub_rn(g, m), 1.0f - h.beta1, m);
    v = __fmaf_rn(__fmul_rn(1.0f - h.beta2, g), g, __fmul_rn(h.beta2, v));
    const float change = __fdiv_rn(m, __fmaf_rn(__fsqrt_rn(v), __fsqrt_rn(h.c2), eps));
    const float cautious = __fmul_rn(change, p) > 0.0f ? -h.weight_decay : 0.0f;
    const float decay = h.weight_decay < 0.0f ? cautious : h.weight_decay;
    p = __fmaf_rn(change, __fmul_rn(-h.lr, h.c1), __fmul_rn(p, __fmaf_rn(-h.lr, decay, 1.0f)));
}

template <int N>
__device__ void update(const Item& t, std::int64_t i, float eps) {
    float p[N], g[N], m[N], v[N];
    t.g.read(i, g);
    t.m.read(i, m);
    t.v.read(i, v);
    t.p.read(i, i, p);
    if (t.row) {
        for (int k = 0; k < N; ++k) {
            const std::int32_t row = t.row[i + k];
            // of a row that is not there nothing is addressed, and its element stays as it is
            if (row >= 0 && row < t.rows) step(Hyper(t.hyper + 6 * row), eps, g[k], p[k], m[k], v[k]);
        }
    } else {
        const Hyper h(t.hyper);
#pragma unroll
        for (int k = 0; k < N; ++k) step(h, eps, g[k], p[k], m[k], v[k]);
    }
    t.p.write(i, i, p);
    t.m.write(i, m);
    t.v.write(i, v);
}

__global__ void __launch_bounds__(THREADS) update_all(const __grid_constant__ Table<Item, MOST> table, float eps) {
    const int item = table.item();
    const Item& t = table.items[item];
    const std::int64_t begin = std::int64_t{blockIdx.x - table.first[item]} * CHUNK;
    std::int64_t i = begin + threadIdx.x * VEC;
    if (t.wide && i + VEC <= t.n) return update<VEC>(t, i, eps);
    if (t.wide) {  // the end, which is no whole vector
        for (; i < t.n && i < begin + (threadIdx.x + 1) * VEC; ++i) update<1>(t, i, eps);
        return;
    }
    for (i = begin + threadIdx.x; i < t.n && i < begin + CHUNK; i += THREADS) update<1>(t, i, eps);
}

}  // namespace

void adam_update(int device, Pointer stream, const std::vector<AdamTensors>& tensors, float eps) {
    std::vector<Item> items;
    for (const AdamTensors& t : tensors) {
        require(t.n >= 0 && (t.row ? t.rows >= 1 : t.rows == 1), "adam_update: n is ", t.n, " and hyper has ", t.rows,
                " rows; expected n >= 0, and several rows only with a row for each element");
        require(!t.n || (t.p && t.g && t.exp_avg && t.exp_avg_sq && t.hyper),
                "adam_update: of a tensor of ", t.n, " elements p, g, exp_avg, exp_avg_sq or hyper is not there");
        require(!t.low || t.p_dtype == "bfloat16", "adam_update: p of a master is ", t.p_dtype, "; expected bfloat16");
        items.push_back({{numbers(t.p, t.p_dtype), reinterpret_cast<std::int16_t*>(t.low)},
                         numbers(t.g, t.g_dtype), numbers(t.exp_avg, t.moment_dtype),
                         numbers(t.exp_avg_sq, t.moment_dtype), reinterpret_cast<const float*>(t.hyper),
                         reinterpret_cast<const std::int32_t*>(t.row), t.n, t.rows,
                         by_16_bytes(t.p, t.low, t.g, t.exp_avg, t.exp_avg_sq)});
    }
    auto blocks = [](const Item& t) { return ceil_div(t.n, CHUNK); };
    launch_all(update_all, items, blocks, THREADS, 0, {device, stream}, eps);
}
