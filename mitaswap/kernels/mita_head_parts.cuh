// Sizes, shared memory and small pieces of `mita_head.cu`.
#pragma once
#include <mita_head_rows.cuh>

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int NS = NP < 32 ? 40 : NP + 8;           // floats of a row of scores: 8 banks apart
constexpr int TURNS = (NP / 16 + WARPS - 1) / WARPS;  // tiles of 16 queries a warp
constexpr int MT = (M + 7) / 8, KT = (K + 7) / 8;   // tiles of landmarks, of an expert's keys

// shared memory, in bytes: q, then
constexpr int KEYS = NP * ROW, VALUES = 2 * KEYS;
constexpr int MARKS = 3 * KEYS;                      // landmarks, a term after the other
constexpr int READ = MARKS + TERM;                   // V~, when the second terms are done with
constexpr int SOFTMAX = MARKS;                       // float2 [NP], once routing has read the first ones
// float32 [M, NS]; each row is later a list of 32 scores, and then NP halves
constexpr int SCORES = MARKS + TERMS * TERM;
constexpr int LISTS = SCORES + M * NS * 4;           // keys of each expert, u8 [M, 8, 4]
constexpr int ROUTES = LISTS + M * 32;               // expert of each query, u8
constexpr int SORTED = ROUTES + 256;                 // queries sorted by expert, u8
constexpr int SUMS = SORTED + 256, COUNTS = SUMS + 128;
constexpr int TILES = COUNTS + 128;  // of 16 queries: expert, begin << 8, count << 16
constexpr int MOST_TILES = 48, BYTES = TILES + (MOST_TILES + 4) * 4;

// Which part a thread has, and where its block's memory lies.
struct Thread : Lane {
    int mt, pair;  // its 16 landmarks and two chunks

    __device__ explicit Thread(char* memory) : Lane(memory), mt(warp & 1), pair(warp >> 1) {}
    __device__ float* scores(int e) const { return (float*)(memory + SCORES) + e * NS; }
    __device__ float2* softmax() const { return (float2*)(memory + SOFTMAX); }
    __device__ float* sums() const { return (float*)(memory + SUMS); }
    __device__ u8* list(int e) const { return (u8*)(memory + LISTS) + 32 * e; }
    __device__ u8* routes() const { return (u8*)(memory + ROUTES); }
    __device__ u8* sorted() const { return (u8*)(memory + SORTED); }
    __device__ int* counts() const { return (int*)(memory + COUNTS); }
    __device__ int* tiles() const { return (int*)(memory + TILES); }
};

// The place of chunk 0 of row `byte` of `four`, in few instructions.
__device__ __forceinline__ Place chunk_0(Place rows, u32 four, int byte) {
    const u32 row = byte ? four >> (8 * byte - 7) : four << 7;
    const u32 last = byte ? four >> (8 * byte - 4) : four << 4;
    return rows + ((row & 255 << 7) | (last & 7 << 4));
}
