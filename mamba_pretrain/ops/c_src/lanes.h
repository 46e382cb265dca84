// What the C kernels share: vectors of neighbouring channels, elementary functions on them, and tensors as Python describes them.
//
// A vector holds LANES channels of one step. Written with the vector extensions of gcc and clang, it becomes whatever instructions the
// machine has. Channels past the tensor's edge are zero when loaded and left alone when stored.

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16 };
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec8 __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

// A (batch, length, channels) tensor with adjacent channels; mirrors kernel_arguments.Rows.
struct rows {
    float* data;
    int64_t batch_stride;  // elements
    int32_t row_bytes;
};

INLINE float* at(const struct rows* rows, int64_t batch, int64_t step) {
    return (float*)((char*)(rows->data + batch * rows->batch_stride) + step * rows->row_bytes);
}

INLINE vec splat(float x) { return x - (vec){0}; }

// Compilers like to fetch an operand from memory at each of its uses instead; that doubles the loads of a matrix product.
#ifdef __AVX512F__
#define KEEP_IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define KEEP_IN_REGISTER(x) (void)(x)
#endif

INLINE vec load(const float* from, int64_t lanes) {
    vec x = {0};
    if (lanes >= LANES)
        memcpy(&x, from, sizeof x);
    else
        memcpy(&x, from, lanes * sizeof(float));
    return x;
}

INLINE void store(float* to, vec x, int64_t lanes) { memcpy(to, &x, (lanes >= LANES ? LANES : lanes) * sizeof(float)); }

// Lanes `stride` floats apart.
INLINE vec gather(const float* from, int64_t stride, int64_t lanes) {
    float x[LANES] = {0};
    for (int64_t i = 0; i < LANES && i < lanes; ++i) x[i] = from[i * stride];
    return load(x, LANES);
}

INLINE void scatter(float* to, int64_t stride, vec x, int64_t lanes) {
    for (int64_t i = 0; i < LANES && i < lanes; ++i) to[i * stride] = x[i];
}

INLINE float sum(vec x) {
    vec8 half[2];
    memcpy(half, &x, sizeof x);
    vec8 s = half[0] + half[1];
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

INLINE vec either(ivec condition, vec yes, vec no) { return (vec)((condition & (ivec)yes) | (~condition & (ivec)no)); }

// e^x within 2 units of the last place; 0 below -87, where results would leave the normal numbers, and e^88 above 88.
INLINE vec vexp(vec x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    ivec tiny = x < -87.0f;
    x = either(x > 88.0f, splat(88.0f), either(tiny, splat(-87.0f), x));
    vec n = (x * 1.44269504f + to_integer) - to_integer;
    vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
    vec p = splat(1.9875691e-4f);
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return either(tiny, splat(0.0f), p * (vec)power);
}

INLINE vec vsigmoid(vec x) { return 1.0f / (1.0f + vexp(-x)); }

// log(1 + e^x) with full relative precision on both sides.
INLINE vec vsoftplus(vec x) {
    vec e = vexp(either(x > 0.0f, -x, x));  // log1p(e) = 2 atanh(e / (2 + e))
    vec s = e / (e + 2.0f), q = s * s;
    vec p = splat(1.0f / 13);
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return 2.0f * s * p + either(x > 0.0f, x, splat(0.0f));
}

// Working memory of one call, aligned for vectors; freed by free().
INLINE vec* vectors(int64_t count) { return (vec*)aligned_alloc(4 * LANES, (size_t)count * sizeof(vec)); }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Runs function(arguments, first, last) over all tasks on so many threads. With OpenMP they are torch's own: other threads would compete with
// those, which wait for work without sleeping.
typedef void run_function(const void* arguments, int64_t first, int64_t last);

void run_tasks(run_function* function, const void* arguments, int64_t tasks, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t i = 0; i < threads; ++i) function(arguments, tasks * i / threads, tasks * (i + 1) / threads);
}

#ifdef _OPENMP
const int has_openmp = 1;
#else
const int has_openmp = 0;
#endif
