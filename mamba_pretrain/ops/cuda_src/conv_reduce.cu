// Adds over blocks what conv_backward found for weight and bias, in a fixed order. A lane owns one of the results, a warp every WARPS-th
// part of it; the first warp adds up the warps.
#include "common.cuh"

constexpr int WARPS_A_BLOCK = 8;

struct ConvReduceParams {
    const float* sums;      // (parts, taps + 1, channels)
    float *dweight, *dbias;  // (channels, taps), (channels)
    int parts, channels;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS_A_BLOCK) conv_reduce(const __grid_constant__ ConvReduceParams p) {
    extern __shared__ __align__(16) char shared[];
    float* found = reinterpret_cast<float*>(shared);  // (warps, 32)
    const int results = (TAPS + 1) * p.channels, result = blockIdx.x * 32 + (threadIdx.x & 31), warp = threadIdx.x >> 5;
    float sum = 0.f;
    if (result < results) {
#pragma unroll 8
        for (int part = warp; part < p.parts; part += WARPS_A_BLOCK) sum += p.sums[offset_t(part) * results + result];
    }
    found[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || result >= results) return;
#pragma unroll
    for (int w = 1; w < WARPS_A_BLOCK; ++w) sum += found[w * 32 + threadIdx.x];
    const int tap = result / p.channels, channel = result % p.channels;
    if (tap < TAPS) {
        p.dweight[offset_t(channel) * TAPS + tap] = sum;
    } else {
        p.dbias[channel] = sum;
    }
}

extern "C" __device__ const int conv_reduce_shared_bytes = 32 * WARPS_A_BLOCK * sizeof(float);
