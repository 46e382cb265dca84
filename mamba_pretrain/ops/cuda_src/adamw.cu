// One step of AdamW (arXiv:1711.05101) on any number of tensors, gradients divided by a number on the way: 16 bytes read and 12 written an element,
// and 2 more where a parameter has a copy of low precision (SCALAR_TYPE) that matmuls use.
//
// A block updates CHUNK elements of one tensor. A thread asks for IN_FLIGHT vectors of each of the four tensors before it uses the first: the pass is
// limited by memory.
#include "common.cuh"

constexpr int THREADS = 256, VECTOR = 4, IN_FLIGHT = 2;
constexpr int CHUNK = 1 << 14;

struct AdamwTensor {
    float* parameter;
    const float* gradient;
    float *first, *second;  // moments
    scalar_t* copy;         // or null
    const float* step;      // how many there have been, this one included
    offset_t count;         // elements of each
};

struct AdamwParams {
    const AdamwTensor* tensors;
    const int* chunks;     // (blocks, 2): a block's tensor, and which of its chunks
    const float* divisor;  // of gradients
    float lr, decay;       // decay: learning rate times weight decay
    float beta1, fresh1, log_beta1, beta2, fresh2, log_beta2;  // fresh = 1 - beta
    float eps;
};

struct Update {
    const AdamwParams& p;
    const float scale, rate, root;

    // 1 - beta^step is exact to fp32 as expm1, however little is left of beta^step or of the difference.
    DEVICE Update(const AdamwParams& p, float step)
        : p(p), scale(1.f / *p.divisor), rate(p.lr / -expm1f(step * p.log_beta1)), root(1.f / sqrtf(-expm1f(step * p.log_beta2))) {}

    DEVICE void operator()(float& parameter, float gradient, float& first, float& second) const {
        gradient *= scale;
        first = fmaf(p.beta1, first, p.fresh1 * gradient);
        second = fmaf(p.beta2, second, p.fresh2 * gradient * gradient);
        parameter = fmaf(-p.decay, parameter, parameter);
        parameter = fmaf(-rate, first / fmaf(sqrtf(second), root, p.eps), parameter);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4) adamw(const __grid_constant__ AdamwParams p) {
    const AdamwTensor tensor = p.tensors[p.chunks[2 * blockIdx.x]];
    const offset_t begin = offset_t(p.chunks[2 * blockIdx.x + 1]) * CHUNK;
    const int count = int(tensor.count - begin < CHUNK ? tensor.count - begin : CHUNK);
    float *parameter = tensor.parameter + begin, *first = tensor.first + begin, *second = tensor.second + begin;
    const float* gradient = tensor.gradient + begin;
    scalar_t* copy = tensor.copy == nullptr ? nullptr : tensor.copy + begin;
    const Update update(p, *tensor.step);

    const auto addresses = reinterpret_cast<size_t>(parameter) | reinterpret_cast<size_t>(gradient) | reinterpret_cast<size_t>(first) |
                           reinterpret_cast<size_t>(second) | reinterpret_cast<size_t>(copy);
    const int vectors = addresses % 16 == 0 ? count / VECTOR : 0;
    for (int start = threadIdx.x; start < vectors; start += IN_FLIGHT * THREADS) {
        float x[IN_FLIGHT][VECTOR], g[IN_FLIGHT][VECTOR], m[IN_FLIGHT][VECTOR], v[IN_FLIGHT][VECTOR];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const int at = min(start + i * THREADS, vectors - 1) * VECTOR;
            load<VECTOR>(parameter + at, x[i]);
            load<VECTOR>(gradient + at, g[i]);
            load<VECTOR>(first + at, m[i]);
            load<VECTOR>(second + at, v[i]);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) update(x[i][j], g[i][j], m[i][j], v[i][j]);
            if (start + i * THREADS < vectors) {
                const int at = (start + i * THREADS) * VECTOR;
                store<VECTOR>(parameter + at, x[i]);
                store<VECTOR>(first + at, m[i]);
                store<VECTOR>(second + at, v[i]);
                if (copy != nullptr) store<VECTOR>(copy + at, x[i]);
            }
        }
    }
    for (int at = vectors * VECTOR + int(threadIdx.x); at < count; at += THREADS) {
        update(parameter[at], gradient[at], first[at], second[at]);
        if (copy != nullptr) copy[at] = from_float(parameter[at]);
    }
}
