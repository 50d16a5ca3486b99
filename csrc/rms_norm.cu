// RMSNorm of one stream, or of a (x + x1) + b x0, and its backward: the contract is that of kernels/rms_norm.py.
//
// A team of threads holds one row: a warp where a row is short, else the block. Each thread has ELEMENTS numbers of it
// in registers, as 16-byte vectors that lie a team apart, so that a warp reads 512 bytes side by side. The row is read
// once: its mean of squares is known when all of its threads have read their part, and then they still hold it.
//
// Backward keeps its streams in registers as they came, 16 bits a bf16 number, and makes the sum of streams again where
// it needs it a second time: as fp32 they would take the registers of half of the threads that hide the memory's latency.
#include "redline.h"

#include "api.h"

namespace {

constexpr int ELEMENTS = 8;        // of a row in a thread
constexpr int ROWS_OF_TEAM = 4;    // in backward: one partial sum of da and db for so many rows
constexpr int WARPS = 4;           // of a block whose teams are warps
constexpr int MOST_THREADS = 512;  // of a block
constexpr int MAX_N = MOST_THREADS * ELEMENTS;

// Blocks of most threads that a multiprocessor must hold: what training runs in gets 64 registers a thread at most, the
// rest as many as it needs.
template <typename T, int VEC>
constexpr int BLOCKS = VEC > 1 && sizeof(T) == 2 ? 2 : 1;

// The factors of x and x0, read once: a compiler would read them again after every store, which might have changed them.
struct Factors {
    bool has_a, has_b;
    float a, b;

    __device__ Factors(const float* a_, const float* b_)
        : has_a(a_), has_b(b_), a(a_ ? *a_ : 1.0f), b(b_ ? *b_ : 1.0f) {}

    // a x + b x0, where a missing factor is 1. No compiler chooses what is fused: backward must round h as forward did.
    __device__ float mix(float x, float x0) const {
        if (has_b) return has_a ? __fmaf_rn(x, a, __fmul_rn(b, x0)) : __fmaf_rn(x0, b, x);
        return has_a ? __fmaf_rn(x, a, x0) : __fadd_rn(x, x0);
    }
};

template <typename T>
struct Forward {
    const T *x, *x0, *x1;
    const float *a, *b, *scale;
    T *y, *h;  // y is null where q, which is then stored instead, is not
    float* rstd;
    e4m3* q;
    T* first;
    std::int64_t stride_x, stride_x0, stride_x1, M;
    int N, padded_first, team;
    float eps;
};

template <typename T, int VEC, bool MIX>
__global__ void __launch_bounds__(MOST_THREADS, (BLOCKS<T, VEC>)) forward(const Forward<T> p) {
    constexpr int VECTORS = ELEMENTS / VEC;
    SHARED(float, scratch, 32);
    const Team team(p.team);
    const std::int64_t row = std::int64_t{blockIdx.x} * team.of_block + team.index;
    if (row >= p.M) return;  // a whole team, and a block's team is never beyond
    const Factors factors(p.a, p.b);
    float h[VECTORS][VEC], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int column = (i * team.threads + team.rank) * VEC;
        if (column >= p.N) continue;
        load(p.x + row * p.stride_x + column, h[i]);
        if constexpr (MIX) {
            float other[VEC];
            if (p.x1) {
                load(p.x1 + row * p.stride_x1 + column, other);
#pragma unroll
                for (int j = 0; j < VEC; ++j) h[i][j] += other[j];
            }
            load(p.x0 + row * p.stride_x0 + column, other);
#pragma unroll
            for (int j = 0; j < VEC; ++j) h[i][j] = factors.mix(h[i][j], other[j]);
            store(p.h + row * p.N + column, h[i]);
            round_all<T>(h[i]);  // the norm is that of what is stored
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) squares += h[i][j] * h[i][j];
    }
    const float rstd = __frcp_rn(__fsqrt_rn(__fdiv_rn(team.sum(squares, scratch), static_cast<float>(p.N)) + p.eps));
    if (team.rank == 0) p.rstd[row] = rstd;
    const float inverse = p.scale ? __frcp_rn(*p.scale) : 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int column = (i * team.threads + team.rank) * VEC;
        if (column >= p.N) continue;
#pragma unroll
        for (int j = 0; j < VEC; ++j) h[i][j] *= rstd;
        if (p.y) store(p.y + row * p.N + column, h[i]);
        if (column < p.padded_first) store(p.first + row * p.padded_first + column, h[i]);
        if (!p.q) continue;
        round_all<T>(h[i]);  // q is made from the rounded y
#pragma unroll
        for (int j = 0; j < VEC; ++j) h[i][j] *= inverse;
        store(p.q + row * p.N + column, h[i]);
    }
}

template <typename T>
struct Backward {
    const T *dy, *dh, *dfirst, *dx0_in, *x, *x0, *x1;
    const float *a, *b, *rstd;
    T *dx, *dx0;
    float *da, *db;
    std::int64_t stride_dy, stride_dh, stride_dfirst, stride_dx0_in, stride_x, stride_x0, stride_x1, M;
    int N, first, team;
};

// MIX: x, x0 and x1 are forward's, and h is made of them again; else x is the h that forward saved.
template <typename T, int VEC, bool MIX>
__global__ void __launch_bounds__(MOST_THREADS, (BLOCKS<T, VEC>)) backward(const Backward<T> p) {
    constexpr int VECTORS = ELEMENTS / VEC;
    using Raw = Vector<T, VEC>;
    SHARED(float, scratch, 32);
    const Team team(p.team);
    const std::int64_t first_row = (std::int64_t{blockIdx.x} * team.of_block + team.index) * ROWS_OF_TEAM;
    const Factors factors(p.a, p.b);
    float da = 0.0f, db = 0.0f;
    for (int r = 0; r < ROWS_OF_TEAM; ++r) {
        const std::int64_t row = first_row + r;
        if (row >= p.M) break;  // a whole team: none of it is left at a barrier
        Raw x[VECTORS]{}, x0[MIX ? VECTORS : 1]{}, x1[MIX ? VECTORS : 1]{}, dy[VECTORS]{};
        const float rstd = p.rstd[row];
        // the sum of x and x1, the same with its share of x0 as forward rounded it, and the gradient of y
        auto streams = [&](int i, int j, int column, float& sum, float& h, float& g) {
            sum = to_float(x[i].at[j]);
            h = sum;
            if constexpr (MIX) {
                if (p.x1) sum += to_float(x1[i].at[j]);
                h = to_float(rounded<T>(factors.mix(sum, to_float(x0[i].at[j]))));
            }
            g = to_float(dy[i].at[j]);
            // a few channels: too few for vectors, and their rows begin anywhere
            if (column + j < p.first) g += to_float(p.dfirst[row * p.stride_dfirst + column + j]);
        };
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int column = (i * team.threads + team.rank) * VEC;
            if (column >= p.N) continue;
            x[i] = vector_at<VEC>(p.x + row * p.stride_x + column);
            dy[i] = vector_at<VEC>(p.dy + row * p.stride_dy + column);
            if constexpr (MIX) {
                x0[i] = vector_at<VEC>(p.x0 + row * p.stride_x0 + column);
                if (p.x1) x1[i] = vector_at<VEC>(p.x1 + row * p.stride_x1 + column);
            }
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                float sum, h, g;
                streams(i, j, column, sum, h, g);
                product += g * (h * rstd);
            }
        }
        const float mean = __fdiv_rn(team.sum(product, scratch), static_cast<float>(p.N));
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int column = (i * team.threads + team.rank) * VEC;
            if (column >= p.N) continue;
            float dx[VEC], dx0[VEC], more[VEC];
            if (p.dh) load(p.dh + row * p.stride_dh + column, more);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                float sum, h, g;
                streams(i, j, column, sum, h, g);
                g = rstd * (g - (h * rstd) * mean);
                if (p.dh) g += more[j];
                dx[j] = dx0[j] = g;
                if constexpr (MIX) {
                    if (factors.has_a) dx[j] = g * factors.a, da += g * sum;
                    if (factors.has_b) dx0[j] = g * factors.b, db += g * to_float(x0[i].at[j]);
                }
            }
            if constexpr (MIX) {
                if (p.dx0_in) {
                    load(p.dx0_in + row * p.stride_dx0_in + column, more);
#pragma unroll
                    for (int j = 0; j < VEC; ++j) dx0[j] += more[j];
                }
                store(p.dx0 + row * p.N + column, dx0);
            }
            store(p.dx + row * p.N + column, dx);
        }
    }
    if constexpr (MIX) {
        // one number a block and sum, which torch adds in order: bitwise repeatable
        da = block_reduce(da, scratch);
        db = block_reduce(db, scratch);
        if (threadIdx.x == 0 && p.a) p.da[blockIdx.x] = da;
        if (threadIdx.x == 0 && p.b) p.db[blockIdx.x] = db;
    }
}

// Threads of a team, for rows that a thread reads in vectors of VEC.
int team_threads(int N) { return static_cast<int>(ceil_div(ceil_div(N, ELEMENTS), 32)) * 32; }

struct Shape {
    int team, threads;
    std::int64_t rows;  // of a block

    Shape(int N, int rows_of_team)
        : team(team_threads(N)), threads(team == 32 ? 32 * WARPS : team),
          rows(std::int64_t{threads / team} * rows_of_team) {}
    unsigned blocks(std::int64_t M) const { return static_cast<unsigned>(ceil_div(M, rows)); }
};

template <typename... Pointers>
void check(const char* name, std::int64_t M, int N, Pointers... needed) {
    require((needed && ...), name, ": a tensor that is always needed is not there");
    require(M >= 1 && M < (std::int64_t{1} << 31), name, ": M is ", M, "; expected 1 to 2^31 - 1 rows");
    require(N >= 1 && N <= MAX_N, name, ": N is ", N, "; expected 1 to ", MAX_N, " elements of a row");
}

}  // namespace

void rms_norm_forward(
    int device, Pointer stream, const std::string& dtype, Pointer x, Pointer x0, Pointer x1, Pointer a, Pointer b,
    Pointer scale, Pointer y, Pointer h, Pointer rstd, Pointer q, Pointer first, std::int64_t stride_x,
    std::int64_t stride_x0, std::int64_t stride_x1, std::int64_t M, int N, int padded_first, float eps) {
    check("rms_norm_forward", M, N, x, rstd);
    require(!x0 == !h && (x0 || !(x1 || a || b)), "rms_norm_forward: x1, a, b and h come with x0, and h with it");
    require(!scale == !q && !q == !!y, "rms_norm_forward: scale and q come together, else y does");
    require(!first == !padded_first, "rms_norm_forward: padded_first is ", padded_first, ", and first ",
            first ? "is" : "is not", " there");
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        const Shape shape(N, 1);
        const Forward<T> p{
            reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(x0), reinterpret_cast<const T*>(x1),
            reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), reinterpret_cast<const float*>(scale),
            reinterpret_cast<T*>(y), reinterpret_cast<T*>(h), reinterpret_cast<float*>(rstd),
            reinterpret_cast<e4m3*>(q), reinterpret_cast<T*>(first), stride_x, stride_x0, stride_x1, M, N, padded_first,
            shape.team, eps};
        const std::int64_t bytes = sizeof(T);
        const bool wide = N % WIDE<T> == 0 && by_16_bytes(x, x0, x1, y, h, q, first, stride_x * bytes,
                                                          stride_x0 * bytes, stride_x1 * bytes, padded_first * bytes);
        auto kernel = x0 ? (wide ? forward<T, WIDE<T>, true> : forward<T, 1, true>)
                         : (wide ? forward<T, WIDE<T>, false> : forward<T, 1, false>);
        launch(kernel, shape.blocks(M), shape.threads, 0, {device, stream}, p);
    });
}

// How many numbers da and db are written as.
int rms_norm_backward_blocks(std::int64_t M, int N) {
    check("rms_norm_backward_blocks", M, N);
    return static_cast<int>(Shape(N, ROWS_OF_TEAM).blocks(M));
}

void rms_norm_backward(
    int device, Pointer stream, const std::string& dtype, Pointer dy, Pointer dh, Pointer dfirst, Pointer dx0_in,
    Pointer x, Pointer x0, Pointer x1, Pointer a, Pointer b, Pointer rstd, Pointer dx, Pointer dx0, Pointer da,
    Pointer db, std::int64_t stride_dy, std::int64_t stride_dh, std::int64_t stride_dfirst, std::int64_t stride_dx0_in,
    std::int64_t stride_x, std::int64_t stride_x0, std::int64_t stride_x1, std::int64_t M, int N, int first) {
    check("rms_norm_backward", M, N, dy, x, rstd, dx);
    require(!x0 == !dx0 && (x0 || !(x1 || a || b || dx0_in)), "rms_norm_backward: x1, a, b, dx0_in come with x0, dx0 too");
    require(!a == !da && !b == !db, "rms_norm_backward: da comes with a, db with b");
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        const Shape shape(N, ROWS_OF_TEAM);
        auto in = [](Pointer t) { return reinterpret_cast<const T*>(t); };
        auto numbers = [](Pointer t) { return reinterpret_cast<float*>(t); };
        const Backward<T> p{
            in(dy), in(dh), in(dfirst), in(dx0_in), in(x), in(x0), in(x1), numbers(a), numbers(b), numbers(rstd),
            reinterpret_cast<T*>(dx), reinterpret_cast<T*>(dx0), numbers(da), numbers(db), stride_dy, stride_dh,
            stride_dfirst, stride_dx0_in, stride_x, stride_x0, stride_x1, M, N, first, shape.team};
        const std::int64_t bytes = sizeof(T);
        const bool wide = N % WIDE<T> == 0 && by_16_bytes(dy, dh, dx0_in, x, x0, x1, dx, dx0, stride_dy * bytes,
                                                          stride_dh * bytes, stride_dx0_in * bytes, stride_x * bytes,
                                                          stride_x0 * bytes, stride_x1 * bytes);
        auto kernel = x0 ? (wide ? backward<T, WIDE<T>, true> : backward<T, 1, true>)
                         : (wide ? backward<T, WIDE<T>, false> : backward<T, 1, false>);
        launch(kernel, shape.blocks(M), shape.threads, 0, {device, stream}, p);
    });
}
