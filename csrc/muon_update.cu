// Muon's step without the orthogonalisation, on all banks of matrices of a model in a few launches: the contract of each
// is that of kernels/muon_update.py.
//
//   momentum    momentum_rows, or momentum_columns where Muon's rows are stored columns; then scale, and then
//               divide_columns for columns of several blocks, whose norms are not known before all of them are read
//   apply       squares_of_rows, or squares_of_columns; factor; apply
//
// Each is one launch for all matrices that need it. Where a sum goes across blocks, each block writes its part and the
// next launch adds the parts in order: bitwise repeatable, without atomics.
//
// Rows: a team of threads, a warp if the row is short, computes it and keeps it in shared memory until its norm is known.
// Columns: a block has 128 columns of COLUMN_ROWS rows; its 16 threads of a row take 8 columns each, so that a warp reads
// two stretches of 512 bytes, and its 16 threads of a column add up what they found in shared memory.
#include "redline.h"

#include "api.h"

namespace {

constexpr int THREADS = 256;
constexpr int VEC = 8;
constexpr int MOST = 16;                // banks of a launch
constexpr int SHORT_ROW = 1024;         // elements up to which a warp has a row to itself
constexpr int COLUMNS = 128;            // of a block
constexpr int LANES = THREADS * VEC / COLUMNS;  // threads that share a column
constexpr int COLUMN_ROWS = 256;        // of a block
constexpr int MAP = 4 * THREADS * VEC;  // elements of a block where each is on its own
constexpr int MAX_SIDE = 16384, MAX_MATRICES = 65535;  // so that K times a side fits an int

// One bank (K, R, C). Which of the pointers are there depends on the step.
struct Bank {
    Numbers g, x;
    float* buf;
    Weights p;
    float *scale, *second;
    const float *lr_scale, *hyper;  // hyper: lr, weight decay, momentum
    float* parts;                   // sums of squares (K, parts, n), see `sides`
    float* sums;                    // the same added up (K, n); momentum_rows and squares_of_rows write it at once
    float* factor;                  // (K, n): z / x
    std::int64_t g_k, g_r, buf_k, buf_r, p_k, p_r, low_k, low_r, x_k, x_r;
    int K, R, C;
    bool by_columns;  // n sums are those of columns, else of rows
    bool wide;
};
using Banks = Table<Bank, MOST>;

__host__ __device__ inline int sides(const Bank& b) { return b.by_columns ? b.C : b.R; }
__host__ __device__ inline int parts_of(const Bank& b) { return (b.R + COLUMN_ROWS - 1) / COLUMN_ROWS; }

__host__ __device__ inline int team_of(const Bank& b) { return b.C <= SHORT_ROW ? 32 : THREADS; }

// rows -----------------------------------------------------------------------------------------------------------------

// buf = buf + (1 - momentum) (g - buf), and u = g + momentum (buf - g) of the new buf.
template <int N>
__device__ void nesterov(const Bank& b, std::int64_t g, std::int64_t at, float rest, float (&u)[N]) {
    float grad[N], buf[N];
    b.g.read(g, grad);
    load(b.buf + at, buf);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        buf[i] = __fmaf_rn(__fsub_rn(grad[i], buf[i]), rest, buf[i]);
        u[i] = __fmaf_rn(__fsub_rn(grad[i], buf[i]), rest, buf[i]);
    }
    store(b.buf + at, buf);
}

// 1 / r of a row or column whose squares are summed.
__device__ float inverse_norm(float squares) { return __frcp_rn(fmaxf(__fsqrt_rn(squares), 1e-6f)); }

// Which row a team has, in which matrix; k is K where there is none.
struct Row {
    int k, r;
    __device__ Row(const Bank& b, const Team& team, unsigned block) {
        const std::int64_t row = std::int64_t{block} * team.of_block + team.index;
        k = static_cast<int>(row / b.R);
        r = static_cast<int>(row % b.R);
    }
};

template <int N>
__device__ void momentum_of_row(const Bank& b, const Row& at, const Team& team, float* row, float* scratch) {
    const std::int64_t g = at.k * b.g_k + at.r * b.g_r, buf = at.k * b.buf_k + at.r * b.buf_r;
    const std::int64_t line = std::int64_t{at.k} * b.R + at.r;
    const float rest = 1.0f - b.hyper[2];
    float squares = 0.0f, u[N];
    for (int c = team.rank * N; c < b.C; c += team.threads * N) {
        nesterov(b, g + c, buf + c, rest, u);
        store(row + c, u);
#pragma unroll
        for (int i = 0; i < N; ++i) squares += u[i] * u[i];
    }
    squares = team.sum(squares, scratch);
    if (team.rank == 0) b.sums[line] = squares;
    const float inverse = inverse_norm(squares);
    for (int c = team.rank * N; c < b.C; c += team.threads * N) {  // each thread reads what it wrote itself
        load(row + c, u);
#pragma unroll
        for (int i = 0; i < N; ++i) u[i] *= inverse;
        b.x.write(line * b.C + c, u);
    }
}

// Floats that a team's row takes in shared memory: a multiple of 16 bytes.
__host__ __device__ inline int padded(int C) { return (C + 3) / 4 * 4; }

__global__ void __launch_bounds__(THREADS) momentum_rows(const __grid_constant__ Banks banks) {
    DYNAMIC_SHARED(float, rows);
    SHARED(float, scratch, 32);
    const int item = banks.item();
    const Bank& b = banks.items[item];
    const Team team(team_of(b));
    const Row at(b, team, blockIdx.x - banks.first[item]);
    if (at.k >= b.K) return;  // a whole team, and where the team is the block, it has a row
    float* row = rows + team.index * padded(b.C);
    b.wide ? momentum_of_row<VEC>(b, at, team, row, scratch) : momentum_of_row<1>(b, at, team, row, scratch);
}

template <int N>
__device__ float squares_of_row(const Bank& b, std::int64_t begin, const Team& team) {
    float squares = 0.0f, x[N];
    for (int c = team.rank * N; c < b.C; c += team.threads * N) {
        b.x.read(begin + c, x);
#pragma unroll
        for (int i = 0; i < N; ++i) squares += x[i] * x[i];
    }
    return squares;
}

__global__ void __launch_bounds__(THREADS) squares_of_rows(const __grid_constant__ Banks banks) {
    SHARED(float, scratch, 32);
    const int item = banks.item();
    const Bank& b = banks.items[item];
    const Team team(team_of(b));
    const Row at(b, team, blockIdx.x - banks.first[item]);
    if (at.k >= b.K) return;
    const std::int64_t begin = at.k * b.x_k + at.r * b.x_r;
    float squares = b.wide ? squares_of_row<VEC>(b, begin, team) : squares_of_row<1>(b, begin, team);
    squares = team.sum(squares, scratch);
    if (team.rank == 0) b.sums[std::int64_t{at.k} * b.R + at.r] = squares;
}

// columns --------------------------------------------------------------------------------------------------------------

// Where a block of columns is: its matrix, its part of the rows, its first column.
struct Columns {
    int k, part, c;
    __device__ Columns(const Bank& b, unsigned block) {
        const unsigned across = (b.C + COLUMNS - 1) / COLUMNS, down = parts_of(b);
        c = block % across * COLUMNS;
        part = block / across % down;
        k = block / across / down;
    }
};

// Adds up the squares that the threads of a column found, and writes the block's part. The first COLUMNS threads get the
// sum of theirs.
__device__ float write_part(const Bank& b, const Columns& at, const float (&squares)[VEC], float* tile) {
    const int lane = threadIdx.x / (COLUMNS / VEC), group = threadIdx.x % (COLUMNS / VEC);
#pragma unroll
    for (int i = 0; i < VEC; ++i) tile[lane * COLUMNS + group * VEC + i] = squares[i];
    __syncthreads();  // without it a thread adds what another has not written yet
    float total = 0.0f;
    if (threadIdx.x >= COLUMNS) return total;
    for (int l = 0; l < LANES; ++l) total += tile[l * COLUMNS + threadIdx.x];
    const int c = at.c + threadIdx.x;
    if (c < b.C) b.parts[(std::int64_t{at.k} * parts_of(b) + at.part) * b.C + c] = total;
    return total;
}

// Calls f<N>(r, c, i) for the block's elements that this thread has, N at a time: those at (r, c), of which the first is
// its i-th column.
template <typename F>
__device__ void each_of_columns(const Bank& b, const Columns& at, F f) {
    const int lane = threadIdx.x / (COLUMNS / VEC), c = at.c + threadIdx.x % (COLUMNS / VEC) * VEC;
    const int end = min(b.R, (at.part + 1) * COLUMN_ROWS);
    for (int r = at.part * COLUMN_ROWS + lane; r < end; r += LANES) {
        if (b.wide && c < b.C) f.template operator()<VEC>(r, c, 0);
        if (b.wide) continue;
#pragma unroll
        for (int i = 0; i < VEC; ++i)
            if (c + i < b.C) f.template operator()<1>(r, c + i, i);
    }
}

__global__ void __launch_bounds__(THREADS) momentum_columns(const __grid_constant__ Banks banks) {
    SHARED(float, tile, LANES * COLUMNS);
    SHARED(float, inverse, COLUMNS);
    const int item = banks.item();
    const Bank& b = banks.items[item];
    const Columns at(b, blockIdx.x - banks.first[item]);
    const bool whole = parts_of(b) == 1;  // the block has all of its columns
    const float rest = 1.0f - b.hyper[2];
    float squares[VEC] = {};
    each_of_columns(b, at, [&]<int N>(int r, int c, int first) {
        float u[N];
        nesterov(b, at.k * b.g_k + r * b.g_r + c, at.k * b.buf_k + r * b.buf_r + c, rest, u);
        // its norm is not known yet: divide_columns comes back
        if (!whole) b.x.write((std::int64_t{at.k} * b.R + r) * b.C + c, u);
#pragma unroll
        for (int i = 0; i < N; ++i) squares[first + i] += u[i] * u[i];
    });
    const float total = write_part(b, at, squares, tile);
    if (!whole) return;
    if (threadIdx.x < COLUMNS) inverse[threadIdx.x] = inverse_norm(total);
    __syncthreads();  // without it a thread divides by what another has not added up yet
    each_of_columns(b, at, [&]<int N>(int r, int c, int) {  // each thread reads the buf that it wrote itself
        float grad[N], u[N];
        b.g.read(at.k * b.g_k + r * b.g_r + c, grad);
        load(b.buf + at.k * b.buf_k + r * b.buf_r + c, u);
#pragma unroll
        for (int i = 0; i < N; ++i) u[i] = __fmaf_rn(__fsub_rn(grad[i], u[i]), rest, u[i]) * inverse[c - at.c + i];
        b.x.write((std::int64_t{at.k} * b.R + r) * b.C + c, u);
    });
}

__global__ void __launch_bounds__(THREADS) squares_of_columns(const __grid_constant__ Banks banks) {
    SHARED(float, tile, LANES * COLUMNS);
    const int item = banks.item();
    const Bank& b = banks.items[item];
    const Columns at(b, blockIdx.x - banks.first[item]);
    float squares[VEC] = {};
    each_of_columns(b, at, [&]<int N>(int r, int c, int first) {
        float x[N];
        b.x.read(at.k * b.x_k + r * b.x_r + c, x);
#pragma unroll
        for (int i = 0; i < N; ++i) squares[first + i] += x[i] * x[i];
    });
    write_part(b, at, squares, tile);
}

// one block a matrix ---------------------------------------------------------------------------------------------------

// The sum of squares of one row or column: of its parts in order, or, of a row, what stands there already.
__device__ float sum_of_parts(const Bank& b, int k, int i) {
    const std::int64_t at = std::int64_t{k} * sides(b) + i;
    if (!b.by_columns) return b.sums[at];
    const int parts = parts_of(b);
    float total = 0.0f;
    for (int part = 0; part < parts; ++part) total += b.parts[(std::int64_t{k} * parts + part) * b.C + i];
    return b.sums[at] = total;
}

// What Polar Express multiplies x by. Rows of x have length min(1, r / 1e-6).
__global__ void __launch_bounds__(THREADS) scale(const __grid_constant__ Banks banks, float safety) {
    SHARED(float, scratch, 32);
    const int item = banks.item();
    const Bank& b = banks.items[item];
    const int k = blockIdx.x - banks.first[item], n = sides(b);
    float squares = 0.0f, lengths = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const float s = sum_of_parts(b, k, i);
        squares += s;
        lengths += fminf(s * 1e12f, 1.0f);
    }
    squares = block_reduce(squares, scratch);
    lengths = block_reduce(lengths, scratch);
    if (threadIdx.x) return;
    const float target = __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(n)));
    b.scale[k] = __fdiv_rn(target, safety * target * __fsqrt_rn(lengths) + 1e-6f);
}

// NorMuon's second moment, and z / x, of each row or column.
__global__ void __launch_bounds__(THREADS) factor(const __grid_constant__ Banks banks, float beta2) {
    SHARED(float, scratch, 32);
    const int item = banks.item();
    const Bank& b = banks.items[item];
    const int k = blockIdx.x - banks.first[item], n = sides(b);
    const float others = static_cast<float>(b.by_columns ? b.R : b.C);
    float* second = b.second + std::int64_t{k} * n;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) squares += sum_of_parts(b, k, i);
    const float size = __fsqrt_rn(block_reduce(squares, scratch));
    const float rescale = __fdiv_rn(__fsqrt_rn(static_cast<float>(min(b.R, b.C))), fmaxf(size, 1e-6f));  // y / x
    float new_squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) {  // the same elements as above: a thread reads its own
        const float s = b.sums[std::int64_t{k} * n + i] * rescale * rescale;
        second[i] = __fmaf_rn(__fsub_rn(__fdiv_rn(s, others), second[i]), 1.0f - beta2, second[i]);
        new_squares += s * __frcp_rn(fmaxf(second[i], 1e-10f));
    }
    const float new_size = __fsqrt_rn(block_reduce(new_squares, scratch));
    const float keep = __fdiv_rn(size * rescale, fmaxf(new_size, 1e-10f));
    for (int i = threadIdx.x; i < n; i += THREADS)
        b.factor[std::int64_t{k} * n + i] = rescale * __fsqrt_rn(__frcp_rn(fmaxf(second[i], 1e-10f))) * keep;
}

// one element, or 8, at a time -----------------------------------------------------------------------------------------

__host__ __device__ inline std::int64_t map_blocks(const Bank& b) {  // of a matrix
    return (std::int64_t{b.R} * b.C + MAP - 1) / MAP;
}

// Calls f(k, r, c) for the elements, or vectors of N, that this thread has.
template <int N, typename F>
__device__ void each(const Bank& b, unsigned block, F f) {
    const unsigned blocks = static_cast<unsigned>(map_blocks(b)), across = b.C / N;
    const int k = block / blocks;
    const unsigned begin = block % blocks * (MAP / N), all = static_cast<unsigned>(b.R) * across;
    for (unsigned i = begin + threadIdx.x; i < min(all, begin + MAP / N); i += THREADS)
        f(k, static_cast<int>(i / across), static_cast<int>(i % across * N));
}

// Factors of the elements at (r, c…) of matrix k, from one of each row or column.
template <int N>
__device__ void factors(const Bank& b, const float* of_side, int k, int r, int c, float (&x)[N]) {
    const float* at = of_side + std::int64_t{k} * sides(b);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = at[b.by_columns ? c + i : r];
}

template <int N>
__device__ void divide(const Bank& b, unsigned block) {
    each<N>(b, block, [&](int k, int r, int c) {
        const std::int64_t at = (std::int64_t{k} * b.R + r) * b.C + c;
        float u[N], squares[N];
        b.x.read(at, u);
        factors(b, b.sums, k, r, c, squares);
#pragma unroll
        for (int i = 0; i < N; ++i) u[i] *= inverse_norm(squares[i]);
        b.x.write(at, u);
    });
}

__global__ void __launch_bounds__(THREADS) divide_columns(const __grid_constant__ Banks banks) {
    const int item = banks.item();
    const Bank& b = banks.items[item];
    const unsigned block = blockIdx.x - banks.first[item];
    b.wide ? divide<VEC>(b, block) : divide<1>(b, block);
}

template <int N>
__device__ void apply_to(const Bank& b, unsigned block) {
    each<N>(b, block, [&](int k, int r, int c) {
        const std::int64_t at = k * b.p_k + r * b.p_r + c, low = k * b.low_k + r * b.low_r + c;
        const float lr = b.hyper[0] * b.lr_scale[k], decay = lr * b.hyper[1];
        float p[N], x[N], z[N];
        b.x.read(k * b.x_k + r * b.x_r + c, x);
        factors(b, b.factor, k, r, c, z);
        b.p.read(at, low, p);
        // each fused multiply-add is written out: a master's bits must not depend on where a compiler fuses
#pragma unroll
        for (int i = 0; i < N; ++i) {
            z[i] = __fmul_rn(x[i], z[i]);
            p[i] = __fmaf_rn(__fmul_rn(z[i], p[i]) >= 0.0f ? -decay : 0.0f, p[i], p[i]);
            p[i] = __fmaf_rn(-lr, z[i], p[i]);
        }
        b.p.write(at, low, p);
    });
}

__global__ void __launch_bounds__(THREADS) apply(const __grid_constant__ Banks banks) {
    const int item = banks.item();
    const Bank& b = banks.items[item];
    const unsigned block = blockIdx.x - banks.first[item];
    b.wide ? apply_to<VEC>(b, block) : apply_to<1>(b, block);
}

// the host's side ------------------------------------------------------------------------------------------------------

void check(const char* name, const MuonBank& t) {
    require(t.K >= 1 && t.K <= MAX_MATRICES && t.R >= 1 && t.C >= 1 && t.R <= MAX_SIDE && t.C <= MAX_SIDE, name,
            ": a bank of ", t.K, " x ", t.R, " x ", t.C, "; expected 1 to ", MAX_MATRICES, " matrices with sides of 1 to ",
            MAX_SIDE);
    require(t.x && t.hyper && (t.buf ? t.g && t.scale : t.p && t.second && t.lr_scale), name,
            ": x and hyper are always needed, with buf g and scale, else p, second and lr_scale");
    require(!t.low || t.p_dtype == "bfloat16", name, ": p of a master is ", t.p_dtype, "; expected bfloat16");
}

// Floats of workspace that a bank takes: its sums, its factors, and parts of columns; each a multiple of 16 bytes.
std::int64_t floats(const Bank& b) {
    const std::int64_t n = std::int64_t{b.K} * sides(b);
    return 2 * padded(static_cast<int>(n)) + (b.by_columns ? n * parts_of(b) + 3 : 0) / 4 * 4;
}

std::vector<Bank> banks_of(const char* name, const std::vector<MuonBank>& tensors) {
    std::vector<Bank> banks;
    for (const MuonBank& t : tensors) {
        check(name, t);
        const std::int64_t g = t.g_dtype == "bfloat16" ? 2 : 4, x = t.x_dtype == "bfloat16" ? 2 : 4;
        const std::int64_t p = t.p_dtype == "bfloat16" ? 2 : 4;
        auto in = [](Pointer at) { return reinterpret_cast<float*>(at); };
        Bank b{};
        b.g = numbers(t.g, t.g_dtype);
        b.x = numbers(t.x, t.x_dtype);
        b.buf = in(t.buf);
        b.p = {numbers(t.p, t.p_dtype), reinterpret_cast<std::int16_t*>(t.low)};
        b.scale = in(t.scale), b.second = in(t.second), b.lr_scale = in(t.lr_scale), b.hyper = in(t.hyper);
        b.g_k = t.g_k, b.g_r = t.g_r, b.buf_k = t.buf_k, b.buf_r = t.buf_r, b.p_k = t.p_k, b.p_r = t.p_r;
        b.low_k = t.low_k, b.low_r = t.low_r, b.x_k = t.x_k, b.x_r = t.x_r;
        b.K = t.K, b.R = t.R, b.C = t.C, b.by_columns = t.by_columns;
        b.wide = t.C % VEC == 0 && by_16_bytes(t.g, t.x, t.buf, t.p, t.low, t.g_k * g, t.g_r * g, t.buf_k * 4,
                                               t.buf_r * 4, t.p_k * p, t.p_r * p, t.low_k * 2, t.low_r * 2, t.x_k * x,
                                               t.x_r * x);
        banks.push_back(b);
    }
    return banks;
}

// Gives each bank its part of the workspace.
void share(std::vector<Bank>& banks, Pointer workspace) {
    float* next = reinterpret_cast<float*>(workspace);
    for (Bank& b : banks) {
        const int n = padded(b.K * sides(b));
        b.sums = next, b.factor = next + n, b.parts = next + 2 * n;
        next += floats(b);
    }
}

std::int64_t row_blocks(const Bank& b) { return ceil_div(std::int64_t{b.K} * b.R, THREADS / team_of(b)); }
std::int64_t column_blocks(const Bank& b) { return std::int64_t{b.K} * parts_of(b) * ceil_div(b.C, COLUMNS); }
template <std::int64_t (*blocks)(const Bank&), bool columns>
std::int64_t blocks_if(const Bank& b) { return b.by_columns == columns ? blocks(b) : 0; }

}  // namespace

std::int64_t muon_workspace(const std::vector<MuonBank>& tensors) {
    std::int64_t all = 0;
    for (const Bank& b : banks_of("muon_workspace", tensors)) all += floats(b);
    return all;
}

void muon_momentum(int device, Pointer stream, const std::vector<MuonBank>& tensors, Pointer workspace, float safety) {
    std::vector<Bank> banks = banks_of("muon_momentum", tensors);
    share(banks, workspace);
    const Where where{device, stream};
    std::size_t shared = 0;
    for (const Bank& b : banks)
        if (!b.by_columns) shared = std::max<std::size_t>(shared, THREADS / team_of(b) * padded(b.C) * sizeof(float));
    launch_all(momentum_rows, banks, blocks_if<row_blocks, false>, THREADS, shared, where);
    launch_all(momentum_columns, banks, blocks_if<column_blocks, true>, THREADS, 0, where);
    launch_all(scale, banks, [](const Bank& b) { return b.K; }, THREADS, 0, where, safety);
    auto split = [](const Bank& b) { return b.by_columns && parts_of(b) > 1 ? b.K * map_blocks(b) : 0; };
    launch_all(divide_columns, banks, split, THREADS, 0, where);
}

void muon_apply(int device, Pointer stream, const std::vector<MuonBank>& tensors, Pointer workspace, float beta2) {
    std::vector<Bank> banks = banks_of("muon_apply", tensors);
    share(banks, workspace);
    const Where where{device, stream};
    launch_all(squares_of_rows, banks, blocks_if<row_blocks, false>, THREADS, 0, where);
    launch_all(squares_of_columns, banks, blocks_if<column_blocks, true>, THREADS, 0, where);
    launch_all(factor, banks, [](const Bank& b) { return b.K; }, THREADS, 0, where, beta2);
    launch_all(apply, banks, [](const Bank& b) { return b.K * map_blocks(b); }, THREADS, 0, where);
}
