// y[t] = Σ_k weight[t, k] · swiglu(x[t] · w_in[e]ᵀ) · w_out[e], e = ids[t, k]: a whole mixture of experts.
//
// The rows of an expert go together, so its weights are read once. One list of tasks, taken in order by all threads: a
// slice of an expert's hidden units, then a slice of its output columns, then the sums of a few tokens. Of very many
// rows the outputs do not lie there whole: a stripe of columns is computed and summed up, then the next. A task waits
// for those that it needs, which began before it; there is no other barrier. Each asks for the next one's weights.
// Sums have the orders of tiles.h, and results are rounded where the separate operations round: the bits are theirs.
//
// D width, F hidden units, N rows (kept choices, sorted by expert).
#pragma once
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "packed.h"

namespace {  // other units have their own tasks

constexpr int64_t LEAST = 32, UNITS = 256;     // of a task; multiples of 32
constexpr int64_t COLUMNS = 2048;              // of a task, at most; a multiple of 64
constexpr int64_t TOKENS = 16;                 // of a task
constexpr int64_t CLOSE = 9 << 12;             // bytes of rows that pass w_in in one piece
constexpr int64_t PACKED = 3 << 16;            // bytes of rows that pass w_in together
constexpr int64_t SUMS = 24 * COLUMNS;         // that pass w_out together
constexpr int64_t SOON = 1 << 13;              // bytes that are fetched ahead, at least
constexpr int64_t NEAR = 64, FEW = 3;          // rows of w_out that stay near; rows for which they do

struct Moe {
  const void* x;
  const int64_t* ids;
  const float* weights;
  const uint8_t* kept;
  const void *w_in, *w_out;
  void *hidden, *rows, *y;  // as `axpy_packed` wants them [N, F even], [N, stripe], [T, D]
  int64_t tokens, choices, width, units, experts, stripe, x_row, in_expert, in_row, out_expert, out_row;
};

static inline int64_t even(int64_t n) { return n + (n & 1); }

template <Type type>
static inline V rounded(V x) {
  if constexpr (type == FLOAT32) return x;
  if constexpr (type == FLOAT16) return widen<type>(narrow<type>(x));
  const VU u = (VU)x;
  return (V)(x == x ? (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000 : (VU)(VI{} + 0x7FC00000));
}

// The rows of one expert, in passes of nearly the same size.
struct Group {
  int64_t expert, start, rows, passes;

  int64_t row(int64_t pass) const { return rows * pass / passes; }
};

struct Task {
  enum Kind { UNITS_OF, COLUMNS_OF, TOKENS_OF } kind;
  int64_t group, from, to;  // TOKENS_OF: a stripe
  int64_t pass;             // UNITS_OF: the first
};

template <Type type>
class Mixture {
  static constexpr int64_t size = SIZE<type>;
  static constexpr Type held = pairs<type> ? type : FLOAT32;  // of what is hidden

  // Of a thread.
  struct Room {
    std::unique_ptr<V[]> packed, sums;
    int64_t group = -1, pass = -1;  // whose rows are packed
  };

  const Moe m;
  const int64_t hidden_row, tall, together;  // rows of a pass, at most; passes that pass w_in together
  std::vector<int32_t> token, slot;  // of each row; of each choice, or -1
  std::vector<Group> groups;
  std::vector<Task> tasks;
  std::vector<std::atomic<int64_t>> units_done;
  std::vector<int64_t> columns_due;  // tasks until a stripe is whole
  std::atomic<int64_t> taken{0}, columns_done{0}, tokens_done{0};
  int64_t most = 0;  // hidden units of a task
  int64_t packed_size = 0, sums_size = 0;  // vectors

 public:
  Mixture(const Moe& m, int threads)
      : m(m), hidden_row(even(m.units)), tall(std::clamp<int64_t>(CLOSE / (64 * steps()), std::min(4, PASS), PASS)),
        together(std::max<int64_t>(1, PACKED / (tall * 64 * steps()))), slot(m.tokens * m.choices, -1) {
    std::vector<int64_t> ends(m.experts + 1);
    const int64_t choices = m.tokens * m.choices;
    for (int64_t i = 0; i < choices; i++)
      if (!m.kept || m.kept[i]) ends[m.ids[i] + 1]++;
    for (int64_t e = 0; e < m.experts; e++) {
      if (ends[e + 1]) groups.push_back({e, ends[e], ends[e + 1], slices(ends[e + 1], tall)});
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
      Room room{std::unique_ptr<V[]>(new V[packed_size]), std::unique_ptr<V[]>(new V[sums_size])};
      int64_t now = taken++;
      while (now < (int64_t)tasks.size()) {
        const int64_t next = taken++;
        const Task &task = tasks[now], &then = tasks[std::min<int64_t>(next, tasks.size() - 1)];
        if (task.kind == Task::UNITS_OF) {
          hidden_units(task, then, room);
          units_done[task.group].fetch_add(1, std::memory_order_release);
        } else if (task.kind == Task::COLUMNS_OF) {
          until(units_done[task.group], units_due(groups[task.group]));
          until(tokens_done, task.from / m.stripe * slices(m.tokens, TOKENS));
          columns(groups[task.group], task.from, task.to, begin(then), room.sums.get());
          columns_done.fetch_add(1, std::memory_order_release);
        } else {
          until(columns_done, columns_due[task.group]);
          for (int64_t t = task.from; t < task.to; t++) mix(t, task.group * m.stripe);
          tokens_done.fetch_add(1, std::memory_order_release);
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

  int64_t steps() const { return slices(m.width, STEP<type>); }

  int64_t units_due(const Group& g) const { return slices(m.units, slice(g)) * slices(g.passes, together); }

  // Hidden units of a task: a single pass reads far, of several each finds near what the first has read.
  int64_t slice(const Group& g) const { return g.passes > 1 ? LEAST : most; }

  // Whole rows of w_out are read fastest; where the experts do not go round, the threads share the last few. Of many
  // rows the sums of fewer columns stay near.
  void plan(int threads) {
    const int64_t many = groups.size(), spare = many % threads;
    units_done = std::vector<std::atomic<int64_t>>(many);
    most = std::clamp<int64_t>(many * m.units / (4 * threads) / LEAST * LEAST, LEAST, UNITS);
    for (int64_t g = 0; g < many; g++) {
      for (int64_t p = 0; p < groups[g].passes; p += together) cut(Task::UNITS_OF, g, 0, m.units, slice(groups[g]), p);
      packed_size = std::max(packed_size, std::min(groups[g].rows, together * tall) * steps());
    }
    const int64_t before = tasks.size();
    for (int64_t first = 0, i = 0; first < m.width; first += m.stripe, i++) {
      const int64_t last = std::min(first + m.stripe, m.width);
      for (int64_t g = 0; g < many; g++) {
        const int64_t rows = groups[g].rows, parts = g >= many - spare || rows > 48 ? 4 : rows > 24 ? 2 : 1;
        const int64_t wide = std::min(last - first, COLUMNS / parts);
        cut(Task::COLUMNS_OF, g, first, last, wide);
        sums_size = std::max(sums_size, std::min(rows, high(wide) * tall) * slices(wide, WIDE) * BROAD);
      }
      columns_due.push_back(tasks.size() - before - i * slices(m.tokens, TOKENS));
      cut(Task::TOKENS_OF, i, 0, m.tokens, TOKENS);
    }
  }

  // Passes whose sums over so many columns stay near.
  int64_t high(int64_t columns) const { return std::max<int64_t>(1, SUMS / (columns * tall)); }

  void cut(typename Task::Kind kind, int64_t group, int64_t from, int64_t to, int64_t each, int64_t pass = 0) {
    for (int64_t i = from; i < to; i += each) tasks.push_back({kind, group, i, std::min(i + each, to), pass});
  }

  const char* in(int64_t expert, int64_t row) const {
    return (const char*)m.w_in + size * (expert * m.in_expert + row * m.in_row);
  }
  const char* out(int64_t expert, int64_t row, int64_t column) const {
    return (const char*)m.w_out + size * (expert * m.out_expert + row * m.out_row + column);
  }
  void* hidden(int64_t row) const { return (char*)m.hidden + SIZE<held> * row * hidden_row; }
  void* result(int64_t row, int64_t i) const { return (char*)m.rows + size * (row * m.stripe + i); }

  // The first weights that a task reads.
  const char* begin(const Task& t, bool up = false) const {
    if (t.kind == Task::UNITS_OF) return in(groups[t.group].expert, up ? m.units + t.from : t.from);
    if (t.kind == Task::COLUMNS_OF) return out(groups[t.group].expert, 0, t.from);
    return (const char*)m.w_out;
  }

  void hidden_units(const Task& task, const Task& then, Room& room) const {
    const Group& g = groups[task.group];
    const int64_t last = std::min(task.pass + together, g.passes), passes = last - task.pass;
    const char* half[2] = {in(g.expert, task.from), in(g.expert, m.units + task.from)};
    pack(task, last, room);
    for (int64_t p = task.pass; p < last; p++) {
      const int64_t row = g.row(p), rows = g.row(p + 1) - row;
      const V* x = room.packed.get() + (row - g.row(task.pass)) * steps();
      alignas(64) float y[2][UNITS * PASS + 16];
      for (int i = 0; i < 2; i++) {
        const char* next = passes > 1 ? begin(then, i) : i ? begin(then) : half[1];
        products(x, rows, half[i], task.to - task.from, y[i], next, p - task.pass, passes);
      }
      activate(y[0], y[1], rows, task, (char*)hidden(g.start + row) + SIZE<held> * task.from * rows);
    }
  }

  // The rows of the task's passes, unless they are there.
  void pack(const Task& task, int64_t last, Room& room) const {
    if (room.group == task.group && room.pass == task.pass) return;
    room.group = task.group, room.pass = task.pass;
    const Group& g = groups[task.group];
    for (int64_t p = task.pass; p < last; p++) {
      const void* x[PASS];
      const int64_t row = g.row(p), rows = g.row(p + 1) - row;
      for (int64_t r = 0; r < rows; r++) x[r] = at<type>(m.x, token[g.start + row + r] * m.x_row);
      pack_rows<type>(x, rows, m.width, room.packed.get() + (row - g.row(task.pass)) * steps());
    }
  }

  // x by `many` rows of w. A single pass fetches the rows that come next, in the end `next`; one of several its part of
  // what lies there.
  void products(const V* x, int64_t rows, const char* w, int64_t many, float* y, const char* next, int64_t pass,
                int64_t passes) const {
    const Tiles& tile = tiles<type>(rows);
    const int64_t row = size * m.in_row, lines = m.width / STEP<type>;
    const int64_t soon = std::min(many, slices(SOON, row * tile.across) * tile.across);
    Ahead ahead{next + many * row * pass / passes, slices(64, passes)};
    for (int64_t i = 0; i < many; i += tile.across) {
      const char* columns[BROAD];
      for (int64_t c = 0; c < BROAD; c++) columns[c] = w + std::min(i + c, many - 1) * row;
      if (const int64_t far = i + soon; passes == 1) ahead.at = far < many ? w + far * row : next + (far - many) * row;
      tile.dot(x, columns, m.width, y + i * rows, ahead);
      ahead.at += lines * tile.across * ahead.by;
    }
  }

  void activate(const float* gate, const float* up, int64_t rows, const Task& task, void* to) const {
    const int64_t many = (task.to - task.from) * rows, odd = (task.to - task.from) % 2;
    for (int64_t i = 0; i < many + odd * rows; i += 16) {
      const V a = rounded<type>(load<FLOAT32>(gate, i)), b = rounded<type>(load<FLOAT32>(up, i));
      const V h = a / (1.0f + exponential(-a)) * b;
      store<held>(to, i, type == held ? h : rounded<type>(h), many + odd * rows - i);
    }
    if (pairs<type> && odd)
      for (int64_t r = 0; r < rows; r++) std::memset((char*)to + size * (many - rows + 2 * r + 1), 0, size);
  }

  void columns(const Group& g, int64_t from, int64_t to, const char* ahead, V* room) const {
    const int64_t many = to - from, each = high(many), all = g.passes;
    for (int64_t pass = 0; pass < all; pass += each) {
      const int64_t last = std::min(pass + each, all);
      const char* next = last < all ? out(g.expert, 0, from) : ahead;
      blocks(g, pass, last, from, many, next, (float*)room);
      for (int64_t p = pass; p < last; p++) {
        const int64_t row = g.row(p), rows = g.row(p + 1) - row;
        const float* sums = (float*)room + (row - g.row(pass)) * slices(many, WIDE) * WIDE;
        const int64_t wide = tiles<type>(rows).wide;
        for (int64_t i = 0; i < many; i += 32)
          for (int64_t r = 0; r < rows; r++) {
            V y[2];
            order<type>(sums + i / wide * wide * rows + r * wide + i % wide, y);
            void* to = result(g.start + row + r, from % m.stripe + i);
            store<type>(to, 0, y[0], many - i);
            if (many - i > 16) store<type>(to, 16, y[1], many - i - 16);
          }
      }
    }
  }

  // w_out a block of rows after another, which stays near while the rows of h pass; a step at a time for very few rows:
  // then the next comes as fast as memory gives it.
  void blocks(const Group& g, int64_t pass, int64_t last, int64_t from, int64_t many, const char* ahead,
              float* room) const {
    constexpr int64_t L = DEEP<type>;
    const int64_t passes = last - pass, padded = slices(many, WIDE) * WIDE, by = size * m.out_row;
    const int64_t block = g.rows < FEW ? L : passes > 2 ? 2 * NEAR : NEAR;
    const int64_t each = passes > 1 ? block : m.units, soon = std::max(block, slices(SOON, size * many));
    Walk walk(out(g.expert, soon, from), size * many, by, m.units - soon, ahead);
    for (int64_t k = 0; k < m.units; k += each) {
      const int64_t deep = std::min(each, m.units - k);
      for (int64_t p = pass; p < last; p++) {
        const int64_t row = g.row(p), rows = g.row(p + 1) - row;
        const char* h = (const char*)hidden(g.start + row) + SIZE<held> * k * rows;
        const Tiles& tile = tiles<type>(rows);
        const int64_t wide = tile.wide, full = deep % L ? 0 : many / wide * wide;
        const int64_t lines = slices(size * wide * block / 64, passes);
        float* y = room + (row - g.row(pass)) * padded;
        tile.axpy(h, deep / L, block / L, out(g.expert, k, from), by, full, y, k == 0, walk, lines);
        for (int64_t i = full; i < many; i += wide)  // what is no whole tile, with zeros beside it
          for (int64_t n = 0; n < deep; n += NEAR) {
            alignas(64) char edge[NEAR * WIDE * size] = {};
            const int64_t wk = wide * size, high = std::min(NEAR, deep - n), steps = slices(high, L);
            for (int64_t j = 0; j < high; j++)
              std::memcpy(edge + j * wk, out(g.expert, k + n + j, from + i), size * std::min(wide, many - i));
            const char* own = h + SIZE<held> * n * rows;
            tile.axpy(own, steps, steps, edge, wk, wide, y + i * rows, k + n == 0, walk, 0);
          }
      }
    }
  }

  void mix(int64_t t, int64_t first) const {
    const int64_t many = std::min(m.stripe, m.width - first);
    for (int64_t i = 0; i < many; i += 16) {
      V sum{};
      for (int64_t k = 0; k < m.choices; k++) {
        const int64_t row = slot[t * m.choices + k];
        if (row >= 0) sum = sum + load<type>(result(row, i), 0, many - i) * m.weights[t * m.choices + k];
      }
      store<type>((char*)m.y + size * (t * m.width + first + i), 0, sum, many - i);
    }
  }
};

}  // namespace
