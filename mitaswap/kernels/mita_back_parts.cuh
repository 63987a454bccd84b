// Sizes, shared memory and tiles of `mita_head_backward.cu`.
#pragma once
#include <mita_head_rows.cuh>

constexpr int TILES = NP / 16;                      // of 16 tokens, OWN of them a warp's
constexpr int WARPS = (TILES + OWN - 1) / OWN, THREADS = 32 * WARPS;
// warps whose queries' logits have gradients there at once, their tiles, and how often
constexpr int AT_ONCE = (WARPS + PARTS - 1) / PARTS, ROUNDS = (WARPS + AT_ONCE - 1) / AT_ONCE;
constexpr int PART = OWN * AT_ONCE < TILES ? OWN * AT_ONCE : TILES;
constexpr int ES = SHARED ? (M + 15) / 16 : 1;      // steps of 16 landmarks
constexpr int EACH = (M * K + THREADS - 1) / THREADS;  // members that a thread marks

// shared memory, in bytes: q, then
constexpr int KEYS = NP * ROW, VALUES = 2 * KEYS, GRADS = 3 * KEYS;
constexpr int MARKS = 4 * KEYS;                     // landmarks, a term after the other
constexpr int READ = MARKS + TERMS * TERM;          // V~, then the landmarks' gradients
constexpr int DREAD = READ + TERM;                  // gradients of V~
// gradients of routed logits, [keys, a part's queries]; before that, [N, 32] each, weights of
// landmarks, gradients of their logits and of their scores. A row is an odd number of 16 bytes: no
// two of 8 neighbours share banks.
constexpr int LOGITS = DREAD + TERM, LOGIT_ROW = 32 * PART + 16;
constexpr int WIDE = 80;
constexpr int WEIGHTS = LOGITS, DWEIGHTS = WEIGHTS + NP * WIDE, DSCORES = DWEIGHTS + NP * WIDE;
constexpr int LOGITS_END = NP * LOGIT_ROW, SHARED_END = 3 * NP * WIDE;
// float4 [N / 2]: of two queries log-sum-exps (base 2), then their `delta`s in `scale`s
constexpr int ROWS = LOGITS + (SHARED && SHARED_END > LOGITS_END ? SHARED_END : LOGITS_END);
constexpr int EXPERTS = ROWS + 8 * NP;              // of each query, as one bit
constexpr int HELD = EXPERTS + 4 * NP;              // experts that hold each key, as bits
constexpr int PROBE = HELD + 4 * NP;                // log-sum-exp of each landmark, base 2
constexpr int DPROBE = PROBE + 32 * 4;              // float4 [32]: gradient of its sum, in parts
constexpr int BYTES = DPROBE + 32 * 16;

struct Thread : Lane {
    __device__ explicit Thread(char* memory) : Lane(memory) {}
    // first token of its warp's tiles; the last tile twice where there is but one
    __device__ int first(int own) const { return 16 * min(OWN * warp + own, TILES - 1); }
    __device__ bool twice(int own) const { return OWN * warp + own >= TILES; }
    __device__ float4* rows() const { return (float4*)(memory + ROWS); }
    __device__ u32* experts() const { return (u32*)(memory + EXPERTS); }
    __device__ u32* held() const { return (u32*)(memory + HELD); }
    __device__ float* probe() const { return (float*)(memory + PROBE); }
    __device__ float4* dprobe() const { return (float4*)(memory + DPROBE); }
};

// operands of the warp's tiles: 16 rows of D halves, in four steps
typedef u32 Rows[OWN][4][4];
// sums of the warp's tiles, [16, D]
typedef float Sums[OWN][8][4];

// the warp's tiles of rows as first operands
__device__ __forceinline__ void load_tiles(const Thread& my, Rows& a, Place rows) {
#pragma unroll
    for (int own = 0; own < OWN; own++)
#pragma unroll
        for (int s = 0; s < 4; s++)
            load4(a[own][s], (rows + my.first(own) * ROW + (chunk(0, my.sub, my.side) ^ 32 * s)));
}

// 16 x 16 of rows of `stride` bytes, transposed, as a first operand
__device__ __forceinline__ void load_turned(const Thread& my, u32 (&a)[4], Place rows, int stride) {
    load4t(a, rows + (8 * my.side + my.eighth) * stride + (my.sub >> 3) * 16);
}

// c [16, 8 tiles] += a [16, 64] x transposed rows [8 tiles, 64]
template <int tiles>
__device__ __forceinline__ void times_turned(
    const Thread& my, float (&c)[OWN][tiles][4], const Rows& a, Place rows) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 r[tiles][4];
#pragma unroll
        for (int j = 0; j < tiles; j++)
            load4(r[j], rows + (chunk(0, my.eighth, my.corner) ^ 64 * half) + 8 * j * ROW);
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int j = 0; j < tiles; j++)
#pragma unroll
                for (int own = 0; own < OWN; own++)
                    multiply(c[own][j], a[own][2 * half + s], r[j][2 * s], r[j][2 * s + 1]);
    }
}

// c [16, 64] += a [16, 16 steps] x rows [16 steps, 64]
template <int steps>
__device__ __forceinline__ void times(
    const Thread& my, Sums& c, const u32 (&a)[OWN][steps][4], Place rows) {
#pragma unroll
    for (int s = 0; s < steps; s++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 r[4];
            load4t(r, rows + (chunk(0, my.sub, my.side) ^ 32 * j) + 16 * s * ROW);
#pragma unroll
            for (int own = 0; own < OWN; own++) {
                multiply(c[own][2 * j], a[own][s], r[0], r[1]);
                multiply(c[own][2 * j + 1], a[own][s], r[2], r[3]);
            }
        }
}

// two tiles of 16 x 8, as sums lie, as a first operand
__device__ __forceinline__ void operand(
    u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack(left[0], left[1]), a[1] = pack(left[2], left[3]);
    a[2] = pack(right[0], right[1]), a[3] = pack(right[2], right[3]);
}

// Begin to copy the warp's rows, zeros beyond N. from: of the head.
__device__ __forceinline__ void copy_tiles(const Thread& my, int to, const u16* from, int stride) {
    const int n = my.first(0) + my.corner;
    const Place at = chunk(my.here + to, n, my.eighth);
    from += (long long)n * stride + 8 * my.eighth;
#pragma unroll
    for (int i = 0; i < 16 * OWN; i += 4, from += 4 * (long long)stride) {
        if (my.twice(i / 16)) break;
        copy16((at ^ 64 * (i / 4 % 2)) + i * ROW, from, n + i < N);
    }
}

// Write the warp's rows, through its rows of shared memory, which nobody else reads.
__device__ __forceinline__ void write_tiles(
    const Thread& my, const Sums& c, int through, u16* to, int stride) {
    const Place rows = my.here + through + my.first(0) * ROW;
    __syncwarp();
#pragma unroll
    for (int own = 0; own < OWN; own++)
#pragma unroll
        for (int s = 0; s < 4 && !my.twice(own); s++) {
            u32 r[4];
            operand(r, c[own][2 * s], c[own][2 * s + 1]);
            store4(rows + 16 * own * ROW + (chunk(0, my.sub, my.side) ^ 32 * s), r);
        }
    __syncwarp();
    const int n = my.first(0) + my.corner;
    const Place from = chunk(rows, my.corner, my.eighth);
    to += (long long)n * stride + 8 * my.eighth;
#pragma unroll
    for (int i = 0; i < 16 * OWN; i += 4, to += 4 * (long long)stride) {
        if (my.twice(i / 16)) break;
        const uint4 row = get16((from ^ 64 * (i / 4 % 2)) + i * ROW);
        if (n + i < N) *(uint4*)to = row;
    }
}
