// Depthwise causal convolution over time, shared by its two passes.
//
// A thread follows CHANNELS adjacent channels through a strip of STRIP steps, with the rows that its taps reach in registers. Where a
// document begins these rows are cleared, so that no tap reaches across.
//
// Specialised by the macros TAPS, CHANNELS (4 if rows allow such vectors, else 1), HAS_SEQ (documents) and SILU.
#pragma once
#include "common.cuh"

constexpr int STRIP = 64;

struct ConvParams {
    Rows x, dy;
    const float *weight, *bias;  // (taps, channels), (channels) or null
    const int* seq_idx;
    const scalar_t* history;  // (batch, taps - 1, channels) or null: the rows before step 0
    scalar_t *y, *dx;         // (batch, length, channels)
    scalar_t* dhistory;
    float* sums;  // (batch, strips, taps + 1, channels): gradients of weight and bias from each strip
    int length, channels;
};

struct Convolution {
    const ConvParams& p;
    const int batch, channel, begin, end;
    float weight[TAPS][CHANNELS], bias[CHANNELS], window[TAPS][CHANNELS];  // window: the row of the current step last

    DEVICE Convolution(const ConvParams& params)
        : p(params),
          batch(blockIdx.z),
          channel((blockIdx.x * blockDim.x + threadIdx.x) * CHANNELS),
          begin(blockIdx.y * STRIP),
          end(min(params.length, int(blockIdx.y + 1) * STRIP)) {}

    DEVICE bool starts(int step) const {
#if HAS_SEQ
        const int* row = p.seq_idx + offset_t(batch) * p.length;
        return step >= 1 && row[step] != row[step - 1];
#else
        return false;
#endif
    }

    DEVICE scalar_t* history_row(scalar_t* rows, int step) const {
        return rows + (offset_t(batch) * (TAPS - 1) + step + TAPS - 1) * p.channels + channel;
    }

    // Moves on to a step, which may lie before 0.
    DEVICE void advance(int step) {
        const bool start = starts(step);
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k)
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) window[k][c] = start ? 0.f : window[k + 1][c];
        if (step >= 0) {
            load<CHANNELS>(p.x.at(batch, step) + channel, window[TAPS - 1]);
        } else if (p.history != nullptr) {
            load<CHANNELS>(history_row(const_cast<scalar_t*>(p.history), step), window[TAPS - 1]);
        }
    }

    // Loads the parameters, and the rows before the strip.
    DEVICE void enter() {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            bias[c] = p.bias != nullptr ? p.bias[channel + c] : 0.f;
#pragma unroll
            for (int k = 0; k < TAPS; ++k) {
                weight[k][c] = p.weight[k * p.channels + channel + c];
                window[k][c] = 0.f;
            }
        }
#pragma unroll
        for (int before = TAPS - 1; before >= 1; --before) advance(begin - before);
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
