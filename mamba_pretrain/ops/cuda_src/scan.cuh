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
constexpr int GROUP = 16 / CPT;          // steps whose 16 results a quad sums together
constexpr int STEPS_A_LANE = 4 / CPT;    // of which each lane ends up with this many, for all CPT channels
constexpr int LANES_A_ROW = WARP_CHANNELS / 4;  // lanes that turn one step of a warp's activations into floats, four channels each

// Stands for the time step where a document begins: exp(RESET * A) is exactly 0, so that neither state nor gradient crosses.
constexpr float RESET = 1e30f;
// A is kept below this: RESET * A must underflow, and exp(delta * -1e-20) is 1 for any other time step.
constexpr float LARGEST_A = -1e-20f;

using offset_t = long long;

struct Rows {  // a (batch, length, channels) tensor whose channels are adjacent
    scalar_t* data;
    offset_t batch_stride, row_stride;
    DEVICE scalar_t* at(int batch, int step) const { return data + batch * batch_stride + step * row_stride; }
};

struct Segments {  // the length is cut into `count` segments of `length` steps (a multiple of TILE), which run in parallel
    int count, length;
};

DEVICE float decay_rate(const float* A, offset_t i) {
    const float rate = A[i] * LOG2E;
#if HAS_SEQ
    return rate <= 0.f ? fminf(rate, LARGEST_A) : rate;
#else
    return rate;
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

// Four channels of one step: softplus(delta + bias).
DEVICE void time_steps(const scalar_t* raw_delta, const float (&bias)[4], float (&delta)[4]) {
    load<4>(raw_delta, delta);
#pragma unroll
    for (int i = 0; i < 4; ++i) delta[i] = softplus(delta[i] + bias[i]);
}

// delta as the recurrence sees it: RESET where a document begins, 0 (nothing happens) past the end.
DEVICE void mark(float (&delta)[4], unsigned starts, int step, int valid) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (starts >> step & 1u) delta[i] = RESET;
        if (step >= valid) delta[i] = 0.f;
    }
}

// Channel values that may be absent or lie past the end, as floats.
template <int K>
DEVICE void load_channels(const float* values, int first, int channels, float (&v)[K]) {
#pragma unroll
    for (int i = 0; i < K; ++i) v[i] = values != nullptr && first + i < channels ? values[first + i] : 0.f;
}

// CPT channels of one row of a result.
DEVICE void store_row(scalar_t* row, int first, int channels, const float (&v)[CPT]) {
#if VECTOR_IO
    if (first < channels) store<CPT>(row + first, v);
#else
#pragma unroll
    for (int c = 0; c < CPT; ++c)
        if (first + c < channels) row[first + c] = from_float(v[c]);
#endif
}
