// Watches the shared memory of an emulated block: races.cpp says how. Without WATCHED nothing is watched.
#pragma once

namespace races {
enum Kind { ACCESS, COPY_ISSUED, COPY_ARRIVED };
#ifdef WATCHED
void begin(char* shared, long bytes, int threads);  // a block
void end();
void run(int lane);           // whose turn it is
void met(bool whole_block);   // this lane has passed a barrier
void see(const void* p, long bytes, bool write, Kind kind);
#else
inline void begin(char*, long, int) {}
inline void end() {}
inline void run(int) {}
inline void met(bool) {}
inline void see(const void*, long, bool, Kind) {}
#endif
}  // namespace races
