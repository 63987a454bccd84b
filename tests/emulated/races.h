// Accesses to a block's memory that nothing puts in order. The compiler calls the functions below at
// every load and store (-fsanitize=thread; its library is not linked). In order are those of a lane;
// of lanes of a warp, by __syncwarp; of warps, by a barrier of the block, and by arrive and await.
// Shuffles and products put nothing in order, though here they do.
#pragma once
#include <dlfcn.h>

#include <set>
#include <string>

#define UNSEEN __attribute__((no_sanitize_thread))

struct Turn { int block = 0, warp = 0; bool arrived = false, awaited = false; };  // of a thread
struct Access { int block = -1, warp = -1; u32 lanes = 0, late = 0; };  // late: once they arrived
struct Byte { Access read[16], written[16]; };  // by warps
static Turn turns[512];
static Byte* bytes_seen = nullptr;
static char* seen_from = nullptr;
static long seen_bytes = 0;
static std::set<std::string> races_found;
static std::string races_text;

inline void ordered_by_block() { turns[block.current].block++; }
inline void ordered_by_warp() { turns[block.current].warp++; }
inline void has_arrived() { turns[block.current].arrived = true; }
inline void has_awaited() { turns[block.current].awaited = true; }
inline void watch(char* memory, int bytes) {
    delete[] bytes_seen;
    bytes_seen = new Byte[bytes];
    for (Turn& turn : turns) turn = Turn();
    seen_from = memory, seen_bytes = bytes;
}
inline void unwatch() { seen_bytes = 0; }

UNSEEN inline bool apart(const Access& other, int warp, int of) {
    const Turn& now = turns[block.current];
    if (other.block != now.block) return false;
    if (of != warp) return !(now.awaited && !other.late);
    return other.warp == now.warp && other.lanes & ~(1u << my_lane());
}

UNSEEN inline void touched(const void* at, int bytes, bool write, void* where) {
    const long offset = (const char*)at - seen_from;
    if (offset < 0 || offset >= seen_bytes) return;
    const int warp = block.current / 32;
    const Turn& now = turns[block.current];
    bool race = (uintptr_t)at % bytes;
    for (int i = 0; i < bytes && offset + i < seen_bytes; i++) {
        Byte& byte = bytes_seen[offset + i];
        for (int of = 0; of < 16; of++)
            race |= apart(byte.written[of], warp, of) || (write && apart(byte.read[of], warp, of));
        Access& mine = (write ? byte.written : byte.read)[warp];
        if (mine.block != now.block || mine.warp != now.warp) mine = {now.block, now.warp, 0, 0};
        mine.lanes |= 1u << my_lane();
        if (now.arrived) mine.late |= 1u << my_lane();
    }
    if (!race) return;
    Dl_info info;
    dladdr(where, &info);
    char text[32];
    std::snprintf(text, sizeof text, "%lx ", (long)((char*)where - (char*)info.dli_fbase - 1));
    races_found.insert(text);
}

// where in the library races were seen
extern "C" const char* races() {
    races_text.clear();
    for (const std::string& one : races_found) races_text += one;
    return races_text.c_str();
}

extern "C" {
#define SEEN(bytes)                                                             \
    UNSEEN void __tsan_read##bytes(void* at) {                                  \
        touched(at, bytes, false, __builtin_return_address(0));                 \
    }                                                                           \
    UNSEEN void __tsan_write##bytes(void* at) {                                 \
        touched(at, bytes, true, __builtin_return_address(0));                  \
    }                                                                           \
    UNSEEN void __tsan_unaligned_read##bytes(void* at) {                        \
        touched(at, bytes, false, __builtin_return_address(0));                 \
    }                                                                           \
    UNSEEN void __tsan_unaligned_write##bytes(void* at) {                       \
        touched(at, bytes, true, __builtin_return_address(0));                  \
    }
SEEN(1) SEEN(2) SEEN(4) SEEN(8) SEEN(16)
UNSEEN void __tsan_init() {}
UNSEEN void __tsan_func_entry(void*) {}
UNSEEN void __tsan_func_exit() {}
UNSEEN void __tsan_vptr_update(void*, void*) {}
UNSEEN void __tsan_vptr_read(void*) {}
UNSEEN void __tsan_read_range(void* at, long bytes) {
    for (long i = 0; i < bytes; i++) touched((char*)at + i, 1, false, __builtin_return_address(0));
}
UNSEEN void __tsan_write_range(void* at, long bytes) {
    for (long i = 0; i < bytes; i++) touched((char*)at + i, 1, true, __builtin_return_address(0));
}
}
