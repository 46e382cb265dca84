// Cross-entropy of rows of logits, and softmax - onehot written over them. A block walks over rows. A row lies in shared memory from its
// arrival until its gradient is stored, while the next one is on its way: it is read from memory once.
//
//   COLUMNS   numbers a row, whole 16-byte vectors
//   WARPS     warps a block
//   GRADIENT  1 if the gradient is written
#include "common.cuh"

constexpr int THREADS = 32 * WARPS, VECTOR = 16 / sizeof(scalar_t), VECTORS = COLUMNS / VECTOR;
constexpr int ROUNDS = (VECTORS + THREADS - 1) / THREADS, ROW_BYTES = VECTORS * 16;

struct SoftmaxParams {
    scalar_t* logits;
    const long long* targets;
    float* losses;
    offset_t stride;  // elements from row to row
    long long ignore_index;
    int rows, valid;  // columns from `valid` on take no part
};

// The vectors of a row that a thread copies, and that it alone reads: its own wait is all that they need.
template <class Function>
DEVICE void own_vectors(Function function) {
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int v = threadIdx.x + i * THREADS;
        if (VECTORS % THREADS == 0 || i < ROUNDS - 1 || v < VECTORS) function(v);
    }
}

DEVICE void fetch(char* row, const SoftmaxParams& p, int number) {
    if (number < p.rows) {
        const char* from = reinterpret_cast<const char*>(p.logits + number * p.stride);
        own_vectors([&](int v) { copy_async<16>(row + v * 16, from + v * 16); });
    }
    commit_copies();
}

DEVICE void read_vector(const char* row, int v, float (&x)[VECTOR]) {
    const float4 q = *reinterpret_cast<const float4*>(row + v * 16);
#if SCALAR_TYPE == 0
    x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
#else
    unpack(__float_as_uint(q.x), x[0], x[1]);
    unpack(__float_as_uint(q.y), x[2], x[3]);
    unpack(__float_as_uint(q.z), x[4], x[5]);
    unpack(__float_as_uint(q.w), x[6], x[7]);
#endif
}

DEVICE void write_vector(char* row, int v, const float (&x)[VECTOR]) {
    unsigned w[4];
    to_words(x, w);
    *reinterpret_cast<float4*>(row + v * 16) =
        make_float4(__uint_as_float(w[0]), __uint_as_float(w[1]), __uint_as_float(w[2]), __uint_as_float(w[3]));
}

// The numbers of a vector from column `valid` on become `value`.
DEVICE void fill_padding(float (&x)[VECTOR], int v, int valid, float value) {
    const int inside = valid - v * VECTOR;
    if (inside >= VECTOR) return;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) x[j] = j < inside ? x[j] : value;
}

DEVICE float nothing() { return __uint_as_float(0xff800000u); }  // -inf

// The largest of some numbers x, and the sum of 2^((x - largest) log2 e).
struct Sum {
    float largest, total;
};

// Nothing is subtracted where there is nothing but -inf: the difference would be NaN.
DEVICE float exponent(float largest) { return largest == nothing() ? 0.f : largest * LOG2E; }

DEVICE Sum joined(const Sum& a, const Sum& b) {
    const float largest = fmaxf(a.largest, b.largest), by = exponent(largest);
    return {largest, a.total * exp2_fast(a.largest * LOG2E - by) + b.total * exp2_fast(b.largest * LOG2E - by)};
}

// Every lane gets that of its warp.
DEVICE Sum of_warp(Sum sum) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
        const Sum other = {__shfl_xor_sync(FULL_WARP, sum.largest, mask), __shfl_xor_sync(FULL_WARP, sum.total, mask)};
        sum = joined(sum, other);
    }
    return sum;
}

// Padding has no probability: it becomes -inf where it lies in shared memory.
DEVICE void hide_padding(char* row, int valid) {
    if (valid >= COLUMNS) return;
    own_vectors([&](int v) {
        if ((v + 1) * VECTOR <= valid) return;
        float x[VECTOR];
        read_vector(row, v, x);
        fill_padding(x, v, valid, nothing());
        write_vector(row, v, x);
    });
}

DEVICE Sum of_own(const char* row) {
    Sum sum = {nothing(), 0.f};
    own_vectors([&](int v) {
        float x[VECTOR];
        read_vector(row, v, x);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum.largest = fmaxf(sum.largest, x[j]);
    });
    const float by = exponent(sum.largest);
    own_vectors([&](int v) {
        float x[VECTOR];
        read_vector(row, v, x);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum.total += exp2_fast(fmaf(x[j], LOG2E, -by));
    });
    return sum;
}

// A row that does not count has no `valid` columns.
DEVICE void write_gradient(char* to, const char* row, float log2_total, int target, int valid) {
    own_vectors([&](int v) {
        float x[VECTOR];
        read_vector(row, v, x);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) x[j] = exp2_fast(fmaf(x[j], LOG2E, -log2_total));
        const int place = target - v * VECTOR;
        if (unsigned(place) < unsigned(VECTOR)) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) x[j] -= j == place ? 1.f : 0.f;
        }
        fill_padding(x, v, valid, 0.f);
        write_vector(to, v, x);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) softmax_gradient(const __grid_constant__ SoftmaxParams p) {
    extern __shared__ __align__(16) char shared[];
    Sum* of_warps = reinterpret_cast<Sum*>(shared + 2 * ROW_BYTES);  // (2, WARPS): one barrier a row is enough, as rows take turns
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    fetch(shared, p, blockIdx.x);
    long long target = p.targets[blockIdx.x];  // there are at most as many blocks as rows
    int turn = 0;
    for (int number = blockIdx.x; number < p.rows; number += gridDim.x, turn ^= 1) {
        char* row = shared + turn * ROW_BYTES;
        scalar_t* logits = p.logits + number * p.stride;
        const int following = number + gridDim.x;
        fetch(shared + (turn ^ 1) * ROW_BYTES, p, following);
        const bool counts = target != p.ignore_index;
        // Read before the barrier: behind it other warps write over it.
        const float at_target = threadIdx.x == 0 && counts ? to_float(logits[target]) : 0.f;
        const long long target_of_following = following < p.rows ? p.targets[following] : p.ignore_index;
        wait_copies<1>();
        hide_padding(row, p.valid);
        const Sum mine = of_warp(of_own(row));
        if (lane == 0) of_warps[turn * WARPS + warp] = mine;
        __syncthreads();
        const Sum sum = of_warp(lane < WARPS ? of_warps[turn * WARPS + lane] : Sum{nothing(), 0.f});
        const float log2_total = fmaf(sum.largest, LOG2E, log2_fast(sum.total));
        if (threadIdx.x == 0) p.losses[number] = counts ? log2_total * LN2 - at_target : 0.f;
        if (GRADIENT) write_gradient(reinterpret_cast<char*>(logits), row, log2_total, int(target), counts ? p.valid : 0);
        target = target_of_following;
    }
}

extern "C" __device__ const int softmax_gradient_shared_bytes = 2 * ROW_BYTES + 2 * WARPS * sizeof(Sum);
