// Helpers shared by the kernels: storage types, math, copies of tiles, sums over quads. Compiled by NVRTC: no host headers.
//
// Every kernel is specialised at compile time by macros (see ops/cuda_scan.py):
//   SCALAR_TYPE 0 fp32, 1 bf16, 2 fp16: how activations are stored; arithmetic is fp32 everywhere
//   VECTOR_IO   1 if every activation row begins on 16 bytes and holds whole 16-byte chunks
#pragma once

#include <ptx.cuh>

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr unsigned FULL_WARP = 0xffffffffu;

// -- storage types ------------------------------------------------------------------------------------------------------

DEVICE float to_float(scalar_t x) {
#if SCALAR_TYPE == 0
    return x;
#else
    float first, second;
    unpack(x, first, second);
    return first;
#endif
}

DEVICE scalar_t from_float(float x) {
#if SCALAR_TYPE == 0
    return x;
#else
    return static_cast<scalar_t>(pack(x, 0.f));
#endif
}

// K consecutive floats, as wide as their alignment (K * 4 bytes, at most 16) allows.
template <int K>
DEVICE void load(const float* p, float (&v)[K]) {
    static_assert(K <= 2 || K % 4 == 0, "1, 2 or a multiple of 4");
    if constexpr (K == 1) {
        v[0] = *p;
    } else if constexpr (K == 2) {
        const float2 q = *reinterpret_cast<const float2*>(p);
        v[0] = q.x, v[1] = q.y;
    } else {
#pragma unroll
        for (int i = 0; i < K; i += 4) {
            const float4 q = *reinterpret_cast<const float4*>(p + i);
            v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
        }
    }
}

template <int K>
DEVICE void store(float* p, const float (&v)[K]) {
    if constexpr (K == 1) {
        *p = v[0];
    } else if constexpr (K == 2) {
        *reinterpret_cast<float2*>(p) = make_float2(v[0], v[1]);
    } else {
#pragma unroll
        for (int i = 0; i < K; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
}

#if SCALAR_TYPE != 0
template <int K>
DEVICE void load(const scalar_t* p, float (&v)[K]) {
    if constexpr (K == 1) {
        v[0] = to_float(*p);
    } else if constexpr (K == 2) {
        unpack(*reinterpret_cast<const unsigned*>(p), v[0], v[1]);
    } else {
#pragma unroll
        for (int i = 0; i < K; i += 4) {
            const uint2 q = *reinterpret_cast<const uint2*>(p + i);
            unpack(q.x, v[i], v[i + 1]);
            unpack(q.y, v[i + 2], v[i + 3]);
        }
    }
}

template <int K>
DEVICE void store(scalar_t* p, const float (&v)[K]) {
    if constexpr (K == 1) {
        *p = from_float(v[0]);
    } else if constexpr (K == 2) {
        *reinterpret_cast<unsigned*>(p) = pack(v[0], v[1]);
    } else {
#pragma unroll
        for (int i = 0; i < K; i += 4)
            *reinterpret_cast<uint2*>(p + i) = make_uint2(pack(v[i], v[i + 1]), pack(v[i + 2], v[i + 3]));
    }
}
#endif

// Floats as they are stored, in words.
template <int K, int WORDS>
DEVICE void to_words(const float (&v)[K], unsigned (&w)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
#if SCALAR_TYPE == 0
        w[i] = __float_as_uint(v[i]);
#else
        w[i] = pack(v[2 * i], v[2 * i + 1]);
#endif
    }
}

// -- math ---------------------------------------------------------------------------------------------------------------

// 2^x on the FMA pipe, for x <= 0: relieves the special-function unit, which gives 16 results a clock where the FMA pipe gives 128.
// Cody-Waite with a degree 5 minimax polynomial; relative error 1.6e-7, below ex2.approx's; exactly 0 from -127 down.
DEVICE float exp2_polynomial(float x) {
    x = fmaxf(x, -127.f);
    const float shifted = x + 12582912.f;  // 1.5 * 2^23: rounds to the nearest integer, which lands in the low bits
    const float f = x - (shifted - 12582912.f);
    float p = 1.32647273e-3f;
    p = fmaf(p, f, 9.67151299e-3f);
    p = fmaf(p, f, 5.55073359e-2f);
    p = fmaf(p, f, 2.40222424e-1f);
    p = fmaf(p, f, 6.93147004e-1f);
    p = fmaf(p, f, 1.f);
    return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

DEVICE float sigmoid(float x) { return reciprocal_fast(1.f + exp2_fast(-x * LOG2E)); }

// log(1 + exp(x)), linear above 20 as in torch.
DEVICE float softplus(float x) {
    const float e = exp2_fast(x * LOG2E);
#if SCALAR_TYPE == 0
    const float y = log1pf(e);
#else
    const float series = e * fmaf(-e, fmaf(-e, 0.33333333f, 0.5f), 1.f);
    const float y = e < 0.01f ? series : log2_fast(1.f + e) * LN2;
#endif
    return x > 20.f ? x : y;
}

// Derivative of softplus at the x whose softplus is y: sigmoid(x) = 1 - exp(-y), without cancellation for small y.
DEVICE float softplus_slope(float y) {
    const float series = y * fmaf(-y, fmaf(-y, fmaf(-y, 0.041666667f, 0.16666667f), 0.5f), 1.f);
    return y < 0.08f ? series : 1.f - exp2_fast(-y * LOG2E);
}

// -- asynchronous copies from global to shared memory -------------------------------------------------------------------

using offset_t = long long;

// A (batch, length, channels) tensor whose channels are adjacent.
struct Rows {
    scalar_t* data;
    offset_t batch_stride;  // elements
    int row_bytes;
    DEVICE scalar_t* at(int batch, int step) const {
        return reinterpret_cast<scalar_t*>(reinterpret_cast<char*>(data + batch * batch_stride) + offset_t(step) * row_bytes);
    }
};

// Tiles of ROWS steps and COLS channels (PITCH elements a row in shared memory) that THREADS threads bring one after another. Each thread
// moves a pointer along: addresses from the beginning of the tensor take twice the instructions. VECTOR: rows are whole, aligned 16-byte
// chunks and arrive asynchronously.
template <bool VECTOR, int ROWS, int COLS, int PITCH, int THREADS>
struct TileStream {
    static constexpr int CHUNK = VECTOR ? 16 / sizeof(scalar_t) : 1, A_ROW = COLS / CHUNK, COUNT = ROWS * A_ROW;
    static constexpr bool ONE_COLUMN = THREADS % A_ROW == 0;  // all of a thread's chunks lie below its first
    const char* next;                                         // the thread's first chunk of the next tile, or that tile's beginning
    int row_bytes;

    DEVICE TileStream(const Rows& from, int batch, int step, int first, unsigned thread)
        : next(reinterpret_cast<const char*>(from.at(batch, step) + first)), row_bytes(from.row_bytes) {
        if constexpr (ONE_COLUMN) next += offset_t(thread / A_ROW) * row_bytes + thread % A_ROW * CHUNK * sizeof(scalar_t);
    }

    // Brings the next tile, zeros outside the first `rows` and `cols`, and goes on by `steps`.
    DEVICE void fetch(scalar_t* tile, int rows, int cols, unsigned thread, int steps) {
        const bool whole = rows >= ROWS && cols >= COLS;
#pragma unroll
        for (int i = 0; i < (COUNT + THREADS - 1) / THREADS; ++i) {
            const unsigned v = thread + i * THREADS, row = v / A_ROW, col = v % A_ROW * CHUNK;
            if (COUNT % THREADS != 0 && v >= COUNT) break;
            const bool inside = whole || (int(row) < rows && int(col) < cols);
            const char* from = next + (ONE_COLUMN ? offset_t(i * (THREADS / A_ROW)) * row_bytes : offset_t(row) * row_bytes + col * sizeof(scalar_t));
            scalar_t* target = tile + row * PITCH + col;
            if constexpr (VECTOR) {
                copy_async<16>(target, from, inside);
            } else {
                *target = inside ? *reinterpret_cast<const scalar_t*>(from) : scalar_t(0);
            }
        }
        next += offset_t(steps) * row_bytes;
    }
};
