// What the landmarks read, V~, and the attention of all queries.
#pragma once
#include <mita_head_parts.cuh>

// V~ = softmax(S) V from the numerators, in PARTS, each of 16 landmarks and 16 channels.
constexpr int PARTS = (M + 15) / 16 * 4;
__device__ __forceinline__ void read_values(const Thread& my, int part, u16* values) {
    const Place read = my.here + READ;
    const int mt = part / 4, pair = part % 4;
    float c[2][2][4] = {};
    const int e = min(16 * mt + my.sub, M - 1);
    const Place row = place(my.scores(e)) + 16 * (my.side ^ (e >> 2 & 1));
    u32 a[3][4], r[3][4];  // two steps are on their way
#pragma unroll
    for (int s = 0; s < NP / 16 + 2; s++) {
        if (s < NP / 16) {
            load4(a[s % 3], row + 32 * s);
            load4t(r[s % 3], chunk(my.here + VALUES, my.sub, 2 * pair + my.side) + 16 * s * ROW);
        }
        if (s < 2) continue;
        const int now = (s - 2) % 3;
        multiply(c[s % 2][0], a[now], r[now][0], r[now][1]);
        multiply(c[s % 2][1], a[now], r[now][2], r[now][3]);
    }
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int e = 16 * mt + my.g + 8 * upper, l = 2 * upper;
        const float share = 1.f / my.sums()[min(e, M - 1)];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float x = c[0][j][l] + c[1][j][l], y = c[0][j][l + 1] + c[1][j][l + 1];
            const u32 low = pack(x * share, y * share);
            put(chunk(read, e, 2 * pair + j) + 4 * my.t, e < M ? low : 0);
            const long long at = (my.head * M + e) * D + 16 * pair + 8 * j + 2 * my.t;
            if (SAVE && e < M) *(u32*)(values + at) = low;
        }
    }
}

// Attention to the keys of experts, a tile of queries, which are of one expert, at a time: normalised,
// into the places of these queries, which nobody else reads, and what it is relative to beside. Then
// the parts of V~, for warps with fewer tiles: turns go to the warps to and fro.
__device__ __forceinline__ void attend(const Thread& my, float factor, u16* values) {
    const int count = my.tiles()[MOST_TILES];
    // what the next tile begins with is loaded during one
    struct Start {
        int tile, query;  // and the query of row g or g + 8, for t = 0, 1
        u32 keys;         // one of each eight
        Place row;

        __device__ __forceinline__ void load(const Thread& my) {
            const int left = tile >> 16;
            const u8* queries = my.sorted() + (tile >> 8 & 255);
            // lanes that are too many take the last query once more
            const bool few = left <= 8;  // half of the tile is empty
            const int mine = queries[min(few ? my.eighth : my.sub, left - 1)];
            row = chunk(my.here, mine, few ? my.corner : my.side);
            query = queries[min(my.g + 8 * (my.t & 1), left - 1)];
            keys = ((const u32*)my.list(tile & 255))[my.eighth];
        }
    } start, next;
    int i = my.warp;
    start.tile = my.tiles()[min(i, count - 1)];
    start.load(my);
    next = start;
#pragma unroll 1
    for (int turn = 1; i < count + (SHARED ? PARTS : 0); turn++, start = next) {
        const int now = i;
        i = WARPS * turn + (turn & 1 ? WARPS - 1 - my.warp : my.warp);
        if (now >= count) {
            read_values(my, now - count, values);
            continue;
        }
        next.tile = my.tiles()[min(i, count - 1)];
        const int left = start.tile >> 16;
        const bool few = left <= 8;
        const u32 four = start.keys;
        const Place row = start.row;
        u32 a[4][4] = {};
        float logits[KT][4] = {};
        if (few)
#pragma unroll
            for (int s = 0; s < 4; s += 2) {
                u32 r[4];
                load4(r, row ^ 32 * s);
#pragma unroll
                for (int l = 0; l < 4; l++) a[s + l / 2][l % 2 * 2] = r[l];
            }
        else
#pragma unroll
            for (int s = 0; s < 4; s++) load4(a[s], row ^ 32 * s);
        u32 keys[2][KT][4], read[KT / 2 + KT % 2][4][4];
        Place of[4];
#pragma unroll
        for (int j = 0; j < 4; j++) of[j] = chunk_0(my.here + KEYS, four, j);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < KT; j++)
                load4(keys[half][j], of[j] ^ my.corner << 4 ^ 64 * half);
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int j = 0; j < KT; j++)
                multiply(logits[j], a[s], keys[s / 2][j][s % 2 * 2], keys[s / 2][j][s % 2 * 2 + 1]);
#pragma unroll
        for (int s = 0; 2 * s < KT; s++) {  // while the softmax is computed
            const Place row = (my.sub < 8 ? of[2 * s] : of[2 * s + 1]) ^ my.side << 4;
#pragma unroll
            for (int j = 0; j < 4; j++) load4t(read[s][j], (row ^ 32 * j) + VALUES - KEYS);
        }
        next.load(my);
        float top[2] = {};  // of queries g and g + 8
        u32 weights[2][4] = {};
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            if (upper && few) break;
            float peak = -INFINITY;
#pragma unroll
            for (int j = 0; j < KT; j++)
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    float& x = logits[j][2 * upper + l];
                    const int rank = KT * l + j;  // and 2 KT t: beyond K is nothing
                    if (rank + 6 * KT >= K && rank + 2 * KT * my.t >= K) x = -INFINITY;
                    peak = fmaxf(peak, x);
                }
            top[upper] = peak_of<4>(peak) * factor;
#pragma unroll
            for (int j = 0; j < KT; j++)
                weights[j / 2][j % 2 * 2 + upper] =
                    pack(power_of_two(logits[j][2 * upper] * factor - top[upper]),
                         power_of_two(logits[j][2 * upper + 1] * factor - top[upper]));
        }
        float c[8][4] = {}, sums[4] = {};
#pragma unroll
        for (int s = 0; 2 * s < KT; s++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                multiply(c[2 * j], weights[s], read[s][j][0], read[s][j][1]);
                multiply(c[2 * j + 1], weights[s], read[s][j][2], read[s][j][3]);
            }
#pragma unroll
        for (int s = 0; 2 * s < KT; s++) multiply(sums, weights[s], ONES, ONES);
        const float share[2] = {__fdividef(1.f, sums[0]), __fdividef(1.f, sums[2])};
        __syncwarp();
        if (few)
#pragma unroll
            for (int s = 0; s < 4; s += 2) {
                u32 r[4];
#pragma unroll
                for (int l = 0; l < 4; l++)
                    r[l] = pack(c[2 * s + l][0] * share[0], c[2 * s + l][1] * share[0]);
                store4(row ^ 32 * s, r);
            }
        else
#pragma unroll
            for (int s = 0; s < 4; s++) {
                u32 r[4];
#pragma unroll
                for (int l = 0; l < 4; l++) {
                    const float(&x)[4] = c[2 * s + l / 2];
                    r[l] = pack(x[l % 2 * 2] * share[l % 2], x[l % 2 * 2 + 1] * share[l % 2]);
                }
                store4(row ^ 32 * s, r);
            }
        if (my.t < 2 && my.g + 8 * my.t < left)
            my.softmax()[start.query] = make_float2(my.t ? top[1] : top[0], my.t ? sums[2] : sums[0]);
    }
}

// The output: both softmaxes as one, tiles of queries as they lie, in whole rows.
__device__ __forceinline__ void finish(
    const Thread& my, const Shares& shares, u16* out, int son, float* lse) {
    float routed[TURNS][2], shared[TURNS][2] = {};  // factors of queries g and g + 8
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        float sums[4] = {};
#pragma unroll
        for (int s = 0; SHARED && 16 * s < M; s++)
            multiply(sums, shares.weights[turn][s], ONES, ONES);
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const int n = 16 * (my.warp + WARPS * turn) + my.g + 8 * upper;
            if (n >= NP) break;
            const float2 own = my.softmax()[n];
            float top = own.x, total = own.y;
            if (SHARED) {
                top = fmaxf(top, shares.top[turn][upper]);
                routed[turn][upper] = own.y * power_of_two(own.x - top);
                shared[turn][upper] = power_of_two(shares.top[turn][upper] - top);
                total = routed[turn][upper] + shared[turn][upper] * sums[2 * upper];
                const float share = __fdividef(1.f, total);
                routed[turn][upper] *= share, shared[turn][upper] *= share;
            }
            if (SAVE && my.t == 0 && n < N) lse[my.head * N + n] = top + log_two(total);
        }
    }
    if (SHARED) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float c[TURNS][4][4] = {};
#pragma unroll
            for (int s = 0; 16 * s < M; s++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u32 r[4];
                    load4t(r, (chunk(my.here + READ, my.sub, my.side) ^ 32 * (2 * half + j)) +
                                  16 * s * ROW);
#pragma unroll
                    for (int turn = 0; turn < TURNS; turn++) {
                        multiply(c[turn][2 * j], shares.weights[turn][s], r[0], r[1]);
                        multiply(c[turn][2 * j + 1], shares.weights[turn][s], r[2], r[3]);
                    }
                }
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                const int i = my.warp + WARPS * turn;
                if (i >= NP / 16) break;
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    const Place row =
                        (chunk(my.here, my.sub, my.side) ^ 32 * (2 * half + s)) + 16 * i * ROW;
                    u32 r[4];
                    load4(r, row);
#pragma unroll
                    for (int l = 0; l < 4; l++) {
                        const float(&x)[4] = c[turn][2 * s + l / 2];
                        const float own = routed[turn][l % 2], other = shared[turn][l % 2];
                        r[l] = pack(unpack((u16)r[l]) * own + x[l % 2 * 2] * other,
                                    unpack((u16)(r[l] >> 16)) * own + x[l % 2 * 2 + 1] * other);
                    }
                    store4(row, r);
                }
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int i = my.warp + WARPS * turn;
        if (i >= NP / 16) break;
        uint4 rows[4];
#pragma unroll
        for (int j = 0; j < 4; j++)  // rows 4 j + corner: their last three bits are corner's or 4 more
            rows[j] = get16((chunk(my.here, my.corner, my.eighth) ^ 64 * (j % 2)) +
                            (16 * i + 4 * j) * ROW);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int n = 16 * i + 4 * j + my.corner;
            if (n < N) *(uint4*)(out + (long long)n * son + 8 * my.eighth) = rows[j];
        }
    }
}
