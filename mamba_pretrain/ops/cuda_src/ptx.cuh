// The instructions that CUDA C++ has no words for, one function each. The tests replace this file to run the kernels on a CPU.
#pragma once

#define DEVICE __device__ __forceinline__

#if SCALAR_TYPE == 0
using scalar_t = float;
#else
using scalar_t = unsigned short;
#endif

// -- two 16-bit numbers in a word -----------------------------------------------------------------------------------------

// The two 16-bit numbers in a word, the one at the lower address first.
DEVICE void unpack(unsigned word, float& first, float& second) {
#if SCALAR_TYPE == 1
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
#else
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(first), "=f"(second) : "r"(word));
#endif
}

DEVICE unsigned pack(float first, float second) {
    unsigned word;
#if SCALAR_TYPE == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
    return word;
}

// -- special functions, relative error about 2^-22 ------------------------------------------------------------------------

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// -- asynchronous copies from global to shared memory ---------------------------------------------------------------------

DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Copies 16, 8 or 4 bytes; or writes zeros and reads nothing.
template <int BYTES>
DEVICE void copy_async(void* shared, const void* global, bool inside = true) {
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(inside ? 16 : 0) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(inside ? BYTES : 0), "n"(BYTES) : "memory");
    }
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For all copies but those of the last PENDING commits.
template <int PENDING = 0>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// -- stores without a branch ----------------------------------------------------------------------------------------------

// Writes 1, 2 or 4 words if `yes`: a predicate, which leaves the code around it in one piece.
template <int WORDS>
DEVICE void store_if(bool yes, void* p, const unsigned (&w)[WORDS]) {
    if constexpr (WORDS == 1) {
        asm volatile("{.reg .pred q; setp.ne.u32 q, %0, 0; @q st.global.b32 [%1], %2;}" ::"r"(unsigned(yes)), "l"(p), "r"(w[0]) : "memory");
    } else if constexpr (WORDS == 2) {
        asm volatile("{.reg .pred q; setp.ne.u32 q, %0, 0; @q st.global.v2.b32 [%1], {%2, %3};}" ::"r"(unsigned(yes)), "l"(p), "r"(w[0]), "r"(w[1]) : "memory");
    } else {
        asm volatile("{.reg .pred q; setp.ne.u32 q, %0, 0; @q st.global.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"(unsigned(yes)), "l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                     : "memory");
    }
}
