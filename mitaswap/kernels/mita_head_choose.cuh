// The K keys of each expert, the softmax of its landmark's scores, the queries sorted by expert.
#pragma once
#include <mita_head_parts.cuh>

constexpr int EACH = NP / 8;   // scores that each of 8 lanes holds of a row
constexpr int MOST = 32;       // so many keys at most are chosen first, then K of them
constexpr int QUERIES = (N + 31) / 32;  // queries that a lane sorts

// The K largest of a row of scores, of equals the first, as bits: lane j of 8 has keys j + 8 i. By
// halving the range of order keys, and then that of positions of scores with the last one.
__device__ __noinline__ u32 surely_largest(const float* scores, int lane) {
    const int j = lane & 7;
    int least = 0x7fffffff, most = (int)0x80000000;
    for (int i = 0; i < EACH; i++)
        if (8 * i + j < N) {
            least = min(least, order_key(scores[8 * i + j]));
            most = max(most, order_key(scores[8 * i + j]));
        }
#pragma unroll
    for (int i = 4; i; i >>= 1) {
        least = min(least, __shfl_xor_sync(LANES, least, i));
        most = max(most, __shfl_xor_sync(LANES, most, i));
    }
    while (__ballot_sync(LANES, least < most)) {
        const int half = (least | most) - ((least ^ most) >> 1);  // half way up, no overflow
        int sum = 0;
        for (int i = 0; i < EACH; i++) sum += 8 * i + j < N && order_key(scores[8 * i + j]) >= half;
        if (sum_of<8>(sum) >= K) least = half;
        else most = max(least, half - 1);
    }
    u32 more = 0, ties = 0, taken = 0;
    for (int i = 0; i < EACH; i++) {
        more |= (u32)(8 * i + j < N && order_key(scores[8 * i + j]) > least) << i;
        ties |= (u32)(8 * i + j < N && order_key(scores[8 * i + j]) == least) << i;
    }
    const int room = K - sum_of<8>(__popc(more));
    int end = 0;  // the most that keeps the ties before it at `room`
    for (int step = 256; step; step >>= 1) {
        u32 some = 0;
        for (int i = 0; i < EACH; i++) some |= (u32)(8 * i + j < end + step) << i;
        if (sum_of<8>(__popc(some & ties)) <= room) end += step, taken = some & ties;
    }
    return more | taken;
}

// Between K and MOST of the largest of these scores x, which are -inf beyond N; if that many are not
// found soon, the K largest.
__device__ __forceinline__ u32 largest(
    const float (&x)[EACH], const float* scores, float peak, int lane) {
    const int j = lane & 7;
    float sums[2] = {}, squares[2] = {};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const bool ok = 8 * i + 8 <= N || 8 * i + j < N;
        sums[i % 2] += ok ? x[i] : 0.f;
        squares[i % 2] += ok ? x[i] * x[i] : 0.f;
    }
    const float mean = sum_of<8>(sums[0] + sums[1]) / N;
    const float spread = root(fmaxf(sum_of<8>(squares[0] + squares[1]) / N - mean * mean, 0.f));
    // count(low) >= K > count(high), most likely: narrow the range until few enough are left above
    constexpr float WANTED = 0.5f * (K + MOST);
    float low = N > MOST ? mean - 4.f * spread : -INFINITY, found = N;
    float high = key_value(order_key(peak) + 1), above = 0.f;
    float guess = mean + spread * (AIM / 1000.f);
    bool open = N > MOST;
    for (int turn = 0; turn < 20; turn++) {
        if (!(guess > low && guess < high)) guess = 0.5f * low + 0.5f * high;
        open = open && guess > low && guess < high;
        if (!__ballot_sync(LANES, open)) break;
        float counts[4] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++) counts[i % 4] += at_least(x[i], guess);
        const float count = sum_of<8>((counts[0] + counts[1]) + (counts[2] + counts[3]));
        if (open && count >= K) low = guess, found = count;
        if (open && count < K) high = guess, above = count;
        open = open && found > MOST;
        if (found < N && above > 0.f) {
            const float share = __fdividef(found - WANTED, found - above);
            guess = low + fminf(fmaxf(share, 0.08f), 0.92f) * (high - low);
        } else {
            guess += (count - WANTED) * spread * (STEP / 1000.f);
        }
    }
    u32 chosen = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        chosen |= (u32)(x[i] >= low && (8 * i + 8 <= N || 8 * i + j < N)) << i;
    const int count = sum_of<8>(__popc(chosen));
    open = count < K || count > MOST;
    // many equals, too wide a range, or no numbers
    if (__ballot_sync(LANES, open)) {
        const u32 surely = surely_largest(scores, lane);
        if (open) chosen = surely;
    }
    return chosen;
}

// Of a list of MOST keys or fewer, K remain: those with the largest scores, of equals the first. Lane
// j of 8 has positions 4 j + i of `count`; which of its own remain is bit i.
__device__ __noinline__ u32 surely_remain(const float* scores, const u8* at, int count, int lane) {
    constexpr int gone = 0x7fffffff;
    const int j = lane & 7;
    int keys[4], places[4];
    for (int i = 0; i < 4; i++) {
        const bool there = 4 * j + i < count;
        places[i] = there ? at[4 * j + i] : 0;
        keys[i] = there ? min(order_key(scores[4 * j + i]), gone - 1) : gone;
    }
    for (int over = count - K; __ballot_sync(LANES, over > 0); over--) {
        int least = min(min(keys[0], keys[1]), min(keys[2], keys[3])), last = -1;
#pragma unroll
        for (int l = 4; l; l >>= 1) least = min(least, __shfl_xor_sync(LANES, least, l));
        for (int i = 0; i < 4; i++) last = max(last, keys[i] == least ? places[i] : -1);
#pragma unroll
        for (int l = 4; l; l >>= 1) last = max(last, __shfl_xor_sync(LANES, last, l));
        for (int i = 0; i < 4; i++)
            if (over > 0 && keys[i] == least && places[i] == last) keys[i] = gone;
    }
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (u32)(keys[i] < gone) << i;
    return out;
}

// The same, by counting for each how many are larger; `remain` of them if equals are among them.
__device__ __forceinline__ u32 remaining(const float* scores, const u8* at, int count, int lane) {
    const int j = lane & 7;
    const float4 own = ((const float4*)scores)[j];
    const float x[4] = {own.x, own.y, own.z, own.w};
    float larger[4] = {};
#pragma unroll
    for (int l = 0; l < MOST / 4; l++) {
        const float4 others = ((const float4*)scores)[l];
#pragma unroll
        for (int i = 0; i < 4; i++)
            larger[i] += (at_least(others.x, x[i]) + at_least(others.y, x[i])) +
                         (at_least(others.z, x[i]) + at_least(others.w, x[i]));
    }
    u32 out = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) out |= (u32)(larger[i] <= K && 4 * j + i < count) << i;
    if (__ballot_sync(LANES, sum_of<8>(__popc(out)) != K)) out = surely_remain(scores, at, count, lane);
    return out;
}

// The keys of four experts a warp, and, in the place of their scores, numerators of the softmax.
__device__ __forceinline__ void choose_keys(
    const Thread& my, float factor, int* members, float* probe_lse) {
    if (4 * my.warp >= M) return;
    const int e = min(4 * my.warp + my.corner, M - 1);
    const bool mine = 4 * my.warp + my.corner < M;
    float x[EACH], peak = -INFINITY;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const float score = my.scores(e)[8 * i + my.eighth];
        x[i] = 8 * i + 8 <= N || 8 * i + my.eighth < N ? score : -INFINITY;
        peak = fmaxf(peak, x[i]);
    }
    peak = peak_of<8>(peak);
    u32 chosen = largest(x, my.scores(e), peak, my.lane);
    int position = sum_before<8>(__popc(chosen), my.lane);
    const int count = __shfl_sync(LANES, position + __popc(chosen), my.lane | 7);
    float* scores = my.scores(e);
    u8* list = my.list(e);
    __syncwarp();  // scores are read
    if (mine) {
        // those that are not there are less than all
        ((float4*)scores)[my.eighth] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (mine && chosen >> i & 1) {
            list[position] = (u8)(8 * i + my.eighth);
            scores[position] = x[i];
            position++;
        }
    __syncwarp();
    const u32 four = ((const u32*)list)[my.eighth];
    const u32 remain = remaining(scores, list, count, my.lane);
    __syncwarp();
    // Listed by their last three bits, neighbours in different eights: keys of one eight hardly ever
    // share banks. Rank r is the (r / KT)th of the (r % KT)th eight, 4 (r / KT) + r % KT in the list.
    int rank = sum_before<8>(__popc(remain), my.lane);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (remain >> i & 1) {
            const int at = four >> 8 * i & 255;
            if (mine) list[rank / KT * 4 + rank % KT] = (u8)at;
            if (SAVE && mine) members[(my.head * M + e) * K + rank] = at;
            rank++;
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {  // those that are too many are the first once more
        if (i < KT && KT * 7 + i < K) continue;
        const bool there = i < KT && KT * my.eighth + i < K;
        if (mine && !there) list[4 * my.eighth + i] = list[i < KT ? i : 0];
    }
    if (!SHARED) return;
    u16* weights = (u16*)scores + my.eighth;
    const int other = (e >> 2 & 1) * 8;  // chunks change places, as rows 4 apart share banks
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const float p = power_of_two(x[i] * factor - peak * factor);
        sum += p;
        if (mine) weights[8 * i + (i % 2 ? -other : other)] = (u16)pack(p, 0.f);
    }
    sum = sum_of<8>(sum);
    if (mine && my.eighth == 0) {
        my.sums()[e] = sum;
        if (SAVE) probe_lse[my.head * M + e] = (peak * factor + log_two(sum)) / LOG2E;
    }
}

// The queries sorted by expert, by one warp, and tiles of 16 of them.
__device__ __forceinline__ void sort_queries(const Thread& my, int* starts, int* order) {
    const int lane = my.lane;
    int* counts = my.counts();
    int rank[QUERIES];
    counts[lane] = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
        const int n = lane + 32 * i, e = n < N ? my.routes()[n] : 255;
        const u32 same = __match_any_sync(LANES, e);
        rank[i] = (n < N ? counts[e] : 0) + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (n < N && same >> lane == 1) counts[e] = rank[i] + 1;
        __syncwarp();
    }
    const int count = counts[lane], begin = sum_before<32>(count, lane);
    const int parts = (count + 15) / 16, before = sum_before<32>(parts, lane);
    counts[lane] = begin;
    for (int i = 0; i < parts; i++)
        my.tiles()[before + i] = lane | (begin + 16 * i) << 8 | min(16, count - 16 * i) << 16;
    if (lane == 31) my.tiles()[MOST_TILES] = before + parts;
    if (SAVE && lane < M) starts[my.head * (M + 1) + lane] = begin;
    if (SAVE && lane == 0) starts[my.head * (M + 1) + M] = N;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
        const int n = lane + 32 * i;
        if (n >= N) break;
        const int to = counts[my.routes()[n]] + rank[i];
        my.sorted()[to] = (u8)n;
        if (SAVE) order[my.head * N + to] = n;
    }
}
