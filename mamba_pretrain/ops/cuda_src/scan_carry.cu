// What a segment of the sequence passes on, for scans cut into segments that run in parallel (few channels, long sequences).
//
//   forward  (REVERSE 0): the state after a segment that began with zero,                   sum_t exp(A S_t) delta_t u_t B_t
//   backward (REVERSE 1): the gradient of the state before it, if nothing came from behind, sum_t exp(A S_t) C_t dy_t
//
// and the sum of its time steps. scan_join chains them: exp(A * sum of time steps) is how much of what enters a segment leaves it.
//
// S_t is the sum of the time steps between step t and the end that passes on: those behind t, or in reverse those up to t and its own.
// A warp walks away from that end, so it knows S_t without what lies beyond. Once exp(A S) is zero for a (channel, state) pair, whatever
// comes adds zeros. So pairs that have decayed are written, the others move together whenever they fit into half of the slots, and
// likewise the channels that have any; with none left the warp stops. A document's start is a time step that ends all pairs.
//
// What is dropped has decayed by 2^-126: it would have to be 2^100 times as large as what comes behind it to be seen in fp32.
// A value that is not finite may be dropped as well, where a recurrence would multiply it with zero and pass NaN on; the pass over its
// own segment shows it in any case. A > 0 works as long as it lets nothing grow by 2^127 within a segment.
#include "scan.cuh"

struct CarryParams {
    Rows values;  // forward: u; backward: dy
    Rows delta;
    Rows z;       // backward, with HAS_Z
    Rows BC;      // forward: B; backward: C
    const float *A, *delta_bias;
    const int* seq_idx;
    float* carry;      // (batch, segments - 1, channels, states): nobody receives what the last passes on (the first in reverse)
    float* delta_sum;  // (batch, segments - 1, channels): of the steps that were walked
    int length, channels;
    Segments segments;
};

constexpr bool GATED = REVERSE && HAS_Z;
constexpr int SLOTS = CPT * NPT;                                  // (channel, state) pairs of a lane
constexpr int STEPS_A_LANE = TILE / QUAD;                         // that it prepares, of CPT channels
constexpr int STAGES = 3;                                         // tiles on the way or in use: late in a walk one takes less time than its copy
constexpr int RAW_PITCH = WARP_CHANNELS + 16 / sizeof(scalar_t);  // of rows that lanes read at four steps: spreads these over the banks
constexpr int DIRECTION = REVERSE ? TILE : -TILE;
constexpr float UNDERFLOW = -126.f;                               // below it exp2_fast gives exactly 0, as it flushes what is smaller than normal
constexpr float LEAST_RATE = -1e38f;                              // finite, since it is multiplied with S = 0
constexpr float EMPTY = -3e38f;                                   // in place of a rate: a slot without a pair; what it adds up is never written

struct CarryTile {  // a warp's shared memory
    scalar_t values[STAGES][TILE][RAW_PITCH];
    scalar_t delta[STAGES][TILE][RAW_PITCH];
    scalar_t z[GATED ? STAGES : 1][GATED ? TILE : 1][RAW_PITCH];
    scalar_t bc[STAGES][TILE][STATES];
    float steps[TILE][WARP_CHANNELS + 2][2];  // S_t, and what B or C is multiplied with; a pitch as above
    float bc_float[TILE][STATES];
    float sum[WARP_CHANNELS];                 // of the time steps up to here; of a channel that was dropped, up to there
    int channel[WARP_CHANNELS];               // those with pairs that are left come first
    float rate[SLOTS * 16], h[SLOTS * 16];    // pairs on the move: at most half of all, since the others have decayed
    int pair[SLOTS * 16];
};
static_assert(WARPS * sizeof(CarryTile) <= MOST_SHARED, "a block's shared memory");
static_assert(sizeof(CarryTile) % 16 == 0, "every warp's begins where vectors may");

struct Pairs {  // that a lane adds up
    int slots = SLOTS;  // in use, the first ones
    float rate[SLOTS], h[SLOTS];
    int pair[SLOTS];  // channel * STATES + state, counted from the warp's first
};

struct Columns {  // channels whose activations a lane prepares
    int count = CPT;
    int channel[CPT];
    float bias[CPT], sum[CPT];
};

struct Remaining {  // pairs of a warp that have not decayed, and their channels, a bit each
    int pairs;
    unsigned channels;
};

using Activations = TileStream<VECTOR_IO, TILE, WARP_CHANNELS, RAW_PITCH, 32>;
using WarpBC = TileStream<VECTOR_BC, TILE, STATES, STATES, 32>;

struct CarryWarp {
    CarryTile& tile;
    const int lane, channels;   // from the warp's first on
    const float* bias;          // of these, or null
    float* carry;               // of these
    Activations values, delta, z;
    WarpBC BC;

    // Fetches a tile, and moves on.
    DEVICE void issue(int rows, int stage) {
        values.fetch(tile.values[stage][0], rows, channels, lane, DIRECTION);
        delta.fetch(tile.delta[stage][0], rows, channels, lane, DIRECTION);
        if constexpr (GATED) z.fetch(tile.z[stage][0], rows, channels, lane, DIRECTION);
        BC.fetch(tile.bc[stage][0], rows, STATES, lane, DIRECTION);
    }

    DEVICE void load_columns(Columns& own) const {
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
            own.channel[c] = tile.channel[c * QUADS + lane % QUADS];
            own.sum[c] = tile.sum[own.channel[c]];
            own.bias[c] = bias != nullptr && own.channel[c] < channels ? bias[own.channel[c]] : 0.f;
        }
    }

    DEVICE void prepare_bc(int stage) const {
        constexpr int VECTORS = TILE * STATES / 128;
        float bc[VECTORS][4];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) load<4>(&tile.bc[stage][0][(v * 32 + lane) * 4], bc[v]);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) store<4>(&tile.bc_float[0][(v * 32 + lane) * 4], bc[v]);
    }

    // A lane turns STEPS_A_LANE steps of its columns into floats, and adds up the time steps over the tile.
    template <int K = CPT>
    DEVICE void prepare(int stage, unsigned starts, int valid, Columns& own) const {
        if constexpr (K > 1)
            if (own.count < K) return prepare<K / 2>(stage, starts, valid, own);
        const int part = lane / QUADS;
        const auto step = [&](int i) { return REVERSE ? part * STEPS_A_LANE + i : TILE - 1 - part * STEPS_A_LANE - i; };  // in the order of the walk
        float delta[STEPS_A_LANE][K], input[STEPS_A_LANE][K], gate[STEPS_A_LANE][K];
#pragma unroll
        for (int i = 0; i < STEPS_A_LANE; ++i)
#pragma unroll
            for (int c = 0; c < K; ++c) {
                delta[i][c] = to_float(tile.delta[stage][step(i)][own.channel[c]]);
                input[i][c] = to_float(tile.values[stage][step(i)][own.channel[c]]);
                if constexpr (GATED) gate[i][c] = to_float(tile.z[stage][step(i)][own.channel[c]]);
            }
#pragma unroll
        for (int i = 0; i < STEPS_A_LANE; ++i)
#pragma unroll
            for (int c = 0; c < K; ++c) {
                delta[i][c] = softplus(delta[i][c] + own.bias[c]);
                if constexpr (GATED) input[i][c] *= gate[i][c] * sigmoid(gate[i][c]);
                if constexpr (!REVERSE) input[i][c] *= delta[i][c];
            }
        if (starts != 0 || valid < TILE) {
#pragma unroll
            for (int i = 0; i < STEPS_A_LANE; ++i)
#pragma unroll
                for (int c = 0; c < K; ++c) {
                    if (starts >> step(i) & 1u) delta[i][c] = RESET;
                    if (step(i) >= valid) delta[i][c] = 0.f;
                }
        }
#pragma unroll
        for (int c = 0; c < K; ++c) {
            float S[STEPS_A_LANE], total = delta[0][c];
            S[0] = REVERSE ? total : 0.f;
#pragma unroll
            for (int i = 1; i < STEPS_A_LANE; ++i) {
                S[i] = REVERSE ? total + delta[i][c] : total;
                total += delta[i][c];
            }
            // What the parts before this one, in the order of the walk, add up to: a pair of parts exchanges its sums, then both pairs theirs.
            const float other = __shfl_xor_sync(FULL_WARP, total, QUADS), two = total + other;
            const float others = __shfl_xor_sync(FULL_WARP, two, 2 * QUADS);
            const float before = own.sum[c] + (part & 1 ? other : 0.f) + (part & 2 ? others : 0.f);
            own.sum[c] += two + others;
#pragma unroll
            for (int i = 0; i < STEPS_A_LANE; ++i) {
                const float both[2] = {before + S[i], input[i][c]};
                store<2>(tile.steps[step(i)][own.channel[c]], both);
            }
            if (part == 0) tile.sum[own.channel[c]] = own.sum[c];
        }
    }

    // Whether a pair sees nothing beyond this tile.
    DEVICE bool decayed(float rate, int channel) const { return rate * tile.sum[channel] < UNDERFLOW; }

    // A tile's share of the pairs where they lie as at first: a lane's are neighbours, and come in vectors.
    DEVICE void add_in_place(const Pairs& own, float (&sum)[SLOTS]) const {
        const int part = part_of(lane), first = quad_of<4>(lane) * CPT;
#pragma unroll 4
        for (int step = 0; step < TILE; ++step) {
            float bc[NPT], both[2 * CPT];
            load<NPT>(&tile.bc_float[step][part * NPT], bc);
            load<2 * CPT>(tile.steps[step][first], both);
            unrolled<SLOTS>([&](auto s_) {
                constexpr int s = decltype(s_)::value, c = s / NPT;
                sum[s] = fmaf(decay<s>(both[2 * c], own.rate[s]), both[2 * c + 1] * bc[s % NPT], sum[s]);
            });
        }
    }

    // The same of K packed pairs a lane, wherever theirs are.
    template <int K>
    DEVICE void add_packed(const Pairs& own, float (&sum)[K]) const {
#pragma unroll(K < 4 ? 16 / K : 4)  // about 16 loads on their way, but not fewer than 4 steps
        for (int step = 0; step < TILE; ++step)
            unrolled<K>([&](auto s_) {
                constexpr int s = decltype(s_)::value;
                float both[2];
                load<2>(tile.steps[step][own.pair[s] / STATES], both);
                sum[s] = fmaf(decay<s>(both[0], own.rate[s]), both[1] * tile.bc_float[step][own.pair[s] % STATES], sum[s]);
            });
    }

    // Adds a tile to the pairs. Its own sum comes first: many small terms would be lost beside a large one. All slots are in use as long as the
    // pairs lie as at first, since packing them leaves at most half. (How many are in use is known when it runs: it finds its K by halving.)
    template <int K = SLOTS>
    DEVICE Remaining walk(Pairs& own) const {
        if constexpr (K > 1)
            if (own.slots < K) return walk<K / 2>(own);
        float sum[K] = {};
        if constexpr (K == SLOTS)
            add_in_place(own, sum);
        else
            add_packed<K>(own, sum);
        int pairs = 0;
        unsigned channels = 0;
#pragma unroll
        for (int s = 0; s < K; ++s) {
            own.h[s] += sum[s];
            const int channel = K == SLOTS ? quad_of<4>(lane) * CPT + s / NPT : own.pair[s] / STATES;
            const bool empty = K < SLOTS && own.rate[s] == EMPTY;
            if (!(empty || decayed(own.rate[s], channel))) ++pairs, channels |= 1u << channel;
        }
        return {__reduce_add_sync(FULL_WARP, pairs), __reduce_or_sync(FULL_WARP, channels)};
    }

    DEVICE void write(const Pairs& own, int s) const {
        if (own.rate[s] != EMPTY) carry[own.pair[s]] = own.h[s];
    }

    // Writes the pairs that have decayed, and deals the others out anew.
    DEVICE void pack_pairs(Pairs& own) const {
        const unsigned below = (1u << lane) - 1u;
        int count = 0;
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            if (s >= own.slots) break;
            const bool stays = !(own.rate[s] == EMPTY || decayed(own.rate[s], own.pair[s] / STATES));
            const unsigned mask = __ballot_sync(FULL_WARP, stays);
            if (stays) {
                const int at = count + __popc(mask & below);
                tile.rate[at] = own.rate[s], tile.h[at] = own.h[s], tile.pair[at] = own.pair[s];
            } else {
                write(own, s);
            }
            count += __popc(mask);
        }
        __syncwarp();
        while (own.slots > 0 && count <= own.slots / 2 * 32) own.slots /= 2;
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            if (s >= own.slots) break;
            const int at = s * 32 + lane;
            const bool inside = at < count;
            own.rate[s] = inside ? tile.rate[at] : EMPTY, own.h[s] = inside ? tile.h[at] : 0.f, own.pair[s] = inside ? tile.pair[at] : 0;
        }
    }

    // Brings channels that have pairs to the front, and prepares no more columns than hold them.
    DEVICE void pack_channels(unsigned remaining, Columns& columns) const {
        const unsigned below = (1u << lane) - 1u;
        const int staying = __popc(remaining);
        const bool stays = remaining >> lane & 1u;
        if (lane < WARP_CHANNELS) tile.channel[stays ? __popc(remaining & below) : staying + __popc(~remaining & below)] = lane;
        __syncwarp();
        while (columns.count > 1 && staying <= columns.count / 2 * QUADS) columns.count /= 2;
        load_columns(columns);
    }

    // Drops what has decayed, once what remains fits into half of the slots or of the columns. (Half of the channels have at most half of the pairs.)
    DEVICE void drop(Remaining remaining, Pairs& pairs, Columns& columns) const {
        if (remaining.pairs > pairs.slots / 2 * 32 && __popc(remaining.channels) > columns.count / 2 * QUADS) return;
        pack_pairs(pairs);
        pack_channels(remaining.channels, columns);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_carry(const __grid_constant__ CarryParams p) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, batch = blockIdx.y, segment = blockIdx.z + REVERSE;
    const int channel0 = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * WARP_CHANNELS;
    if (channel0 >= p.channels) return;
    const int begin = segment * p.segments.length, end = min(p.length, begin + p.segments.length);
    const int tiles = (end - begin + TILE - 1) / TILE, first = REVERSE ? begin : end - TILE;
    const offset_t row = (offset_t(batch) * (p.segments.count - 1) + blockIdx.z) * p.channels + channel0;
    CarryTile& tile = reinterpret_cast<CarryTile*>(shared)[threadIdx.x >> 5];
    const float* bias = p.delta_bias != nullptr ? p.delta_bias + channel0 : nullptr;
    CarryWarp warp{tile,
                   lane,
                   p.channels - channel0,
                   bias,
                   p.carry + row * STATES,
                   {p.values, batch, first, channel0, unsigned(lane)},
                   {p.delta, batch, first, channel0, unsigned(lane)},
                   {p.z, batch, first, channel0, unsigned(lane)},
                   {p.BC, batch, first, 0, unsigned(lane)}};
    DocumentStarts documents;
    const offset_t seq_row = offset_t(batch) * p.length;
    documents.prefetch(p.seq_idx, seq_row, first, p.length, lane);
    for (int k = 0; k < STAGES - 1; ++k) {
        if (k < tiles) warp.issue(end - (first + k * DIRECTION), k);
        commit_copies();
    }

    Pairs pairs;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
        const int channel = quad_of<4>(lane) * CPT + s / NPT;
        pairs.pair[s] = channel * STATES + part_of(lane) * NPT + s % NPT;
        pairs.rate[s] = channel < warp.channels ? fmaxf(decay_rate(p.A, offset_t(channel0) * STATES + pairs.pair[s]), LEAST_RATE) : EMPTY;
        pairs.h[s] = 0.f;
    }
    if (lane < WARP_CHANNELS) tile.channel[lane] = lane, tile.sum[lane] = 0.f;
    __syncwarp();
    Columns columns;
    warp.load_columns(columns);

    int stage = 0;
    for (int k = 0; k < tiles && pairs.slots > 0; ++k) {
        const int start = first + k * DIRECTION;
        const unsigned starts = documents.mask(start, p.length, lane);
        wait_copies<STAGES - 2>();
        __syncwarp();
        if (k + STAGES - 1 < tiles) warp.issue(end - (start + (STAGES - 1) * DIRECTION), stage == 0 ? STAGES - 1 : stage - 1);
        commit_copies();
        if (k + 1 < tiles) documents.prefetch(p.seq_idx, seq_row, start + DIRECTION, p.length, lane);
        warp.prepare_bc(stage);
        warp.prepare(stage, starts, end - start, columns);
        __syncwarp();
        warp.drop(warp.walk(pairs), pairs, columns);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    wait_copies();  // of tiles that nobody needed
#pragma unroll
    for (int s = 0; s < SLOTS; ++s)
        if (s < pairs.slots) warp.write(pairs, s);
    if (lane < min(WARP_CHANNELS, warp.channels)) p.delta_sum[row + lane] = tile.sum[lane];
}

extern "C" __device__ const int scan_carry_shared_bytes = WARPS * sizeof(CarryTile);
