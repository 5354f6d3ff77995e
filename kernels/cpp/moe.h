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

#include "tiles.h"

namespace {  // other units have their own tasks

constexpr int64_t UNITS = 32, COLUMNS = 2048;  // of a task, at most; multiples of 32
constexpr int64_t TOKENS = 16;                 // of a task
constexpr int64_t ROWS = 96;                   // that pass the rows of w_in together
constexpr int64_t FEW = 8, HIGH = 96;          // rows that w_out streams past as it lies; at most, that pass a panel
constexpr int64_t NEAR = 64;                   // rows of w_out in a panel

struct Moe {
  const void* x;
  const int64_t* ids;
  const float* weights;
  const uint8_t* kept;
  const void *w_in, *w_out;
  void *hidden, *rows, *y;  // [N, F even], [N, stripe], [T, D]
  int64_t tokens, choices, width, units, experts, stripe, x_row, in_expert, in_row, out_expert, out_row;
};

static inline int64_t even(int64_t n) { return n + (n & 1); }

template <Type type>
static inline V rounded(V x) {
  if constexpr (type == FLOAT32) return x;
  else return widen<type>(narrow<type>(x));
}

// The lines of a block of rows of w, asked for in the order in which they lie.
struct Walk {
  const char *at, *end;
  int64_t wide, skip;  // bytes of a row that are read, and from there to the next

  inline void step() {
    fetch(at);
    at += 64;
    if (at >= end) at += skip, end = at + wide;
  }
};

// y[r, m] += Σ_k x[r][k] · w[k][m] for some steps from k on and the columns of a panel. `lines` are walked meanwhile.
template <Type type, int R>
[[gnu::noinline]] static void panel_add(const void* const* x, int64_t k, int64_t steps, const void* panel, float* y,
                                        int64_t y_row, Walk& ahead, int64_t lines) {
  Walk walk = ahead;
  V sum[R * BROAD];
#pragma GCC unroll 32
  for (int i = 0; i < R * BROAD; i++) sum[i] = load<FLOAT32>(y + i / BROAD * y_row, 16 * (i % BROAD));
  auto* b = (const Operand<type>*)panel;
  for (int64_t s = 0; s < steps; s++, k += DEEP<type>, b += BROAD) {
    for (int64_t i = s; i < lines; i += steps) walk.step();
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Operand<type> a = spread<type>(x[r], k);
#pragma GCC unroll 8
      for (int c = 0; c < BROAD; c++) sum[r * BROAD + c] = mac(a, b[c], sum[r * BROAD + c]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < R * BROAD; i++) store<FLOAT32>(y + i / BROAD * y_row, 16 * (i % BROAD), sum[i]);
  ahead = walk;
}

// The rows of one expert.
struct Group {
  int64_t expert, start, rows;
};

struct Task {
  enum Kind { UNITS_OF, COLUMNS_OF, TOKENS_OF } kind;
  int64_t group, from, to;  // TOKENS_OF: a stripe
};

template <Type type>
class Mixture {
  static constexpr int64_t size = SIZE<type>;

  const Moe m;
  const int64_t hidden_row;
  std::vector<int32_t> token, slot;  // of each row; of each choice, or -1
  std::vector<Group> groups;
  std::vector<Task> tasks;
  std::vector<std::atomic<int64_t>> units_done;
  std::vector<int64_t> columns_due;  // tasks until a stripe is whole
  std::atomic<int64_t> taken{0}, columns_done{0}, tokens_done{0};
  int64_t room_size = 0;  // numbers

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
      const std::unique_ptr<float[]> room(new float[room_size]);
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
          until(tokens_done, task.from / m.stripe * slices(m.tokens, TOKENS));
          columns(groups[task.group], task.from, task.to, ahead, room.get());
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

  // Whole rows of w_out are read fastest; where the experts do not go round, the threads share the last few. Of many
  // rows the sums of fewer columns stay near.
  void plan(int threads) {
    const int64_t many = groups.size(), spare = many % threads;
    units_done = std::vector<std::atomic<int64_t>>(many);
    for (int64_t g = 0; g < many; g++) cut(Task::UNITS_OF, g, 0, m.units, UNITS);
    const int64_t before = tasks.size();
    for (int64_t first = 0, i = 0; first < m.width; first += m.stripe, i++) {
      const int64_t last = std::min(first + m.stripe, m.width);
      for (int64_t g = 0; g < many; g++) {
        const int64_t rows = groups[g].rows, parts = g >= many - spare || rows > 48 ? 4 : rows > 24 ? 2 : 1;
        const int64_t wide = std::min(last - first, COLUMNS / parts);
        cut(Task::COLUMNS_OF, g, first, last, wide);
        room_size = std::max(room_size, std::min(rows, high(wide)) * (wide + 16));
      }
      columns_due.push_back(tasks.size() - before - i * slices(m.tokens, TOKENS));
      cut(Task::TOKENS_OF, i, 0, m.tokens, TOKENS);
    }
  }

  // Rows whose sums over so many columns stay near.
  static int64_t high(int64_t columns) { return std::clamp<int64_t>(24 * COLUMNS / columns, FEW, HIGH); }

  void cut(typename Task::Kind kind, int64_t group, int64_t from, int64_t to, int64_t each) {
    for (int64_t i = from; i < to; i += each) tasks.push_back({kind, group, i, std::min(i + each, to)});
  }

  const char* in(int64_t expert, int64_t row) const {
    return (const char*)m.w_in + size * (expert * m.in_expert + row * m.in_row);
  }
  const char* out(int64_t expert, int64_t row, int64_t column) const {
    return (const char*)m.w_out + size * (expert * m.out_expert + row * m.out_row + column);
  }
  void* hidden(int64_t row, int64_t i) const { return (char*)m.hidden + size * (row * hidden_row + i); }
  void* result(int64_t row, int64_t i) const { return (char*)m.rows + size * (row * m.stripe + i); }

  // The first weights that a task reads.
  const char* begin(int64_t task) const {
    const Task& t = tasks[task];
    if (t.kind == Task::UNITS_OF) return in(groups[t.group].expert, t.from);
    if (t.kind == Task::COLUMNS_OF) return out(groups[t.group].expert, 0, t.from);
    return (const char*)m.w_out;
  }

  void hidden_units(const Group& g, int64_t from, int64_t to, const char* ahead) const {
    const char *gate = in(g.expert, from), *up = in(g.expert, m.units + from);
    const int64_t many = to - from, end = g.start + g.rows;
    const void* x[ROWS];
    alignas(64) float y[2][ROWS * UNITS];
    for (int64_t row = g.start, rows; row < end; row += rows) {
      rows = std::min(ROWS, end - row);
      for (int64_t r = 0; r < rows; r++) x[r] = at<type>(m.x, token[row + r] * m.x_row);
      dot_block<type>(x, rows, gate, m.in_row, many, m.width, y[0], UNITS, up);
      dot_block<type>(x, rows, up, m.in_row, many, m.width, y[1], UNITS, row + rows < end ? gate : ahead);
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < many; i += 16) {
          const V a = rounded<type>(load<FLOAT32>(y[0] + r * UNITS, i));
          const V b = rounded<type>(load<FLOAT32>(y[1] + r * UNITS, i));
          store<type>(hidden(row + r, from + i), 0, a / (1.0f + exponential(-a)) * b, many - i);
        }
        if (to == m.units && m.units < hidden_row) std::memset(hidden(row + r, m.units), 0, size);
      }
    }
  }

  void columns(const Group& g, int64_t from, int64_t to, const char* ahead, float* room) const {
    const int64_t many = to - from, y_row = many + 16, end = g.start + g.rows;
    const bool pack = g.rows > FEW && many % PANEL == 0;
    const void* h[HIGH];
    for (int64_t row = g.start, rows; row < end; row += rows) {
      rows = std::min(pack ? high(many) : FEW, end - row);
      const char* next = row + rows < end ? out(g.expert, 0, from) : ahead;
      for (int64_t r = 0; r < rows; r++) h[r] = hidden(row + r, 0);
      if (pack) panels(h, rows, g.expert, from, many, next, room);
      else if (rows < 3) stream(h, rows, g.expert, from, many, next, room);
      else axpy_block<type>(h, rows, out(g.expert, 0, from), m.out_row, many, m.units, room, y_row, next);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < many; i += 16)
          store<type>(result(row + r, from % m.stripe + i), 0, load<FLOAT32>(room + r * y_row, i), many - i);
    }
  }

  // w_out as it lies, two rows at a time: then the next two come as fast as memory gives them.
  void stream(const void* const* h, int64_t rows, int64_t expert, int64_t from, int64_t many, const char* ahead,
              float* room) const {
    const int64_t y_row = many + 16;
    std::memset(room, 0, 4 * rows * y_row);
    for (int64_t k = 0; k < m.units; k += DEEP<type>) {
      const char* w = out(expert, k, from);
      const char* next = k + DEEP<type> < m.units ? out(expert, k + DEEP<type>, from) : ahead;
      if (k + DEEP<type> <= m.units) axpy_rows<type, 1>(h, rows, k, w, m.out_row, many, room, y_row, next);
      else axpy_rows<type, 1, false>(h, rows, k, w, m.out_row, many, room, y_row, next);
    }
  }

  // w_out a block of rows after another; a panel of it stays near while the rows of h pass.
  void panels(const void* const* h, int64_t rows, int64_t expert, int64_t from, int64_t many, const char* ahead,
              float* room) const {
    const int64_t y_row = many + 16, tiles = slices(rows, TALL), lines = size * many * NEAR / 64;
    const int64_t each = slices(lines, tiles * (many / PANEL));
    alignas(64) char panel[NEAR * PANEL * 4];
    std::memset(room, 0, 4 * rows * y_row);
    for (int64_t k = 0; k < m.units; k += NEAR) {
      const int64_t deep = std::min(NEAR, m.units - k), steps = slices(deep, DEEP<type>);
      const char* next = k + NEAR < m.units ? out(expert, k + NEAR, from) : ahead;
      Walk walk{next, next + size * many, size * many, size * (m.out_row - many)};
      for (int64_t i = 0; i < many; i += PANEL) {
        pack_panels<type>(out(expert, k, from + i), m.out_row, PANEL, deep, panel);
        for (int64_t r = 0, n; r < rows; r += n) {
          float* y = room + r * y_row + i;
          n = rows - r;
          if (TALL == 6 && n >= 6) n = 6, panel_add<type, 6>(h + r, k, steps, panel, y, y_row, walk, each);
          else if (n >= 4) n = 4, panel_add<type, 4>(h + r, k, steps, panel, y, y_row, walk, each);
          else if (n >= 2) n = 2, panel_add<type, 2>(h + r, k, steps, panel, y, y_row, walk, each);
          else panel_add<type, 1>(h + r, k, steps, panel, y, y_row, walk, each);
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
