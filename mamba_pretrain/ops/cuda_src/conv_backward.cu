// Gradients of the convolution: s_t = dy_t silu'(sum_t), dx_t = sum_j weight_{TAPS-1-j} s_{t+j}, dweight_k = sum_t s_t x_{t-TAPS+1+k}.
//
// A warp runs TAPS - 1 steps past its chunk for the rows whose later taps lie there, and recomputes the sums it needs. A block adds up what
// its warps find for weight and bias, conv_reduce adds over blocks. Every order is fixed.
#include "conv.cuh"

struct Sums {  // gradients of weight and bias
    float weight[TAPS][CHANNELS], bias[CHANNELS];
};

struct Gradients {
    Sums& sums;
    Stream dy;
    char* row;                 // that of dx which the current step completes
    float dx[TAPS][CHANNELS];  // dx[j]: of the row j steps back, so far

    DEVICE Gradients(const Convolution& conv, Sums& found, int limit)
        : sums(found),
          dy(conv.p.dy, conv.batch, conv.begin, conv.channel, limit - conv.begin),
          row(reinterpret_cast<char*>(conv.p.dx.at(conv.batch, conv.begin - REACH) + conv.channel)) {
        clear(dx);
    }

    // What a step's output gradient (in s) adds to everything.
    template <bool PLAIN>
    DEVICE void add(const Convolution& conv, int i, bool own, float (&s)[CHANNELS]) {
#if SILU
        float y[CHANNELS];
        conv.sum(y);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const float gate = sigmoid(y[c]);
            s[c] *= gate * fmaf(y[c], 1.f - gate, 1.f);
        }
#endif
#pragma unroll
        for (int j = 0; j < TAPS; ++j)
            if (PLAIN || !conv.starts.within(i, j))
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    const float weight = conv.weight[REACH - j][c];
                    dx[j][c] = j == 0 ? weight * s[c] : fmaf(weight, s[c], dx[j][c]);
                }
        if (PLAIN || own) {
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                sums.bias[c] += s[c];
#pragma unroll
                for (int k = 0; k < TAPS; ++k) sums.weight[k][c] = fmaf(s[c], conv.window[k][c], sums.weight[k][c]);
            }
        }
    }

    // The group of steps from `step` on. `limit`: the step after the last that is read.
    template <bool PLAIN>
    DEVICE void group(Convolution& conv, int step, int limit) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i, ++step) {
            if (!PLAIN && step >= conv.end + REACH) return;
#pragma unroll
            for (int j = REACH; j >= 1; --j)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) dx[j][c] = dx[j - 1][c];
            if (PLAIN || step < limit) {
                float s[CHANNELS];
                conv.advance<PLAIN>(i);
                dy.rows[i].read(s);
                add<PLAIN>(conv, i, step < conv.end, s);
            } else {
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) dx[0][c] = 0.f;
            }
            if (PLAIN || step - REACH >= conv.begin) {
                put(reinterpret_cast<scalar_t*>(row), dx[REACH]);
            } else if (conv.begin == 0 && conv.p.dhistory != nullptr) {
                put(conv.history_row(conv.p.dhistory, step - REACH), dx[REACH]);
            }
            row += conv.p.dx.row_bytes;
        }
    }
};

// Adds what the block's warps found and stores it.
DEVICE void store_sums(const ConvParams& p, const Sums& found, char* shared) {
    float* parts = reinterpret_cast<float*>(shared);  // (WARPS, TILE_CHANNELS)
    const int first = blockIdx.x * TILE_CHANNELS;
    float* sums = p.sums + (offset_t(blockIdx.z) * gridDim.y + blockIdx.y) * (TAPS + 1) * p.channels + first;
#pragma unroll
    for (int k = 0; k <= TAPS; ++k, sums += p.channels) {
        __syncthreads();
        float* own = parts + threadIdx.x * CHANNELS;
        if (k < TAPS) {
            store<CHANNELS>(own, found.weight[k < TAPS ? k : 0]);
        } else {
            store<CHANNELS>(own, found.bias);
        }
        __syncthreads();
        for (int c = threadIdx.x; c < TILE_CHANNELS && first + c < p.channels; c += 32 * WARPS) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += parts[w * TILE_CHANNELS + c];
            sums[c] = sum;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) conv_backward(const __grid_constant__ ConvParams p) {
    extern __shared__ __align__(16) char shared[];
    const int begin = blockIdx.y * COVERED + (threadIdx.x >> 5) * CHUNK_STEPS, limit = min(p.length, begin + CHUNK_STEPS + REACH);
    Sums sums;
    clear(sums.weight);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) sums.bias[c] = 0.f;
    if (begin < p.length) {
        Convolution conv(p, limit);
        Gradients gradients(conv, sums, limit);
        for (int step = begin; step < conv.end + REACH; step += AHEAD, conv.starts.next_group()) {
            conv.x.advance(limit - step - AHEAD);
            gradients.dy.advance(limit - step - AHEAD);
            const bool edge = step < begin + REACH || step + AHEAD > conv.end;
            if (!edge && !conv.starts.within(AHEAD - 1, AHEAD + REACH - 1)) {
                gradients.group<true>(conv, step, limit);
            } else {
                gradients.group<false>(conv, step, limit);
            }
        }
    }
    store_sums(p, sums, shared);
}

extern "C" __device__ const int conv_backward_shared_bytes = WARPS * TILE_CHANNELS * sizeof(float);
