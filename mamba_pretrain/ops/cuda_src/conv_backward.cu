// Gradients of the convolution: s_t = dy_t silu'(sum_t), dx_t = sum_j weight_{TAPS-1-j} s_{t+j}, dweight_k = sum_t s_t x_{t-TAPS+1+k}.
//
// A strip's thread runs TAPS - 1 steps past its end for the rows whose later taps lie there, and recomputes the sums it needs. What a
// strip finds for weight and bias is added over strips afterwards, in a fixed order.
#include "conv.cuh"

extern "C" __global__ void conv_backward(const __grid_constant__ ConvParams p) {
    Convolution conv(p);
    if (conv.channel >= p.channels) return;
    conv.enter();
    float dx[TAPS][CHANNELS] = {}, dweight[TAPS][CHANNELS] = {}, dbias[CHANNELS] = {};  // dx[j]: of the row j steps back, so far
    int reach = conv.begin == 0 ? TAPS - 1 : 0;  // rows before the current one that its gradient flows to
#pragma unroll 4
    for (int step = conv.begin; step < conv.end + TAPS - 1; ++step) {
#pragma unroll
        for (int j = TAPS - 1; j >= 0; --j)
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) dx[j][c] = j > 0 ? dx[j > 0 ? j - 1 : 0][c] : 0.f;
        if (step < p.length) {
            if (conv.starts(step)) {
                reach = 0;
            } else if (step > conv.begin) {
                reach = min(reach + 1, TAPS - 1);
            }
            float s[CHANNELS];
            conv.advance(step);
            load<CHANNELS>(p.dy.at(conv.batch, step) + conv.channel, s);
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
                if (j <= reach)
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) dx[j][c] = fmaf(conv.weight[TAPS - 1 - j][c], s[c], dx[j][c]);
            if (step < conv.end) {
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    dbias[c] += s[c];
#pragma unroll
                    for (int k = 0; k < TAPS; ++k) dweight[k][c] = fmaf(s[c], conv.window[k][c], dweight[k][c]);
                }
            }
        }
        const int row = step - (TAPS - 1);
        if (row >= conv.begin) {
            store<CHANNELS>(p.dx + (offset_t(conv.batch) * p.length + row) * p.channels + conv.channel, dx[TAPS - 1]);
        } else if (row < 0 && p.dhistory != nullptr) {
            store<CHANNELS>(conv.history_row(p.dhistory, row), dx[TAPS - 1]);
        }
    }
    float* sums = p.sums + (offset_t(conv.batch) * gridDim.y + blockIdx.y) * (TAPS + 1) * p.channels + conv.channel;
#pragma unroll
    for (int k = 0; k < TAPS; ++k) store<CHANNELS>(sums + k * p.channels, dweight[k]);
    store<CHANNELS>(sums + TAPS * p.channels, dbias);
}
