// Forward pass of the selective scan.
//
//   state_t = exp(delta_t A) state_{t-1} + delta_t u_t B_t        y_t = (C_t . state_t + D u_t) silu(z_t)
//
// Per tile of 16 steps, fetched one tile ahead by asynchronous copies:
//   1. activations become floats in shared memory: time steps (softplus) and their products with u, each warp for its own channels;
//      B and C for the whole block, a tile ahead, so that one barrier a tile is enough. That barrier also keeps the warps of a
//      multiprocessor abreast: left alone, some would finish early and leave the others without company to hide latency;
//   2. the recurrence, with states in registers; C . state is summed over a quad through shared memory, where every lane collects
//      whole steps (by shuffles it takes 2% longer, on the tensor cores 9%, which also round);
//   3. these it finishes (skip, gate) and stores in vectors.
// The state before each tile is kept for the backward pass.
#include "scan.cuh"

constexpr int GROUP = 16 / CPT;        // steps whose 16 results a quad sums together
constexpr int STEPS_A_LANE = 4 / CPT;  // of which each lane ends up with this many, for all CPT channels
constexpr int TWIN = TWIST_CHANNELS == CPT ? 4 : 1;
static_assert(TWIST_CHANNELS % CPT == 0, "a lane's channels share a twist");

struct ForwardParams {
    Rows u, delta, z, B, C;
    scalar_t* y;  // (batch, length, channels), contiguous
    const float *A, *D, *delta_bias;
    const int* seq_idx;
    const float* initial;  // (batch, segments, channels, states) or null
    float* final_state;    // (batch, channels, states) or null
    float* checkpoints;    // (batch, tiles, channels, states), in slot order, or null
    int length, channels;
    Segments segments;
};

struct ForwardWarp {  // a warp's shared memory
    scalar_t u[2][TILE][WARP_CHANNELS];
    scalar_t delta[2][TILE][WARP_CHANNELS];
#if HAS_Z
    scalar_t z[2][TILE][WARP_CHANNELS];
#endif
    float time_step[TILE][WARP_CHANNELS];
    float input[TILE][WARP_CHANNELS];
    float sums[QuadSums<4>::SIZE];
};

struct ForwardBlock {
    scalar_t bc[2][TILE][2 * STATES];
    float B[2][TILE][TWISTS][STATES];
    float C[2][TILE][TWISTS][STATES];
    ForwardWarp warps[WARPS];
};
static_assert(sizeof(ForwardBlock) <= MOST_SHARED, "a block's shared memory");
static_assert(sizeof(ForwardWarp) % 16 == 0, "every warp's begins where vectors may");

using Activations = TileStream<VECTOR_IO, TILE, WARP_CHANNELS, WARP_CHANNELS, 32>;
using BlockBC = TileStream<VECTOR_BC, TILE, STATES, 2 * STATES, THREADS>;

struct Forward {
    const ForwardParams& p;
    ForwardBlock& block;
    ForwardWarp& tile;
    const int batch, channel0, lane, end;
    Activations u, delta, z;
    BlockBC B, C;
    scalar_t* out;  // where the lane's next result goes

    DEVICE Forward(const ForwardParams& p, ForwardBlock& block, ForwardWarp& tile, int batch, int channel0, int lane, int begin, int end)
        : p(p), block(block), tile(tile), batch(batch), channel0(channel0), lane(lane), end(end), u(p.u, batch, begin, channel0, lane),
          delta(p.delta, batch, begin, channel0, lane), z(p.z, batch, begin, channel0, lane), B(p.B, batch, begin, 0, threadIdx.x),
          C(p.C, batch, begin, 0, threadIdx.x),
          out(p.y + (offset_t(batch) * p.length + begin + part_of(lane) * STEPS_A_LANE) * p.channels + channel0 + quad_of<TWIN>(lane) * CPT) {}

    // The next tile, which begins at `start`; BC runs a tile ahead.
    DEVICE void issue_activations(int start, int stage) {
        const int rows = end - start, cols = p.channels - channel0;
        u.fetch(tile.u[stage][0], rows, cols, lane, TILE);
        delta.fetch(tile.delta[stage][0], rows, cols, lane, TILE);
#if HAS_Z
        z.fetch(tile.z[stage][0], rows, cols, lane, TILE);
#endif
    }

    DEVICE void issue_bc(int start, int stage) {
        const int rows = end - start;
        B.fetch(block.bc[stage][0], rows, STATES, threadIdx.x, TILE);
        C.fetch(block.bc[stage][0] + STATES, rows, STATES, threadIdx.x, TILE);
    }

    DEVICE void prepare(int stage, const float (&bias)[4], unsigned starts, int valid) const {
        const Conversion lanes{lane};
        float delta[PASSES][4], u[PASSES][4];
        lanes.load(tile.delta[stage], delta);
        lanes.load(tile.u[stage], u);
        lanes.softplus(delta, bias);
        lanes.multiply(u, delta);
        lanes.mark(delta, starts, valid);
        lanes.store(tile.time_step, delta);
        lanes.store(tile.input, u);
    }

    // The lane's STEPS_A_LANE steps from `step` on, of the quad's channels.
    DEVICE void finish(int stage, int step, int valid, int channel, const float (&D)[CPT], const float (&sums)[4]) {
        float u[STEPS_A_LANE][CPT], z[STEPS_A_LANE][CPT];
#pragma unroll
        for (int r = 0; r < STEPS_A_LANE; ++r) {
            load<CPT>(&tile.u[stage][step + r][channel], u[r]);
#if HAS_Z
            load<CPT>(&tile.z[stage][step + r][channel], z[r]);
#endif
        }
#pragma unroll
        for (int r = 0; r < STEPS_A_LANE; ++r) {
            float y[CPT];
#pragma unroll
            for (int c = 0; c < CPT; ++c) {
                y[c] = fmaf(D[c], u[r][c], sums[r * CPT + c]);
#if HAS_Z
                y[c] *= z[r][c] * sigmoid(z[r][c]);
#endif
            }
            store_channels(out + r * p.channels, channel0 + channel, p.channels, y, step + r < valid);
        }
        out += GROUP * p.channels;
    }

    // The recurrence over a tile.
    DEVICE void walk(int stage, int valid, int twist, const float (&D)[CPT], const float (&rate)[CPT][NPT], float (&h)[CPT][NPT]) {
        const int part = part_of(lane), own = quad_of<TWIN>(lane) * CPT;
        const QuadSums<4> exchange{tile.sums};
#pragma unroll 1
        for (int group = 0; group < TILE; group += GROUP) {
            float sums[4], parts[QUAD][4];
#pragma unroll
            for (int receiver = 0; receiver < QUAD; ++receiver) {
#pragma unroll
                for (int r = 0; r < STEPS_A_LANE; ++r) {
                    const int step = group + receiver * STEPS_A_LANE + r;
                    float B[NPT], C[NPT], delta[CPT], input[CPT];
                    load<NPT>(&block.B[stage][step][twist][part * NPT], B);
                    load<NPT>(&block.C[stage][step][twist][part * NPT], C);
                    load<CPT>(&tile.time_step[step][own], delta);
                    load<CPT>(&tile.input[step][own], input);
                    unrolled<CPT>([&](auto c_) {
                        constexpr int c = decltype(c_)::value;
                        float sum = 0.f;
                        unrolled<NPT>([&](auto n_) {
                            constexpr int n = decltype(n_)::value;
                            h[c][n] = fmaf(decay<c * NPT + n>(delta[c], rate[c][n]), h[c][n], input[c] * B[n]);
                            sum = fmaf(h[c][n], C[n], sum);
                        });
                        parts[receiver][r * CPT + c] = sum;
                    });
                }
            }
            __syncwarp();  // all lanes have taken what they put before
#pragma unroll
            for (int i = 0; i < QUAD; ++i) exchange.put(i, lane, parts[i]);
            __syncwarp();
            exchange.take(lane, sums);
            finish(stage, group + part * STEPS_A_LANE, valid, own, D, sums);
        }
    }

    DEVICE void store_final(int twist, const float (&h)[CPT][NPT]) const {
        const int part = part_of(lane), channel = channel0 + quad_of<TWIN>(lane) * CPT;
        if (p.final_state == nullptr || end != p.length) return;
#pragma unroll
        for (int c = 0; c < CPT; ++c)
#pragma unroll
            for (int n = 0; n < NPT; ++n)
                if (channel + c < p.channels)
                    p.final_state[(offset_t(batch) * p.channels + channel + c) * STATES + part * NPT + (n ^ twist)] = h[c][n];
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const __grid_constant__ ForwardParams p) {
    extern __shared__ __align__(16) char shared[];
    ForwardBlock& block = *reinterpret_cast<ForwardBlock*>(shared);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, quad = quad_of<TWIN>(lane), part = part_of(lane);
    const int batch = blockIdx.y, segment = blockIdx.z;
    const int begin = segment * p.segments.length, end = min(p.length, begin + p.segments.length);
    ForwardWarp& tile = block.warps[warp];
    Forward scan{p, block, tile, batch, (int(blockIdx.x) * WARPS + warp) * WARP_CHANNELS, lane, begin, end};

    const int channel = scan.channel0 + quad * CPT;  // the quad's first
    const int twist = channel / TWIST_CHANNELS % TWISTS;
    float rate[CPT][NPT], h[CPT][NPT], D[CPT], bias[4];
#pragma unroll
    for (int c = 0; c < CPT; ++c)
#pragma unroll
        for (int n = 0; n < NPT; ++n) {
            const offset_t state = offset_t(channel + c) * STATES + part * NPT + (n ^ twist);
            const offset_t row = (offset_t(batch) * p.segments.count + segment) * p.channels * STATES;
            const bool inside = channel + c < p.channels;
            rate[c][n] = inside ? decay_rate(p.A, state) : 0.f;
            h[c][n] = inside && p.initial != nullptr ? p.initial[row + state] : 0.f;
        }
    load_channels(p.D, channel, p.channels, D);
    load_channels(p.delta_bias, scan.channel0 + Conversion{lane}.channel(), p.channels, bias);

    DocumentStarts documents;
    const offset_t seq_row = offset_t(batch) * p.length;
    documents.prefetch(p.seq_idx, seq_row, begin, p.length, lane);
    scan.issue_bc(begin, 0);
    commit_copies();
    wait_copies();
    __syncthreads();
    convert_bc(block.bc[0], block.B[0], block.C[0]);
    scan.issue_activations(begin, 0);
    scan.issue_bc(begin + TILE, 1);
    commit_copies();

    const offset_t tiles = (p.length + TILE - 1) / TILE;
    float* checkpoint = p.checkpoints + ((batch * tiles + begin / TILE) * p.channels + channel) * STATES + part * NPT;
    int stage = 0;
    for (int start = begin; start < end; start += TILE, stage ^= 1) {
        const int valid = min(TILE, end - start);
        const unsigned starts = documents.mask(start, p.length, lane);
        wait_copies();
        __syncthreads();
        if (start + TILE < end) {
            scan.issue_activations(start + TILE, stage ^ 1);
            scan.issue_bc(start + 2 * TILE, stage);
            commit_copies();
            documents.prefetch(p.seq_idx, seq_row, start + TILE, p.length, lane);
            convert_bc(block.bc[stage ^ 1], block.B[stage ^ 1], block.C[stage ^ 1]);
        }
        scan.prepare(stage, bias, starts, valid);
        if (p.checkpoints != nullptr) {
#pragma unroll
            for (int c = 0; c < CPT; ++c)
                if (channel + c < p.channels) store<NPT>(checkpoint + c * STATES, h[c]);
            checkpoint += offset_t(p.channels) * STATES;
        }
        __syncwarp();
        scan.walk(stage, valid, twist, D, rate, h);
    }
    scan.store_final(twist, h);
}

extern "C" __device__ const int scan_forward_shared_bytes = sizeof(ForwardBlock);
