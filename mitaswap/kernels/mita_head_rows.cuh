// Rows of a head in shared memory, tiles of them, windows: what `mita_head.cu`, `mita_stream.cu` and
// `mita_head_backward.cu` share.
#pragma once
#include <warp.cuh>

constexpr int N = TOKENS, NP = (N + 15) / 16 * 16;  // rows that exist are NP
constexpr int D = 64, ROW = 2 * D;                  // bytes of a row
constexpr int TERMS = BF16 ? 3 : 2;                 // of a landmark: `split` in mita_parts.py
constexpr int TERM = 32 * ROW;                      // landmarks, a term after the other
constexpr u32 ONE = BF16 ? 0x3f80 : 0x3c00, ONES = ONE * 0x10001;  // a half, two
constexpr float LOG2E = 1.4426950408889634f;

// What a thread is and where its block's memory lies.
struct Lane {
    char* memory;
    Place here;
    int thread, lane, warp;
    int g, t;             // row and pair of columns that it holds of a tile of 8
    int sub, side;        // row and chunk that it loads of 16 rows
    int eighth, corner;   // and of 8 rows
    long long head;

    __device__ explicit Lane(char* memory) : memory(memory), here(place(memory)) {
        thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
        g = lane >> 2, t = lane & 3;
        sub = lane & 15, side = lane >> 4;
        eighth = lane & 7, corner = lane >> 3;
        head = blockIdx.x;
    }
};

// Chunk c, of 16 bytes, of a row of D halves: where no two of 8 neighbouring rows share banks.
// Chunk c ^ d lies at the place ^ 16 d.
__device__ __forceinline__ Place chunk(Place rows, int row, int c) {
    return rows + row * ROW + ((c ^ (row & 7)) << 4);
}

template <int lanes>
__device__ __forceinline__ float peak_of(float x) {
#pragma unroll
    for (int i = lanes / 2; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(LANES, x, i));
    return x;
}

template <int lanes, class T>
__device__ __forceinline__ T sum_of(T x) {
#pragma unroll
    for (int i = lanes / 2; i; i >>= 1) x += __shfl_xor_sync(LANES, x, i);
    return x;
}

// sum over the lanes before this one, of each `lanes` neighbours
template <int lanes>
__device__ __forceinline__ int sum_before(int x, int lane) {
    int sum = x;
#pragma unroll
    for (int i = 1; i < lanes; i <<= 1) {
        const int other = __shfl_up_sync(LANES, sum, i);
        sum += (lane & (lanes - 1)) >= i ? other : 0;
    }
    return sum - x;
}

// int32 keys in the order of floats; -0.0 is 0.0
__device__ __forceinline__ int order_key(float x) {
    const int bits = __float_as_int(x == 0.f ? 0.f : x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float key_value(int key) {
    return __int_as_float(key ^ ((key >> 31) & 0x7fffffff));
}

// Write two elements of a landmark as terms of halves, each `apart` bytes from the one before; the
// first ones.
template <int apart = TERM>
__device__ __forceinline__ u32 put_terms(Place to, float x, float y) {
    u32 first = 0;
#pragma unroll
    for (int term = 0; term < TERMS; term++) {
        const u32 low = pack(x, y);
        put(to + term * apart, low);
        if (term == 0) first = low;
        x = (x - unpack((u16)low)) * (BF16 ? 1.f : 2048.f);
        y = (y - unpack((u16)(low >> 16))) * (BF16 ? 1.f : 2048.f);
    }
    return first;
}

// The landmarks' windows, which span rows floor(i h / A) to ceil((i + 1) h / A), as in adaptive
// pooling: those that each token lies in, as bits, and the number of tokens of each.
struct Inside {
    u32 of[NP];
    int tokens[32];
};

__device__ constexpr Inside inside_windows() {
    Inside out = {};
    for (int e = 0; e < M; e++) {
        int top = e / B * HEIGHT / A, bottom = ((e / B + 1) * HEIGHT + A - 1) / A;
        int left = e % B * WIDTH / B, right = ((e % B + 1) * WIDTH + B - 1) / B;
        for (int y = top; y < bottom; y++)
            for (int x = left; x < right; x++) out.of[FIRST + y * WIDTH + x] |= 1u << e;
        out.tokens[e] = (bottom - top) * (right - left);
    }
    return out;
}
