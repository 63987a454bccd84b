// Gradients of routed logits: all of a head's, but those of keys that a query's expert does not
// hold are zeros.
#pragma once
#include <mita_back_parts.cuh>

// delta = grad x out of the warp's queries, times the scale, into `rows`. out: of this lane.
__device__ __forceinline__ void query_rows(
    const Thread& my, const uint4 (&out)[4 * OWN], float scale) {
    const Place grads = chunk(my.here + GRADS, my.first(0) + my.corner, my.eighth);
#pragma unroll
    for (int i = 0; i < 4 * OWN; i++) {
        if (my.twice(i / 4)) break;
        const int n = my.first(0) + 4 * i + my.corner;
        const uint4 grad = get16((grads ^ 64 * (i % 2)) + 4 * i * ROW);
        const u32 left[4] = {grad.x, grad.y, grad.z, grad.w};
        const u32 right[4] = {out[i].x, out[i].y, out[i].z, out[i].w};
        float dot = 0.f;
#pragma unroll
        for (int l = 0; l < 4; l++)
            dot += unpack((u16)left[l]) * unpack((u16)right[l]) +
                   unpack((u16)(left[l] >> 16)) * unpack((u16)(right[l] >> 16));
        dot = sum_of<8>(dot);
        if (my.eighth == 0) ((float*)&my.rows()[n >> 1])[2 + (n & 1)] = n < N ? dot * scale : 0.f;
    }
}

// Of `count` tiles of queries the gradients of their logits of the warp's keys, into memory, and
// what keys and values have from them.
__device__ __forceinline__ void attend_keys(
    const Thread& my, int begin, int count, float scale, const Rows& keys, const Rows& values,
    Sums& dkeys, Sums& dvalues) {
    u32 held[2 * OWN];
#pragma unroll
    for (int i = 0; i < 2 * OWN; i++) held[i] = my.held()[my.first(i / 2) + my.g + i % 2 * 8];
    const float factor = scale * LOG2E;
    int i = OWN * my.warp % count;  // each warp begins elsewhere
#pragma unroll 1
    for (int turn = 0; turn < count; turn++, i = i + 1 < count ? i + 1 : 0) {
        const int first = 16 * (begin + i);
        const Place queries = my.here + first * ROW;
        float weights[OWN][2][4] = {}, d[OWN][2][4] = {};
        times_turned(my, weights, keys, queries);
        times_turned(my, d, values, queries + GRADS);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float4 two = my.rows()[first / 2 + 4 * j + my.t];
            const uint2 experts = *(const uint2*)&my.experts()[first + 8 * j + 2 * my.t];
#pragma unroll
            for (int l = 0; l < 4 * OWN; l++) {
                float& x = weights[l / 4][j][l % 4];
                float& y = d[l / 4][j][l % 4];
                x = power_of_two(x * factor - (l % 2 ? two.y : two.x));
                x = held[l / 2] & (l % 2 ? experts.y : experts.x) ? x : 0.f;
                y = x * (y * scale - (l % 2 ? two.w : two.z));
            }
        }
        u32 a[OWN][1][4];
#pragma unroll
        for (int own = 0; own < OWN; own++) operand(a[own][0], weights[own][0], weights[own][1]);
        times(my, dvalues, a, queries + GRADS);
#pragma unroll
        for (int own = 0; own < OWN; own++) {
            operand(a[own][0], d[own][0], d[own][1]);
            store4(my.here + LOGITS + (my.first(own) + my.sub) * LOGIT_ROW + 32 * i + 16 * my.side,
                   a[own][0]);
        }
        times(my, dkeys, a, queries);
    }
}

// What the warp's queries, whose tiles begin at i of those in memory, have from routed logits.
__device__ __forceinline__ void attend_queries(const Thread& my, int i, Sums& dqueries) {
#pragma unroll
    for (int s = 0; s < TILES; s++) {
        u32 a[OWN][1][4];
#pragma unroll
        for (int own = 0; own < OWN; own++)
            load_turned(my, a[own][0],
                        my.here + LOGITS + 16 * s * LOGIT_ROW + 32 * (my.twice(own) ? i : i + own),
                        LOGIT_ROW);
        times(my, dqueries, a, my.here + KEYS + 16 * s * ROW);
    }
}
