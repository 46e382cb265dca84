// Runs a kernel on a CPU: every lane is a coroutine, and whatever joins lanes (barriers, shuffles) switches between
// them. Takes the place of cuda_src/ptx.cuh, so that the kernels' own source is what runs. Shared memory begins as NaN; an asynchronous
// copy arrives only when it is waited for.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "races.h"

#define DEVICE inline
#define __device__
#define __global__
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
using std::max;
using std::min;

template <class To, class From>
inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline float __uint_as_float(unsigned x) { return bits<float>(x); }
inline unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
inline float __int_as_float(int x) { return bits<float>(x); }
inline int __float_as_int(float x) { return bits<int>(x); }

struct Dim { int x = 1, y = 1, z = 1; };

// -- lanes as coroutines --------------------------------------------------------------------------------------------------

struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Dim index;
    bool done = false;
    int block_barriers = 0, warp_barriers = 0;
    std::vector<std::function<void()>> copies;
    std::vector<std::vector<std::function<void()>>> committed;
};

struct Machine {
    std::vector<Lane> lanes;
    std::vector<unsigned> mail;  // a word that each lane shows to its warp
    ucontext_t scheduler;
    int current = 0;
    std::function<void()> kernel;
};
inline Machine machine;
inline Dim blockIdx, blockDim, gridDim;
#define threadIdx (machine.lanes[machine.current].index)
alignas(128) char shared[1 << 20];

inline void yield() {
    const int self = machine.current;
    swapcontext(&machine.lanes[self].context, &machine.scheduler);
}

// Waits until every lane of [first, first + count) has come as often as this one.
template <int Lane::*Counter>
inline void barrier(int first, int count) {
    const int goal = ++(machine.lanes[machine.current].*Counter);
    for (;;) {
        bool all = true;
        for (int i = first; i < first + count; ++i) all &= machine.lanes[i].done || machine.lanes[i].*Counter >= goal;
        if (all) return;
        yield();
    }
}

inline void __syncthreads() {
    barrier<&Lane::block_barriers>(0, int(machine.lanes.size()));
    races::met(true);
}
inline void meet() { barrier<&Lane::warp_barriers>(machine.current & ~31, 32); }
inline void __syncwarp() {
    meet();
    races::met(false);
}

inline void run_block(int threads, long shared_bytes, const std::function<void()>& kernel) {
    constexpr int STACK = 1 << 17;
    std::memset(shared, 0xff, sizeof shared);
    machine.lanes.clear();
    machine.lanes.resize(threads);
    machine.mail.assign(threads, 0);
    machine.kernel = kernel;
    races::begin(shared, shared_bytes, threads);
    for (int i = 0; i < threads; ++i) {
        Lane& lane = machine.lanes[i];
        lane.stack = std::make_unique<char[]>(STACK);
        lane.index = {i, 0, 0};
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.get();
        lane.context.uc_stack.ss_size = STACK;
        lane.context.uc_link = &machine.scheduler;
        makecontext(&lane.context, +[] { machine.kernel(); machine.lanes[machine.current].done = true; }, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (machine.current = 0; machine.current < threads; ++machine.current) {
            if (machine.lanes[machine.current].done) continue;
            any = true;
            races::run(machine.current);
            swapcontext(&machine.scheduler, &machine.lanes[machine.current].context);
        }
    }
    races::end();
}

// -- what lanes of a warp show each other ---------------------------------------------------------------------------------

inline void show(unsigned word) { machine.mail[machine.current] = word; }
inline unsigned see(int lane) { return machine.mail[(machine.current & ~31) + lane]; }

template <class T>
inline T exchange_with(T value, int lane) {
    show(bits<unsigned>(value));
    meet();
    const T seen = bits<T>(see(lane));
    meet();
    return seen;
}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) { return exchange_with(value, (machine.current & 31) ^ mask); }
template <class T>
inline T __shfl_up_sync(unsigned, T value, int by) { return exchange_with(value, std::max((machine.current & 31) - by, 0)); }
inline unsigned __ballot_sync(unsigned, bool vote) {
    show(vote);
    meet();
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= (see(i) & 1u) << i;
    meet();
    return all;
}
template <class T, class Join>
inline T reduce(T value, Join join) {
    show(bits<unsigned>(value));
    meet();
    T all = bits<T>(see(0));
    for (int i = 1; i < 32; ++i) all = join(all, bits<T>(see(i)));
    meet();
    return all;
}
inline int __reduce_add_sync(unsigned, int value) { return reduce(value, std::plus<int>()); }
inline unsigned __reduce_or_sync(unsigned, unsigned value) { return reduce(value, std::bit_or<unsigned>()); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// -- the functions of cuda_src/ptx.cuh ------------------------------------------------------------------------------------

#if SCALAR_TYPE == 0
using scalar_t = float;
#else
using scalar_t = unsigned short;
#endif

inline float widen(unsigned short x) {
#if SCALAR_TYPE == 1
    return bits<float>(unsigned(x) << 16);
#else
    return float(bits<_Float16>(x));
#endif
}
inline unsigned short narrow(float x) {
#if SCALAR_TYPE == 1
    const unsigned word = bits<unsigned>(x);
    if (std::isnan(x)) return 0x7fff;
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
#else
    return bits<unsigned short>(_Float16(x));
#endif
}
inline void unpack(unsigned word, float& first, float& second) { first = widen(word & 0xffff), second = widen(word >> 16); }
inline unsigned pack(float first, float second) { return narrow(first) | unsigned(narrow(second)) << 16; }

inline float exp2_fast(float x) { return x < -126.f ? 0.f : std::exp2(x); }  // subnormal results are flushed
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }

template <int BYTES>
inline void copy_async(void* to, const void* from, bool inside = true) {
    if (reinterpret_cast<uintptr_t>(to) % BYTES || (inside && reinterpret_cast<uintptr_t>(from) % BYTES)) {
        std::fprintf(stderr, "misaligned copy of %d bytes\n", BYTES);
        std::abort();
    }
    races::see(to, BYTES, true, races::COPY_ISSUED);
    machine.lanes[machine.current].copies.push_back([=] {
        races::see(to, BYTES, true, races::COPY_ARRIVED);
        inside ? std::memcpy(to, from, BYTES) : std::memset(to, 0, BYTES);
    });
}
inline void commit_copies() {
    Lane& lane = machine.lanes[machine.current];
    lane.committed.push_back(std::move(lane.copies));
    lane.copies.clear();
}
template <int PENDING = 0>
inline void wait_copies() {
    auto& committed = machine.lanes[machine.current].committed;
    while (committed.size() > PENDING) {
        for (auto& copy : committed.front()) copy();
        committed.erase(committed.begin());
    }
}

template <int WORDS>
inline void store_if(bool yes, void* p, const unsigned (&w)[WORDS]) {
    if (yes && reinterpret_cast<uintptr_t>(p) % sizeof w) {
        std::fprintf(stderr, "misaligned store of %zu bytes\n", sizeof w);
        std::abort();
    }
    if (yes) std::memcpy(p, w, sizeof w);
}
