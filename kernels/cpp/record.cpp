// Kernel calls that were recorded, one after another; and small kernels in place of the library's operations that lie
// between them: copies, sums of two.
#include "kernels.h"

// A kernel takes whole numbers, addresses among them, and at most one float. On x86-64 it finds each where its own
// signature has it, whatever else is passed, so that one signature calls them all.
struct Call {
  void* kernel;
  int64_t whole[12];
  float real;
  int32_t checked;  // it returns 0 where it can not go on
};
typedef int (*Kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      int64_t, float);

// Rows to other places, there perhaps in another type: [outer, inner, width] of any strides but the last.
struct Move {
  const void* from;
  void* to;
  const int64_t* index;  // of the outer rows, where they are chosen, else null
  int64_t from_type, to_type, size;  // of types that are the same: only how large a number is
  int64_t outer, inner, width, from_outer, from_inner, to_outer, to_inner, rows;
};

template <Type type>
static void convert(const void* from, void* to, int64_t to_type, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const V x = load<type>(from, i, n - i);
    if (to_type == FLOAT32) store<FLOAT32>(to, i, x, n - i);
    else if (to_type == BFLOAT16) store<BFLOAT16>(to, i, x, n - i);
    else store<FLOAT16>(to, i, x, n - i);
  }
}

template <Type type>
static void add_rows(const void* x, const void* y, void* sum, int64_t n, int threads) {
#pragma omp parallel for num_threads(n < SMALL ? 1 : threads)
  for (int64_t i = 0; i < n; i += 16)
    store<type>(sum, i, load<type>(x, i, n - i) + load<type>(y, i, n - i), n - i);
}

extern "C" {

// Runs the calls; the number of those that went well.
int64_t turnout_play(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t* a = calls[i].whole;
    const int went = ((Kernel)calls[i].kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
                                               calls[i].real);
    if (calls[i].checked && !went) return i;
  }
  return count;
}

// 0, and nothing is written, where a chosen row is none of the `rows`.
int turnout_move(const Move* m, int) {
  const int64_t from_size = m->from_type == m->to_type ? m->size : m->from_type == FLOAT32 ? 4 : 2;
  const int64_t to_size = m->from_type == m->to_type ? m->size : m->to_type == FLOAT32 ? 4 : 2;
  for (int64_t i = 0; m->index && i < m->outer; i++)
    if ((uint64_t)m->index[i] >= (uint64_t)m->rows) return 0;
  for (int64_t i = 0; i < m->outer; i++)
    for (int64_t j = 0; j < m->inner; j++) {
      const int64_t row = m->index ? m->index[i] : i;
      const char* from = (const char*)m->from + from_size * (row * m->from_outer + j * m->from_inner);
      char* to = (char*)m->to + to_size * (i * m->to_outer + j * m->to_inner);
      if (m->from_type == m->to_type) {
        std::memcpy(to, from, to_size * m->width);
      } else {
#define CALL(T) convert<T>(from, to, m->to_type, m->width)
        BY_TYPE(m->from_type, CALL)
#undef CALL
      }
    }
  return 1;
}

void turnout_add(int type, const void* x, const void* y, void* sum, int64_t n, int threads) {
#define CALL(T) add_rows<T>(x, y, sum, n, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
}
