// Sizes and shared memory of `mita_stream.cu`, and rows of a head as operands of products.
#pragma once
#include <mita_head_rows.cuh>

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int PARTS = WARPS / 2;                   // of sums over all rows
constexpr int MT = (M + 7) / 8, KT = (K + 7) / 8;  // tiles of 8 landmarks, of 8 of an expert's keys
constexpr int MOST = 32;                           // keys that an expert has at most
constexpr int ALL = NP / 16;                       // tiles of 16 tokens
constexpr int AT_ONCE = 64;                        // queries of an expert that a warp takes at most

// Floats from a row of scores to the next: 4 banks apart, and room behind NP halves for PARTS rows of
// sums, of D floats.
constexpr int LEAST_NS = N > NP / 2 + PARTS * D ? N : NP / 2 + PARTS * D;
constexpr int NS = (LEAST_NS + 11) / 16 * 16 + 4;
constexpr int GATHERED = 2 * K * ROW;   // bytes of an expert's keys and values
constexpr int MARK_BYTES = M * ROW;     // of one term of all landmarks

// shared memory, in bytes: scores, float [M, NS], then numerators and sums, then what STAGES experts a
// warp are
constexpr int SCORE_BYTES = M * NS * 4, EXPERT_BYTES = WARPS * STAGES * GATHERED;
constexpr int MARKS = ((SCORE_BYTES > EXPERT_BYTES ? SCORE_BYTES : EXPERT_BYTES) + 127) / 128 * 128;
constexpr int READ = MARKS + MARK_BYTES;         // V~, when the other terms are done with
constexpr int SORTED = READ + MARK_BYTES;        // then queries sorted by expert, u16
constexpr int OTHER = (TERMS - 1) * MARK_BYTES, LATER = MARK_BYTES + 2 * NP;
constexpr int ROUTES = READ + (OTHER > LATER ? OTHER : LATER);  // expert of each query, u8
constexpr int LISTS = ROUTES + NP;               // keys of each expert, u16 [M, MOST]
constexpr int SUMS = LISTS + M * MOST * 2, COUNTS = SUMS + 128;
constexpr int ITEMS = COUNTS + 128;  // some queries of one expert: expert, begin << 8, count << 20
constexpr int MOST_ITEMS = M + N / AT_ONCE;
constexpr int TAKEN = ITEMS + (MOST_ITEMS + 1) * 4, BYTES = TAKEN + 2 * 4;
enum { LANDMARK, ITEM };             // what warps take one after the other

// The chunk, of 16 bytes, of a row of D halves in shared memory where chunk c lies is c ^ of_row(row):
// the same chunk of 8 neighbouring rows in different banks, and four of two.
__device__ __forceinline__ int of_row(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

// Which part a thread has, and where its block's memory lies.
struct Thread : Lane {
    __device__ explicit Thread(char* memory) : Lane(memory) {}
    __device__ static Place in_row(Place rows, int row, int c) {
        return rows + row * ROW + ((c ^ of_row(row)) << 4);
    }
    __device__ float* scores(int e) const { return (float*)memory + e * NS; }
    __device__ float* parts(int e) const { return scores(e) + NP / 2; }
    __device__ float* sums() const { return (float*)(memory + SUMS); }
    __device__ u16* list(int e) const { return (u16*)(memory + LISTS) + MOST * e; }
    __device__ u8* routes() const { return (u8*)(memory + ROUTES); }
    __device__ u16* sorted() const { return (u16*)(memory + SORTED); }
    __device__ int* counts() const { return (int*)(memory + COUNTS); }
    __device__ int* items() const { return (int*)(memory + ITEMS); }
    __device__ int* taken() const { return (int*)(memory + TAKEN); }

    // the next one that no warp has taken
    __device__ __forceinline__ int take(int what) const {
        return __shfl_sync(LANES, lane ? 0 : one_more(taken() + what), 0);
    }
};

// Chunks t and 4 + t of a row of q, k or v, as lane 4 g + t has them of the g-th of 8 rows: `from` is
// the head's chunk t. As operands of products they have the channels in another order than usual,
// words before chunks; landmarks are written in that order, word t of chunk 4 h + i being word i of
// chunk 4 h + t.
struct Row {
    uint4 half[2];

    __device__ __forceinline__ void ask(const u16* from, int row, int stride) {
        const uint4* at = (const uint4*)(from + row * stride);
        half[0] = ask16(at);
        half[1] = ask16(at + 4);
    }
};

// Where two words of a landmark, from channel 4 f on, are.
struct Words {
    Place first, second;

    __device__ Words(Place rows, int row, int f) {
        const int c = (f >> 3) * 4 + (f & 1) * 2, word = f >> 1 & 3;
        first = Thread::in_row(rows, row, c) + 4 * word;
        second = Thread::in_row(rows, row, c + 1) + 4 * word;
    }
};
