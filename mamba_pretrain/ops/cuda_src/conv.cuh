// Depthwise causal convolution over time, shared by its two passes.
//
// A warp owns 32 * CHANNELS adjacent channels and CHUNK_STEPS steps, a block's WARPS warps successive chunks of the same channels. A lane
// reads its channels of a row as one vector, and asks for AHEAD rows while it works on the AHEAD before them: the pass is limited by
// memory, and what hides memory's latency is the number of bytes on their way. The rows that taps reach stay in registers, so a chunk
// reads TAPS - 1 rows of its neighbours' and else everything once. Lanes past the last channel repeat the last vector's work: the same
// values to the same place.
//
// Steps go in groups of AHEAD, unrolled. Nearly all groups are PLAIN: no document begins near, no edge of the chunk lies in them. The
// others ask at every step what it may see. The branch between the two also keeps the compiler from issuing a group's loads after its
// arithmetic, which it does where both stand in one basic block.
//
// Specialised by the macros TAPS, CHANNELS (1, or 2, 4 or 8 where rows allow such vectors), CHUNK_STEPS, AHEAD, WARPS, MIN_BLOCKS (that a
// multiprocessor should hold), HAS_SEQ (documents) and SILU.
#pragma once
#include "common.cuh"

constexpr int REACH = TAPS - 1;  // rows before its own that a step sees
constexpr int COVERED = WARPS * CHUNK_STEPS;
constexpr int TILE_CHANNELS = 32 * CHANNELS;
static_assert(CHANNELS <= 2 || CHANNELS % 4 == 0, "parameters come in vectors");
static_assert(CHUNK_STEPS % AHEAD == 0 && AHEAD + REACH < 32, "groups divide a chunk, and their starts fit in a word");
static_assert(CHUNK_STEPS >= REACH, "only the first chunk reaches before step 0");

struct ConvParams {
    Rows x, dy, dx;
    const float *weight, *bias;  // (channels, taps), (channels) or null; each begins on 16 bytes
    const int* seq_idx;          // (batch, length)
    const scalar_t* history;     // (batch, taps - 1, channels) or null: the rows before step 0
    scalar_t* y;                 // (batch, length, channels)
    scalar_t* dhistory;
    float* sums;  // (batch, blocks over time, taps + 1, channels): gradients of weight and bias from each block
    int length, channels;
};

// CHANNELS adjacent channels of a row as they lie in memory.
struct alignas(sizeof(scalar_t) * CHANNELS) Vector {
#if SCALAR_TYPE == 0 || CHANNELS == 1
    scalar_t values[CHANNELS];

    DEVICE void read(float (&v)[CHANNELS]) const {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) v[c] = to_float(values[c]);
    }

    DEVICE explicit Vector(const float (&v)[CHANNELS]) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) values[c] = from_float(v[c]);
    }
#else
    unsigned pairs[CHANNELS / 2];

    DEVICE void read(float (&v)[CHANNELS]) const {
#pragma unroll
        for (int c = 0; c < CHANNELS; c += 2) unpack(pairs[c / 2], v[c], v[c + 1]);
    }

    DEVICE explicit Vector(const float (&v)[CHANNELS]) {
#pragma unroll
        for (int c = 0; c < CHANNELS; c += 2) pairs[c / 2] = pack(v[c], v[c + 1]);
    }
#endif
    Vector() = default;
};

DEVICE void put(scalar_t* p, const float (&v)[CHANNELS]) { *reinterpret_cast<Vector*>(p) = Vector(v); }

template <int COUNT>
DEVICE void clear(float (&rows)[COUNT][CHANNELS]) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) rows[k][c] = 0.f;
}

// Successive rows of a tensor, AHEAD at a time, each group asked for while the one before is in work.
struct Stream {
    const char* next;
    const int row_bytes;
    Vector coming[AHEAD], rows[AHEAD];

    // `more`: how many rows are wanted, from `step` on.
    DEVICE Stream(const Rows& tensor, int batch, int step, int channel, int more)
        : next(reinterpret_cast<const char*>(tensor.at(batch, step) + channel)), row_bytes(tensor.row_bytes) {
        ask(more);
    }

    DEVICE void ask(int more) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (i < more) coming[i] = *reinterpret_cast<const Vector*>(next);
            next += row_bytes;
        }
    }

    // Makes the group that was asked for the current one; `more`: how many rows are wanted after it.
    DEVICE void advance(int more) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) rows[i] = coming[i];
        ask(more);
    }
};

// Where documents begin: a bit a step, the lowest that of the step REACH before the current group.
struct Starts {
#if HAS_SEQ
    static constexpr int WORDS = (CHUNK_STEPS + 2 * REACH + 31) / 32;
    unsigned words[WORDS];

    // All lanes of the warp together.
    DEVICE Starts(const int* row, int first, int length) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            const int step = first + 32 * w + int(threadIdx.x & 31);
            words[w] = __ballot_sync(FULL_WARP, step >= 1 && step < length && row[step] != row[step - 1]);
        }
    }

    // Whether one begins in the `count` steps that end with the group's step i.
    DEVICE bool within(int i, int count) const { return (words[0] >> (REACH + i + 1 - count) & ((1u << count) - 1)) != 0; }

    DEVICE void next_group() {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) words[w] = words[w] >> AHEAD | (w + 1 < WORDS ? words[w + 1] << (32 - AHEAD) : 0u);
    }
#else
    DEVICE Starts(const int*, int, int) {}
    DEVICE bool within(int, int) const { return false; }
    DEVICE void next_group() {}
#endif
};

struct Convolution {
    const ConvParams& p;
    const int batch, channel, begin, end;  // steps [begin, end) of the channels from `channel` on
    Starts starts;
    Stream x;
    float weight[TAPS][CHANNELS], bias[CHANNELS], window[TAPS][CHANNELS];  // window: the row of the current step last

    // Loads the parameters and the rows before the chunk; asks for the first of its own. `limit`: the step after the last that is read.
    DEVICE Convolution(const ConvParams& params, int limit)
        : p(params),
          batch(blockIdx.z),
          channel(min(int(blockIdx.x * TILE_CHANNELS + (threadIdx.x & 31) * CHANNELS), params.channels - CHANNELS)),
          begin(blockIdx.y * COVERED + (threadIdx.x >> 5) * CHUNK_STEPS),
          end(min(params.length, begin + CHUNK_STEPS)),
          starts(params.seq_idx + offset_t(batch) * params.length, begin - REACH, params.length),
          x(params.x, batch, begin, channel, limit - begin) {
        Vector before[TAPS];
        const bool first = begin == 0;
        if (!first || p.history != nullptr) {
            const scalar_t* row = first ? history_row(p.history, -REACH) : p.x.at(batch, begin - REACH) + channel;
            const offset_t stride = first ? offset_t(p.channels) : p.x.row_bytes / offset_t(sizeof(scalar_t));
#pragma unroll
            for (int k = 0; k < REACH; ++k) before[k] = *reinterpret_cast<const Vector*>(row + k * stride);
        }
        load_parameters();
        clear(window);
        if (!first || p.history != nullptr) {
#pragma unroll
            for (int k = 0; k < REACH; ++k)
                if (!starts.within(-1, REACH - 1 - k)) before[k].read(window[k + 1]);
        }
    }

    DEVICE void load_parameters() {
        const float* own = p.weight + offset_t(channel) * TAPS;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) bias[c] = 0.f;
        if (p.bias != nullptr) load<CHANNELS>(p.bias + channel, bias);
        if constexpr (CHANNELS * TAPS % 4 != 0) {
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
                for (int k = 0; k < TAPS; ++k) weight[k][c] = own[c * TAPS + k];
        } else {
            float flat[CHANNELS * TAPS];
            load<CHANNELS * TAPS>(own, flat);
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
                for (int k = 0; k < TAPS; ++k) weight[k][c] = flat[c * TAPS + k];
        }
    }

    // Row `step` (before 0) of a tensor like the history.
    template <class T>
    DEVICE T* history_row(T* rows, int step) const {
        return rows + (offset_t(batch) * REACH + step + REACH) * p.channels + channel;
    }

    // Moves the window on to the group's step i.
    template <bool PLAIN>
    DEVICE void advance(int i) {
        if (!PLAIN && starts.within(i, 1)) clear(window);
#pragma unroll
        for (int k = 0; k < REACH; ++k)
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) window[k][c] = window[k + 1][c];
        x.rows[i].read(window[REACH]);
    }

    // The convolution before the activation.
    DEVICE void sum(float (&y)[CHANNELS]) const {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            y[c] = bias[c];
#pragma unroll
            for (int k = 0; k < TAPS; ++k) y[c] = fmaf(weight[k][c], window[k][c], y[c]);
        }
    }
};
