// MiTA's forward on sequences of some hundred tokens, halves, head dim 64: one head in one block,
// whose rows stream through registers. What needs all of them, its landmarks' scores, is in shared
// memory; later the keys and values of the experts that warps attend to are. `mita_stream.py`
// compiles it, with these whole numbers fixed:
//   BF16, TOKENS, M, K, FIRST, HEIGHT, WIDTH, A, B, AIM, STEP, SHARED, SAVE: as in `mita_head.cu`
//   STAGES (experts that a warp has room for: 2, or 1)
#include <mita_stream_parts.cuh>
#include <mita_stream_score.cuh>
#include <mita_stream_choose.cuh>
#include <mita_stream_attend.cuh>

// Arguments as those of `mita_head`. Grid: B H blocks of THREADS threads and BYTES of shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 2) mita_stream(
    const u16* q, const u16* k, const u16* v, u16* out, float* lse, u16* marks, u16* values,
    float* exact, float* probe_lse, int* members, int* starts, int* order, int* route,
    int sqb, int sqh, int sqn, int skb, int skh, int skn, int svb, int svh, int svn,
    int sob, int soh, int son, int H, float scale, float again) {
    SHARED_MEMORY(memory);
    const Thread my(memory);
    const int b = blockIdx.x / H, h = blockIdx.x % H;
    q += (long long)b * sqb + (long long)h * sqh;
    k += (long long)b * skb + (long long)h * skh;
    v += (long long)b * svb + (long long)h * svh;
    out += (long long)b * sob + (long long)h * soh;
    const float factor = fmaxf(scale * LOG2E, 1e-30f);
    if (my.warp == 0) my.counts()[my.lane] = 0;
    if (my.thread < 2) my.taken()[my.thread] = 0;
    for (int n = my.thread; n < N; n += THREADS) expect(q + n * sqn);
    sum_rows<Indicators>(my, q, sqn);
    __syncthreads();  // parts of the landmarks
    write_landmarks(my, marks, exact);
    __syncthreads();  // landmarks
    choose_experts(my, q, sqn, route);
    score(my, k, skn);
    __syncthreads();  // scores and routes
    if (my.warp == WARPS - 1) sort_queries(my, starts, order);
#pragma unroll 1
    for (int e = my.take(LANDMARK); e < M; e = my.take(LANDMARK))
        choose_keys(my, e, factor, members, probe_lse);
    __syncthreads();  // softmax of the scores, lists of keys and of queries
    if (SHARED) {
        sum_rows<Numerators>(my, v, svn);
        __syncthreads();  // parts of V~
        write_values(my, values);
        __syncthreads();  // V~
    }
    attend(my, q, sqn, k, skn, v, svn, out, son, lse, factor, fmaxf(again * LOG2E, 1e-30f));
}
