// y_t = silu(bias + sum_k weight_k x_{t - TAPS + 1 + k}), or without silu.
#include "conv.cuh"

// The group of steps from `step` on.
template <bool PLAIN>
DEVICE void forward_group(Convolution& conv, int step, scalar_t*& row) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        if (!PLAIN && step + i >= conv.end) return;
        float y[CHANNELS];
        conv.advance<PLAIN>(i);
        conv.sum(y);
#if SILU
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) y[c] *= sigmoid(y[c]);
#endif
        put(row, y);
        row += conv.p.channels;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) conv_forward(const __grid_constant__ ConvParams p) {
    const int begin = blockIdx.y * COVERED + (threadIdx.x >> 5) * CHUNK_STEPS;
    if (begin >= p.length) return;  // the whole warp
    Convolution conv(p, min(p.length, begin + CHUNK_STEPS));
    scalar_t* row = p.y + (offset_t(conv.batch) * p.length + begin) * p.channels + conv.channel;
    for (int step = begin; step < conv.end; step += AHEAD, conv.starts.next_group()) {
        conv.x.advance(conv.end - step - AHEAD);
        if (step + AHEAD <= conv.end && !conv.starts.within(AHEAD - 1, AHEAD)) {
            forward_group<true>(conv, step, row);
        } else {
            forward_group<false>(conv, step, row);
        }
    }
}
