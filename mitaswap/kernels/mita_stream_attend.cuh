// The attention of all queries, some of one expert at a time.
#pragma once
#include <mita_stream_parts.cuh>

// Begin to copy the keys and values of an expert to where a warp has room for them.
__device__ __forceinline__ void gather(
    const Thread& my, Place to, int e, const u16* k, int skn, const u16* v, int svn) {
    const u16* list = my.list(e);
#pragma unroll 2
    for (int i = 0; i < K; i += 4) {
        const int r = i + my.corner;
        if (i + 4 > K && r >= K) break;
        const int n = list[r];
        const Place at = Thread::in_row(to, r, my.eighth);
        copy16(at, k + n * skn + 8 * my.eighth, true);
        copy16(at + K * ROW, v + n * svn + 8 * my.eighth, true);
    }
}

// 16 queries as first operands of products: rows g and g + 8. What is 0, but not known to be, keeps
// the compiler from moving them into place once more for each product.
__device__ __forceinline__ void as_first(const Row (&x)[2], u32 (&a)[4][4], u32 zero) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 &lower = x[0].half[half], &upper = x[1].half[half];
        u32(&first)[4] = a[2 * half], (&second)[4] = a[2 * half + 1];
        first[0] = lower.x, first[1] = upper.x, first[2] = lower.y, first[3] = upper.y;
        second[0] = lower.z, second[1] = upper.z, second[2] = lower.w, second[3] = upper.w;
#pragma unroll
        for (int i = 0; i < 4; i++) first[i] |= zero, second[i] |= zero;
    }
}

// Products of 16 queries with an expert's keys.
__device__ __forceinline__ void times_keys(
    const Thread& my, const u32 (&a)[4][4], Place keys, float (&c)[KT][4]) {
    const Place usual = Thread::in_row(keys, my.g, my.t);
    const Place last = Thread::in_row(keys, min(8 * (KT - 1) + my.g, K - 1), my.t);
#pragma unroll
    for (int j = 0; j < KT; j++) {
        const Place row = j < KT - 1 ? usual + 8 * j * ROW : last;
        const uint4 b = get16(row);
        multiply(c[j], a[0], b.x, b.y);
        multiply(c[j], a[1], b.z, b.w);
    }
#pragma unroll
    for (int j = 0; j < KT; j++) {
        const uint4 b = get16<64>(j < KT - 1 ? usual + 8 * j * ROW : last);
        multiply(c[j], a[2], b.x, b.y);
        multiply(c[j], a[3], b.z, b.w);
    }
}

// And with the landmarks.
__device__ __forceinline__ void times_marks(
    const Thread& my, const u32 (&a)[4][4], float (&c)[MT][4]) {
    const Place marks = my.here + MARKS;
    const Place usual = Thread::in_row(marks, my.eighth, my.corner);
    const Place last = Thread::in_row(marks, min(8 * (MT - 1) + my.eighth, M - 1), my.corner);
    u32 b[4];
#pragma unroll
    for (int j = 0; j < MT; j++) {
        load4(b, j < MT - 1 ? usual + 8 * j * ROW : last);
        multiply(c[j], a[0], b[0], b[1]);
        multiply(c[j], a[1], b[2], b[3]);
    }
#pragma unroll
    for (int j = 0; j < MT; j++) {
        load4<64>(b, j < MT - 1 ? usual + 8 * j * ROW : last);
        multiply(c[j], a[2], b[0], b[1]);
        multiply(c[j], a[3], b[2], b[3]);
    }
}

// The numerators of their softmax as operands, from products c of query g or g + 8.
template <int COUNT>
__device__ __forceinline__ void numerators_of(
    const Thread& my, const float (&c)[(COUNT + 7) / 8][4], int upper, float factor, float top,
    u32 (&weights)[2][4]) {
#pragma unroll
    for (int j = 0; j < (COUNT + 7) / 8; j++) {
        float w[2];
#pragma unroll
        for (int l = 0; l < 2; l++) {
            w[l] = power_of_two(c[j][2 * upper + l] * factor - top);
            if (8 * j + 8 > COUNT && 8 * j + 2 * my.t + l >= COUNT) w[l] = 0.f;
        }
        weights[j / 2][j % 2 * 2 + upper] = pack(w[0], w[1]);
    }
}

template <int COUNT>
__device__ __forceinline__ float largest_of(
    const Thread& my, const float (&c)[(COUNT + 7) / 8][4], int upper) {
    float peak = -INFINITY;
#pragma unroll
    for (int j = 0; j < (COUNT + 7) / 8; j++)
#pragma unroll
        for (int l = 0; l < 2; l++)
            if (8 * j + 8 <= COUNT || 8 * j + 2 * my.t + l < COUNT)
                peak = fmaxf(peak, c[j][2 * upper + l]);
    return peak;
}

// c += weights times channels of some rows in shared memory: chunk `flip` / 16 and the next.
template <u32 flip>
__device__ __forceinline__ void add_channels(const u32 (&weights)[4], Place row, float (&c)[8][4]) {
    u32 r[4];
    load4t<flip>(r, row);
    multiply(c[flip / 16], weights, r[0], r[1]);
    multiply(c[flip / 16 + 1], weights, r[2], r[3]);
}

// c += weights times some rows in shared memory, of which there are COUNT; sums of weights as well.
template <int COUNT>
__device__ __forceinline__ void add_values(
    const Thread& my, const u32 (&weights)[2][4], Place rows, float (&c)[8][4], float (&sums)[4]) {
#pragma unroll
    for (int s = 0; 16 * s < COUNT; s++) {
        const Place row = Thread::in_row(rows, min(16 * s + my.sub, COUNT - 1), my.side);
        multiply(sums, weights[s], ONES, ONES);
        add_channels<0>(weights[s], row, c);
        add_channels<32>(weights[s], row, c);
        add_channels<64>(weights[s], row, c);
        add_channels<96>(weights[s], row, c);
    }
}

// A query's output, from what four lanes have: 8 bytes a lane of each two chunks, from `to` on.
__device__ __forceinline__ void write_row(
    const Thread& my, const float (&c)[8][4], int upper, float share, u16* to, bool ok) {
    const bool odd = my.t & 1;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const u32 low = pack(c[j][2 * upper] * share, c[j][2 * upper + 1] * share);
        const u32 high = pack(c[j + 1][2 * upper] * share, c[j + 1][2 * upper + 1] * share);
        const u32 other = __shfl_xor_sync(LANES, odd ? low : high, 1);
        const uint2 both = {odd ? other : low, odd ? high : other};
        if (ok) *(uint2*)(to + 8 * j) = both;
    }
}

// Whoever is done takes the next item, whose rows are on their way while it has another.
__device__ __forceinline__ void attend(
    const Thread& my, const u16* q, int sqn, const u16* k, int skn, const u16* v, int svn, u16* out,
    int son, float* lse, float factor, float again) {
    const int count = my.items()[MOST_ITEMS];
    const Place room = my.here + my.warp * STAGES * GATHERED;
    const u32 zero = sqn & 7;  // rows are read 16 bytes at a time
    q += 8 * my.t;
    out += 8 * (my.t & 1) + 4 * (my.t >> 1);
    const auto take = [&] {
        const int which = my.take(ITEM);
        return which < count ? my.items()[which] : -1;
    };
    int item = take();
    if (STAGES > 1 && item >= 0) gather(my, room, item & 255, k, skn, v, svn);
    commit();
#pragma unroll 1
    for (int stage = 0; item >= 0; stage ^= STAGES - 1) {
        const Place keys = room + stage * GATHERED;
        const u16* queries = my.sorted() + (item >> 8 & 4095);
        const int all = item >> 20;
        int n[2] = {queries[min(my.g, all - 1)], queries[min(my.g + 8, all - 1)]};
        Row rows[2];
#pragma unroll
        for (int i = 0; i < 2; i++) rows[i].ask(q, n[i], sqn);
        int next = -1;
        if (STAGES > 1) {
            next = take();
            if (next >= 0)
                gather(my, room + (stage ^ 1) * GATHERED, next & 255, k, skn, v, svn);
            commit();
            wait<1>();
        } else {
            gather(my, keys, item & 255, k, skn, v, svn);
            commit();
            wait<0>();
        }
        __syncwarp();
#pragma unroll 1
        for (int first = 0; first < all; first += 16) {
            float routed[KT][4] = {}, shared[MT][4] = {};
            u32 a[4][4];
            as_first(rows, a, zero);
            const int now[2] = {n[0], n[1]};
            if (first + 16 < all)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    n[i] = queries[min(first + 16 + my.g + 8 * i, all - 1)];
                    rows[i].ask(q, n[i], sqn);
                }
            times_keys(my, a, keys, routed);
            if (SHARED) times_marks(my, a, shared);
            u32 weights[2][4] = {}, others[2][4] = {};
            float top[2];
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                float peak = largest_of<K>(my, routed, upper) * factor;
                if (SHARED) peak = fmaxf(peak, largest_of<M>(my, shared, upper) * again);
                top[upper] = peak_of<4>(peak);
                numerators_of<K>(my, routed, upper, factor, top[upper], weights);
                if (SHARED) numerators_of<M>(my, shared, upper, again, top[upper], others);
            }
            float c[8][4] = {}, sums[4] = {};
            add_values<K>(my, weights, keys + K * ROW, c, sums);
            if (SHARED) add_values<M>(my, others, my.here + READ, c, sums);
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                const bool ok = first + my.g + 8 * upper < all;
                const int at = now[upper];
                write_row(my, c, upper, __fdividef(1.f, sums[2 * upper]), out + at * son, ok);
                if (SAVE && ok && my.t == 0)
                    lse[my.head * N + at] = top[upper] + log_two(sums[2 * upper]);
            }
        }
        __syncwarp();  // who reads these rows is done with them
        item = STAGES > 1 ? next : take();
    }
    wait<0>();
}
