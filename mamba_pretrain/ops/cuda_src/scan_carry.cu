// What a segment of the sequence passes on, for scans cut into segments that run in parallel (few channels, long sequences).
//
//   forward  (REVERSE 0): the state after a segment that began with zero
//   backward (REVERSE 1): the gradient of the state before a segment, if nothing came from behind it
//
// and the sum of its time steps. scan_join chains them: exp(A * sum of time steps) is how much of what enters a segment leaves it.
#include "scan.cuh"

struct CarryParams {
    Rows values;  // forward: u; backward: dy
    Rows delta;
    Rows z;       // backward, with HAS_Z
    Rows BC;      // forward: B; backward: C
    const float *A, *delta_bias;
    const int* seq_idx;
    float* carry;      // (batch, segments, channels, states)
    float* delta_sum;  // (batch, segments, channels)
    int length, channels;
    Segments segments;
};

constexpr bool GATED = REVERSE && HAS_Z;

struct CarryTile {  // a warp's shared memory
    scalar_t values[2][TILE][WARP_CHANNELS];
    scalar_t delta[2][TILE][WARP_CHANNELS];
    scalar_t z[GATED ? 2 : 1][GATED ? TILE : 1][WARP_CHANNELS];
    scalar_t bc[2][TILE][STATES];
    float time_step[TILE][WARP_CHANNELS];
    float input[TILE][WARP_CHANNELS];
    float bc_float[TILE][STATES];
};

struct CarryWarp {
    const CarryParams& p;
    CarryTile& tile;
    const int batch, channel0, lane;

    DEVICE void issue(int start, int end, int stage) const {
        const int rows = end - start, cols = p.channels - channel0;
        copy_tile<VECTOR_IO, TILE, WARP_CHANNELS, WARP_CHANNELS, 32>(tile.values[stage][0], p.values, batch, start, channel0, rows, cols, lane);
        copy_tile<VECTOR_IO, TILE, WARP_CHANNELS, WARP_CHANNELS, 32>(tile.delta[stage][0], p.delta, batch, start, channel0, rows, cols, lane);
        if constexpr (GATED)
            copy_tile<VECTOR_IO, TILE, WARP_CHANNELS, WARP_CHANNELS, 32>(tile.z[stage][0], p.z, batch, start, channel0, rows, cols, lane);
        copy_tile<VECTOR_BC, TILE, STATES, STATES, 32>(tile.bc[stage][0], p.BC, batch, start, 0, rows, STATES, lane);
        commit_copies();
    }

    DEVICE void prepare(int stage, const float (&bias)[4], unsigned starts, int valid, float (&delta_sum)[4]) const {
        const Conversion lanes{lane};
        float delta[PASSES][4], input[PASSES][4];
        lanes.load(tile.delta[stage], delta);
        lanes.load(tile.values[stage], input);
        if constexpr (GATED) {
            float z[PASSES][4];
            lanes.load(tile.z[stage], z);
            lanes.gate(input, z);
        }
        lanes.softplus(delta, bias);
        if constexpr (!REVERSE) lanes.multiply(input, delta);
        lanes.mark(delta, starts, valid);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int i = 0; i < 4; ++i) delta_sum[i] += delta[pass][i];
        lanes.store(tile.time_step, delta);
        lanes.store(tile.input, input);
#pragma unroll
        for (int v = 0; v < TILE * STATES; v += 32 * 4) {
            float x[4];
            load<4>(&tile.bc[stage][0][v + lane * 4], x);
            store<4>(&tile.bc_float[0][v + lane * 4], x);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_carry(const __grid_constant__ CarryParams p) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, quad = quad_of<4>(lane), part = part_of(lane);
    const int batch = blockIdx.y, segment = blockIdx.z;
    const int channel0 = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * WARP_CHANNELS;
    if (channel0 >= p.channels) return;
    CarryTile& tile = reinterpret_cast<CarryTile*>(shared)[threadIdx.x >> 5];
    const CarryWarp warp{p, tile, batch, channel0, lane};
    const int begin = segment * p.segments.length, end = min(p.length, begin + p.segments.length);
    const int tiles = (end - begin + TILE - 1) / TILE;

    const int own = quad * CPT, channel = channel0 + own;
    float rate[CPT][NPT], h[CPT][NPT], bias[4], delta_sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int c = 0; c < CPT; ++c)
#pragma unroll
        for (int n = 0; n < NPT; ++n) {
            rate[c][n] = channel + c < p.channels ? decay_rate(p.A, offset_t(channel + c) * STATES + part * NPT + n) : 0.f;
            h[c][n] = 0.f;
        }
    load_channels(p.delta_bias, channel0 + lane % LANES_A_ROW * 4, p.channels, bias);

    DocumentStarts documents;
    const offset_t seq_row = offset_t(batch) * p.length;
    const int first = REVERSE ? begin + (tiles - 1) * TILE : begin, direction = REVERSE ? -TILE : TILE;
    documents.prefetch(p.seq_idx, seq_row, first, p.length, lane);
    warp.issue(first, end, 0);
    for (int k = 0; k < tiles; ++k) {
        const int start = first + k * direction, valid = min(TILE, end - start), stage = k & 1;
        const unsigned starts = documents.mask(start, p.length, lane);
        wait_copies();
        __syncwarp();
        if (k + 1 < tiles) {
            warp.issue(start + direction, end, stage ^ 1);
            documents.prefetch(p.seq_idx, seq_row, start + direction, p.length, lane);
        }
        warp.prepare(stage, bias, starts, valid, delta_sum);
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < TILE; ++i) {
            const int step = REVERSE ? TILE - 1 - i : i;
            float BC[NPT], delta[CPT], input[CPT];
            load<NPT>(&tile.bc_float[step][part * NPT], BC);
            load<CPT>(&tile.time_step[step][own], delta);
            load<CPT>(&tile.input[step][own], input);
            unrolled<CPT>([&](auto c_) {
                constexpr int c = decltype(c_)::value;
                unrolled<NPT>([&](auto n_) {
                    constexpr int n = decltype(n_)::value;
                    const float a = decay<c * NPT + n>(delta[c], rate[c][n]);
                    h[c][n] = REVERSE ? a * fmaf(input[c], BC[n], h[c][n]) : fmaf(a, h[c][n], input[c] * BC[n]);
                });
            });
        }
        __syncwarp();
    }
    const offset_t row = offset_t(batch) * p.segments.count + segment;
#pragma unroll
    for (int c = 0; c < CPT; ++c)
        if (channel + c < p.channels) store<NPT>(p.carry + (row * p.channels + channel + c) * STATES + part * NPT, h[c]);
    // Lanes that share channels hold sums over different steps.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int mask = LANES_A_ROW; mask < 32; mask *= 2) delta_sum[i] += __shfl_xor_sync(FULL_WARP, delta_sum[i], mask);
        const int c = channel0 + lane * 4 + i;
        if (lane < LANES_A_ROW && c < p.channels) p.delta_sum[row * p.channels + c] = delta_sum[i];
    }
}

extern "C" __device__ const int scan_carry_shared_bytes = WARPS * sizeof(CarryTile);
