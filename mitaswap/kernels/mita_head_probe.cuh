// Landmarks, their scores of all keys, and the nearest landmark of each query.
#pragma once
#include <mita_head_parts.cuh>

// Operands of a product that sums windows of tokens: 2.0 (bit 14 of a half) where a token lies in a
// window, for 2 x 16 windows and NP / 16 x 16 tokens as each lane holds them. Windows span rows
// floor(i h / A) to ceil((i + 1) h / A), as in adaptive pooling.
struct Windows {
    alignas(16) u32 twos[2][NP / 16][32][4];  // read 16 bytes at a time
    float half_share[32];  // 1 / (2 tokens)
};

__device__ constexpr Windows make_windows() {
    Windows out = {};
    u32 of[NP] = {};
    for (int e = 0; e < M; e++) {
        int top = e / B * HEIGHT / A, bottom = ((e / B + 1) * HEIGHT + A - 1) / A;
        int left = e % B * WIDTH / B, right = ((e % B + 1) * WIDTH + B - 1) / B;
        for (int y = top; y < bottom; y++)
            for (int x = left; x < right; x++) of[FIRST + y * WIDTH + x] |= 1u << e;
        out.half_share[e] = 0.5f / ((bottom - top) * (right - left));
    }
    for (int i = 0; i < 2 * (NP / 16) * 32 * 4; i++) {
        int mt = i / 128 / (NP / 16), s = i / 128 % (NP / 16), lane = i / 4 % 32, r = i % 4;
        int e = 16 * mt + lane / 4 + r % 2 * 8, n = 16 * s + lane % 4 * 2 + r / 2 * 8;
        out.twos[mt][s][lane][r] = (of[n] >> e & 1) << 14 | (of[n + 1] >> e & 1) << 30;
    }
    return out;
}

static __device__ constexpr Windows windows = make_windows();

// Begin to copy N rows into shared memory, zeros after them.
__device__ __forceinline__ void copy_rows(const Thread& my, int to, const u16* from, int stride) {
    const int row = my.thread >> 3, c = my.thread & 7;
    const Place at = chunk(my.here + to, row, c);
    from += (long long)row * stride + c * 8;
#pragma unroll
    for (int i = 0; i < NP; i += THREADS / 8, from += (long long)stride * (THREADS / 8))
        if (row + i < NP) copy16(at + i * ROW, from, row + i < N);
    commit();
}

// Landmarks, as terms of halves: the windows' indicators times q.
__device__ __forceinline__ void pool(const Thread& my, u16* marks, float* exact) {
    const int g = my.g, t = my.t;
    if (16 * my.mt >= M) {  // no landmarks: zeros, lest they are multiplied as anything
        wait<2>();
        __syncthreads();
#pragma unroll
        for (int term = 0; term < TERMS; term++)
            clear(chunk(my.here + MARKS + term * TERM, 16 + my.sub, 2 * my.pair + my.side));
        return;
    }
    float c[2][2][4] = {};  // sums over every other 16 tokens
    uint4 twos[NP / 16];
#pragma unroll
    for (int s = 0; s < NP / 16; s++) twos[s] = *(const uint4*)windows.twos[my.mt][s][my.lane];
    wait<2>();
    __syncthreads();
#pragma unroll
    for (int s = 0; s < NP / 16; s++) {
        u32 r[4], a[4] = {twos[s].x, twos[s].y, twos[s].z, twos[s].w};
        load4t(r, chunk(my.here, my.sub, 2 * my.pair + my.side) + 16 * s * ROW);
        multiply(c[s % 2][0], a, r[0], r[1]);
        multiply(c[s % 2][1], a, r[2], r[3]);
    }
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int e = 16 * my.mt + g + 8 * upper, l = 2 * upper;
        const float share = windows.half_share[e];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float x = (c[0][j][l] + c[1][j][l]) * share;
            float y = (c[0][j][l + 1] + c[1][j][l + 1]) * share;
            const long long at = (my.head * M + e) * D + 16 * my.pair + 8 * j + 2 * t;
            if (SAVE && e < M) *(float2*)(exact + at) = make_float2(x, y);
            const Place to = chunk(my.here + MARKS, e, 2 * my.pair + j) + 4 * t;
#pragma unroll
            for (int term = 0; term < TERMS; term++) {
                const u32 low = pack(x, y);
                put(to + term * TERM, low);
                if (SAVE && term == 0 && e < M) *(u32*)(marks + at) = low;
                x = (x - unpack((u16)low)) * (BF16 ? 1.f : 2048.f);
                y = (y - unpack((u16)(low >> 16))) * (BF16 ? 1.f : 2048.f);
            }
        }
    }
}

// Landmark scores of all keys, unscaled.
__device__ __forceinline__ void score(const Thread& my) {
    if (16 * my.mt >= M) return;
    u32 a[TERMS][4][4];
#pragma unroll
    for (int term = 0; term < TERMS; term++)
#pragma unroll
        for (int s = 0; s < 4; s++)
            load4(a[term][s],
                  chunk(my.here + MARKS + term * TERM, 16 * my.mt + my.sub, my.side) ^ 32 * s);
#pragma unroll
    for (int i = 0; i < (NP / 8 + 3) / 4; i++) {
        const int j = min(my.pair + 4 * i, NP / 8 - 1);
        const Place keys = chunk(my.here + KEYS, my.eighth, my.corner) + 8 * j * ROW;
        u32 r[2][4];
        float c[4] = {}, low[4] = {};
        load4(r[0], keys);
        load4(r[1], keys ^ 64);
#pragma unroll
        for (int term = TERMS - 1; term >= 0; term--)
#pragma unroll
            for (int s = 0; s < 4; s++)
                multiply(term ? low : c, a[term][s], r[s / 2][s % 2 * 2], r[s / 2][s % 2 * 2 + 1]);
#pragma unroll
        for (int l = 0; l < 4; l++) c[l] += low[l] * (BF16 ? 1.f : 1.f / 2048.f);
        if (my.pair + 4 * i >= NP / 8) break;  // another warp's
        const int e = 16 * my.mt + my.g;
        float* to = my.scores(e) + 8 * j + 2 * my.t;
        if (e < M) *(float2*)to = make_float2(c[0], c[1]);
        if (e + 8 < M) *(float2*)(to + 8 * NS) = make_float2(c[2], c[3]);
    }
}

// Of each query the nearest landmark, of equals the first.
__device__ __forceinline__ void choose_experts(const Thread& my, int* route) {
    for (int i = my.warp; i < NP / 16; i += WARPS) {
        u32 a[4][4];
        float c[MT][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++)
            load4(a[s], (chunk(my.here, my.sub, my.side) ^ 32 * s) + 16 * i * ROW);
#pragma unroll
        for (int term = TERMS - 1; term >= 0; term--)
#pragma unroll
            for (int j = 0; j < MT; j++) {
                u32 r[2][4];
                const Place rows =
                    chunk(my.here + MARKS + term * TERM, 8 * j + my.eighth, my.corner);
                load4(r[0], rows);
                load4(r[1], rows ^ 64);
#pragma unroll
                for (int s = 0; s < 4; s++)
                    multiply(c[j], a[s], r[s / 2][s % 2 * 2], r[s / 2][s % 2 * 2 + 1]);
                if (!BF16 && term)
#pragma unroll
                    for (int l = 0; l < 4; l++) c[j][l] *= 1.f / 2048.f;
            }
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            float best = -INFINITY;
            int expert = 0;
#pragma unroll
            for (int j = 0; j < MT; j++)
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    const int e = 8 * j + 2 * my.t + l;
                    const float x = c[j][2 * upper + l];
                    if (x > best && (8 * j + 8 <= M || e < M)) best = x, expert = e;
                }
#pragma unroll
            for (int l = 1; l < 4; l <<= 1) {
                const float other = __shfl_xor_sync(LANES, best, l);
                const int its = __shfl_xor_sync(LANES, expert, l);
                if (other > best || (other == best && its < expert)) best = other, expert = its;
            }
            const int n = 16 * i + my.g + 8 * upper;
            if (my.t == 0) {
                my.routes()[n] = (u8)expert;
                if (SAVE && n < N) route[my.head * N + n] = expert;
            }
        }
    }
}
