// y_t = silu(bias + sum_k weight_k x_{t - TAPS + 1 + k}), or without silu.
#include "conv.cuh"

extern "C" __global__ void conv_forward(const __grid_constant__ ConvParams p) {
    Convolution conv(p);
    if (conv.channel >= p.channels) return;
    conv.enter();
#pragma unroll 4
    for (int step = conv.begin; step < conv.end; ++step) {
        float y[CHANNELS];
        conv.advance(step);
        conv.sum(y);
#if SILU
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) y[c] *= sigmoid(y[c]);
#endif
        store<CHANNELS>(p.y + (offset_t(conv.batch) * p.length + step) * p.channels + conv.channel, y);
    }
}
