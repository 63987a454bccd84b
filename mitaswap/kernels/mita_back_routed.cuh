// Gradients of routed logits: all of a head, but those of keys that a query's expert does not hold are
// zeros.
#pragma once
#include <mita_back_parts.cuh>

// delta = grad x out of the warp's queries, of which out are the parts that this lane holds.
__device__ __forceinline__ void query_rows(const Thread& my, const uint4 (&out)[4], float scale) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int n = my.first + 4 * i + my.corner;
        const uint4 grad = get16(chunk(my.here + GRADS, n, my.eighth));
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

// Of `count` tiles of queries the gradients of their logits of the warp's keys, into memory, and what
// keys and values have from them.
__device__ __forceinline__ void attend_keys(
    const Thread& my, int begin, int count, float scale, const u32 (&keys)[4][4],
    float (&dkeys)[8][4], float (&dvalues)[8][4]) {
    const u32 held[2] = {my.held()[my.first + my.g], my.held()[my.first + my.g + 8]};
    const float factor = scale * LOG2E;
    const Place own = my.here + VALUES + my.first * ROW;
    int i = my.warp % count;  // each warp begins elsewhere
#pragma unroll 1
    for (int turn = 0; turn < count; turn++, i = i + 1 < count ? i + 1 : 0) {
        const int first = 16 * (begin + i);
        const Place queries = my.here + first * ROW;
        float weights[2][4] = {}, d[2][4] = {};
        times_turned(my, weights, keys, queries);
        u32 values[4][4];  // anew each time, as registers are few
        load_tile(my, values, own);
        times_turned(my, d, values, queries + GRADS);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float4 two = my.rows()[first / 2 + 4 * j + my.t];
            const uint2 experts = *(const uint2*)&my.experts()[first + 8 * j + 2 * my.t];
#pragma unroll
            for (int l = 0; l < 4; l++) {
                float& x = weights[j][l];
                x = power_of_two(x * factor - (l % 2 ? two.y : two.x));
                x = held[l / 2] & (l % 2 ? experts.y : experts.x) ? x : 0.f;
                d[j][l] = x * (d[j][l] * scale - (l % 2 ? two.w : two.z));
            }
        }
        u32 a[1][4];
        operand(a[0], weights[0], weights[1]);
        times(my, dvalues, a, queries + GRADS);
        operand(a[0], d[0], d[1]);
        store4(my.here + LOGITS + (my.first + my.sub) * LOGIT_ROW + 32 * i + 16 * my.side, a[0]);
        times(my, dkeys, a, queries);
    }
}

// What the warp's queries, tile i of those in memory, have from routed logits.
__device__ __forceinline__ void attend_queries(const Thread& my, int i, float (&dqueries)[8][4]) {
#pragma unroll
    for (int s = 0; s < TILES; s++) {
        u32 a[1][4];
        load_turned(my, a[0], my.here + LOGITS + 16 * s * LOGIT_ROW + 32 * i, LOGIT_ROW);
        times(my, dqueries, a, my.here + KEYS + 16 * s * ROW);
    }
}
