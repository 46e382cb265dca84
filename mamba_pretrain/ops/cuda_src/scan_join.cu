// Chains what segments pass on (see scan_carry.cu) into what each of them receives: the state before it, or behind it in reverse.
#include "scan.cuh"

struct JoinParams {
    const float *A, *delta_sum, *carry;  // (channels, states), (batch, segments, channels), (batch, segments, channels, states)
    const float* outer;                  // (batch, channels, states) or null: enters the first segment (the last in reverse)
    float* received;                     // like carry
    int batch, channels, segments, reverse;
};

extern "C" __global__ void scan_join(const __grid_constant__ JoinParams p) {
    const offset_t states = offset_t(p.channels) * STATES, i = offset_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.batch * states) return;
    const offset_t batch = i / states, state = i % states, channel = state / STATES;
    const float rate = fminf(p.A[state] * LOG2E, LARGEST_A);
    float h = p.outer != nullptr ? p.outer[i] : 0.f;
    for (int k = 0; k < p.segments; ++k) {
        const offset_t segment = batch * p.segments + (p.reverse ? p.segments - 1 - k : k);
        p.received[segment * states + state] = h;
        h = fmaf(exp2_fast(rate * p.delta_sum[segment * p.channels + channel]), h, p.carry[segment * states + state]);
    }
}
