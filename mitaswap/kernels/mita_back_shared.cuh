// What the shared expert gives: gradients of its logits, of V~, of the landmarks' scores, and of
// the landmarks.
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

// of the warp's tiles: sums [16, 16 ES], as they lie and as first operands
typedef float WideSums[OWN][2 * ES][4];
typedef u32 Wide[OWN][ES][4];

// c = rows x landmarks
__device__ __forceinline__ void times_landmarks(const Thread& my, WideSums& c, const Rows& a) {
#pragma unroll
    for (int term = TERMS - 1; term >= 0; term--) {
        times_turned(my, c, a, my.here + MARKS + term * TERM);
        if (!BF16 && term)
#pragma unroll
            for (int i = 0; i < OWN * 8 * ES; i++)
                c[i / (8 * ES)][i / 4 % (2 * ES)][i % 4] *= 1.f / 2048.f;
    }
}

__device__ __forceinline__ void operands(Wide& a, const WideSums& c) {
#pragma unroll
    for (int i = 0; i < OWN * ES; i++)
        operand(a[i / ES][i % ES], c[i / ES][2 * (i % ES)], c[i / ES][2 * (i % ES) + 1]);
}

// into the warp's rows
__device__ __forceinline__ void put_wide(const Thread& my, int to, const Wide& a) {
#pragma unroll
    for (int i = 0; i < OWN * ES; i++)
        store4(my.here + to + (my.first(i / ES) + my.sub) * WIDE + 32 * (i % ES) + 16 * my.side,
               a[i / ES][i % ES]);
}

// The weights of landmarks for the warp's queries, and the gradients of their logits, which remain.
// ratio: again / scale, as `rows` has delta times the scale.
__device__ __forceinline__ void weigh_landmarks(
    const Thread& my, float again, float ratio, Wide& dlogits) {
    WideSums weights = {}, d = {};
    Rows a;
    load_tiles(my, a, my.here);
    times_landmarks(my, weights, a);
    load_tiles(my, a, my.here + GRADS);
    times_turned(my, d, a, my.here + READ);
#pragma unroll
    for (int i = 0; i < 2 * OWN; i++) {
        const int own = i / 2, upper = i % 2, n = my.first(own) + my.g + 8 * upper;
        const float4 two = my.rows()[n >> 1];
        const float lse = n & 1 ? two.y : two.x, delta = (n & 1 ? two.w : two.z) * ratio;
#pragma unroll
        for (int j = 0; j < 2 * ES; j++)
#pragma unroll
            for (int l = 0; l < 2; l++) {
                float& x = weights[own][j][2 * upper + l];
                float& y = d[own][j][2 * upper + l];
                x = power_of_two(x * again * LOG2E - lse);
                if (8 * j + 8 > M && 8 * j + 2 * my.t + l >= M) x = 0.f;
                y = x * (y * again - delta);
            }
    }
    Wide packed;
    operands(packed, weights);
    put_wide(my, WEIGHTS, packed);
    operands(dlogits, d);
    put_wide(my, DWEIGHTS, dlogits);
}

// Units of 16 channels: sums over all tokens, c += transposed [N, 32] x rows, for all landmarks
constexpr int UNITS = 4;
typedef float Unit[ES][2][4];
__device__ __forceinline__ void sum_tokens(
    const Thread& my, Unit& c, int unit, int wide, int rows) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        u32 a[ES][4], r[4];
#pragma unroll
        for (int s = 0; s < ES; s++)
            load_turned(my, a[s], my.here + wide + 16 * n * WIDE + 32 * s, WIDE);
        load4t(r, chunk(my.here + rows, my.sub, 2 * unit + my.side) + 16 * n * ROW);
#pragma unroll
        for (int s = 0; s < ES; s++) {
            multiply(c[s][0], a[s], r[0], r[1]);
            multiply(c[s][1], a[s], r[2], r[3]);
        }
    }
}

// The gradients of V~, and of the sum of each landmark's softmax.
__device__ __forceinline__ void read_gradients(const Thread& my) {
    for (int unit = my.warp; unit < UNITS; unit += WARPS) {
        Unit c = {};
        sum_tokens(my, c, unit, WEIGHTS, GRADS);
#pragma unroll
        for (int i = 0; i < 2 * ES; i++) {
            const int e = 8 * i + my.g, l = i % 2 * 2;
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int at = (int)(chunk(0, e, 2 * unit + j) + 4 * my.t);
                const u32 low = pack(c[i / 2][j][l], c[i / 2][j][l + 1]);
                const u32 value = *(const u32*)(my.memory + READ + at);
                put(my.here + DREAD + at, low);
                sum += unpack((u16)low) * unpack((u16)value) +
                       unpack((u16)(low >> 16)) * unpack((u16)(value >> 16));
            }
            sum = sum_of<4>(sum);
            if (my.t == 0) ((float*)&my.dprobe()[e])[unit] = sum;
        }
    }
}

// The gradients of the landmarks' scores of the warp's keys; what keys and values have from them.
__device__ __forceinline__ void probe_keys(
    const Thread& my, float scale, const Rows& keys, const Rows& values, Sums& dkeys,
    Sums& dvalues) {
    WideSums shares = {}, d = {};
    times_landmarks(my, shares, keys);
    times_turned(my, d, values, my.here + DREAD);
#pragma unroll
    for (int i = 0; i < 4 * ES; i++) {
        const int j = i / 2, l = i % 2, e = 8 * j + 2 * my.t + l;
        const float lse = my.probe()[e];
        const float4 parts = my.dprobe()[e];
        const float sum = ((parts.x + parts.y) + (parts.z + parts.w)) * scale;
#pragma unroll
        for (int k = 0; k < 2 * OWN; k++) {
            const int own = k / 2, upper = k % 2;
            float& x = shares[own][j][2 * upper + l];
            float& y = d[own][j][2 * upper + l];
            x = power_of_two(x * scale * LOG2E - lse);
            if (8 * j + 8 > M && e >= M) x = 0.f;
            if (my.first(own) + my.g + 8 * upper >= N) x = 0.f;
            y = x * (y * scale - sum);
        }
    }
    Wide packed;
    operands(packed, d);
    put_wide(my, DSCORES, packed);
    times(my, dkeys, packed, my.here + MARKS);
    operands(packed, shares);
    times(my, dvalues, packed, my.here + DREAD);
}

// The gradients of the landmarks, each as a share for a token of its window.
__device__ __forceinline__ void landmark_gradients(const Thread& my) {
    for (int unit = my.warp; unit < UNITS; unit += WARPS) {
        Unit c = {};
        sum_tokens(my, c, unit, DWEIGHTS, 0);
        sum_tokens(my, c, unit, DSCORES, KEYS);
#pragma unroll
        for (int i = 0; i < 2 * ES; i++) {
            const int e = 8 * i + my.g, l = i % 2 * 2;
            const float share = windows.share[e];
#pragma unroll
            for (int j = 0; j < 2; j++)
                put(chunk(my.here + READ, e, 2 * unit + j) + 4 * my.t,
                    pack(c[i / 2][j][l] * share, c[i / 2][j][l + 1] * share));
        }
    }
}

// Which windows the warp's queries lie in, as a first operand.
__device__ __forceinline__ void window_operand(const Thread& my, Wide& a) {
#pragma unroll
    for (int own = 0; own < OWN; own++)
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const u32 of = windows.inside.of[my.first(own) + my.g + 8 * upper] >> 2 * my.t;
#pragma unroll
            for (int i = 0; i < 2 * ES; i++) {
                const u32 two = of >> 8 * i;
                a[own][i / 2][i % 2 * 2 + upper] = ((two & 1) | (two & 2) << 15) * ONE;
            }
        }
}
