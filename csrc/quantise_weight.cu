// Weights in e4m3 and the same transposed, a tensor in either fp8 type with a given scale and the same transposed, or
// fp8 numbers transposed: the contracts of kernels/quantise_weight.py and of `transpose` in kernels/fp8.py.
//
// Two launches read the weights, matrices of one size with a scale each, since a scale is known when all of its matrix
// has been seen. Each block of the first leaves the largest |w| that it saw, and each block of the second takes the
// largest of those of its matrix: no atomics, and no host waits. blockIdx.z is the matrix, in both.
//
// The second: a block has a tile of TILE rows and columns. A thread reads and rounds 16 neighbours of a row, which are 16
// bytes of q and go into shared memory. Then it reads 4 bytes of each of 16 rows there, which are 16 bytes of 4 rows of
// q_t. Both copies are so written in pieces of 128 bytes.
//
// Shared memory has no padding but a swizzle: chunk k of 16 bytes of a row lies at k ^ (row / 16). Eight threads that
// write have the eight chunks of a row; the 32 that read have four words of one chunk in eight groups of 16 rows, hence
// in eight places of 16 bytes: all 32 banks either way.
//
// On its way a tensor with a given scale may raise a number to its largest size, for the scales of later steps: a block
// finds the largest of its tile and has one atomic. All are of that number, in any order, which is exact for a maximum;
// none reads it.
//
// Hazard: a thread of the second part reads what others have written; a barrier stands between.
#include "redline.h"

#include "api.h"

namespace {

constexpr int TILE = 128;    // rows and columns of a block
constexpr int THREADS = 256;
constexpr int UNIT = 16;     // neighbours that a thread rounds, and rows that it transposes
constexpr int UNITS = TILE * TILE / UNIT / THREADS;  // of a thread
constexpr int IN_ROW = TILE / UNIT;                  // units of a row
constexpr int AMAX_THREADS = 512, BATCH = 4;
constexpr int AMAX_BLOCKS = 264;  // two a multiprocessor of an H100; blocks of the second launch read their results
constexpr std::int64_t MOST_MATRICES = 65535;  // CUDA's limit of a grid's z

struct Byte { std::uint8_t bits; };  // of a number that is moved as it is

// The larger of two sizes. Their bits have the order of the numbers, NaN's come last: it is not lost.
struct LargestSize {
    static constexpr float NOTHING = 0.0f;
    __device__ static float join(float a, float b) { return __float_as_uint(a) < __float_as_uint(b) ? b : a; }
};

template <typename T>
struct Sizes {
    const T* w;
    float* largest;  // one a block
    std::int64_t rows, columns, matrix, stride;  // the last two: from a matrix, and a row, to the next
};

// VEC numbers at a time; blocks of the same y take rows, those of the same x columns in turn.
template <typename T, int VEC>
__global__ void __launch_bounds__(AMAX_THREADS, 2) amax(const Sizes<T> p) {
    SHARED(float, scratch, 32);
    const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x, vectors = p.columns / VEC;
    float size = 0.0f;
    for (std::int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const T* const w = p.w + blockIdx.z * p.matrix + row * p.stride;
        for (std::int64_t v = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; v < vectors; v += BATCH * step) {
            Vector<T, VEC> x[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
                if (v + i * step < vectors) x[i] = vector_at<VEC>(w + (v + i * step) * VEC);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (v + i * step >= vectors) continue;
#pragma unroll
                for (int j = 0; j < VEC; ++j) size = LargestSize::join(size, fabsf(to_float(x[i].at[j])));
            }
        }
    }
    size = block_reduce<LargestSize>(size, scratch);
    if (threadIdx.x == 0) p.largest[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = size;
}

// x / scale in fp32, rounded to nearest as PyTorch's: an approximate quotient decides ties otherwise. The scale, which
// is positive, being one number, one reciprocal serves all, where a division would branch for each element and call a
// function for each zero: x / scale is q = x * reciprocal less what the exact remainder q * scale - x says that it is
// too much [Markstein 1990]. Hazards: below a small scale, it and x are first multiplied by a power of two, or the
// remainder would not be exact; what overflows there is cut anyway. A remainder of zero is +0 and its product -0, so that
// q keeps the sign of a zero x. An infinite scale has no remainder, an infinite q none either.
struct Divisor {
    float power, multiple, reciprocal;

    __device__ explicit Divisor(float scale) {
        power = scale < 0x1p-80f ? 0x1p96f : 1.0f;
        scale = __fmul_rn(scale, power);
        multiple = scale == INFINITE ? 0.0f : scale;
        reciprocal = __fdiv_rn(1.0f, scale);
    }
    __device__ float quotient(float x) const {
        x = __fmul_rn(x, power);
        const float q = __fmul_rn(x, reciprocal);
        return fabsf(q) < INFINITE ? __fmaf_rn(__fmaf_rn(q, multiple, -x), -reciprocal, q) : q;
    }
};

template <typename T>
struct Transposed {
    const T* x;
    std::uint8_t *q, *q_t;
    const float *scale_in, *largest;  // one of them: the scale, or of how many parts it is to be made
    float *scale_out, *amax;          // amax: raised to the largest size, unless null
    std::int64_t n, R, C, columns_t, matrix_x, stride_x, matrix_q, stride_q, matrix_t, stride_t;
    int parts;
    float tiny;
    bool wide_x, wide_q, wide_t;  // all rows begin at multiples of 16 bytes
};

// Four rows of four bytes to four columns.
__device__ void transpose_bytes(const std::uint32_t (&row)[4], std::uint32_t (&column)[4]) {
    const std::uint32_t a = __byte_perm(row[0], row[1], 0x5140), b = __byte_perm(row[2], row[3], 0x5140);
    const std::uint32_t c = __byte_perm(row[0], row[1], 0x7362), d = __byte_perm(row[2], row[3], 0x7362);
    column[0] = __byte_perm(a, b, 0x5410);
    column[1] = __byte_perm(a, b, 0x7632);
    column[2] = __byte_perm(c, d, 0x5410);
    column[3] = __byte_perm(c, d, 0x7632);
}

// As many as there are of 16 bytes, all at once where that is possible.
__device__ void store_bytes(std::uint8_t* to, const Vector<std::uint8_t, UNIT>& bytes, std::int64_t there, bool wide) {
    if (wide && there >= UNIT) {
        vector_at<UNIT>(to) = bytes;
        return;
    }
#pragma unroll
    for (int j = 0; j < UNIT; ++j)
        if (j < there) to[j] = bytes.at[j];
}

// Q: what numbers are rounded to; of bytes, which are moved as they are, itself.
template <typename T, typename Q>
__global__ void __launch_bounds__(THREADS, 4) transpose(const Transposed<T> p) {
    constexpr bool QUANTISE = !std::is_same_v<T, Byte>;
    using Unit = Vector<T, UNIT>;
    using Bytes = Vector<std::uint8_t, UNIT>;
    SHARED(Bytes, tile, TILE * IN_ROW);
    SHARED(float, scratch, 32);
    const std::int64_t first_row = std::int64_t{blockIdx.x} * TILE, first_column = std::int64_t{blockIdx.y} * TILE;
    const std::int64_t matrix = blockIdx.z;
    auto read = [&](int i) {  // zeros beyond the matrix
        const int unit = i * THREADS + threadIdx.x;
        const std::int64_t row = first_row + unit / IN_ROW, column = first_column + unit % IN_ROW * UNIT;
        const T* const from = p.x + matrix * p.matrix_x + row * p.stride_x + column;
        Unit x{};
        if (i < UNITS && row < p.R && column < p.C) {
            if (p.wide_x && column + UNIT <= p.C) {
                x = vector_at<UNIT>(from);
            } else {
#pragma unroll
                for (int j = 0; j < UNIT; ++j)
                    if (column + j < p.C) x.at[j] = from[j];
            }
        }
        return x;
    };
    Unit x = read(0);  // on its way while the scale is made
    float scale = 1.0f, seen = 0.0f;
    if constexpr (QUANTISE) {
        if (p.scale_in) {
            scale = p.scale_in[matrix];
        } else {
            float size = 0.0f;
            for (int part = threadIdx.x; part < p.parts; part += THREADS)
                size = LargestSize::join(size, p.largest[matrix * p.parts + part]);
            scale = __fdiv_rn(block_reduce<LargestSize>(size, scratch), E4M3_MAX);
            if (scale < p.tiny) scale = p.tiny;  // NaN is not
            if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) p.scale_out[matrix] = scale;
        }
    }
    const Divisor by(scale);
#pragma unroll 1  // one unit in registers and one on its way: more would take those of other blocks
    for (int i = 0; i < UNITS; ++i) {
        const Unit next = read(i + 1);
        const int unit = i * THREADS + threadIdx.x, tile_row = unit / IN_ROW, chunk = unit % IN_ROW;
        const std::int64_t row = first_row + tile_row, column = first_column + chunk * UNIT;
        Bytes bytes;
        if constexpr (QUANTISE) {
            Vector<Q, UNIT> rounded;
#pragma unroll
            for (int j = 0; j < UNIT; j += 2)
                convert_pair(by.quotient(to_float(x.at[j])), by.quotient(to_float(x.at[j + 1])), &rounded.at[j]);
            if (p.amax) {
#pragma unroll
                for (int j = 0; j < UNIT; ++j) seen = LargestSize::join(seen, fabsf(to_float(x.at[j])));
            }
#pragma unroll
            for (int j = 0; j < UNIT; ++j) bytes.at[j] = rounded.at[j].bits;
            if (row < p.R)
                store_bytes(p.q + matrix * p.matrix_q + row * p.stride_q + column, bytes, p.C - column, p.wide_q);
        } else {
#pragma unroll
            for (int j = 0; j < UNIT; ++j) bytes.at[j] = x.at[j].bits;
        }
        tile[tile_row * IN_ROW + (chunk ^ tile_row / UNIT)] = bytes;
        x = next;
    }
    __syncthreads();  // without it a thread reads what another has not written yet
    const int group = threadIdx.x % 8, word = threadIdx.x / 8;  // 16 rows, and four columns of the tile
    const int chunk = word / 4 ^ group;
    std::uint32_t columns[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        std::uint32_t in[4], out[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Bytes& bytes = tile[(group * UNIT + i * 4 + j) * IN_ROW + chunk];
            in[j] = reinterpret_cast<const std::uint32_t*>(&bytes)[word % 4];
        }
        transpose_bytes(in, out);
#pragma unroll
        for (int j = 0; j < 4; ++j) columns[j][i] = out[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const std::int64_t row = first_column + word * 4 + j, column = first_row + group * UNIT;  // of q_t
        if (row >= p.C) continue;
        const Bytes bytes = *reinterpret_cast<const Bytes*>(columns[j]);
        std::uint8_t* const to = p.q_t + matrix * p.matrix_t + row * p.stride_t + column;
        store_bytes(to, bytes, p.columns_t - column, p.wide_t);
    }
    if constexpr (QUANTISE) {
        if (p.amax) {
            seen = block_reduce<LargestSize>(seen, scratch);
            if (threadIdx.x == 0) atomicMax(reinterpret_cast<int*>(p.amax), __float_as_int(seen));
        }
    }
}

template <typename T, typename Q>
void start(Transposed<T> p, int device, Pointer stream) {
    auto at = [](const auto* pointer) { return reinterpret_cast<Pointer>(pointer); };
    constexpr std::int64_t SIZE = sizeof(T);
    p.wide_x = by_16_bytes(at(p.x), p.matrix_x * SIZE, p.stride_x * SIZE);
    p.wide_q = by_16_bytes(at(p.q), p.matrix_q, p.stride_q);
    p.wide_t = by_16_bytes(at(p.q_t), p.matrix_t, p.stride_t);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.columns_t, TILE)), static_cast<unsigned>(ceil_div(p.C, TILE)),
                    static_cast<unsigned>(p.n));
    launch(transpose<T, Q>, grid, THREADS, 0, {device, stream}, p);
}

void check(const char* name, std::int64_t n, std::int64_t R, std::int64_t C, std::int64_t columns_t) {
    require(n >= 1 && n <= MOST_MATRICES, name, ": ", n, " matrices; expected 1 to ", MOST_MATRICES);
    require(R >= 1 && C >= 1 && ceil_div(C, TILE) <= 65535, name, ": a matrix of ", R, " x ", C,
            "; expected a row or more and 1 to ", std::int64_t{65535} * TILE, " columns");
    require(columns_t >= R, name, ": rows of ", columns_t, " for columns of ", R, "; expected as many or more");
}

// Of `largest`, those of one of n matrices.
std::int64_t most_parts(std::int64_t n) { return std::max<std::int64_t>(1, AMAX_BLOCKS / n); }

}  // namespace

// How many numbers `largest` has room for.
std::int64_t quantise_weight_parts(std::int64_t n) { return n * most_parts(n); }

void quantise_weight(
    int device, Pointer stream, const std::string& dtype, Pointer w, Pointer q, Pointer q_t, Pointer scale,
    Pointer largest, std::int64_t n, std::int64_t R, std::int64_t C, std::int64_t columns_t, std::int64_t matrix_w,
    std::int64_t stride_w, std::int64_t matrix_q, std::int64_t stride_q, std::int64_t matrix_t, std::int64_t stride_t,
    float tiny) {
    check("quantise_weight", n, R, C, columns_t);
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        const bool gapless = stride_w == C;  // all of a matrix as one row
        const Sizes<T> sizes{reinterpret_cast<const T*>(w), reinterpret_cast<float*>(largest), gapless ? 1 : R,
                             gapless ? R * C : C, matrix_w, stride_w};
        constexpr std::int64_t SIZE = sizeof(T);
        const bool wide =
            sizes.columns % WIDE<T> == 0 && by_16_bytes(w, matrix_w * SIZE, gapless ? 0 : stride_w * SIZE);
        const std::int64_t vectors = ceil_div(sizes.columns, wide ? WIDE<T> : 1);
        const std::int64_t blocks = gapless ? ceil_div(vectors, AMAX_THREADS) : R;
        const unsigned parts = static_cast<unsigned>(std::min(blocks, most_parts(n))), z = static_cast<unsigned>(n);
        launch(wide ? amax<T, WIDE<T>> : amax<T, 1>, gapless ? dim3(parts, 1, z) : dim3(1, parts, z), AMAX_THREADS, 0,
               {device, stream}, sizes);
        start<T, e4m3>(
            Transposed<T>{reinterpret_cast<const T*>(w), reinterpret_cast<std::uint8_t*>(q),
                          reinterpret_cast<std::uint8_t*>(q_t), nullptr, reinterpret_cast<const float*>(largest),
                          reinterpret_cast<float*>(scale), nullptr, n, R, C, columns_t, matrix_w, stride_w, matrix_q,
                          stride_q, matrix_t, stride_t, static_cast<int>(parts), tiny, false, false, false},
            device, stream);
    });
}

void fp8_transpose(
    int device, Pointer stream, const std::string& dtype, const std::string& q_dtype, Pointer x, Pointer q, Pointer q_t,
    Pointer scale, Pointer amax, std::int64_t n, std::int64_t R, std::int64_t C, std::int64_t columns_t,
    std::int64_t matrix_x, std::int64_t stride_x, std::int64_t matrix_q, std::int64_t stride_q, std::int64_t matrix_t,
    std::int64_t stride_t) {
    check("fp8_transpose", n, R, C, columns_t);
    require(!q == !scale, "fp8_transpose: q and scale come together");
    require(q || !amax, "fp8_transpose: amax comes with q and scale");
    require(q_dtype == "float8_e4m3fn" || q_dtype == "float8_e5m2", "fp8_transpose: q is ", q_dtype,
            "; expected float8_e4m3fn or float8_e5m2");
    auto run = [&](auto number, auto becomes) {
        using T = decltype(number);
        start<T, decltype(becomes)>(
            Transposed<T>{reinterpret_cast<const T*>(x), reinterpret_cast<std::uint8_t*>(q),
                          reinterpret_cast<std::uint8_t*>(q_t), reinterpret_cast<const float*>(scale), nullptr,
                          nullptr, reinterpret_cast<float*>(amax), n, R, C, columns_t, matrix_x, stride_x, matrix_q,
                          stride_q, matrix_t, stride_t, 0, 0.0f, false, false, false},
            device, stream);
    };
    if (q && q_dtype == "float8_e5m2") return with_type(dtype, [&](auto number) { run(number, e5m2{}); });
    if (q) return with_type(dtype, [&](auto number) { run(number, e4m3{}); });
    require(dtype == q_dtype, "fp8_transpose: dtype is ", dtype, " and there is no q; expected that of q_t, ", q_dtype);
    run(Byte{}, Byte{});
}
