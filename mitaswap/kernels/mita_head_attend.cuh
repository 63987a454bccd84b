// What the landmarks read, V~, and the attention of all queries.
#pragma once
#include <mita_head_parts.cuh>

// V~ = softmax(S) V from the numerators.
__device__ __forceinline__ void read_values(const Thread& my, u16* values) {
    const Place read = my.here + READ;
    if (16 * my.mt >= M) {
        clear(chunk(read, 16 + my.sub, 2 * my.pair + my.side));
        return;
    }
    float c[2][2][4] = {};
    const Place row = place(my.scores(min(16 * my.mt + my.sub, M - 1))) + 16 * my.side;
#pragma unroll
    for (int s = 0; s < NP / 16; s++) {
        u32 a[4], r[4];
        load4(a, row + 32 * s);
        load4t(r, chunk(my.here + VALUES, my.sub, 2 * my.pair + my.side) + 16 * s * ROW);
        multiply(c[s % 2][0], a, r[0], r[1]);
        multiply(c[s % 2][1], a, r[2], r[3]);
    }
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int e = 16 * my.mt + my.g + 8 * upper, l = 2 * upper;
        const float share = 1.f / my.sums()[min(e, M - 1)];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float x = c[0][j][l] + c[1][j][l], y = c[0][j][l + 1] + c[1][j][l + 1];
            const u32 low = pack(x * share, y * share);
            put(chunk(read, e, 2 * my.pair + j) + 4 * my.t, e < M ? low : 0);
            const long long at = (my.head * M + e) * D + 16 * my.pair + 8 * j + 2 * my.t;
            if (SAVE && e < M) *(u32*)(values + at) = low;
        }
    }
}

// c [16, 8] = rows of q times 8 rows, of which this lane loads chunks from `row`
__device__ __forceinline__ void dot(float (&c)[4], const u32 (&q)[4][4], Place row) {
    u32 r[2][4];
    load4(r[0], row);
    load4(r[1], row ^ 64);
#pragma unroll
    for (int s = 0; s < 4; s++) multiply(c, q[s], r[s / 2][s % 2 * 2], r[s / 2][s % 2 * 2 + 1]);
}

// c [16, D] += weights [16, 16] times 16 rows, of which this lane loads chunks from `row`
__device__ __forceinline__ void add(float (&c)[8][4], const u32 (&weights)[4], Place row) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 r[4];
        load4t(r, row ^ 32 * j);
        multiply(c[2 * j], weights, r[0], r[1]);
        multiply(c[2 * j + 1], weights, r[2], r[3]);
    }
}

// The attention of all queries, a tile of them, which are of one expert, a warp.
__device__ __forceinline__ void attend(
    const Thread& my, u16* out, int son, float* lse, float factor, float again) {
    const int g = my.g, t = my.t, count = my.tiles()[MOST_TILES];
    const Place values = my.here + VALUES;
#pragma unroll 1
    for (int i = my.warp; i < count; i += WARPS) {
        const int tile = my.tiles()[i], left = tile >> 16;
        const u8* list = my.list(tile & 255);
        const u8* queries = my.sorted() + (tile >> 8 & 255);
        const Place row = chunk(my.here, queries[min(my.sub, left - 1)], my.side);
        int mine[2], whole[4];
#pragma unroll
        for (int j = 0; j < 2; j++) mine[j] = queries[min(g + 8 * j, left - 1)];
#pragma unroll
        for (int j = 0; j < 4; j++) whole[j] = queries[min(my.corner + 4 * j, left - 1)];
        u32 a[4][4];
        float own[4][4] = {}, some[4][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) load4(a[s], row ^ 32 * s);
        if (SHARED)
#pragma unroll
            for (int j = 0; j < MT; j++)
                dot(some[j], a, chunk(my.here + MARKS, my.eighth, my.corner) + 8 * j * ROW);
#pragma unroll
        for (int j = 0; j < KT; j++)
            dot(own[j], a, chunk(my.here + KEYS, list[8 * j + my.eighth], my.corner));
        float top[2], total[2] = {};  // of queries g and g + 8
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            float peak = -INFINITY, other = -INFINITY;
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    const int e = 8 * j + l;  // and 2 t: where all are beyond, nothing is done
                    float &x = own[j][2 * upper + l], &y = some[j][2 * upper + l];
                    if (e < K && e + 6 >= K && e + 2 * t >= K) x = -INFINITY;
                    if (e < M && e + 6 >= M && e + 2 * t >= M) y = -INFINITY;
                    if (e < K) peak = fmaxf(peak, x);
                    if (SHARED && e < M) other = fmaxf(other, y);
                }
            top[upper] = SHARED ? fmaxf(peak * factor, other * again) : peak * factor;
        }
#pragma unroll
        for (int l = 1; l < 4; l <<= 1)
#pragma unroll
            for (int upper = 0; upper < 2; upper++)
                top[upper] = fmaxf(top[upper], __shfl_xor_sync(LANES, top[upper], l));
        float c[8][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) {  // 16 landmarks, the others, 16 keys, the others
            if (s < 2 ? !SHARED || 16 * s >= M : 16 * s - 32 >= K) continue;
            u32 w[4];
#pragma unroll
            for (int l = 0; l < 4; l++) {
                const int j = s % 2 * 2 + l / 2, upper = l % 2, e = 8 * j, most = s < 2 ? M : K;
                const float(&logits)[4] = s < 2 ? some[j] : own[j];
                const float by = s < 2 ? again : factor;
                float x = 0.f, y = 0.f;
                if (e < most) x = power_of_two(logits[2 * upper] * by - top[upper]);
                if (e + 1 < most) y = power_of_two(logits[2 * upper + 1] * by - top[upper]);
                total[upper] += x + y;
                w[l] = pack(x, y);
            }
            add(c, w, s < 2 ? chunk(my.here + READ, my.sub, my.side) + 16 * s * ROW
                            : chunk(values, list[16 * (s - 2) + my.sub], my.side));
        }
#pragma unroll
        for (int l = 1; l < 4; l <<= 1)
#pragma unroll
            for (int upper = 0; upper < 2; upper++)
                total[upper] += __shfl_xor_sync(LANES, total[upper], l);
        // into the place of these queries, which nobody else reads, and from there in whole rows
        __syncwarp();
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            if (8 * upper >= left) break;
            const float inverse = __fdividef(1.f, total[upper]);
            const Place to = chunk(my.here, mine[upper], 0) + 4 * t;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32 two = pack(c[j][2 * upper] * inverse, c[j][2 * upper + 1] * inverse);
                if (g + 8 * upper < left) put(to ^ 16 * j, two);
            }
            if (SAVE && t == 0 && g + 8 * upper < left)
                lse[my.head * N + mine[upper]] = top[upper] + log_two(total[upper]);
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            if (4 * j >= left) break;
            const uint4 x = get16(chunk(my.here, whole[j], my.eighth));
            const uint4 y = get16(chunk(my.here, whole[j + 1], my.eighth));
            u16* to = out + 8 * my.eighth;
            if (my.corner + 4 * j < left) *(uint4*)(to + (long long)whole[j] * son) = x;
            if (my.corner + 4 * j + 4 < left) *(uint4*)(to + (long long)whole[j + 1] * son) = y;
        }
    }
}
