// Landmarks, their scores of all keys, and the nearest landmark of each query.
#pragma once
#include <mita_head_parts.cuh>

// Which tokens lie in which windows, for 2 x 16 windows and NP / 16 x 16 tokens as lanes hold them as
// the first operand of a product: bit i and bit 16 + i of a word are the two halves of the operand's
// register 16 * word + i.
struct Windows {
    uint4 bits[2][32];
    float2 half_share[2][32];  // 1 / (2 tokens) of the windows of rows g and g + 8
};

__device__ constexpr Windows make_windows() {
    Windows out = {};
    const Inside inside = inside_windows();
    for (int e = 0; e < M; e++)
        for (int t = 0; t < 4; t++) {
            float2& shares = out.half_share[e / 16][e % 8 * 4 + t];
            (e / 8 % 2 ? shares.y : shares.x) = 0.5f / inside.tokens[e];
        }
    for (int i = 0; i < 2 * 32 * (NP / 4); i++) {
        int mt = i / (32 * (NP / 4)), lane = i / (NP / 4) % 32, s = i % (NP / 4) / 4, r = i % 4;
        int e = 16 * mt + lane / 4 + r % 2 * 8, n = 16 * s + lane % 4 * 2 + r / 2 * 8;
        u32 bits = ((inside.of[n] >> e & 1) | (inside.of[n + 1] >> e & 1) << 16) << (4 * s + r) % 16;
        uint4& words = out.bits[mt][lane];
        (s / 4 == 0 ? words.x : s / 4 == 1 ? words.y : s / 4 == 2 ? words.z : words.w) |= bits;
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
__device__ __forceinline__ void pool(
    const Thread& my, const uint4& bits, const float2& half_share, u16* marks, float* exact) {
    const int g = my.g, t = my.t;
    wait<2>();
    __syncthreads();  // q
    if (16 * my.mt >= M) return;
    float c[2][2][4] = {};  // sums over every other 16 tokens
#pragma unroll
    for (int s = 0; s < NP / 16; s++) {
        u32 r[4], a[4];
        const u32 word = s / 4 == 0 ? bits.x : s / 4 == 1 ? bits.y : s / 4 == 2 ? bits.z : bits.w;
#pragma unroll
        for (int l = 0; l < 4; l++) {  // 2.0 is bit 14 of a half
            const int i = 4 * (s % 4) + l;
            a[l] = (i > 14 ? word >> 1 : word << (14 - i)) & 0x40004000;
        }
        load4t(r, chunk(my.here, my.sub, 2 * my.pair + my.side) + 16 * s * ROW);
        multiply(c[s % 2][0], a, r[0], r[1]);
        multiply(c[s % 2][1], a, r[2], r[3]);
    }
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int e = 16 * my.mt + g + 8 * upper, l = 2 * upper;
        const float share = upper ? half_share.y : half_share.x;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float x = (c[0][j][l] + c[1][j][l]) * share;
            const float y = (c[0][j][l + 1] + c[1][j][l + 1]) * share;
            const long long at = (my.head * M + e) * D + 16 * my.pair + 8 * j + 2 * t;
            if (SAVE && e < M) *(float2*)(exact + at) = make_float2(x, y);
            const u32 low = put_terms(chunk(my.here + MARKS, e, 2 * my.pair + j) + 4 * t, x, y);
            if (SAVE && e < M) *(u32*)(marks + at) = low;
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
    // 16 keys at a time, the next ones on their way, and chains of products side by side
    constexpr int ALL = NP / 16, EACH_PAIR = (ALL + 3) / 4;
    u32 r[2][2][2][4];
    const Place keys = chunk(my.here + KEYS, my.eighth, my.corner);
#pragma unroll
    for (int i = 0; i <= EACH_PAIR; i++) {
        if (i < EACH_PAIR) {
            const Place rows = keys + 16 * min(my.pair + 4 * i, ALL - 1) * ROW;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                load4(r[i % 2][j][0], rows + 8 * j * ROW);
                load4(r[i % 2][j][1], (rows ^ 64) + 8 * j * ROW);
            }
        }
        if (i == 0) continue;
        float c[2][TERMS][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int term = 0; term < TERMS; term++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const u32(&b)[4] = r[(i - 1) % 2][j][s / 2];
                    multiply(c[j][term], a[term][s], b[s % 2 * 2], b[s % 2 * 2 + 1]);
                }
        const int which = my.pair + 4 * (i - 1);
        if (which >= ALL) break;  // another warp's
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float x[4];
#pragma unroll
            for (int l = 0; l < 4; l++)
                x[l] = c[j][0][l] + (c[j][1][l] + (BF16 ? c[j][TERMS - 1][l] : 0.f)) *
                                        (BF16 ? 1.f : 1.f / 2048.f);
            const int e = 16 * my.mt + my.g;
            float* to = my.scores(e) + 16 * which + 8 * j + 2 * my.t;
            if (e < M) *(float2*)to = make_float2(x[0], x[1]);
            if (e + 8 < M) *(float2*)(to + 8 * NS) = make_float2(x[2], x[3]);
        }
    }
}

// What the shared expert is to the queries of a warp, tiles of 16 of them: numerators of the softmax
// over landmarks, as a product's operands; of queries g and g + 8 the logits (of base 2) that they
// are relative to.
struct Shares {
    u32 weights[TURNS][2][4];
    float top[TURNS][2];
};

// Of each query the nearest landmark, of equals the first, and the shares of all.
__device__ __forceinline__ void choose_experts(
    const Thread& my, float again, int* route, Shares& shares) {
    u32 a[TURNS][4][4];
    float products[TURNS][MT][4] = {};
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int i = min(my.warp + WARPS * turn, NP / 16 - 1);
#pragma unroll
        for (int s = 0; s < 4; s++)
            load4(a[turn][s], (chunk(my.here, my.sub, my.side) ^ 32 * s) + 16 * i * ROW);
    }
#pragma unroll
    for (int term = TERMS - 1; term >= 0; term--) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 r[MT][4];
#pragma unroll
            for (int j = 0; j < MT; j++)
                load4(r[j], chunk(my.here + MARKS + term * TERM, 8 * j + my.eighth, my.corner) ^
                                64 * half);
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int j = 0; j < MT; j++)
#pragma unroll
                    for (int turn = 0; turn < TURNS; turn++)
                        multiply(products[turn][j], a[turn][2 * half + s], r[j][2 * s],
                                 r[j][2 * s + 1]);
        }
        if (!BF16 && term)
#pragma unroll
            for (int i = 0; i < TURNS * MT * 4; i++)
                products[i / 4 / MT][i / 4 % MT][i % 4] *= 1.f / 2048.f;
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int i = my.warp + WARPS * turn;
        const float(&c)[MT][4] = products[turn];
        if (i >= NP / 16) break;
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
            if (SHARED) shares.top[turn][upper] = best * again;
#pragma unroll
            for (int j = 0; SHARED && j < 4; j++) {
                float w[2] = {};
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    const int e = 8 * j + l;  // and 2 t
                    if (e >= M) continue;
                    w[l] = power_of_two(c[j < MT ? j : 0][2 * upper + l] * again - best * again);
                    if (e + 6 >= M && e + 2 * my.t >= M) w[l] = 0.f;
                }
                shares.weights[turn][j / 2][j % 2 * 2 + upper] = pack(w[0], w[1]);
            }
        }
    }
}
