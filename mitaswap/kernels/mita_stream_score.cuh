// Landmarks, V~, scores of all keys, the nearest landmark of each query: what reads all rows once.
#pragma once
#include <mita_stream_parts.cuh>

constexpr int AHEAD = 2;  // tiles of 16 tokens

// Which tokens lie in which windows, as lanes hold them as the first operands of products, of 2 x 16
// windows and 16 tokens: register i's halves are bits 14 - i and 30 - i of a word, of 2.0.
struct Windows {
    u32 bits[ALL][32];
    float half_share[32];  // 1 / (2 tokens) of each window
};

__device__ constexpr Windows make_windows() {
    Windows out = {};
    const Inside inside = inside_windows();
    for (int e = 0; e < M; e++) out.half_share[e] = 0.5f / inside.tokens[e];
    for (int n = 0; n < N; n++)
        for (int e = 0; e < M; e++)
            if (inside.of[n] >> e & 1) {
                const int lane = e % 8 * 4 + n % 8 / 2;
                const int i = e / 16 * 4 + n % 16 / 8 * 2 + e % 16 / 8;
                out.bits[n / 16][lane] |= 1u << (n % 2 ? 30 - i : 14 - i);
            }
    return out;
}

static __device__ constexpr Windows windows = make_windows();

// The windows' indicators as weights of tokens.
struct Indicators {
    const u32* next;
    u32 words[AHEAD];

    __device__ Indicators(const Thread& my, int tile) : next(&windows.bits[tile][my.lane]) {}
    __device__ __forceinline__ void ask(int slot) {
        words[slot] = ask4(next);
        next += PARTS * 32;
    }
    __device__ __forceinline__ void get(int slot, u32 (&a)[2][4]) {
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 4][i % 4] = words[slot] << i & 0x40004000;
    }
};

// Numerators of the softmax over landmarks' scores, in the place of the scores.
struct Numerators {
    Place row[2];

    __device__ Numerators(const Thread& my, int tile) {
        for (int mt = 0; mt < 2; mt++)
            row[mt] = place(my.scores(min(16 * mt + my.sub, M - 1))) + 16 * my.side + 32 * tile;
    }
    __device__ __forceinline__ void ask(int) {}
    __device__ __forceinline__ void get(int, u32 (&a)[2][4]) {
#pragma unroll
        for (int mt = 0; 16 * mt < M; mt++) {
            load4(a[mt], row[mt]);
            row[mt] += PARTS * 32;
        }
    }
};

// c += weights times 16 rows, of which a lane has g and g + 8: 8 channels of 32.
__device__ __forceinline__ void add_rows(
    const u32 (&weights)[2][4], const uint4 (&rows)[2], float (&c)[2][4][4]) {
    const u32 words[2][4] = {{rows[0].x, rows[0].y, rows[0].z, rows[0].w},
                             {rows[1].x, rows[1].y, rows[1].z, rows[1].w}};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 first = transposed(words[0][i]), second = transposed(words[1][i]);
#pragma unroll
        for (int mt = 0; 16 * mt < M; mt++) multiply(c[mt][i], weights[mt], first, second);
    }
}

// Sums of all rows with the weights of each landmark: parts of them, of some tiles of tokens a
// warp, and half of the channels.
template <class Weights>
__device__ __forceinline__ void sum_rows(const Thread& my, const u16* from, int stride) {
    const int half = my.warp & 1, part = my.warp >> 1;
    float c[2][4][4] = {};
    uint4 rows[AHEAD][2];  // these are on their way
    u32 a[2][4];
    Weights weights(my, part);
    from += 32 * half + 8 * my.t + (16 * part + my.g) * stride;
    const auto ask = [&](int slot) {
        weights.ask(slot);
        rows[slot][0] = ask16((const uint4*)from);
        rows[slot][1] = ask16((const uint4*)(from + 8 * stride));
        from += 16 * PARTS * stride;
    };
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++)
        if (part + PARTS * slot < N / 16) ask(slot);
#pragma unroll 1
    for (int first = part; first < N / 16; first += PARTS * AHEAD)
#pragma unroll
        for (int slot = 0; slot < AHEAD; slot++) {
            if (first + PARTS * slot >= N / 16) break;
            weights.get(slot, a);
            add_rows(a, rows[slot], c);
            if (first + PARTS * (slot + AHEAD) < N / 16) ask(slot);
        }
    if (N % 16 && part == N / 16 % PARTS) {  // the last, not a whole one
        weights.ask(0);
        rows[0][0] = rows[0][1] = {};
        if (my.g < N % 16) rows[0][0] = ask16((const uint4*)from);
        if (my.g + 8 < N % 16) rows[0][1] = ask16((const uint4*)(from + 8 * stride));
        weights.get(0, a);
        add_rows(a, rows[0], c);
    }
#pragma unroll
    for (int mt = 0; 16 * mt < M; mt++)
#pragma unroll
        for (int l = 0; l < 4; l += 2) {
            const int e = 16 * mt + my.g + 4 * l;
            if (e >= M) continue;
            float4* to = (float4*)(my.parts(e) + D * part + 32 * half + 8 * my.t);
            to[0] = make_float4(c[mt][0][l], c[mt][0][l + 1], c[mt][1][l], c[mt][1][l + 1]);
            to[1] = make_float4(c[mt][2][l], c[mt][2][l + 1], c[mt][3][l], c[mt][3][l + 1]);
        }
}

// The sum of all parts: channels 4 f ... 4 f + 3 of a landmark, times its share.
__device__ __forceinline__ float4 whole(const Thread& my, int e, int f, float share) {
    float4 sum = {};
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const float4 x = ((const float4*)my.parts(e))[D / 4 * part + f];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    return make_float4(sum.x * share, sum.y * share, sum.z * share, sum.w * share);
}

// Landmarks, as terms of halves, from their parts.
__device__ __forceinline__ void write_landmarks(const Thread& my, u16* marks, float* exact) {
    for (int i = my.thread; i < M * (D / 4); i += THREADS) {
        const int e = i / (D / 4), f = i % (D / 4);
        const float4 x = whole(my, e, f, windows.half_share[e]);
        const Words to(my.here + MARKS, e, f);
        const u32 low = put_terms<MARK_BYTES>(to.first, x.x, x.y);
        const u32 high = put_terms<MARK_BYTES>(to.second, x.z, x.w);
        const long long at = (my.head * M + e) * D + 4 * f;
        if (SAVE) *(float4*)(exact + at) = x;
        if (SAVE) *(uint2*)(marks + at) = {low, high};
    }
}

// V~ from its parts.
__device__ __forceinline__ void write_values(const Thread& my, u16* values) {
    for (int i = my.thread; i < M * (D / 4); i += THREADS) {
        const int e = i / (D / 4), f = i % (D / 4);
        const float4 x = whole(my, e, f, 1.f / my.sums()[e]);
        const Place to = Thread::in_row(my.here + READ, e, f / 2) + f % 2 * 8;
        const u32 low = pack(x.x, x.y), high = pack(x.z, x.w);
        put(to, low);
        put(to + 4, high);
        if (SAVE) *(uint2*)(values + (my.head * M + e) * D + 4 * f) = {low, high};
    }
}

// Four tiles of 8 rows; those that are not there are the last once more.
struct Rows {
    Row tiles[4];

    __device__ __forceinline__ void ask(const Thread& my, const u16* from, int stride, int four) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            tiles[i].ask(from, min(32 * four + 8 * i + my.g, N - 1), stride);
    }
};

// Products of landmarks g, g + 8 and so on with these rows: the s-th 16 channels, of one term.
template <int s>
__device__ __forceinline__ void times_channels(
    const Place (&marks)[2], int term, const Rows& x, float (&c)[2][4][4]) {
#pragma unroll
    for (int mt = 0; 16 * mt < M; mt++) {
        u32 a[4];
        load4<32 * s>(a, marks[mt] + term * MARK_BYTES);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4& b = x.tiles[i].half[s / 2];
            multiply(c[mt][i], a, s % 2 ? b.z : b.x, s % 2 ? b.w : b.y);
        }
    }
}

__device__ __forceinline__ void times_landmarks(
    const Place (&marks)[2], const Rows& x, float (&c)[2][4][4]) {
#pragma unroll
    for (int term = TERMS - 1; term >= 0; term--) {
        times_channels<0>(marks, term, x, c);
        times_channels<1>(marks, term, x, c);
        times_channels<2>(marks, term, x, c);
        times_channels<3>(marks, term, x, c);
        if (!BF16 && term)
#pragma unroll
            for (int i = 0; i < 32; i++) c[i / 16][i / 4 % 4][i % 4] *= 1.f / 2048.f;
    }
}

// Of `count` columns of scores, and as many after them, the better ones of two lanes, of equals the
// first landmark: who has the lane's bit keeps the later columns.
template <int count>
__device__ __forceinline__ void better(float (&best)[8], int (&expert)[8], bool later, int lane) {
#pragma unroll
    for (int i = 0; i < count; i++) {
        const float x = later ? best[i] : best[i + count];
        const int e = later ? expert[i] : expert[i + count];
        if (later) best[i] = best[i + count], expert[i] = expert[i + count];
        const float other = __shfl_xor_sync(LANES, x, lane);
        const int its = __shfl_xor_sync(LANES, e, lane);
        if (other > best[i] || (other == best[i] && its < expert[i])) best[i] = other, expert[i] = its;
    }
}

// Of each query the nearest landmark, of equals the first; and how many have each.
__device__ __forceinline__ void write_routes(
    const Thread& my, const float (&c)[2][4][4], int four, int* route) {
    float best[8];
    int expert[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {  // query 8 (i / 2) + 2 t + i % 2
        best[i] = -INFINITY, expert[i] = 0;
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const int e = 8 * l + my.g;
            const float x = c[l / 2][i / 2][l % 2 * 2 + i % 2];
            if (8 * l < M && x > best[i] && (8 * l + 8 <= M || e < M)) best[i] = x, expert[i] = e;
        }
    }
    better<4>(best, expert, my.lane & 16, 16);
    better<2>(best, expert, my.lane & 8, 8);
    better<1>(best, expert, my.lane & 4, 4);
    const int n = 32 * four + (my.g >> 1) * 8 + 2 * my.t + (my.g & 1);
    if (n >= N) return;
    my.routes()[n] = (u8)expert[0];
    one_more(my.counts() + expert[0]);
    if (SAVE) route[my.head * N + n] = expert[0];
}

// Nearest landmarks of all queries, 32 at a time.
__device__ __forceinline__ void choose_experts(
    const Thread& my, const u16* q, int stride, int* route) {
    Place marks[2];
    for (int mt = 0; mt < 2; mt++)
        marks[mt] = Thread::in_row(my.here + MARKS, min(16 * mt + my.sub, M - 1), my.side);
    q += 8 * my.t;
    Rows x;
    int i = my.warp;
    if (32 * i < N) x.ask(my, q, stride, i);
#pragma unroll 1
    for (; 32 * i < N; i += WARPS) {
        float c[2][4][4] = {};
        times_landmarks(marks, x, c);
        if (32 * (i + WARPS) < N) x.ask(my, q, stride, i + WARPS);
        write_routes(my, c, i, route);
    }
}

// Scores of all keys, unscaled, 16 at a time: a warp keeps half of the landmarks.
__device__ __forceinline__ void score(const Thread& my, const u16* k, int stride) {
    const int mt = my.warp & 1;
    if (16 * mt >= M) return;
    u32 a[TERMS][4][4];
    const Place mark = Thread::in_row(my.here + MARKS, min(16 * mt + my.sub, M - 1), my.side);
#pragma unroll
    for (int term = 0; term < TERMS; term++)
#pragma unroll
        for (int s = 0; s < 4; s++) load4(a[term][s], (mark ^ 32 * s) + term * MARK_BYTES);
    k += 8 * my.t;
    Row x[2][2];  // the next ones are on their way
    const auto ask = [&](int slot, int tile) {
        if (tile >= ALL) return;
#pragma unroll
        for (int i = 0; i < 2; i++)  // there is room for scores of the last once more
            x[slot][i].ask(k, min(16 * tile + 8 * i + my.g, N - 1), stride);
    };
    const int begin = (WARPS - 1 - my.warp) >> 1;  // who had fewer queries has more keys
    ask(0, begin);
#pragma unroll 1
    for (int first = begin; first < ALL; first += WARPS)
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const int tile = first + WARPS / 2 * slot;
            if (tile >= ALL) break;
            ask(slot ^ 1, tile + WARPS / 2);
            float c[2][2][4] = {};  // of first terms, of the others
#pragma unroll
            for (int s = 0; s < 4; s++)
#pragma unroll
                for (int term = TERMS - 1; term >= 0; term--)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint4& b = x[slot][i].half[s / 2];
                        multiply(c[i][term > 0], a[term][s], s % 2 ? b.z : b.x, s % 2 ? b.w : b.y);
                    }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int n = 16 * tile + 8 * i + 2 * my.t;
                if (n >= N) continue;
                float y[4];
#pragma unroll
                for (int l = 0; l < 4; l++)
                    y[l] = c[i][0][l] + c[i][1][l] * (BF16 ? 1.f : 1.f / 2048.f);
                const int e = 16 * mt + my.g;
                if (e < M) *(float2*)(my.scores(e) + n) = make_float2(y[0], y[1]);
                if (e + 8 < M) *(float2*)(my.scores(e + 8) + n) = make_float2(y[2], y[3]);
            }
        }
}
