// What a warp does together, in PTX: copies into shared memory, tiles of 8 x 8 halves, their
// products. Needs compute capability 8.0. Tests replace this file by one that a C++ compiler takes.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define LANES 0xffffffffu
#define INFINITY __int_as_float(0x7f800000)
#define SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]

// where something lies in shared memory, which a block's begins in at a multiple of 128 bytes
typedef u32 Place;

__device__ __forceinline__ Place place(const void* shared) {
    return (Place)__cvta_generic_to_shared(shared);
}

// 16 bytes into shared memory while the program goes on; zeros unless ok
__device__ __forceinline__ void copy16(Place to, const void* from, bool ok) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(from), "r"(ok ? 16 : 0) : "memory");
}

// constants from memory, loaded where this stands
__device__ __forceinline__ u32 ask4(const u32* from) {
    u32 x;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

__device__ __forceinline__ uint4 ask16(const uint4* from) {
    uint4 x;
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"

                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}

__device__ __forceinline__ float2 ask8(const float2* from) {
    float2 x;
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from));
    return x;
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// ask the second cache for what lies there; nothing waits for it
__device__ __forceinline__ void expect(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// until all but the last `left` groups of copies are there, for this thread
template <int left>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// a second barrier, of `all` threads: some arrive and go on, others wait for all
template <int all>
__device__ __forceinline__ void arrive() {
    asm volatile("bar.arrive 1, %0;" ::"n"(all) : "memory");
}

template <int all>
__device__ __forceinline__ void await() {
    asm volatile("bar.sync 1, %0;" ::"n"(all) : "memory");
}

__device__ __forceinline__ void put(Place to, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

// set bits of a word that other threads set bits of
__device__ __forceinline__ void set_bits(u32* word, u32 bits) { atomicOr(word, bits); }

// one more in a word that other threads add to; what was there
__device__ __forceinline__ int one_more(int* word) { return atomicAdd(word, 1); }

// `flip`, here and below: of the place, so that no register holds each place that a loop needs
template <u32 flip = 0>
__device__ __forceinline__ uint4 get16(Place from) {
    uint4 x;
    asm volatile("{.reg .u32 at; xor.b32 at, %4, %5; ld.shared.v4.u32 {%0, %1, %2, %3}, [at];}"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from), "n"(flip) : "memory");
    return x;
}

// four tiles of 8 x 8 halves; lanes 8 i ... 8 i + 7 give the rows of tile i
template <u32 flip = 0>
__device__ __forceinline__ void load4(u32 (&r)[4], Place row) {
    asm volatile("{.reg .u32 at; xor.b32 at, %4, %5; "
                 "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [at];}"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row), "n"(flip) : "memory");
}

// the same, each tile transposed
template <u32 flip = 0>
__device__ __forceinline__ void load4t(u32 (&r)[4], Place row) {
    asm volatile("{.reg .u32 at; xor.b32 at, %4, %5; "
                 "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [at];}"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row), "n"(flip) : "memory");
}

// four tiles of 8 x 8 halves, as load4 reads them, into the rows that lanes give
__device__ __forceinline__ void store4(Place row, const u32 (&r)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#else
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 4; i++)
        put(__shfl_sync(LANES, row, 8 * i + lane / 4) + lane % 4 * 4, r[i]);
#endif
}

// c [16, 8] += a [16, 16] b [16, 8], float32 sums of products of halves
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// two floats rounded to halves, the first in the low bits
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 out;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#endif
    return out;
}

__device__ __forceinline__ float unpack(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
#endif
}

// a tile of 8 x 8 halves, transposed
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
    return out;
}

// the least, the most, the sum of what a warp's lanes have
__device__ __forceinline__ int least_of(int x) { return __reduce_min_sync(LANES, x); }
__device__ __forceinline__ int most_of(int x) { return __reduce_max_sync(LANES, x); }
__device__ __forceinline__ int total_of(int x) { return __reduce_add_sync(LANES, x); }

__device__ __forceinline__ float power_of_two(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

__device__ __forceinline__ float log_two(float x) {
    float out;
    asm("lg2.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

__device__ __forceinline__ float root(float x) {
    float out;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// 1 where x is at least `least`, else 0: one instruction
__device__ __forceinline__ float at_least(float x, float least) {
    float out;
    asm("set.ge.f32.f32 %0, %1, %2;" : "=f"(out) : "f"(x), "f"(least));
    return out;
}
