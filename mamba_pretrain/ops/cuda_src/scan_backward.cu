// Backward pass of the selective scan, from the last tile of 16 steps to the first.
//
//   g_t = C_t dy_t + a_{t+1} g_{t+1}   (gradient of state_t; a_t = exp(delta_t A); dy is the gradient before skip and gate)
//   d(delta u)_t = sum_n g B      dB_t = sum_d g delta u      dC_t = sum_d dy state_t
//   dA = sum_t a_t g_t state_{t-1} delta_t                    d delta_t = u d(delta u) + sum_n a_t g_t state_{t-1} A
//
// Per tile, from the state kept before it:
//   1. activations become floats in shared memory; each warp for its own channels, B and C for the whole block;
//   2. the states before each SUB steps are rebuilt and set aside in shared memory;
//   3. from the last SUB steps to the first: decays and states in registers, C . state and dC on the way forward, the adjoint
//      recurrence and everything else on the way back. Sums over a channel's states are exact, through shared memory, where
//      each lane collects one whole step to finish and to store in vectors;
//   4. sums over channels (dB, dC) are exchanged between lanes, collected per block, and added over blocks by scan_reduce.
//
// No atomics: every sum has a fixed order. The states of a lane are permuted by its quad number (slot n holds state n ^ twist), so
// that halving exchanges between quads send one register and keep another without choosing; B and C lie in shared memory once per twist.
#include "scan.cuh"

constexpr int SUB = 4;                           // steps whose decays and states are in registers
constexpr int SUBS = TILE / SUB;
constexpr int PITCH = WARP_CHANNELS + (CPT == 4 ? 4 : 0);  // of rows that a quad's lanes read at four steps: spreads these over the banks
constexpr int KEPT = NPT / TWISTS;               // sums of a lane that are left after the exchanges without choice
constexpr int STATE_VECTORS = CPT * NPT / VECTOR;
constexpr int STATE_FLOATS = STATE_VECTORS * 32 * VECTOR;  // of a warp at one step
constexpr int BEYOND = ((QuadSums<CPT>::SIZE > STATE_FLOATS ? QuadSums<CPT>::SIZE - STATE_FLOATS : 1) + 3) / 4 * 4;  // sums take more than one step's states
static_assert(SUB == QUAD, "each lane of a quad finishes one step");

// The time step where a document begins is scaled by a power of two, which the end of its computation takes back: any decay underflows.
constexpr float START_SCALE = 0x1p100f, START_LEAST = 0x1p-26f, START_MOST = 0x1p27f;
static_assert(START_SCALE * START_LEAST * -LARGEST_A > 150.f, "exp2 of it is exactly 0");

struct BackwardParams {
    Rows u, delta, z, B, C, dout;
    scalar_t *du, *ddelta;  // (batch, length, channels), contiguous
    scalar_t* dz;           // the same, but for rows that are GATE_ROW times as long: a part of a wider tensor
    const float *A, *D, *delta_bias;
    const int* seq_idx;
    const float* checkpoints;  // (batch, tiles, channels, states)
    const float* dreceived;    // (batch, segments, channels, states) or null: gradient of the state after each segment
    float* dinitial;           // (batch, channels, states) or null
    float* dBC;                // (batch, blocks, 2, length, states): dB and dC of a block's channels
    float* dA;                 // (batch, segments, channels, states)
    float* dD;                 // (batch, segments, channels)
    float* dbias;              // (batch, segments, channels)
    int length, channels;
    Segments segments;
};

struct BackwardWarp {  // a warp's shared memory
    scalar_t u[2][TILE][WARP_CHANNELS];
    scalar_t delta[2][TILE][WARP_CHANNELS];
#if HAS_Z
    scalar_t gated[2][2][TILE][WARP_CHANNELS];  // dout and z; once these have been used dout times the gate's slope, in floats
    DEVICE scalar_t (*dout(int stage))[WARP_CHANNELS] { return gated[stage][0]; }
    DEVICE scalar_t (*z(int stage))[WARP_CHANNELS] { return gated[stage][1]; }
    DEVICE float (*dgate(int stage))[WARP_CHANNELS] { return reinterpret_cast<float(*)[WARP_CHANNELS]>(gated[stage]); }
#else
    scalar_t douts[2][TILE][WARP_CHANNELS];
    DEVICE scalar_t (*dout(int stage))[WARP_CHANNELS] { return douts[stage]; }
#endif
    float time_step[TILE][PITCH];
    float input[TILE][WARP_CHANNELS];
    float dy[TILE][PITCH];
    float dBC[2][TILE][STATES];
    float states[SUBS][STATE_VECTORS][32][VECTOR];  // before each SUB steps, one lane's side by side
    float beyond[BEYOND];
    float dD[32][4];                                // a lane's share: of the channels that it turns into floats,
    float dbias[32][CPT];                           // and of those that it finishes
    float D[WARP_CHANNELS];
    float bias[WARP_CHANNELS];
};

struct BackwardBlock {
    scalar_t bc[TILE][2 * STATES];
    float B[TILE][TWISTS][STATES];
    float C[TILE][TWISTS][STATES];
    BackwardWarp warps[WARPS];
};

static_assert(sizeof(BackwardBlock) <= MOST_SHARED, "a block's shared memory; PITCH and BEYOND take its last bytes with 16 states");
static_assert(sizeof(BackwardWarp) % 16 == 0, "every warp's begins where vectors may");

using Activations = TileStream<VECTOR_IO, TILE, WARP_CHANNELS, WARP_CHANNELS, 32>;
using BlockBC = TileStream<VECTOR_BC, TILE, STATES, 2 * STATES, THREADS>;

struct Backward {
    const BackwardParams& p;
    BackwardBlock& block;
    BackwardWarp& tile;
    const int batch, channel0, lane;
    Activations u, delta, dout, z;
    BlockBC B, C;
    offset_t out;  // where the lane's next results go
    float* dBC;    // where those of the block go

    DEVICE Backward(const BackwardParams& p, BackwardBlock& block, BackwardWarp& tile, int batch, int channel0, int lane, int last)
        : p(p), block(block), tile(tile), batch(batch), channel0(channel0), lane(lane), u(p.u, batch, last, channel0, lane),
          delta(p.delta, batch, last, channel0, lane), dout(p.dout, batch, last, channel0, lane), z(p.z, batch, last, channel0, lane),
          B(p.B, batch, last, 0, threadIdx.x), C(p.C, batch, last, 0, threadIdx.x),
          out((offset_t(batch) * p.length + last + (SUBS - 1) * SUB + part()) * p.channels + channel0 + own()),
          dBC(p.dBC + ((offset_t(batch) * gridDim.x + blockIdx.x) * 2 * p.length + last) * STATES) {}

    DEVICE int quad() const { return quad_of<4>(lane); }  // its twist depends on bits 1 and 2
    DEVICE int part() const { return part_of(lane); }
    DEVICE int twist() const { return quad() % TWISTS; }
    DEVICE int own() const { return quad() * CPT; }
    // Where a channel lies in a row of dgate, whose size leaves no room for a pitch.
    DEVICE static int swizzled(int step, int channel) { return CPT == 4 ? channel ^ step % 4 * 4 : channel; }

    // The tile before the last one that was fetched; it begins at `start`.
    DEVICE void issue(int start, int end, int stage) {
        const int rows = end - start, cols = p.channels - channel0;
        u.fetch(tile.u[stage][0], rows, cols, lane, -TILE);
        delta.fetch(tile.delta[stage][0], rows, cols, lane, -TILE);
        dout.fetch(tile.dout(stage)[0], rows, cols, lane, -TILE);
#if HAS_Z
        z.fetch(tile.z(stage)[0], rows, cols, lane, -TILE);
#endif
    }

    DEVICE void issue_bc(int start, int end) {
        const int rows = end - start;
        B.fetch(block.bc[0], rows, STATES, threadIdx.x, -TILE);
        C.fetch(block.bc[0] + STATES, rows, STATES, threadIdx.x, -TILE);
        commit_copies();
    }

    // The state kept before a tile, to states[0]. Only this lane reads it, so waiting for its own copies is enough.
    DEVICE void issue_checkpoint(int start) const {
        const offset_t tiles = (p.length + TILE - 1) / TILE;
        const int channel = channel0 + own();
        const float* checkpoint = p.checkpoints + ((batch * tiles + start / TILE) * p.channels + channel) * STATES + part() * NPT;
#pragma unroll
        for (int v = 0; v < STATE_VECTORS; ++v) {
            const int c = v * VECTOR / NPT;
            copy_async<VECTOR * 4>(tile.states[0][v][lane], checkpoint + c * STATES + v * VECTOR % NPT, channel + c < p.channels);
        }
        commit_copies();
    }

    DEVICE void load_state(int sub, float (&h)[CPT][NPT]) const {
#pragma unroll
        for (int v = 0; v < STATE_VECTORS; ++v) {
            float x[VECTOR];
            load<VECTOR>(tile.states[sub][v][lane], x);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) h[(v * VECTOR + i) / NPT][(v * VECTOR + i) % NPT] = x[i];
        }
    }

    DEVICE void store_state(int sub, const float (&h)[CPT][NPT]) const {
#pragma unroll
        for (int v = 0; v < STATE_VECTORS; ++v) {
            float x[VECTOR];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) x[i] = h[(v * VECTOR + i) / NPT][(v * VECTOR + i) % NPT];
            store<VECTOR>(tile.states[sub][v][lane], x);
        }
    }

    // delta as the recurrence sees it: scaled where a document begins, so that the decay underflows, and 0 (nothing happens) past the end.
    DEVICE void mark(float (&delta)[PASSES][4], unsigned starts, int valid) const {
        if (starts == 0 && valid >= TILE) return;
        const Conversion lanes{lane};
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (starts >> lanes.step(pass) & 1u) delta[pass][i] = fminf(fmaxf(delta[pass][i], START_LEAST), START_MOST) * START_SCALE;
                if (lanes.step(pass) >= valid) delta[pass][i] = 0.f;
            }
    }

    DEVICE void prepare(int stage, unsigned starts, int valid) const {
        const Conversion lanes{lane};
        float bias[4], delta[PASSES][4], u[PASSES][4], dy[PASSES][4];
        load<4>(&tile.bias[lanes.channel()], bias);
        lanes.load(tile.delta[stage], delta);
        lanes.load(tile.u[stage], u);
        lanes.load(tile.dout(stage), dy);
#if HAS_Z
        float z[PASSES][4];
        lanes.load(tile.z(stage), z);
        __syncwarp();  // all lanes have read what dgate takes the place of
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float gate = sigmoid(z[pass][i]), silu = z[pass][i] * gate;
                z[pass][i] = dy[pass][i] * fmaf(silu, 1.f - gate, gate);
                dy[pass][i] *= silu;
            }
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) store<4>(&tile.dgate(stage)[lanes.step(pass)][swizzled(lanes.step(pass), lanes.channel())], z[pass]);
#endif
        float dD[4];
        load<4>(tile.dD[lane], dD);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int i = 0; i < 4; ++i) dD[i] = fmaf(dy[pass][i], u[pass][i], dD[i]);
        store<4>(tile.dD[lane], dD);
        lanes.softplus(delta, bias);
        lanes.multiply(u, delta);
        mark(delta, starts, valid);
        lanes.store(tile.time_step, delta);
        lanes.store(tile.input, u);
        lanes.store(tile.dy, dy);
    }

    // The states before each SUB steps but the first, from the one before the tile.
    DEVICE void rebuild(const float (&rate)[CPT][NPT]) const {
        float h[CPT][NPT];
        load_state(0, h);
#pragma unroll 1
        for (int sub = 1; sub < SUBS; ++sub) {
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const int step = (sub - 1) * SUB + i;
                float B[NPT], delta[CPT], input[CPT];
                load<NPT>(&block.B[step][twist()][part() * NPT], B);
                load<CPT>(&tile.time_step[step][own()], delta);
                load<CPT>(&tile.input[step][own()], input);
                unrolled<CPT>([&](auto c_) {
                    constexpr int c = decltype(c_)::value;
                    unrolled<NPT>([&](auto n_) {
                        constexpr int n = decltype(n_)::value;
                        h[c][n] = fmaf(decay<c * NPT + n>(delta[c], rate[c][n]), h[c][n], input[c] * B[n]);
                    });
                });
            }
            store_state(sub, h);
        }
    }

    // Where the states before these steps lay, which are read by now; of the first steps those before the second, whose place is free, since
    // the states before the next tile arrive in theirs.
    DEVICE QuadSums<CPT> sums(int sub) const { return {&tile.states[max(sub, 1)][0][0][0]}; }

    // Adds one step's contributions over the quads of a pair of lanes, of four quads if TWISTS allows; leaves KEPT sums.
    DEVICE void exchange(float (&v)[NPT], float (&kept)[KEPT]) const {
#pragma unroll
        for (int bit = 1; bit < TWISTS; bit *= 2)
#pragma unroll
            for (int n = 0; n < NPT; ++n)
                if (n % (2 * bit) == 0) v[n] += __shfl_xor_sync(FULL_WARP, v[n + bit], 8 * bit);
#pragma unroll
        for (int k = 0; k < KEPT; ++k) kept[k] = v[k * TWISTS];
    }

    // Ends the sums over the quads of two adjacent steps; quads 0-3 keep the first, 4-7 the second.
    DEVICE void collect(float (*sums)[STATES], int step, float (&first)[KEPT], float (&second)[KEPT]) const {
        const bool upper = quad() >= 4;
#pragma unroll
        for (int k = 0; k < KEPT; ++k) {
            float keep = upper ? second[k] : first[k];
            keep += __shfl_xor_sync(FULL_WARP, upper ? first[k] : second[k], 1);
            if constexpr (TWISTS < 4) keep += __shfl_xor_sync(FULL_WARP, keep, 16);
            if (TWISTS == 4 || lane < 16) sums[step + upper][part() * NPT + k * TWISTS + twist()] = keep;
        }
    }

    // The step that a lane received from the quad sums: du, d delta, dz, and the lane's share of dbias. No branches, so that what comes
    // before and behind mixes with it.
    DEVICE void finish(int stage, int sub, int valid, const float (&y)[CPT], const float (&dinput)[CPT], const float (&dlog)[CPT]) {
        const int channel = own(), step = sub * SUB + part();
        float D[CPT], dbias[CPT], u[CPT], delta[CPT], dy[CPT], du[CPT], ddelta[CPT];
        load<CPT>(&tile.D[channel], D);
        load<CPT>(tile.dbias[lane], dbias);
        load<CPT>(&tile.u[stage][step][channel], u);
        load<CPT>(&tile.time_step[step][channel], delta);
        load<CPT>(&tile.dy[step][channel], dy);
#if HAS_Z
        float dz[CPT];
        load<CPT>(&tile.dgate(stage)[step][swizzled(step, channel)], dz);
#endif
#if HAS_SEQ
        const bool starts = delta[0] >= START_SCALE * START_LEAST;
#pragma unroll
        for (int c = 0; c < CPT; ++c) delta[c] = starts ? delta[c] * (1.f / START_SCALE) : delta[c];
#endif
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
            du[c] = fmaf(dinput[c], delta[c], D[c] * dy[c]);
            ddelta[c] = fmaf(dinput[c], u[c], dlog[c] * LN2) * softplus_slope(delta[c]);
            dbias[c] += ddelta[c];
#if HAS_Z
            dz[c] *= fmaf(D[c], u[c], y[c]);
#endif
        }
        const int first = channel0 + channel;
        const bool inside = step < valid;
        store_channels(p.du + out, first, p.channels, du, inside);
        store_channels(p.ddelta + out, first, p.channels, ddelta, inside);
#if HAS_Z
        store_channels(p.dz + GATE_ROW * out - (GATE_ROW - 1) * first, first, p.channels, dz, inside);
#endif
        out -= SUB * p.channels;
        store<CPT>(tile.dbias[lane], dbias);
    }

    DEVICE void begin_channels() const {
#pragma unroll
        for (int i = 0; i < 4; ++i) tile.dD[lane][i] = 0.f;
#pragma unroll
        for (int c = 0; c < CPT; ++c) tile.dbias[lane][c] = 0.f;
        for (int c = lane; c < WARP_CHANNELS; c += 32) {
            const bool inside = channel0 + c < p.channels;
            tile.D[c] = p.D != nullptr && inside ? p.D[channel0 + c] : 0.f;
            tile.bias[c] = p.delta_bias != nullptr && inside ? p.delta_bias[channel0 + c] : 0.f;
        }
    }

    // dD and dbias: lanes that share channels hold sums over different steps.
    DEVICE void end_channels(offset_t row) const {
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
            float sum = tile.dbias[lane][c];
            sum += __shfl_xor_sync(FULL_WARP, sum, PART_BIT);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2 * PART_BIT);
            const int channel = channel0 + own() + c;
            if (part() == 0 && channel < p.channels) p.dbias[row * p.channels + channel] = sum;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = tile.dD[lane][i];
#pragma unroll
            for (int mask = LANES_A_ROW; mask < 32; mask *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, mask);
            const int channel = channel0 + lane * 4 + i;
            if (lane < LANES_A_ROW && channel < p.channels) p.dD[row * p.channels + channel] = sum;
        }
    }

    // Forward over SUB steps: decays, states (h[i] before step i) and what they alone give, C . state and dC.
    DEVICE void ahead(int sub, const float (&rate)[CPT][NPT], float (&a)[SUB][CPT][NPT], float (&h)[SUB + 1][CPT][NPT], float (&y)[CPT]) const {
        float even[KEPT], odd[KEPT];
        load_state(sub, h[0]);
        __syncwarp();  // all lanes have read what the sums take the place of
        unrolled<SUB>([&](auto i_) {
            constexpr int i = decltype(i_)::value;
            const int step = sub * SUB + i;
            float B[NPT], C[NPT], delta[CPT], input[CPT], dy[CPT], parts[CPT], dC[NPT] = {};
            load<NPT>(&block.B[step][twist()][part() * NPT], B);
            load<NPT>(&block.C[step][twist()][part() * NPT], C);
            load<CPT>(&tile.time_step[step][own()], delta);
            load<CPT>(&tile.input[step][own()], input);
            load<CPT>(&tile.dy[step][own()], dy);
            unrolled<CPT>([&](auto c_) {
                constexpr int c = decltype(c_)::value;
                float sum = 0.f;
                unrolled<NPT>([&](auto n_) {
                    constexpr int n = decltype(n_)::value;
                    a[i][c][n] = decay<c * NPT + n>(delta[c], rate[c][n]);
                    h[i + 1][c][n] = fmaf(a[i][c][n], h[i][c][n], input[c] * B[n]);
                    sum = fmaf(C[n], h[i + 1][c][n], sum);
                    dC[n] = fmaf(dy[c], h[i + 1][c][n], dC[n]);
                });
                parts[c] = sum;
            });
            if constexpr (HAS_Z) sums(sub).put(i, lane, parts);
            exchange(dC, i % 2 ? odd : even);
            if constexpr (i % 2) collect(tile.dBC[1], step - 1, even, odd);
        });
        if constexpr (HAS_Z) {
            __syncwarp();
            sums(sub).take(lane, y);
            __syncwarp();
        }
    }

    // Back over SUB steps: the adjoint g, and everything that needs it.
    DEVICE void back(int sub, const float (&rate)[CPT][NPT], const float (&a)[SUB][CPT][NPT], const float (&h)[SUB + 1][CPT][NPT], float (&g)[CPT][NPT],
                     float (&dA)[CPT][NPT], float (&dinput)[CPT], float (&dlog)[CPT]) const {
        float log_parts[SUB][CPT], even[KEPT], odd[KEPT];
        unrolled<SUB>([&](auto i_) {
            constexpr int i = SUB - 1 - decltype(i_)::value;
            const int step = sub * SUB + i;
            float B[NPT], C[NPT], delta[CPT], input[CPT], dy[CPT], parts[CPT], dB[NPT] = {};
            load<NPT>(&block.B[step][twist()][part() * NPT], B);
            load<NPT>(&block.C[step][twist()][part() * NPT], C);
            load<CPT>(&tile.time_step[step][own()], delta);
            load<CPT>(&tile.input[step][own()], input);
            load<CPT>(&tile.dy[step][own()], dy);
            unrolled<CPT>([&](auto c_) {
                constexpr int c = decltype(c_)::value;
                float sum = 0.f, log_sum = 0.f;
                unrolled<NPT>([&](auto n_) {
                    constexpr int n = decltype(n_)::value;
                    const float adjoint = fmaf(C[n], dy[c], g[c][n]);
                    dB[n] = fmaf(adjoint, input[c], dB[n]);
                    sum = fmaf(adjoint, B[n], sum);
                    g[c][n] = a[i][c][n] * adjoint;
                    const float dexponent = g[c][n] * h[i][c][n];
                    log_sum = fmaf(dexponent, rate[c][n], log_sum);
                    dA[c][n] = fmaf(dexponent, delta[c], dA[c][n]);
                });
                parts[c] = sum;
                log_parts[i][c] = log_sum;
            });
            sums(sub).put(i, lane, parts);
            exchange(dB, i % 2 ? odd : even);
            if constexpr (i % 2 == 0) collect(tile.dBC[0], step, even, odd);
        });
        __syncwarp();
        sums(sub).take(lane, dinput);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < SUB; ++i) sums(sub).put(i, lane, log_parts[i]);
        __syncwarp();
        sums(sub).take(lane, dlog);
    }

    // dB and dC of the tile that begins at `start`, summed over the warps of the block. All threads.
    DEVICE void store_dbc(int start, int end) {
        constexpr int VECTORS = TILE * STATES / 4;
#pragma unroll
        for (int first = 0; first < 2 * VECTORS; first += THREADS) {
            const unsigned v = first + threadIdx.x;
            if (2 * VECTORS % THREADS != 0 && v >= 2 * VECTORS) break;
            const unsigned which = v / VECTORS, at = v % VECTORS * 4, step = at / STATES;
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                float x[4];
                load<4>(&block.warps[w].dBC[which][0][at], x);
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] += x[i];
            }
            if (start + int(step) < end) store<4>(dBC + offset_t(which) * p.length * STATES + at, sum);
        }
        dBC -= TILE * STATES;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const __grid_constant__ BackwardParams p) {
    extern __shared__ __align__(16) char shared[];
    BackwardBlock& block = *reinterpret_cast<BackwardBlock*>(shared);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, batch = blockIdx.y, segment = blockIdx.z;
    const int begin = segment * p.segments.length, end = min(p.length, begin + p.segments.length);
    const int last = begin + (end - begin - 1) / TILE * TILE;
    Backward scan{p, block, block.warps[warp], batch, (int(blockIdx.x) * WARPS + warp) * WARP_CHANNELS, lane, last};
    const int channel = scan.channel0 + scan.own(), part = scan.part(), twist = scan.twist();
    const offset_t row = offset_t(batch) * p.segments.count + segment;

    float rate[CPT][NPT], g[CPT][NPT], dA[CPT][NPT];
#pragma unroll
    for (int c = 0; c < CPT; ++c)
#pragma unroll
        for (int n = 0; n < NPT; ++n) {
            const offset_t state = offset_t(channel + c) * STATES + part * NPT + (n ^ twist);
            const bool inside = channel + c < p.channels;
            rate[c][n] = inside ? decay_rate(p.A, state) : 0.f;
            g[c][n] = inside && p.dreceived != nullptr ? p.dreceived[row * p.channels * STATES + state] : 0.f;
            dA[c][n] = 0.f;
        }
    scan.begin_channels();

    DocumentStarts documents;
    const offset_t seq_row = offset_t(batch) * p.length;
    documents.prefetch(p.seq_idx, seq_row, last, p.length, lane);
    scan.issue_checkpoint(last);
    scan.issue(last, end, 0);
    scan.issue_bc(last, end);
    int stage = 0;
    for (int start = last; start >= begin; start -= TILE, stage ^= 1) {
        const int valid = min(TILE, end - start);
        const unsigned starts = documents.mask(start, p.length, lane);
        wait_copies();
        __syncthreads();
        if (start < last) scan.store_dbc(start + TILE, end);
        if (start > begin) {
            scan.issue(start - TILE, end, stage ^ 1);
            documents.prefetch(p.seq_idx, seq_row, start - TILE, p.length, lane);
        }
        convert_bc(block.bc, block.B, block.C);
        scan.prepare(stage, starts, valid);
        __syncthreads();
        if (start > begin) scan.issue_bc(start - TILE, end);
        scan.rebuild(rate);
#pragma unroll 1
        for (int sub = SUBS - 1; sub >= 0; --sub) {
            float a[SUB][CPT][NPT], h[SUB + 1][CPT][NPT], y[CPT], dinput[CPT], dlog[CPT];
            scan.ahead(sub, rate, a, h, y);
            if (sub == 0 && start > begin) scan.issue_checkpoint(start - TILE);
            scan.back(sub, rate, a, h, g, dA, dinput, dlog);
            scan.finish(stage, sub, valid, y, dinput, dlog);
        }
    }
    __syncthreads();
    scan.store_dbc(begin, end);
#pragma unroll
    for (int c = 0; c < CPT; ++c)
#pragma unroll
        for (int n = 0; n < NPT; ++n) {
            const offset_t state = offset_t(channel + c) * STATES + part * NPT + (n ^ twist);
            if (channel + c < p.channels) {
                p.dA[row * p.channels * STATES + state] = dA[c][n];
                if (p.dinitial != nullptr && segment == 0) p.dinitial[offset_t(batch) * p.channels * STATES + state] = g[c][n];
            }
        }
    scan.end_channels(row);
}

extern "C" __device__ const int scan_backward_shared_bytes = sizeof(BackwardBlock);
