// Chains what segments pass on (see scan_carry.cu) into what each of them receives: the state before it, or behind it in reverse.
//
// Where a walk stopped early, its time steps are part of the segment's, and enough for a decay of exactly 0, by the same product.
#include "scan.cuh"

struct JoinParams {
    const float *A, *delta_sum, *carry;  // (channels, states), (batch, segments - 1, channels), (batch, segments - 1, channels, states)
    const float* outer;                  // (batch, channels, states) or null: enters the first segment (the last in reverse)
    float* received;                     // (batch, segments, channels, states)
    int batch, channels, segments, reverse;
};

extern "C" __global__ void scan_join(const __grid_constant__ JoinParams p) {
    const offset_t states = offset_t(p.channels) * STATES, i = offset_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.batch * states) return;
    const offset_t batch = i / states, state = i % states, channel = state / STATES;
    const float rate = resettable_rate(p.A[state]);
    const int links = p.segments - 1;
    float h = p.outer != nullptr ? p.outer[i] : 0.f;
    float* received = p.received + batch * p.segments * states + state;
    for (int k = 0; k < links; ++k) {
        const int link = p.reverse ? links - 1 - k : k;  // from segment `link` to the next, or back
        const offset_t row = batch * links + link;
        received[(link + p.reverse) * states] = h;
        h = fmaf(exp2_fast(rate * p.delta_sum[row * p.channels + channel]), h, p.carry[row * states + state]);
    }
    received[p.reverse ? 0 : links * states] = h;
}
