// Queries, keys and values of a layer, from its rows: projected, normalised and rotated, a head at a time.
//
// A head's columns of the three matrices are read once for all rows. The sums are those of `linear`, each result is
// rounded where the operations one after another would round it, and so the bits are theirs.
// T rows of D numbers, H query and G key/value heads of d numbers.
#include <vector>

#include "rowwise.h"
#include "tiles.h"

struct Heads {
  const void *x, *w[3];
  void* y[3];
  const void* norm[2];  // of queries and keys, or null
  const float *cos, *sin;
  int64_t rows, depth, heads, kv_heads, d, norm_type;
  float eps;
};

constexpr int64_t BLOCK = 48;  // rows of a task

template <Type type>
static void head(const Heads& it, int64_t which, int64_t column, int64_t first, float* room) {
  const int64_t T = std::min(BLOCK, it.rows - first), d = it.d, count = which ? it.kv_heads : it.heads;
  const void* rows[BLOCK];
  for (int64_t t = 0; t < T; t++) rows[t] = at<type>(it.x, (first + t) * it.depth);
  const void* w = at<type>(it.w[which], column * d * it.depth);
  dot_block<type>(rows, T, w, it.depth, d, it.depth, room, d, at<type>(w, d * it.depth));
  for (int64_t t = 0; t < T; t++) {
    void* y = (void*)at<type>(it.y[which], ((first + t) * count + column) * d);
    for (int64_t i = 0; i < d; i += 16) store<type>(y, i, load<FLOAT32>(room + t * d, i, d - i), d - i);
    if (which == 2) continue;
    if (it.norm[which]) norm_row<type>(y, it.norm_type, it.norm[which], y, d, it.eps);
    turn_row<type>(y, it.cos + (first + t) * d / 2, it.sin + (first + t) * d / 2, y, d / 2);
  }
}

template <Type type>
static void all_heads(const Heads& it, int threads) {
  const int64_t columns = it.heads + 2 * it.kv_heads, blocks = (it.rows + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(it.rows * it.depth * columns * it.d < SMALL ? 1 : threads)
  {
    std::vector<float> room(std::min(it.rows, BLOCK) * it.d);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < columns * blocks; i++) {
      const int64_t column = i / blocks, which = column < it.heads ? 0 : column < it.heads + it.kv_heads ? 1 : 2;
      const int64_t own = which ? (column - it.heads) % it.kv_heads : column;
      head<type>(it, which, own, i % blocks * BLOCK, room.data());
    }
  }
}

extern "C" void turnout_heads(int type, const Heads* it, int threads) {
#define CALL(T) all_heads<T>(*it, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
