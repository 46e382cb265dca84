// Forward pass of the selective scan.
//
//   state_t = exp(delta_t A) state_{t-1} + delta_t u_t B_t        y_t = (C_t . state_t + D u_t) silu(z_t)
//
// Each warp works alone on its own tiles, double-buffered by asynchronous copies: no barrier of the block. Per tile of 16 steps:
//   1. every lane turns activations into floats: time steps (softplus) and their products with u, to shared memory;
//   2. the recurrence, with states in registers; C . state is summed over a quad on the tensor cores, which also hands every lane
//      the step that it finishes;
//   3. skip, gate and store, in vectors.
// The state before each tile is kept for the backward pass.
#include "scan.cuh"

struct ForwardParams {
    Rows u, delta, z, B, C, y;
    const float *A, *D, *delta_bias;
    const int* seq_idx;
    const float* initial;  // (batch, segments, channels, states) or null
    float* final_state;    // (batch, channels, states) or null
    float* checkpoints;    // (batch, tiles, channels, states) or null
    int length, channels;
    Segments segments;
};

struct ForwardTile {  // a warp's shared memory
    scalar_t u[2][TILE][WARP_CHANNELS];
    scalar_t delta[2][TILE][WARP_CHANNELS];
#if HAS_Z
    scalar_t z[2][TILE][WARP_CHANNELS];
#endif
    scalar_t bc[2][TILE][2 * STATES];
    float time_step[TILE][WARP_CHANNELS];
    float input[TILE][WARP_CHANNELS];
    float bc_float[TILE][2 * STATES];
};

struct ForwardWarp {
    const ForwardParams& p;
    ForwardTile& tile;
    const int batch, channel0, lane;

    DEVICE void issue(int start, int end, int stage) const {
        const int rows = end - start, cols = p.channels - channel0;
        copy_tile<VECTOR_IO, TILE, WARP_CHANNELS, WARP_CHANNELS, 32>(tile.u[stage][0], p.u.at(batch, start) + channel0, p.u.row_stride, rows, cols, lane);
        copy_tile<VECTOR_IO, TILE, WARP_CHANNELS, WARP_CHANNELS, 32>(tile.delta[stage][0], p.delta.at(batch, start) + channel0, p.delta.row_stride, rows, cols, lane);
#if HAS_Z
        copy_tile<VECTOR_IO, TILE, WARP_CHANNELS, WARP_CHANNELS, 32>(tile.z[stage][0], p.z.at(batch, start) + channel0, p.z.row_stride, rows, cols, lane);
#endif
        copy_tile<VECTOR_BC, TILE, STATES, 2 * STATES, 32>(tile.bc[stage][0], p.B.at(batch, start), p.B.row_stride, rows, STATES, lane);
        copy_tile<VECTOR_BC, TILE, STATES, 2 * STATES, 32>(tile.bc[stage][0] + STATES, p.C.at(batch, start), p.C.row_stride, rows, STATES, lane);
        commit_copies();
    }

    // Step 1: floats of the whole tile.
    DEVICE void prepare(int stage, const float (&bias)[4], unsigned starts, int valid) const {
        const int channel = lane % LANES_A_ROW * 4;
        const bool special = starts != 0 || valid < TILE;
#pragma unroll
        for (int pass = 0; pass < TILE; pass += 32 / LANES_A_ROW) {
            const int step = pass + lane / LANES_A_ROW;
            float delta[4], u[4];
            time_steps(&tile.delta[stage][step][channel], bias, delta);
            load<4>(&tile.u[stage][step][channel], u);
#pragma unroll
            for (int i = 0; i < 4; ++i) u[i] *= delta[i];
            if (special) mark(delta, starts, step, valid);
            store<4>(&tile.time_step[step][channel], delta);
            store<4>(&tile.input[step][channel], u);
        }
#pragma unroll
        for (int v = 0; v < TILE * 2 * STATES; v += 32 * 4) {
            float x[4];
            load<4>(&tile.bc[stage][0][v + lane * 4], x);
            store<4>(&tile.bc_float[0][v + lane * 4], x);
        }
    }

    // Step 3: the lane's STEPS_A_LANE steps from `step` on, of the quad's channels.
    DEVICE void finish(int stage, int start, int step, int valid, int channel, const float (&D)[CPT], const float (&sums)[4]) const {
#pragma unroll
        for (int r = 0; r < STEPS_A_LANE; ++r) {
            float u[CPT], y[CPT];
            load<CPT>(&tile.u[stage][step + r][channel], u);
#pragma unroll
            for (int c = 0; c < CPT; ++c) y[c] = fmaf(D[c], u[c], sums[r * CPT + c]);
#if HAS_Z
            float z[CPT];
            load<CPT>(&tile.z[stage][step + r][channel], z);
#pragma unroll
            for (int c = 0; c < CPT; ++c) y[c] *= z[c] * sigmoid(z[c]);
#endif
            if (step + r < valid) store_row(p.y.at(batch, start + step + r), channel0 + channel, p.channels, y);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const __grid_constant__ ForwardParams p) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, quad = lane >> 2, part = lane & 3;
    const int batch = blockIdx.y, segment = blockIdx.z;
    const int channel0 = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * WARP_CHANNELS;
    if (channel0 >= p.channels) return;
    ForwardTile& tile = reinterpret_cast<ForwardTile*>(shared)[threadIdx.x >> 5];
    const ForwardWarp warp{p, tile, batch, channel0, lane};
    const int begin = segment * p.segments.length, end = min(p.length, begin + p.segments.length);

    const int own = quad * CPT, channel = channel0 + own;  // the quad's first channel, in the warp and in all
    float rate[CPT][NPT], h[CPT][NPT], D[CPT], bias[4];
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
        const offset_t state = offset_t(channel + c) * STATES + part * NPT;
        const offset_t row = (offset_t(batch) * p.segments.count + segment) * p.channels * STATES;
#pragma unroll
        for (int n = 0; n < NPT; ++n) {
            const bool inside = channel + c < p.channels;
            rate[c][n] = inside ? decay_rate(p.A, state + n) : 0.f;
            h[c][n] = inside && p.initial != nullptr ? p.initial[row + state + n] : 0.f;
        }
    }
    load_channels(p.D, channel, p.channels, D);
    load_channels(p.delta_bias, channel0 + lane % LANES_A_ROW * 4, p.channels, bias);

    DocumentStarts documents;
    const offset_t seq_row = offset_t(batch) * p.length;
    documents.prefetch(p.seq_idx, seq_row, begin, p.length, lane);
    warp.issue(begin, end, 0);
    int stage = 0;
    for (int start = begin; start < end; start += TILE, stage ^= 1) {
        const int valid = min(TILE, end - start);
        const unsigned starts = documents.mask(start, p.length, lane);
        wait_copies();
        __syncwarp();
        if (start + TILE < end) {
            warp.issue(start + TILE, end, stage ^ 1);
            documents.prefetch(p.seq_idx, seq_row, start + TILE, p.length, lane);
        }
        warp.prepare(stage, bias, starts, valid);
        if (p.checkpoints != nullptr) {
            const offset_t tiles = (p.length + TILE - 1) / TILE;
            float* checkpoint = p.checkpoints + ((batch * tiles + start / TILE) * p.channels + channel) * STATES + part * NPT;
#pragma unroll
            for (int c = 0; c < CPT; ++c)
                if (channel + c < p.channels) store<NPT>(checkpoint + c * STATES, h[c]);
        }
        __syncwarp();
#pragma unroll 1
        for (int group = 0; group < TILE; group += GROUP) {
            float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int receiver = 0; receiver < QUAD; ++receiver) {
                float y[4];
#pragma unroll
                for (int r = 0; r < STEPS_A_LANE; ++r) {
                    const int step = group + receiver * STEPS_A_LANE + r;
                    float B[NPT], C[NPT], delta[CPT], input[CPT];
                    load<NPT>(&tile.bc_float[step][part * NPT], B);
                    load<NPT>(&tile.bc_float[step][STATES + part * NPT], C);
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
                        y[r * CPT + c] = sum;
                    });
                }
                quad_sum(sums, y, receiver);
            }
            warp.finish(stage, start, group + part * STEPS_A_LANE, valid, own, D, sums);
        }
        __syncwarp();
    }
    if (p.final_state != nullptr && end == p.length) {
#pragma unroll
        for (int c = 0; c < CPT; ++c)
            if (channel + c < p.channels)
                store<NPT>(p.final_state + (offset_t(batch) * p.channels + channel + c) * STATES + part * NPT, h[c]);
    }
}

extern "C" __device__ const int scan_forward_shared_bytes = WARPS * sizeof(ForwardTile);
