// Finds accesses of lanes to the same shared memory that no barrier puts in order, as they would race on a GPU however the emulation happens to
// order them; reads and writes of what an asynchronous copy is still bringing; and accesses beyond the memory that the kernel asks for.
//
// The kernel's own code is compiled with -fsanitize=thread, whose calls before each access end here. Only barriers count as order: shuffles and
// ballots let lanes meet, but promise nothing about memory.
#define WATCHED
#include "races.h"

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace {
constexpr int GRAIN = 2;  // bytes; the smallest access

struct Moment {  // of a lane: how many barriers of its warp, and of the block, it has passed
    int lane = -1;
    unsigned warp = 0, block = 0;
};

struct Cell {
    Moment writer;
    int in_flight = -1;  // the lane whose copy has not arrived
    std::vector<Moment> readers;
};

char* memory = nullptr;
long limit = 0;
int current = 0;
bool watching = false;
std::vector<Cell> cells;
std::vector<Moment> now;
std::string found;

bool ordered(const Moment& earlier) {
    const Moment& here = now[current];
    if (earlier.lane < 0 || earlier.lane == current) return true;
    return earlier.lane / 32 == current / 32 ? here.warp > earlier.warp : here.block > earlier.block;
}

void report(const char* what, long at, int other) {
    if (!found.empty()) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s at byte %ld of shared memory, by lane %d and lane %d", what, at, current, other);
    found = text;
}
}  // namespace

namespace races {
void begin(char* shared, long bytes, int threads) {
    memory = shared, limit = bytes, watching = true;
    cells.assign(bytes / GRAIN + 1, {});
    now.assign(threads, {});
    for (int i = 0; i < threads; ++i) now[i].lane = i;
}

void end() { watching = false; }
void run(int lane) { current = lane; }

void met(bool whole_block) {
    ++now[current].warp;
    now[current].block += whole_block;
}

void see(const void* p, long bytes, bool write, Kind kind) {
    const long at = static_cast<const char*>(p) - memory;
    if (!watching || at < 0 || at >= 1 << 20) return;  // not the block's shared memory
    if (at + bytes > limit) return report("an access beyond what the kernel asks for", at, current);
    for (long i = at / GRAIN; i < (at + bytes + GRAIN - 1) / GRAIN; ++i) {
        Cell& cell = cells[i];
        if (kind == COPY_ARRIVED) {
            cell.in_flight = -1;
        } else if (cell.in_flight >= 0) {
            report("an access to what a copy still brings", at, cell.in_flight);
        }
        if (!ordered(cell.writer)) report(write ? "two writes" : "a read of what was just written", at, cell.writer.lane);
        if (!write) {
            bool known = false;
            for (Moment& reader : cell.readers)
                if (reader.lane == current) reader = now[current], known = true;
            if (!known) cell.readers.push_back(now[current]);
            continue;
        }
        for (const Moment& reader : cell.readers)
            if (!ordered(reader)) report("a write of what was just read", at, reader.lane);
        cell.readers.clear();
        cell.writer = now[current];
        if (kind == COPY_ISSUED) cell.in_flight = current;
    }
}
}  // namespace races

// What has been found since the last call; empty if nothing.
extern "C" __attribute__((visibility("default"))) const char* races_found() {
    static std::string last;
    last = std::exchange(found, {});
    return last.c_str();
}

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
char __tsan_atomic8_load(const char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void __tsan_read_range(void* p, long bytes) { races::see(p, bytes, false, races::ACCESS); }
void __tsan_write_range(void* p, long bytes) { races::see(p, bytes, true, races::ACCESS); }
#define ACCESSES(bytes)                                                                          \
    void __tsan_read##bytes(void* p) { races::see(p, bytes, false, races::ACCESS); }            \
    void __tsan_write##bytes(void* p) { races::see(p, bytes, true, races::ACCESS); }            \
    void __tsan_unaligned_read##bytes(void* p) { races::see(p, bytes, false, races::ACCESS); }  \
    void __tsan_unaligned_write##bytes(void* p) { races::see(p, bytes, true, races::ACCESS); }
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
}
