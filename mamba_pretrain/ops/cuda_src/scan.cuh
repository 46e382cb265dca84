// Geometry of the selective scan, shared by its kernels.
//
// A quad of lanes owns CPT channels; each of its lanes holds NPT = STATES / 4 of the states of every one of them. A warp therefore
// covers 8 * CPT channels and walks along the sequence in tiles of TILE steps.
//
// Specialised by the macros STATES (8, 16, 32, 64), LANE_CHANNELS (CPT: 1, 2 or 4), WARPS (a block), MIN_BLOCKS (a multiprocessor), HAS_Z, HAS_SEQ (documents),
// VECTOR_BC (rows of B and C are whole, aligned 16-byte chunks) and POLYNOMIAL_EVERY (each such decay is computed on the FMA pipe; 0: none).
#pragma once
#include "common.cuh"

constexpr int QUAD = 4;
constexpr int QUADS = 8;
constexpr int TILE = 16;  // steps between checkpoints
constexpr int NPT = STATES / QUAD;
constexpr int CPT = LANE_CHANNELS;
constexpr int WARP_CHANNELS = QUADS * CPT;
constexpr int BLOCK_CHANNELS = WARPS * WARP_CHANNELS;
constexpr int THREADS = WARPS * 32;
constexpr int LANES_A_ROW = WARP_CHANNELS / 4;  // lanes that turn one step of a warp's activations into floats, four channels each
constexpr int PASSES = TILE * LANES_A_ROW / 32;  // such steps a lane takes

// A quad's lanes differ in bits 1 and 2 of their numbers; bit 0 tells two quads apart that share a twist. So lanes n and n ^ 1 read the
// same B and C, lanes n and n ^ 2 the same activations: pairs that shared memory serves in half the time, 16 bytes a lane.
constexpr int PART_BIT = 2;

DEVICE int part_of(int lane) { return lane / PART_BIT % QUAD; }

// A lane's quad, where TWIN is the bit of its number that its twist does not depend on.
template <int TWIN>
DEVICE int quad_of(int lane) {
    const int others = lane >> 3;
    return others / TWIN * TWIN * 2 + (lane & 1) * TWIN + others % TWIN;
}

// Slot n of a lane holds state n ^ twist, with a twist for each quad (see exchange in scan_backward.cu); B and C lie in shared memory
// once per twist. Checkpoints are kept in slot order, which the backward kernel's quads define: TWIST_CHANNELS of theirs.
constexpr int TWISTS = NPT < 4 ? NPT : 4;
constexpr int VECTOR = NPT < 4 ? NPT : 4;

// Stands for the time step where a document begins: exp(RESET * A) is exactly 0, so that neither state nor gradient crosses.
constexpr float RESET = 1e30f;
// A is kept below this: RESET * A must underflow, and exp(delta * -1e-20) is 1 for any other time step.
constexpr float LARGEST_A = -1e-20f;

struct Segments {  // the length is cut into `count` segments of `length` steps (a multiple of TILE), which run in parallel
    int count, length;
};

// A log2(e), for time steps that may be RESET.
DEVICE float resettable_rate(float A) {
    const float rate = A * LOG2E;
    return rate <= 0.f ? fminf(rate, LARGEST_A) : rate;
}

DEVICE float decay_rate(const float* A, offset_t i) {
#if HAS_SEQ
    return resettable_rate(A[i]);
#else
    return A[i] * LOG2E;
#endif
}

// exp(delta A) for slot number `slot` of a thread, given A log2(e).
template <int SLOT>
DEVICE float decay(float delta, float rate) {
#if POLYNOMIAL_EVERY
    if constexpr (SLOT % POLYNOMIAL_EVERY == POLYNOMIAL_EVERY - 1) return exp2_polynomial(delta * rate);
#endif
    return exp2_fast(delta * rate);
}

// Calls f(integral constant) for 0 .. COUNT - 1: an unrolled loop whose index is a template argument.
template <int I>
struct Index {
    static constexpr int value = I;
};

template <int COUNT, int I = 0, class F>
DEVICE void unrolled(F&& f) {
    if constexpr (I < COUNT) {
        f(Index<I>{});
        unrolled<COUNT, I + 1>(f);
    }
}

// Which steps of a tile begin a document (bit t: step t). Each lane brings one seq_idx, a tile ahead of its use.
struct DocumentStarts {
#if HAS_SEQ
    int value;
    DEVICE void prefetch(const int* seq_idx, offset_t row, int tile_start, int length, int lane) {
        const int step = tile_start + lane - 1;
        value = lane <= TILE && step >= 0 && step < length ? seq_idx[row + step] : 0;
    }
    DEVICE unsigned mask(int tile_start, int length, int lane) const {
        const int step = tile_start + lane - 1, before = __shfl_up_sync(FULL_WARP, value, 1);
        const bool start = lane >= 1 && lane <= TILE && step >= 1 && step < length && value != before;
        return __ballot_sync(FULL_WARP, start) >> 1;
    }
#else
    DEVICE void prefetch(const int*, offset_t, int, int, int) {}
    DEVICE unsigned mask(int, int, int) const { return 0u; }
#endif
};

// The steps of a tile that this lane turns into floats: PASSES of them, four channels each.
struct Conversion {
    int lane;
    DEVICE int step(int pass) const { return pass * (32 / LANES_A_ROW) + lane / LANES_A_ROW; }
    DEVICE int channel() const { return lane % LANES_A_ROW * 4; }
    // All loads come before any store: the compiler must assume that shared arrays overlap, and would wait for each in turn.
    DEVICE void load(const scalar_t (*tile)[WARP_CHANNELS], float (&x)[PASSES][4]) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) ::load<4>(&tile[step(pass)][channel()], x[pass]);
    }
    template <int PITCH>
    DEVICE void store(float (*tile)[PITCH], const float (&x)[PASSES][4]) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) ::store<4>(&tile[step(pass)][channel()], x[pass]);
    }
    DEVICE void softplus(float (&delta)[PASSES][4], const float (&bias)[4]) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int i = 0; i < 4; ++i) delta[pass][i] = ::softplus(delta[pass][i] + bias[i]);
    }
    DEVICE void multiply(float (&x)[PASSES][4], const float (&y)[PASSES][4]) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[pass][i] *= y[pass][i];
    }
    DEVICE void gate(float (&x)[PASSES][4], const float (&z)[PASSES][4]) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[pass][i] *= z[pass][i] * sigmoid(z[pass][i]);
    }
    // delta as the recurrence sees it: RESET where a document begins, 0 (nothing happens) past the end.
    DEVICE void mark(float (&delta)[PASSES][4], unsigned starts, int valid) const {
        if (starts == 0 && valid >= TILE) return;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (starts >> step(pass) & 1u) delta[pass][i] = RESET;
                if (step(pass) >= valid) delta[pass][i] = 0.f;
            }
    }
};

// Turns a tile of B and C (raw: TILE rows of 2 * STATES) into floats, once per twist. All threads of the block.
DEVICE void convert_bc(const scalar_t (*raw)[2 * STATES], float (*B)[TWISTS][STATES], float (*C)[TWISTS][STATES]) {
    constexpr int VECTORS = 2 * STATES / VECTOR;
#pragma unroll
    for (int first = 0; first < TILE * VECTORS; first += THREADS) {
        const unsigned v = first + threadIdx.x, step = v / VECTORS, n = v % VECTORS * VECTOR;
        if (TILE * VECTORS % THREADS != 0 && v >= TILE * VECTORS) break;
        float x[VECTOR];
        load<VECTOR>(&raw[step][n], x);
        float(*copies)[STATES] = n < STATES ? B[step] : C[step];
        // Lanes that write C are one twist off, since that of B lies in the same banks.
        const int off = n >= STATES;
        float z[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) z[i] = off ? x[i ^ 1] : x[i];
#pragma unroll
        for (int t = 0; t < TWISTS; ++t) {
            float y[VECTOR];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) y[i] = z[i ^ t];
            store<VECTOR>(&copies[t ^ off][n % STATES], y);
        }
    }
}

// Channel values that may be absent or lie past the end, as floats.
template <int K>
DEVICE void load_channels(const float* values, int first, int channels, float (&v)[K]) {
#pragma unroll
    for (int i = 0; i < K; ++i) v[i] = values != nullptr && first + i < channels ? values[first + i] : 0.f;
}

// CPT channels of a result from `first` on, to `at`, if they are `inside` the sequence.
DEVICE void store_channels(scalar_t* at, int first, int channels, const float (&v)[CPT], bool inside) {
#if VECTOR_IO && (SCALAR_TYPE == 0 || LANE_CHANNELS > 1)
    unsigned words[CPT * sizeof(scalar_t) / 4];
    to_words(v, words);
    store_if(inside && first < channels, at, words);
#else
#pragma unroll
    for (int c = 0; c < CPT; ++c)
        if (inside && first + c < channels) at[c] = from_float(v[c]);
#endif
}

// Sums over a quad of four times K values through shared memory: lane number r of the quad receives the sums of what its lanes put as number r.
// Exact, of a fixed order. Rows are one pair of quads apart from a multiple of the banks, so that neither way meets a bank twice. Between the
// last put and a take, and before the next put, the warp must meet (__syncwarp).
template <int K>
struct QuadSums {
    static constexpr int ROW = (32 + PART_BIT) * K, SIZE = (QUAD - 1) * ROW + 32 * K;
    float* buffer;  // SIZE floats
    DEVICE void put(int number, int lane, const float (&values)[K]) const { store<K>(buffer + lane * K + number * ROW, values); }
    DEVICE void take(int lane, float (&sums)[K]) const {
        const float* row = buffer + (lane & ~((QUAD - 1) * PART_BIT)) * K + part_of(lane) * ROW;
        float x[QUAD][K];
#pragma unroll
        for (int k = 0; k < QUAD; ++k) load<K>(row + k * PART_BIT * K, x[k]);
#pragma unroll
        for (int i = 0; i < K; ++i) sums[i] = (x[0][i] + x[1][i]) + (x[2][i] + x[3][i]);
    }
};
