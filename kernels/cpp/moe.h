// y[t] = Σ_k weight[t, k] · swiglu(x[t] · w_in[e]ᵀ) · w_out[e], e = ids[t, k]: a whole mixture of experts.
//
// The rows of an expert go together, so its weights are read once. One list of tasks, taken in order by all threads: a
// slice of an expert's hidden units, then a slice of its output columns, then the sums of a few tokens. A task waits
// for those that it needs, which began before it; there is no other barrier. Each asks for the next one's weights.
// Sums have the orders of gemm.h, and results are rounded where the separate operations round: the bits are theirs.
//
// D width, F hidden units, N rows (kept choices, sorted by expert).
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "simd.h"

namespace {  // other units have their own tasks

constexpr int64_t UNITS = 32, COLUMNS = 2048;  // of a task, at most; multiples of 32
constexpr int64_t ROWS = 16;                  // whose sums are kept while w_out streams past

struct Moe {
  const void* x;
  const int64_t* ids;
  const float* weights;
  const uint8_t* kept;
  const void *w_in, *w_out;
  void *hidden, *rows, *y;  // [N, F even], [N, D], [T, D]
  int64_t tokens, choices, width, units, experts, x_row, in_expert, in_row, out_expert, out_row;
};

template <Type type>
constexpr int64_t SIZE = type == FLOAT32 ? 4 : 2;

static inline int64_t even(int64_t n) { return n + (n & 1); }

static inline void soon(const char* address) { _mm_prefetch(address, _MM_HINT_T0); }

// Products in float32, as gemm.h takes them: sixteen lanes along a row of w_in, one lane a column of w_out.
template <Type T>
struct Widened {
  static constexpr Type type = T;
  static constexpr int DEEP = 4;  // rows of w_out that are added at once

  // sums[r · C + c] = x[r] · w[c]; `ahead` is read soon, in the same pattern
  template <int R, int C>
  static inline void dot(const void* const* x, const char* w, int64_t w_row, int64_t K, const char* ahead, V* sums) {
    for (int i = 0; i < R * C; i++) sums[i] = V{};
    for (int64_t k = 0; k < K; k += 16) {
      V a[R];
      for (int r = 0; r < R; r++) a[r] = load<type>(x[r], k, K - k);
      for (int c = 0; c < C; c++) {
        V b = load<type>(w + c * w_row, k, K - k);
        soon(ahead + c * w_row + k * SIZE<type>);
        for (int r = 0; r < R; r++) sums[r * C + c] = fma(a[r], b, sums[r * C + c]);
      }
    }
  }

  // sums[r][m] += Σ_k h[r][k] · w[k][m] for the next DEEP ks, if so many are left
  template <int R>
  static inline void add(const void* const* h, const char* w, int64_t w_row, int64_t left, int64_t M, const char* ahead,
                         float* const* sums) {
    float a[R][DEEP];
    for (int r = 0; r < R; r++)
      for (int k = 0; k < DEEP; k++) a[r][k] = k < left ? load<type>(h[r], k, 1)[0] : 0.0f;
    for (int64_t m = 0; m < M; m += 16) {
      V b[DEEP];
      for (int k = 0; k < DEEP; k++) {
        b[k] = k < left ? load<type>(w + k * w_row, m, M - m) : V{};
        soon(ahead + k * w_row + m * SIZE<type>);
      }
      for (int r = 0; r < R; r++) {
        V sum = load<FLOAT32>(sums[r], m);
        for (int k = 0; k < DEEP; k++) sum = fma(all(a[r][k]), b[k], sum);
        store<FLOAT32>(sums[r], m, sum);
      }
    }
  }

  static inline void ordered(const float* sums, V* out) { std::memcpy(out, sums, 128); }
};

#if defined(__AVX512BF16__)
// bfloat16 by its own instruction: two products a lane, neighbours along K.
struct Pairs {
  static constexpr Type type = BFLOAT16;
  static constexpr int DEEP = 2;

  static inline __m512bh numbers(const void* row, int64_t i) {
    return (__m512bh)_mm512_loadu_si512((const uint16_t*)row + i);
  }
  static inline __m512bh numbers(const void* row, int64_t i, __mmask32 some) {
    return (__m512bh)_mm512_maskz_loadu_epi16(some, (const uint16_t*)row + i);
  }
  static inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

  template <int R, int C>
  static inline void dot(const void* const* x, const char* w, int64_t w_row, int64_t K, const char* ahead, V* sums) {
    __m512 sum[R * C];
    for (int i = 0; i < R * C; i++) sum[i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
      __m512bh b[C];
      for (int c = 0; c < C; c++) {
        b[c] = numbers(w + c * w_row, k);
        soon(ahead + 2 * (C * k + 32 * c));
      }
      for (int r = 0; r < R; r++) {
        __m512bh a = numbers(x[r], k);
        for (int c = 0; c < C; c++) sum[r * C + c] = _mm512_dpbf16_ps(sum[r * C + c], a, b[c]);
      }
    }
    if (k < K)
      for (int c = 0; c < C; c++) {
        __m512bh b = numbers(w + c * w_row, k, first(K - k));
        for (int r = 0; r < R; r++)
          sum[r * C + c] = _mm512_dpbf16_ps(sum[r * C + c], numbers(x[r], k, first(K - k)), b);
      }
    for (int i = 0; i < R * C; i++) sums[i] = (V)sum[i];
  }

  // Two rows of w turn into pairs; the lanes of the sums lie as unpacking leaves them. An odd last k is paired with zero.
  template <int R>
  static inline void add(const void* const* h, const char* w, int64_t w_row, int64_t left, int64_t M,
                         const char* ahead, float* const* sums) {
    __m512bh a[R];
    for (int r = 0; r < R; r++) a[r] = (__m512bh)_mm512_set1_epi32(*(const int32_t*)h[r]);
    for (int64_t m = 0; m < M; m += 32) {
      const __mmask32 some = first(M - m);
      const __m512i even = (__m512i)numbers(w, m, some), odd = (__m512i)numbers(w + w_row, m, left > 1 ? some : 0);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd), high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
      const char* then = ahead + (m + m < M ? 4 * m : w_row + 4 * m - 2 * M);  // in the order in which they lie
      soon(then), soon(then + 64);
      for (int r = 0; r < R; r++) {
        float* at = sums[r] + m;
        _mm512_storeu_ps(at, _mm512_dpbf16_ps(_mm512_loadu_ps(at), a[r], low));
        _mm512_storeu_ps(at + 16, _mm512_dpbf16_ps(_mm512_loadu_ps(at + 16), a[r], high));
      }
    }
  }

  // The sums of 32 columns, as the columns lie.
  static inline void ordered(const float* sums, V* out) {
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    const __m512 s = _mm512_loadu_ps(sums), t = _mm512_loadu_ps(sums + 16);
    out[0] = (V)_mm512_permutex2var_ps(s, front, t), out[1] = (V)_mm512_permutex2var_ps(s, back, t);
  }
};
#endif

template <Type type>
static inline V rounded(V x) {
  if constexpr (type == FLOAT32) return x;
  else return widen<type>(narrow<type>(x));
}

template <int n>
static inline void lanes(V* sums, float* out) {  // out[i] = reduce(sums[i])
  if constexpr (n < 16) {
    reduce_all<n>(sums, out);
  } else {
    reduce_all<16>(sums, out);
    if constexpr (n > 16) lanes<n - 16>(sums + 16, out + 16);
  }
}

// The rows of one expert.
struct Group {
  int64_t expert, start, rows;
};

struct Task {
  enum Kind { UNITS_OF, COLUMNS_OF, TOKENS } kind;
  int64_t group, from, to;
};

template <class Sum>
class Mixture {
  static constexpr Type type = Sum::type;
  static constexpr int64_t size = SIZE<type>;
  static constexpr int HIGH = 6;  // rows of a tile

  const Moe m;
  const int64_t hidden_row;
  std::vector<int32_t> token, slot;  // of each row; of each choice, or -1
  std::vector<Group> groups;
  std::vector<Task> tasks;
  std::vector<std::atomic<int64_t>> units_done;
  std::atomic<int64_t> taken{0}, columns_done{0};
  int64_t columns_all = 0;  // tasks

 public:
  Mixture(const Moe& m, int threads) : m(m), hidden_row(even(m.units)), slot(m.tokens * m.choices, -1) {
    std::vector<int64_t> ends(m.experts + 1);
    const int64_t choices = m.tokens * m.choices;
    for (int64_t i = 0; i < choices; i++)
      if (!m.kept || m.kept[i]) ends[m.ids[i] + 1]++;
    for (int64_t e = 0; e < m.experts; e++) {
      if (ends[e + 1]) groups.push_back({e, ends[e], ends[e + 1]});
      ends[e + 1] += ends[e];
    }
    token.resize(ends[m.experts]);
    for (int64_t i = 0; i < choices; i++)
      if (!m.kept || m.kept[i]) token[slot[i] = ends[m.ids[i]]++] = i / m.choices;
    plan(threads);
  }

  void run(int threads) {
    const int64_t work = (int64_t)token.size() * m.units * m.width;
#pragma omp parallel num_threads(work < SMALL ? 1 : threads)
    {
      std::vector<float> room(ROWS * (COLUMNS + 16));
      int64_t now = taken++;
      while (now < (int64_t)tasks.size()) {
        const int64_t next = taken++;
        const char* ahead = begin(next < (int64_t)tasks.size() ? next : now);
        const Task& task = tasks[now];
        if (task.kind == Task::UNITS_OF) {
          hidden_units(groups[task.group], task.from, task.to, ahead);
          units_done[task.group].fetch_add(1, std::memory_order_release);
        } else if (task.kind == Task::COLUMNS_OF) {
          until(units_done[task.group], slices(m.units, UNITS));
          columns(groups[task.group], task.from, task.to, ahead, room.data());
          columns_done.fetch_add(1, std::memory_order_release);
        } else {
          until(columns_done, columns_all);
          for (int64_t t = task.from; t < task.to; t++) mix(t);
        }
        now = next;
      }
    }
  }

 private:
  static int64_t slices(int64_t n, int64_t of) { return (n + of - 1) / of; }

  static void until(const std::atomic<int64_t>& done, int64_t all) {
    for (int turn = 0; done.load(std::memory_order_acquire) < all; turn++) {
      if (turn < 1000) _mm_pause();
      else std::this_thread::yield();
    }
  }

  // Whole rows of w_out are read fastest; where the experts do not go round, the threads share the last few.
  void plan(int threads) {
    const int64_t many = groups.size(), spare = many % threads;
    units_done = std::vector<std::atomic<int64_t>>(many);
    for (int64_t g = 0; g < many; g++) cut(Task::UNITS_OF, g, m.units, UNITS);
    const int64_t before = tasks.size();
    for (int64_t g = 0; g < many; g++) cut(Task::COLUMNS_OF, g, m.width, g < many - spare ? COLUMNS : COLUMNS / 4);
    columns_all = tasks.size() - before;
    cut(Task::TOKENS, 0, m.tokens, 16);
  }

  void cut(Task::Kind kind, int64_t group, int64_t all, int64_t each) {
    for (int64_t i = 0; i < all; i += each) tasks.push_back({kind, group, i, std::min(i + each, all)});
  }

  const char* in(int64_t expert, int64_t row) const {
    return (const char*)m.w_in + size * (expert * m.in_expert + row * m.in_row);
  }
  const char* out(int64_t expert, int64_t row, int64_t column) const {
    return (const char*)m.w_out + size * (expert * m.out_expert + row * m.out_row + column);
  }
  void* hidden(int64_t row, int64_t i) const { return (char*)m.hidden + size * (row * hidden_row + i); }
  void* result(int64_t row, int64_t i) const { return (char*)m.rows + size * (row * m.width + i); }

  // The first weights that a task reads.
  const char* begin(int64_t task) const {
    const Task& t = tasks[task];
    if (t.kind == Task::UNITS_OF) return in(groups[t.group].expert, t.from);
    if (t.kind == Task::COLUMNS_OF) return out(groups[t.group].expert, 0, t.from);
    return (const char*)m.w_out;
  }

  void hidden_units(const Group& g, int64_t from, int64_t to, const char* ahead) const {
    const int64_t tiles = slices(g.rows, HIGH);
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t row = g.rows * i / tiles;
      const char* then = i + 1 < tiles ? in(g.expert, from) : ahead;
      switch (g.rows * (i + 1) / tiles - row) {
        case 1: units_tile<1>(g, row, from, to, then); break;
        case 2: units_tile<2>(g, row, from, to, then); break;
        case 3: units_tile<3>(g, row, from, to, then); break;
        case 4: units_tile<4>(g, row, from, to, then); break;
        case 5: units_tile<5>(g, row, from, to, then); break;
        default: units_tile<6>(g, row, from, to, then);
      }
    }
  }

  template <int R>
  void units_tile(const Group& g, int64_t row, int64_t from, int64_t to, const char* ahead) const {
    const void* x[R];
    for (int r = 0; r < R; r++) x[r] = at<type>(m.x, token[g.start + row + r] * m.x_row);
    const int64_t many = to - from;
    float gate[R * UNITS], up[R * UNITS];
    constexpr int C = R < 3 ? 2 : 4;
    int64_t i = 0;
    for (; i + C <= many; i += C) {
      const char* then = i + 2 * C <= many ? in(g.expert, from + i + C) : ahead;
      dots<R, C>(x, in(g.expert, from + i), in(g.expert, m.units + from + i), gate + i);
      dots<R, C>(x, in(g.expert, m.units + from + i), then, up + i);
    }
    for (; i < many; i++) {
      dots<R, 1>(x, in(g.expert, from + i), in(g.expert, m.units + from + i), gate + i);
      dots<R, 1>(x, in(g.expert, m.units + from + i), ahead, up + i);
    }
    for (int r = 0; r < R; r++) {
      for (int64_t i = 0; i < many; i += 16) {
        const V a = rounded<type>(load<FLOAT32>(gate + r * UNITS, i, many - i));
        const V b = rounded<type>(load<FLOAT32>(up + r * UNITS, i, many - i));
        store<type>(hidden(g.start + row + r, from + i), 0, a / (1.0f + exponential(-a)) * b, many - i);
      }
      if (to == m.units && m.units < hidden_row) std::memset(hidden(g.start + row + r, m.units), 0, size);
    }
  }

  template <int R, int C>
  void dots(const void* const* x, const char* w, const char* ahead, float* y) const {
    alignas(64) V sums[R * C];
    float found[R * C];
    Sum::template dot<R, C>(x, w, size * m.in_row, m.width, ahead, sums);
    lanes<R * C>(sums, found);
    for (int r = 0; r < R; r++) std::memcpy(y + r * UNITS, found + r * C, 4 * C);
  }

  void columns(const Group& g, int64_t from, int64_t to, const char* ahead, float* room) const {
    const int64_t many = to - from, row_of = COLUMNS + 16;
    for (int64_t row = g.start; row < g.start + g.rows; row += ROWS) {
      const int64_t rows = std::min(ROWS, g.start + g.rows - row);
      const char* last = row + ROWS < g.start + g.rows ? out(g.expert, 0, from) : ahead;
      std::memset(room, 0, 4 * rows * row_of);
      for (int64_t k = 0; k < m.units; k += Sum::DEEP) {
        const char* then = k + Sum::DEEP < m.units ? out(g.expert, k + Sum::DEEP, from) : last;
        const char* w = out(g.expert, k, from);
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) add<4>(row + r, k, w, many, then, room + r * row_of);
        switch (rows - r) {
          case 1: add<1>(row + r, k, w, many, then, room + r * row_of); break;
          case 2: add<2>(row + r, k, w, many, then, room + r * row_of); break;
          case 3: add<3>(row + r, k, w, many, then, room + r * row_of); break;
        }
      }
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < many; i += 32) {
          V sums[2];
          Sum::ordered(room + r * row_of + i, sums);
          for (int64_t j = 0; j < 2 && i + 16 * j < many; j++)
            store<type>(result(row + r, from + i + 16 * j), 0, sums[j], many - i - 16 * j);
        }
    }
  }

  template <int R>
  void add(int64_t row, int64_t k, const char* w, int64_t many, const char* ahead, float* sum) const {
    const void* h[R];
    float* sums[R];
    for (int r = 0; r < R; r++) h[r] = hidden(row + r, k), sums[r] = sum + r * (COLUMNS + 16);
    Sum::template add<R>(h, w, size * m.out_row, m.units - k, many, ahead, sums);
  }

  void mix(int64_t t) const {
    for (int64_t i = 0; i < m.width; i += 16) {
      V sum{};
      for (int64_t k = 0; k < m.choices; k++) {
        const int64_t row = slot[t * m.choices + k];
        if (row >= 0) sum = sum + load<type>(result(row, i), 0, m.width - i) * m.weights[t * m.choices + k];
      }
      store<type>((char*)m.y + size * (t * m.width + i), 0, sum, m.width - i);
    }
  }
};

}  // namespace
