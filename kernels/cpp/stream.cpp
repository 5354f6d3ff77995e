// Reading memory and nothing else: the ceiling of every kernel that is bound by it.
#include <cstdint>
#include <cstring>

typedef uint64_t W __attribute__((vector_size(64)));

extern "C" {

// The exclusive or of `lines` times 64 bytes; each thread reads a stretch of its own.
void turnout_read(const void* data, int64_t lines, uint64_t* out, int threads) {
  constexpr int STEP = 8, AHEAD = 64;  // lines
  uint64_t all = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : all)
  for (int t = 0; t < threads; t++) {
    const char* at = (const char*)data + 64 * (lines * t / threads);
    const int64_t own = lines * (t + 1) / threads - lines * t / threads;
    W sum[STEP] = {};
    int64_t i = 0;
    for (; i + STEP <= own; i += STEP)
      for (int j = 0; j < STEP; j++) {
        W line;
        __builtin_prefetch(at + 64 * (i + j + AHEAD));
        std::memcpy(&line, at + 64 * (i + j), 64);
        sum[j] ^= line;
      }
    for (; i < own; i++) {
      W line;
      std::memcpy(&line, at + 64 * i, 64);
      sum[0] ^= line;
    }
    for (int j = 1; j < STEP; j++) sum[0] ^= sum[j];
    for (int lane = 0; lane < 8; lane++) all ^= sum[0][lane];
  }
  *out = all;
}
}
