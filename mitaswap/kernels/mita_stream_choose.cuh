// The K keys of each expert, the softmax of its landmark's scores, the queries sorted by expert. A
// warp has a row of scores in its registers, 4 neighbours a lane.
#pragma once
#include <mita_stream_parts.cuh>

constexpr int FOURS = (N + 127) / 128, EACH = 4 * FOURS;  // scores that a lane holds of a row

// Position of the i-th score of a lane; whether all lanes' are there.
__device__ __forceinline__ int position(int i, int lane) { return i / 4 * 128 + 4 * lane + i % 4; }
__device__ constexpr bool there(int i) { return i / 4 * 128 + 128 <= N; }

// List the K largest of a row of scores, of equals the first. By halving the range of order keys.
__device__ __noinline__ void list_surely(const float* scores, u16* list, int lane) {
    int least = 0x7fffffff, most = (int)0x80000000;
    for (int n = lane; n < N; n += 32) {
        least = min(least, order_key(scores[n]));
        most = max(most, order_key(scores[n]));
    }
    least = least_of(least), most = most_of(most);
    while (least < most) {
        const int half = (least | most) - ((least ^ most) >> 1);  // half way up, no overflow
        int sum = 0;
        for (int n = lane; n < N; n += 32) sum += order_key(scores[n]) >= half;
        if (total_of(sum) >= K) least = half;
        else most = max(least, half - 1);
    }
    int more = 0;
    for (int n = lane; n < N; n += 32) more += order_key(scores[n]) > least;
    const int room = K - total_of(more);  // for equals
    int listed = 0, ties = 0;
    const u32 before = (1u << lane) - 1;
    for (int first = 0; first < N; first += 32) {
        const int n = first + lane, key = n < N ? order_key(scores[n]) : 0;
        const u32 tied = __ballot_sync(LANES, n < N && key == least);
        const bool take = n < N && (key > least ||
                                    (key == least && ties + __popc(tied & before) < room));
        const u32 taken = __ballot_sync(LANES, take);
        if (take) list[listed + __popc(taken & before)] = (u16)n;
        listed += __popc(taken);
        ties += __popc(tied);
    }
}

// A number that between K and MOST of these scores x, which are -inf beyond N, are not less than; if
// none is found soon, another number.
__device__ __forceinline__ float threshold(const float (&x)[EACH], float peak, int lane) {
    if (N <= MOST) return -INFINITY;
    float sums[2] = {}, squares[2] = {};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const bool ok = there(i) || position(i, lane) < N;
        sums[i % 2] += ok ? x[i] : 0.f;
        squares[i % 2] += ok ? x[i] * x[i] : 0.f;
    }
    const float mean = sum_of<32>(sums[0] + sums[1]) / N;
    const float spread = root(fmaxf(sum_of<32>(squares[0] + squares[1]) / N - mean * mean, 0.f));
    // count(low) >= K > count(high), most likely: narrow the range until few enough are left above
    constexpr float WANTED = 0.5f * (K + MOST);
    float low = mean - 4.f * spread, found = N;
    float high = key_value(order_key(peak) + 1), above = 0.f;
    float guess = mean + spread * (AIM / 1000.f);
    for (int turn = 0; turn < 20; turn++) {
        if (!(guess > low && guess < high)) guess = 0.5f * low + 0.5f * high;
        if (!(guess > low && guess < high)) break;
        float counts[4] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++) counts[i % 4] += at_least(x[i], guess);
        const float count = total_of((int)((counts[0] + counts[1]) + (counts[2] + counts[3])));
        if (count >= K) low = guess, found = count;
        else high = guess, above = count;
        if (found <= MOST) break;
        if (found < N && above > 0.f) {
            const float share = __fdividef(found - WANTED, found - above);
            guess = low + fminf(fmaxf(share, 0.08f), 0.92f) * (high - low);
        } else {
            guess += (count - WANTED) * spread * (STEP / 1000.f);
        }
    }
    return low;
}

// Of `count` keys, MOST or fewer, one a lane, K remain: those with the largest scores, of equals the
// first. Whether a lane's, of position `at`, does.
__device__ __forceinline__ bool remains(float score, int at, int count, int lane) {
    constexpr int gone = 0x7fffffff;
    int key = lane < count ? min(order_key(score), gone - 1) : gone;
    for (int over = count - K; over > 0;) {
        const int least = least_of(key);
        const int equals = __popc(__ballot_sync(LANES, key == least));
        const int last = equals > over ? most_of(key == least ? at : -1) : at;
        if (key == least && at == last) key = gone;
        over -= equals > over ? 1 : equals;
    }
    return key < gone;
}

// The keys of one expert, and, in the place of its scores, numerators of the softmax.
__device__ __forceinline__ void choose_keys(
    const Thread& my, int e, float factor, int* members, float* probe_lse) {
    const int lane = my.lane;
    float* scores = my.scores(e);
    u16* list = my.list(e);
    float x[EACH], peaks[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        float4 four = {};
        if (there(4 * i) || position(4 * i, lane) < N) four = ((const float4*)scores)[32 * i + lane];
        const float own[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int l = 0; l < 4; l++) {
            x[4 * i + l] = there(4 * i) || position(4 * i + l, lane) < N ? own[l] : -INFINITY;
            peaks[l] = fmaxf(peaks[l], x[4 * i + l]);
        }
    }
    const float peak = peak_of<32>(fmaxf(fmaxf(peaks[0], peaks[1]), fmaxf(peaks[2], peaks[3])));
    const float low = threshold(x, peak, lane);
    u32 chosen[(EACH + 31) / 32] = {};
    int own = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        chosen[i / 32] |= (u32)(x[i] >= low && (there(i) || position(i, lane) < N)) << i % 32;
#pragma unroll
    for (int i = 0; 32 * i < EACH; i++) own += __popc(chosen[i]);
    int place = sum_before<32>(own, lane);
    int count = __shfl_sync(LANES, place + own, 31);
    if (count >= K && count <= MOST) {
#pragma unroll
        for (int i = 0; 32 * i < EACH; i++)
            for (u32 left = chosen[i]; left; left &= left - 1)
                list[place++] = (u16)position(32 * i + __popc((left & 0u - left) - 1), lane);
    } else {  // many equals, too wide a range, or no numbers
        list_surely(scores, list, lane);
        count = K;
    }
    __syncwarp();
    const int at = list[min(lane, count - 1)];
    const bool kept = remains(scores[at], at, count, lane);
    const u32 all = __ballot_sync(LANES, kept);
    __syncwarp();  // scores and the list are read
    if (kept) {
        const int rank = __popc(all & ((1u << lane) - 1));
        list[rank] = (u16)at;
        if (SAVE) members[(my.head * M + e) * K + rank] = at;
    }
    if (!SHARED) return;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        float p[4];
#pragma unroll
        for (int l = 0; l < 4; l++) {
            p[l] = power_of_two(x[4 * i + l] * factor - peak * factor);
            sum += p[l];
        }
        if (128 * i + 128 <= NP || position(4 * i, lane) < NP)
            ((uint2*)scores)[32 * i + lane] = {pack(p[0], p[1]), pack(p[2], p[3])};
    }
    sum = sum_of<32>(sum);
    if (lane == 0) {
        my.sums()[e] = sum;
        if (SAVE) probe_lse[my.head * M + e] = (peak * factor + log_two(sum)) / LOG2E;
    }
}

// The queries sorted by expert, by one warp, and items of at most AT_ONCE of one expert.
__device__ __forceinline__ void sort_queries(const Thread& my, int* starts, int* order) {
    const int lane = my.lane;
    int* counts = my.counts();
    const int count = lane < M ? counts[lane] : 0, begin = sum_before<32>(count, lane);
    const int parts = (count + AT_ONCE - 1) / AT_ONCE, before = sum_before<32>(parts, lane);
    for (int i = 0; i < parts; i++)
        my.items()[before + i] =
            lane | (begin + AT_ONCE * i) << 8 | min(AT_ONCE, count - AT_ONCE * i) << 20;
    if (lane == 31) my.items()[MOST_ITEMS] = before + parts;
    if (SAVE && lane < M) starts[my.head * (M + 1) + lane] = begin;
    if (SAVE && lane == 0) starts[my.head * (M + 1) + M] = N;
    counts[lane] = begin;
    __syncwarp();
    for (int first = 0; first < N; first += 32) {
        const int n = first + lane, e = n < N ? my.routes()[n] : 255;
        const u32 same = __match_any_sync(LANES, e);
        const int to = (n < N ? counts[e] : 0) + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (n < N) {
            if (same >> lane == 1) counts[e] = to + 1;
            my.sorted()[to] = (u16)n;
            if (SAVE) order[my.head * N + to] = n;
        }
        __syncwarp();
    }
}
