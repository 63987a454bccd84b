// MiTA's gradients on short sequences of halves, head dim 64: one head in one block, one or two
// tiles of 16 tokens a warp. All logits of a head are computed anew, and those that do not count are
// set to zero; nothing is added atomically but bits. `mita_head_backward.py` compiles it, with these
// whole numbers fixed:
//   BF16 (else float16)   TOKENS   M, K (landmarks, 32 at most; keys an expert)
//   FIRST, HEIGHT, WIDTH, A, B (first patch; patch grid; windows of the pooling)
//   SHARED (with the shared expert)   OWN (tiles of 16 tokens a warp)
//   PARTS (in which the queries' gradients are computed)
#include <mita_back_parts.cuh>
#include <mita_back_routed.cuh>
#include <mita_back_shared.cuh>

// grad (of the output), q, k, v, out, and to be written dq, dk, dv: [B, H, N, D] by strides in
// elements, rows of D dense. The rest as `Saved` in mita_call.py: lse [BH, N], values, exact
// [BH, M, D], probe_lse [BH, M], members [BH, M, K], route [BH, N]. scale: of routed logits and
// scores, again: of shared logits. ahead: blocks that the device holds at most. Grid: B H blocks of
// THREADS threads and BYTES of shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1) mita_head_backward(
    const u16* grad, const u16* q, const u16* k, const u16* v, const u16* out, u16* dq, u16* dk,
    u16* dv, const float* lse, const u16* values, const float* exact, const float* probe_lse,
    const int* members, const int* route, int sgb, int sgh, int sgn, int sqb, int sqh, int sqn,
    int skb, int skh, int skn, int svb, int svh, int svn, int sob, int soh, int son, int sdqb,
    int sdqh, int sdqn, int sdkb, int sdkh, int sdkn, int sdvb, int sdvh, int sdvn, int H,
    int ahead, float scale, float again) {
    SHARED_MEMORY(memory);
    const Thread my(memory);
    const int b = blockIdx.x / H, h = blockIdx.x % H;
    const auto offset = [=](int sb, int sh) { return (long long)b * sb + (long long)h * sh; };
    copy_tiles(my, 0, q + offset(sqb, sqh), sqn);
    copy_tiles(my, GRADS, grad + offset(sgb, sgh), sgn);
    if (SHARED) copy_values(my, values);
    commit();
    copy_tiles(my, KEYS, k + offset(skb, skh), skn);
    copy_tiles(my, VALUES, v + offset(svb, svh), svn);
    commit();
    // all is asked for before anything is waited for
    const int n = my.first(0) + my.lane, query = min(n, N - 1), mark = min(my.lane, M - 1);
    uint4 outs[4 * OWN];
    int marked[EACH];
    Landmarks landmarks;
    const int row = my.first(0) + my.corner;
    const u16* at = out + offset(sob, soh) + (long long)row * son + 8 * my.eighth;
#pragma unroll
    for (int i = 0; i < 4 * OWN; i++, at += 4 * (long long)son)
        outs[i] = row + 4 * i < N ? *(const uint4*)at : uint4{};
#pragma unroll
    for (int i = 0; i < EACH; i++)
        marked[i] = members[my.head * M * K + min(my.thread + THREADS * i, M * K - 1)];
    if (SHARED) landmarks.ask(my, exact);
    const float total = lse[my.head * N + query];
    const int expert = route[my.head * N + query];
    const float probe = SHARED ? probe_lse[my.head * M + mark] : 0.f;

    if (my.lane < 16 * OWN && n < NP) {
        ((float*)&my.rows()[n >> 1])[n & 1] = n < N ? total : INFINITY;
        my.experts()[n] = n < N ? 1u << expert : 0;
        my.held()[n] = 0;
    }
    if (my.warp == 0) my.probe()[my.lane] = probe * LOG2E;
    if (SHARED) landmarks.put_down(my);
    wait<1>();  // each lane for what it has copied
    query_rows(my, outs, scale);
    __syncthreads();  // q, gradients of the output, rows, landmarks, V~, zeros
#pragma unroll
    for (int i = 0; i < EACH; i++)
        set_bits(my.held() + marked[i], 1u << min(my.thread + THREADS * i, M * K - 1) / K);

    Wide dshared;
    Sums dkeys = {}, dvalues = {};
    Rows keys, vals;
    if (SHARED) {
        weigh_landmarks(my, again, again / scale, dshared);
        __syncthreads();  // weights, gradients of logits
        read_gradients(my);
    }
    wait<0>();
    if (blockIdx.x + ahead < gridDim.x) {  // what a block that will come reads
        const int other = blockIdx.x + ahead;
        const auto ask_rows = [=](const u16* x, int sb, int sh, int sn) {
            if (my.lane >= 16 * OWN) return;
            x += (long long)(other / H) * sb + (long long)(other % H) * sh + (long long)query * sn;
            expect(x), expect(x + 32);
        };
        ask_rows(q, sqb, sqh, sqn), ask_rows(grad, sgb, sgh, sgn), ask_rows(out, sob, soh, son);
        ask_rows(k, skb, skh, skn), ask_rows(v, svb, svh, svn);
        const auto ask_all = [=](const void* x, int bytes) {  // that each head has
            for (int at = 64 * my.thread; at < bytes; at += 64 * THREADS)
                expect((const char*)x + (long long)other * bytes + at);
        };
        ask_all(members, M * K * 4), ask_all(lse, N * 4), ask_all(route, N * 4);
        if (SHARED) ask_all(exact, M * D * 4), ask_all(values, M * D * 2);
    }
    __syncthreads();  // k, v, bits, gradients of V~
    load_tiles(my, keys, my.here + KEYS);
    load_tiles(my, vals, my.here + VALUES);
    if (SHARED) {
        probe_keys(my, scale, keys, vals, dkeys, dvalues);
        __syncthreads();  // gradients of scores
        landmark_gradients(my);
        __syncthreads();  // they are read
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int begin = round * AT_ONCE, first = OWN * begin;
        if (round) __syncthreads();  // logits' gradients are read
        attend_keys(my, first, min(PART, TILES - first), scale, keys, vals, dkeys, dvalues);
        if (round == ROUNDS - 1) {
            write_tiles(my, dvalues, VALUES, dv + offset(sdvb, sdvh), sdvn);
            write_tiles(my, dkeys, VALUES, dk + offset(sdkb, sdkh), sdkn);
        }
        __syncthreads();  // logits' gradients
        if (my.warp < begin || my.warp >= begin + AT_ONCE) continue;
        Sums dqueries = {};
        attend_queries(my, OWN * (my.warp - begin), dqueries);
        if (SHARED) {
            Wide inside;
            window_operand(my, inside);
            times(my, dqueries, dshared, my.here + MARKS);
            times(my, dqueries, inside, my.here + READ);
        }
        write_tiles(my, dqueries, 0, dq + offset(sdqb, sdqh), sdqn);
    }
}
