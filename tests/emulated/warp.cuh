// CUDA's threads as fibers of one CPU thread, and `warp.cuh` in plain C++: what a kernel computes can
// be tested on any machine. Each lane leaves what it has for its warp, and goes on when all have.
// Warps run one after the other, in random order, each as far as it can; copies happen when they are
// waited for; memory is poisoned: a missing barrier of the block, or wait, shows as a wrong result.
// With RACES defined (`races.h`), accesses without order show, also within a warp.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define LANES 0xffffffffu
#define SHARED_MEMORY(name) char* name = block.memory
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

struct Index { int x; };
static Index threadIdx, blockIdx, gridDim;

union Word { u32 u; int i; float f; uintptr_t place; };
struct Slot { Word word; const void* row; u32 a[4], b[2]; };
struct Warp { Slot slots[32]; int arrived = 0, tag = 0; long rounds = 0; };
struct Copy { uintptr_t to; const void* from; bool ok; };
struct Block {
    char* memory;
    std::vector<ucontext_t> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<Warp> warps;
    std::vector<char> done;
    std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, by group
    ucontext_t home;
    int arrived = 0, second = 0;
    long rounds = 0, seconds = 0;
    int current = 0;
    void (*body)();
};
static Block block;

inline void yield() { swapcontext(&block.fibers[block.current], &block.home); }

inline void together(int& arrived, long& rounds, int all) {
    long round = rounds;
    if (++arrived == all) {
        arrived = 0;
        rounds++;
    }
    while (rounds == round) yield();
}

#ifdef RACES
inline int my_lane();
#include "races.h"
#else
#define UNSEEN
inline void ordered_by_block() {}
inline void ordered_by_warp() {}
inline void has_arrived() {}
inline void has_awaited() {}
inline void watch(char*, int) {}
inline void unwatch() {}
inline void touched(const void*, int, bool, void*) {}
#endif

inline void __syncthreads() {
    together(block.arrived, block.rounds, (int)block.fibers.size());
    ordered_by_block();
}
template <int all>
void arrive() {
    if (++block.second == all) {
        block.second = 0;
        block.seconds++;
    }
    has_arrived();
}
template <int all>
void await() {
    together(block.second, block.seconds, all);
    has_awaited();
}
inline Warp& my_warp() { return block.warps[block.current / 32]; }
inline int my_lane() { return block.current % 32; }
inline void meet(int tag) {
    Warp& warp = my_warp();
    if (warp.arrived && warp.tag != tag) {
        std::fprintf(stderr, "lanes of a warp meet in lines %d and %d\n", warp.tag, tag);
        std::abort();
    }
    warp.tag = tag;
    together(warp.arrived, warp.rounds, 32);
}
inline void __syncwarp() {
    meet(0);
    ordered_by_warp();
}

// leave something, see what all have left, compute, and leave together
template <class Leave, class See>
auto exchange(Leave leave, See see, int line = __builtin_LINE()) {
    Warp& warp = my_warp();
    leave(warp.slots[my_lane()]);
    meet(line);
    auto out = see(warp.slots);
    meet(-line);
    return out;
}

inline u32 bits_of(int x) { Word w; w.i = x; return w.u; }
inline u32 bits_of(float x) { Word w; w.f = x; return w.u; }
inline float __uint_as_float(u32 x) { Word w; w.u = x; return w.f; }
inline float __int_as_float(int x) { Word w; w.i = x; return w.f; }
inline int __float_as_int(float x) { Word w; w.f = x; return w.i; }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline float __fdividef(float x, float by) { return x / by; }
template <class T>
T shuffle(T x, int from) {
    return exchange([&](Slot& s) { std::memcpy(&s.word, &x, sizeof x); }, [&](Slot* s) {
        T out;
        std::memcpy(&out, &s[from].word, sizeof out);
        return out;
    });
}
template <class T>
T __shfl_sync(u32, T x, int from) { return shuffle(x, from); }
template <class T>
T __shfl_xor_sync(u32, T x, int by) { return shuffle(x, my_lane() ^ by); }
template <class T>
T __shfl_up_sync(u32, T x, int by) { return shuffle(x, my_lane() >= by ? my_lane() - by : my_lane()); }

inline u32 __match_any_sync(u32, int x) {
    return exchange([&](Slot& s) { s.word.i = x; }, [&](Slot* s) {
        u32 out = 0;
        for (int i = 0; i < 32; i++) out |= (u32)(s[i].word.i == x) << i;
        return out;
    });
}
inline u32 __ballot_sync(u32, bool x) {
    return exchange([&](Slot& s) { s.word.i = x; }, [&](Slot* s) {
        u32 out = 0;
        for (int i = 0; i < 32; i++) out |= (u32)(s[i].word.i != 0) << i;
        return out;
    });
}

inline int reduced(int x, int (*join)(int, int)) {
    return exchange([&](Slot& s) { s.word.i = x; }, [&](Slot* s) {
        int out = s[0].word.i;
        for (int i = 1; i < 32; i++) out = join(out, s[i].word.i);
        return out;
    });
}
inline int least_of(int x) { return reduced(x, [](int a, int b) { return min(a, b); }); }
inline int most_of(int x) { return reduced(x, [](int a, int b) { return max(a, b); }); }
inline int total_of(int x) { return reduced(x, [](int a, int b) { return a + b; }); }
inline u32 transposed(u32 x) {
    return exchange([&](Slot& s) { s.word.u = x; }, [&](Slot* s) {
        const int g = my_lane() / 4, t = my_lane() % 4;
        auto half = [&](int row) { return s[4 * row + g / 2].word.u >> 16 * (g % 2) & 0xffff; };
        return half(2 * t) | half(2 * t + 1) << 16;
    });
}

typedef uintptr_t Place;
inline Place place(const void* shared) { return (Place)shared; }
inline void copy16(Place to, const void* from, bool ok) {
    block.copies[block.current].back().push_back({to, from, ok});
}
inline uint4 ask16(const uint4* from) { return *from; }
inline u32 ask4(const u32* from) { return *from; }
inline float2 ask8(const float2* from) { return *from; }
inline void put(Place to, u32 x) { *(u32*)to = x; }
inline void expect(const void* from) { (void)*(volatile const char*)from; }  // must be there
UNSEEN inline void set_bits(u32* word, u32 bits) { *word |= bits; }
UNSEEN inline int one_more(int* word) { return (*word)++; }
template <u32 flip = 0>
uint4 get16(Place from) { return *(uint4*)(from ^ flip); }
inline void commit() { block.copies[block.current].emplace_back(); }
template <int left>
void wait() {
    auto& groups = block.copies[block.current];  // the last is not committed
    for (size_t i = 0; i + left + 1 < groups.size(); i++) {
        for (const Copy& x : groups[i]) {
            touched((void*)x.to, 16, true, __builtin_return_address(0));
            if (x.ok) std::memcpy((void*)x.to, x.from, 16);
            else std::memset((void*)x.to, 0, 16);
        }
        groups[i].clear();
    }
}

inline float unpack(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return (float)half;
#endif
}
inline u16 rounded(float x) {
#if BF16
    if (x != x) return 0x7fff;
    u32 bits = bits_of(x);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    _Float16 half = (_Float16)x;
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
#endif
}
inline u32 pack(float low, float high) { return rounded(low) | (u32)rounded(high) << 16; }
inline float power_of_two(float x) { return std::exp2(x); }
inline float root(float x) { return std::sqrt(x); }
inline float log_two(float x) { return std::log2(x); }

// lanes may give one row several times, with equal values: that is no race
UNSEEN inline bool holds(Place at, u32 x) { return *(u32*)at == x; }

// as on devices without the instruction
inline void store4(Place row, const u32 (&r)[4]) {
    const int lane = my_lane();
    for (int i = 0; i < 4; i++) {
        const Place at = shuffle(row, 8 * i + lane / 4) + lane % 4 * 4;
        if (!holds(at, r[i])) put(at, r[i]);
    }
}

inline void load(u32 (&r)[4], Place row, bool transposed) {
    exchange([&](Slot& s) { s.row = (const void*)row; }, [&](Slot* s) {
        int g = my_lane() / 4, t = my_lane() % 4;
        for (int i = 0; i < 4; i++) {
            auto half = [&](int a, int b) { return (u32)((const u16*)s[8 * i + a].row)[b]; };
            r[i] = transposed ? half(2 * t, g) | half(2 * t + 1, g) << 16
                              : half(g, 2 * t) | half(g, 2 * t + 1) << 16;
        }
        return 0;
    });
}
inline float at_least(float x, float least) { return x >= least; }
template <u32 flip = 0>
void load4(u32 (&r)[4], Place row) { load(r, row ^ flip, false); }
template <u32 flip = 0>
void load4t(u32 (&r)[4], Place row) { load(r, row ^ flip, true); }

inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    exchange(
        [&](Slot& s) {
            std::memcpy(s.a, a, sizeof a);
            s.b[0] = b0;
            s.b[1] = b1;
        },
        [&](Slot* s) {
            auto half = [](u32 word, int i) { return unpack((u16)(word >> 16 * (i & 1))); };
            int g = my_lane() / 4, t = my_lane() % 4;
            for (int i = 0; i < 4; i++) {
                int row = g + 8 * (i / 2), column = 2 * t + i % 2;
                double sum = c[i];
                for (int l = 0; l < 16; l++) {
                    u32 left = s[row % 8 * 4 + l % 8 / 2].a[row / 8 + 2 * (l / 8)];
                    u32 right = s[column * 4 + l % 8 / 2].b[l / 8];
                    sum += (double)half(left, l) * half(right, l);
                }
                c[i] = sum == sum ? (float)sum : __uint_as_float(0x7fffffff);  // as devices
            }
            return 0;
        });
}

static void enter() {
    block.body();
    block.done[block.current] = 1;
    yield();
}

// runs `body` as all threads of all blocks, one block after the other
inline void run(int blocks, int threads, int bytes, void (*body)()) {
    std::mt19937 random(0);
    gridDim.x = blocks;
    block.memory = (char*)std::aligned_alloc(128, (bytes + 127) / 128 * 128);
    block.body = body;
    block.stacks.resize(threads);
    for (auto& stack : block.stacks) stack.resize(1 << 16);
    std::vector<int> order(threads / 32), lanes(32);
    for (size_t i = 0; i < order.size(); i++) order[i] = (int)i;
    for (int i = 0; i < 32; i++) lanes[i] = i;
    for (int i = 0; i < blocks; i++) {
        std::memset(block.memory, 0xff, bytes);  // NaN in any type
        watch(block.memory, bytes);
        blockIdx.x = i;
        block.fibers.assign(threads, {});
        block.warps.assign(threads / 32, {});
        block.done.assign(threads, 0);
        block.copies.assign(threads, {{}});
        for (int j = 0; j < threads; j++) {
            getcontext(&block.fibers[j]);
            block.fibers[j].uc_stack = {block.stacks[j].data(), 0, block.stacks[j].size()};
            makecontext(&block.fibers[j], enter, 0);
        }
        for (int left = threads; left;) {
            bool quiet = true;
            std::shuffle(order.begin(), order.end(), random);
            for (int warp : order)
                for (bool moved = true; moved; quiet = quiet && !moved) {
                    const long before = block.warps[warp].rounds + block.rounds + block.seconds;
                    int ended = 0;
                    std::shuffle(lanes.begin(), lanes.end(), random);
                    for (int lane : lanes) {
                        const int j = 32 * warp + lane;
                        if (block.done[j]) continue;
                        block.current = threadIdx.x = j;
                        swapcontext(&block.home, &block.fibers[j]);
                        ended += block.done[j];
                    }
                    left -= ended;
                    moved = ended || before != block.warps[warp].rounds + block.rounds + block.seconds;
                }
            if (quiet) {
                std::fprintf(stderr, "threads wait for others that never come\n");
                std::abort();
            }
        }
    }
    unwatch();
    std::free(block.memory);
}
