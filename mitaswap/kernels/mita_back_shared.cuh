// What the shared expert gives: gradients of its logits, of V~, of the landmarks' scores, and of the
// landmarks.
#pragma once
#include <mita_back_parts.cuh>

struct Windows {
    Inside inside;
    float share[32];  // 1 / tokens
};

__device__ constexpr Windows make_windows() {
    Windows out = {inside_windows(), {}};
    for (int e = 0; e < M; e++) out.share[e] = 1.f / out.inside.tokens[e];
    return out;
}

static __device__ constexpr Windows windows = make_windows();

// Begin to copy V~.
__device__ __forceinline__ void copy_values(const Thread& my, const u16* values) {
#pragma unroll
    for (int i = my.thread; i < 16 * ES * 8; i += THREADS) {
        const int e = min(i >> 3, M - 1);
        copy16(chunk(my.here + READ, i >> 3, i & 7),
               values + (my.head * M + e) * D + 8 * (i & 7), i >> 3 < M);
    }
}

// What a thread reads of the landmarks, and puts there as terms.
struct Landmarks {
    static constexpr int EACH = (16 * ES * 16 + THREADS - 1) / THREADS;
    float4 x[EACH];

    __device__ __forceinline__ void ask(const Thread& my, const float* exact) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = my.thread + THREADS * i, e = min(at >> 4, M - 1);
            x[i] = *(const float4*)(exact + (my.head * M + e) * D + 4 * (at & 15));
        }
    }
    __device__ __forceinline__ void put_down(const Thread& my) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = my.thread + THREADS * i, e = at >> 4, c = at & 15;
            if (e >= 16 * ES) break;
            const bool ok = e < M;
            const Place to = chunk(my.here + MARKS, e, c >> 1) + 8 * (c & 1);
            put_terms(to, ok ? x[i].x : 0.f, ok ? x[i].y : 0.f);
            put_terms(to + 4, ok ? x[i].z : 0.f, ok ? x[i].w : 0.f);
        }
    }
};

// c [16, 16 ES] = 16 rows x landmarks
__device__ __forceinline__ void times_landmarks(
    const Thread& my, float (&c)[2 * ES][4], const u32 (&a)[4][4]) {
#pragma unroll
    for (int term = TERMS - 1; term >= 0; term--) {
        times_turned(my, c, a, my.here + MARKS + term * TERM);
        if (!BF16 && term)
#pragma unroll
            for (int i = 0; i < 8 * ES; i++) c[i / 4][i % 4] *= 1.f / 2048.f;
    }
}

// [16, 16 ES] into the warp's rows
__device__ __forceinline__ void put_wide(const Thread& my, int to, const u32 (&a)[ES][4]) {
#pragma unroll
    for (int s = 0; s < ES; s++)
        store4(my.here + to + (my.first + my.sub) * WIDE + 32 * s + 16 * my.side, a[s]);
}

// The weights of landmarks for the warp's queries, and the gradients of their logits, which remain.
// delta: of `rows`, in `again`s.
__device__ __forceinline__ void weigh_landmarks(
    const Thread& my, float again, float ratio, u32 (&dlogits)[ES][4]) {
    float weights[2 * ES][4] = {}, d[2 * ES][4] = {};
    u32 a[4][4];
    load_tile(my, a, my.here + my.first * ROW);
    times_landmarks(my, weights, a);
    load_tile(my, a, my.here + GRADS + my.first * ROW);
    times_turned(my, d, a, my.here + READ);
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int n = my.first + my.g + 8 * upper;
        const float4 two = my.rows()[n >> 1];
        const float lse = n & 1 ? two.y : two.x, delta = (n & 1 ? two.w : two.z) * ratio;
#pragma unroll
        for (int j = 0; j < 2 * ES; j++)
#pragma unroll
            for (int l = 0; l < 2; l++) {
                float& x = weights[j][2 * upper + l];
                x = power_of_two(x * again * LOG2E - lse);
                if (8 * j + 8 > M && 8 * j + 2 * my.t + l >= M) x = 0.f;
                d[j][2 * upper + l] = x * (d[j][2 * upper + l] * again - delta);
            }
    }
#pragma unroll
    for (int s = 0; s < ES; s++) operand(dlogits[s], d[2 * s], d[2 * s + 1]);
    put_wide(my, DWEIGHTS, dlogits);
    u32 packed[ES][4];
#pragma unroll
    for (int s = 0; s < ES; s++) operand(packed[s], weights[2 * s], weights[2 * s + 1]);
    put_wide(my, WEIGHTS, packed);
}

// Units of 16 landmarks and 16 channels: sums over all tokens, c += transposed [N, 32] x rows
constexpr int UNITS = 4 * ES;
__device__ __forceinline__ void sum_tokens(
    const Thread& my, float (&c)[2][2][4], int unit, int wide, int rows) {
#pragma unroll
    for (int s = 0; s < TILES; s++) {
        u32 a[4], r[4];
        load_turned(my, a, my.here + wide + 16 * s * WIDE + 32 * (unit / 4), WIDE);
        load4t(r, chunk(my.here + rows, my.sub, 2 * (unit % 4) + my.side) + 16 * s * ROW);
        multiply(c[s % 2][0], a, r[0], r[1]);
        multiply(c[s % 2][1], a, r[2], r[3]);
    }
}

// The gradients of V~, and of the sum of each landmark's softmax.
__device__ __forceinline__ void read_gradients(const Thread& my) {
    for (int unit = my.warp; unit < UNITS; unit += WARPS) {
        const int pair = unit % 4;
        float c[2][2][4] = {};
        sum_tokens(my, c, unit, WEIGHTS, GRADS);
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const int e = unit / 4 * 16 + my.g + 8 * upper, l = 2 * upper;
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int at = (int)(chunk(0, e, 2 * pair + j) + 4 * my.t);
                const u32 low = pack(c[0][j][l] + c[1][j][l], c[0][j][l + 1] + c[1][j][l + 1]);
                const u32 value = *(const u32*)(my.memory + READ + at);
                put(my.here + DREAD + at, low);
                sum += unpack((u16)low) * unpack((u16)value) +
                       unpack((u16)(low >> 16)) * unpack((u16)(value >> 16));
            }
            sum = sum_of<4>(sum);
            if (my.t == 0) ((float*)&my.dprobe()[e])[pair] = sum;
        }
    }
}

// The gradients of the landmarks' scores of the warp's keys; what keys and values have from them.
__device__ __forceinline__ void probe_keys(
    const Thread& my, float scale, const u32 (&keys)[4][4],
    float (&dkeys)[8][4], float (&dvalues)[8][4]) {
    float shares[2 * ES][4] = {}, d[2 * ES][4] = {};
    times_landmarks(my, shares, keys);
    u32 values[4][4];
    load_tile(my, values, my.here + VALUES + my.first * ROW);
    times_turned(my, d, values, my.here + DREAD);
#pragma unroll
    for (int j = 0; j < 2 * ES; j++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
            const int e = 8 * j + 2 * my.t + l;
            const float lse = my.probe()[e];
            const float4 parts = my.dprobe()[e];
            const float sum = ((parts.x + parts.y) + (parts.z + parts.w)) * scale;
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                float& x = shares[j][2 * upper + l];
                x = power_of_two(x * scale * LOG2E - lse);
                if (8 * j + 8 > M && e >= M) x = 0.f;
                if (my.first + my.g + 8 * upper >= N) x = 0.f;
                d[j][2 * upper + l] = x * (d[j][2 * upper + l] * scale - sum);
            }
        }
    u32 packed[ES][4];
#pragma unroll
    for (int s = 0; s < ES; s++) operand(packed[s], d[2 * s], d[2 * s + 1]);
    put_wide(my, DSCORES, packed);
    times(my, dkeys, packed, my.here + MARKS);
#pragma unroll
    for (int s = 0; s < ES; s++) operand(packed[s], shares[2 * s], shares[2 * s + 1]);
    times(my, dvalues, packed, my.here + DREAD);
}

// The gradients of the landmarks, each as a share for a token of its window.
__device__ __forceinline__ void landmark_gradients(const Thread& my) {
    for (int unit = my.warp; unit < UNITS; unit += WARPS) {
        float c[2][2][4] = {};
        sum_tokens(my, c, unit, DWEIGHTS, 0);
        sum_tokens(my, c, unit, DSCORES, KEYS);
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const int e = unit / 4 * 16 + my.g + 8 * upper, l = 2 * upper;
            const float share = windows.share[e];
#pragma unroll
            for (int j = 0; j < 2; j++)
                put(chunk(my.here + READ, e, 2 * (unit % 4) + j) + 4 * my.t,
                    pack((c[0][j][l] + c[1][j][l]) * share,
                         (c[0][j][l + 1] + c[1][j][l + 1]) * share));
        }
    }
}

// Which windows the warp's queries lie in, as a first operand.
__device__ __forceinline__ void window_operand(const Thread& my, u32 (&a)[ES][4]) {
    const u32 of[2] = {windows.inside.of[my.first + my.g], windows.inside.of[my.first + my.g + 8]};
#pragma unroll
    for (int s = 0; s < ES; s++)
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const u32 two = of[l % 2] >> (16 * s + l / 2 * 8) >> 2 * my.t;
            a[s][l] = ((two & 1) | (two & 2) << 15) * ONE;
        }
}
