// MiTA's forward on short sequences of halves, head dim 64: one head in one block, all of it in
// shared memory, so that each expert's keys are gathered from there. `mita_head.py` compiles it,
// with these whole numbers fixed:
//   BF16 (else float16)   TOKENS   M, K (landmarks; keys an expert; 32 at most)
//   FIRST, HEIGHT, WIDTH, A, B (first patch; patch grid; windows of the pooling)
//   AIM, STEP (of normal scores: how many standard deviations above the mean as many as are wanted
//   begin, and what one more of them takes; per mille)
//   SHARED, SAVE (with the shared expert; with what a backward needs)
#include <mita_head_parts.cuh>
#include <mita_head_probe.cuh>
#include <mita_head_choose.cuh>
#include <mita_head_attend.cuh>

// q, k, v, out: [B, H, N, D] by strides in elements, rows of D dense. Written where SAVE, as `Saved`
// in mita_call.py: lse [BH, N], marks, values, exact [BH, M, D], probe_lse [BH, M], members
// [BH, M, K], starts [BH, M + 1], order, route [BH, N]. scale: of routed logits and scores, again:
// of shared logits (values and probe_lse only where SHARED). A q that is no number spoils a column
// of all landmarks (in the Triton kernels of its window's only). Grid: B H blocks of THREADS threads
// and BYTES of shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 2) mita_head(
    const u16* q, const u16* k, const u16* v, u16* out, float* lse, u16* marks, u16* values,
    float* exact, float* probe_lse, int* members, int* starts, int* order, int* route,
    int sqb, int sqh, int sqn, int skb, int skh, int skn, int svb, int svh, int svn,
    int sob, int soh, int son, int H, float scale, float again) {
    SHARED_MEMORY(memory);
    const Thread my(memory);
    const int b = blockIdx.x / H, h = blockIdx.x % H;
    // asked for first, lest they wait behind all rows
    const uint4 bits = ask16(&windows.bits[my.mt][my.lane]);
    const float2 half_share = ask8(&windows.half_share[my.mt][my.lane]);
    copy_rows(my, 0, q + (long long)b * sqb + (long long)h * sqh, sqn);
    copy_rows(my, KEYS, k + (long long)b * skb + (long long)h * skh, skn);
    copy_rows(my, VALUES, v + (long long)b * svb + (long long)h * svh, svn);
    pool(my, bits, half_share, marks, exact);  // waits for q
    wait<1>();
    __syncthreads();  // landmarks and k
    score(my);
    __syncthreads();  // scores
    const float factor = fmaxf(scale * LOG2E, 1e-30f);
    Shares shares = {};
    choose_experts(my, fmaxf(again * LOG2E, 1e-30f), route, shares);
    if (my.warp < WARPS - 1) {
        arrive<THREADS>();
    } else {
        await<THREADS>();  // routes
        sort_queries(my, starts, order);
    }
    choose_keys(my, factor, members, probe_lse);
    wait<0>();
    __syncthreads();  // v, softmax of the scores, lists of keys and of queries
    attend(my, factor, values);
    __syncthreads();  // V~, what routed experts gave
    finish(my, shares, out + (long long)b * sob + (long long)h * soh, son, lse);
}
