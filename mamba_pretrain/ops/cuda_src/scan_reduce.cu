// Ends the sums of the backward pass in a fixed order: dB and dC over blocks of channels, dA, dD and dbias over batch and segments.
#include "scan.cuh"

struct ReduceParams {
    const float* dBC;  // (batch, blocks, 2, length, states)
    scalar_t *dB, *dC;  // (batch, length, states)
    const float *dA_parts, *dD_parts, *dbias_parts;  // (rows, channels, states), (rows, channels), (rows, channels)
    float *dA, *dD, *dbias;
    int batch, blocks, length, rows, channels;
    int bc_grid;  // this many blocks sum dB and dC, the rest the others
};

DEVICE void sum_rows(const float* parts, float* sum, offset_t i, offset_t width, int rows) {
    float total = 0.f;
#pragma unroll 4
    for (int r = 0; r < rows; ++r) total += parts[r * width + i];
    sum[i] = total;
}

extern "C" __global__ void scan_reduce(const __grid_constant__ ReduceParams p) {
    if (blockIdx.x < p.bc_grid) {
        const offset_t matrix = offset_t(p.length) * STATES / 4, i = offset_t(blockIdx.x) * blockDim.x + threadIdx.x;
        if (i >= p.batch * 2 * matrix) return;
        const offset_t batch = i / (2 * matrix), which_and_at = i % (2 * matrix);
        const float4* part = reinterpret_cast<const float4*>(p.dBC) + batch * p.blocks * 2 * matrix + which_and_at;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int block = 0; block < p.blocks; ++block) {
            const float4 x = part[block * 2 * matrix];
            sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
        }
        store<4>((which_and_at < matrix ? p.dB : p.dC) + (batch * matrix + which_and_at % matrix) * 4, sum);
    } else {
        const offset_t states = offset_t(p.channels) * STATES;
        const offset_t i = offset_t(blockIdx.x - p.bc_grid) * blockDim.x + threadIdx.x;
        if (i < states) {
            sum_rows(p.dA_parts, p.dA, i, states, p.rows);
        } else if (i < states + p.channels) {
            sum_rows(p.dD_parts, p.dD, i - states, p.channels, p.rows);
        } else if (i < states + 2 * p.channels) {
            sum_rows(p.dbias_parts, p.dbias, i - states - p.channels, p.channels, p.rows);
        }
    }
}
