// Sizes, shared memory and tiles of `mita_head_backward.cu`.
#pragma once
#include <mita_head_rows.cuh>

constexpr int TILES = NP / 16, WARPS = TILES, THREADS = 32 * WARPS;  // 16 tokens a warp
// tiles of queries whose logits' gradients are there at once, and how often
constexpr int PART = (TILES + PARTS - 1) / PARTS, ROUNDS = (TILES + PART - 1) / PART;
constexpr int ES = SHARED ? (M + 15) / 16 : 1;      // steps of 16 landmarks
constexpr int FLAGS = (M * K + THREADS - 1) / THREADS;  // members that a thread marks

// shared memory, in bytes: q, then
constexpr int KEYS = NP * ROW, VALUES = 2 * KEYS, GRADS = 3 * KEYS;
constexpr int MARKS = 4 * KEYS;                     // landmarks, a term after the other
constexpr int READ = MARKS + TERMS * TERM;          // V~, then the landmarks' gradients
constexpr int DREAD = READ + TERM;                  // gradients of V~
// gradients of routed logits, [keys, a part's queries]; before that [N, 32] each, of weights of
// landmarks, of gradients of their logits and of their scores. Rows begin 16 bytes off those before
// them, of an odd number of such: no two of 8 share banks.
constexpr int LOGITS = DREAD + TERM, LOGIT_ROW = 32 * PART + 16;
constexpr int WIDE = 80, WEIGHTS = LOGITS, DWEIGHTS = WEIGHTS + NP * WIDE, DSCORES = DWEIGHTS + NP * WIDE;
constexpr int LOGITS_END = NP * LOGIT_ROW, SHARED_END = 3 * NP * WIDE;
// float4 [N / 2]: log-sum-exp and gradient of the softmax's sum of two queries
constexpr int ROWS = LOGITS + (SHARED && SHARED_END > LOGITS_END ? SHARED_END : LOGITS_END);
constexpr int EXPERTS = ROWS + 8 * NP;              // of each query, as one bit
constexpr int HELD = EXPERTS + 4 * NP;              // experts that hold each key, as bits
constexpr int PROBE = HELD + 4 * NP;                // log-sum-exp of each landmark, base 2
constexpr int DPROBE = PROBE + 32 * 4;              // float4 [32]: gradient of its sum, in parts
constexpr int BYTES = DPROBE + 32 * 16;

struct Thread : Lane {
    int first;  // token of its warp

    __device__ explicit Thread(char* memory) : Lane(memory), first(16 * warp) {}
    __device__ float4* rows() const { return (float4*)(memory + ROWS); }
    __device__ u32* experts() const { return (u32*)(memory + EXPERTS); }
    __device__ u32* held() const { return (u32*)(memory + HELD); }
    __device__ float* probe() const { return (float*)(memory + PROBE); }
    __device__ float4* dprobe() const { return (float4*)(memory + DPROBE); }
};

// 16 rows as first operands of four steps
__device__ __forceinline__ void load_tile(const Thread& my, u32 (&a)[4][4], Place rows) {
#pragma unroll
    for (int s = 0; s < 4; s++) load4(a[s], chunk(rows, my.sub, my.side) ^ 32 * s);
}

// 16 x 16 of rows of `stride` bytes, transposed, as a first operand
__device__ __forceinline__ void load_turned(const Thread& my, u32 (&a)[4], Place rows, int stride) {
    load4t(a, rows + (8 * my.side + my.eighth) * stride + (my.sub >> 3) * 16);
}

// c [16, 8 tiles] += a [16, 64] x transposed rows [8 tiles, 64]
template <int tiles>
__device__ __forceinline__ void times_turned(
    const Thread& my, float (&c)[tiles][4], const u32 (&a)[4][4], Place rows) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 r[tiles][4];
#pragma unroll
        for (int j = 0; j < tiles; j++)
            load4(r[j], (chunk(rows, my.eighth, my.corner) ^ 64 * half) + 8 * j * ROW);
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int j = 0; j < tiles; j++)
                multiply(c[j], a[2 * half + s], r[j][2 * s], r[j][2 * s + 1]);
    }
}

// c [16, 64] += a [16, 16 steps] x rows [16 steps, 64]
template <int steps>
__device__ __forceinline__ void times(
    const Thread& my, float (&c)[8][4], const u32 (&a)[steps][4], Place rows) {
#pragma unroll
    for (int s = 0; s < steps; s++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 r[4];
            load4t(r, (chunk(rows, my.sub, my.side) ^ 32 * j) + 16 * s * ROW);
            multiply(c[2 * j], a[s], r[0], r[1]);
            multiply(c[2 * j + 1], a[s], r[2], r[3]);
        }
}

// two tiles of 16 x 8, as sums lie, as a first operand
__device__ __forceinline__ void operand(u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack(left[0], left[1]), a[1] = pack(left[2], left[3]);
    a[2] = pack(right[0], right[1]), a[3] = pack(right[2], right[3]);
}

// Begin to copy the warp's rows, zeros beyond N.
__device__ __forceinline__ void copy_tile(const Thread& my, int to, const u16* from, int stride) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        const int n = my.first + i + my.corner;
        const u16* row = from + (long long)min(n, N - 1) * stride + 8 * my.eighth;
        copy16(chunk(my.here + to, n, my.eighth), row, n < N);
    }
}

// Write the warp's rows, through its rows of shared memory, which nobody else reads.
__device__ __forceinline__ void write_tile(
    const Thread& my, const float (&c)[8][4], int through, u16* to, int stride) {
    const Place rows = my.here + through + my.first * ROW;
    __syncwarp();
#pragma unroll
    for (int s = 0; s < 4; s++) {
        u32 r[4];
        operand(r, c[2 * s], c[2 * s + 1]);
        store4(chunk(rows, my.sub, my.side) ^ 32 * s, r);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        const int n = my.first + i + my.corner;
        const uint4 row = get16(chunk(rows, i + my.corner, my.eighth));
        if (n < N) *(uint4*)(to + (long long)n * stride + 8 * my.eighth) = row;
    }
}
