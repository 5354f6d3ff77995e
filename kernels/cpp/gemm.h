// y[n, m] = Σ_k x[n, k] · w[e(n)][k, m] + bias[m], summed over k in the orders of tiles.h.
//
// Few rows of an expert: w is read once, in pieces that stream, each thread fetching the piece that it will take next.
// Many: a piece of w stays near while the rows pass it. Rows and columns are divided over threads; the sum never is.
#pragma once
#include <omp.h>

#include <atomic>
#include <memory>
#include <vector>

#include "tiles.h"

constexpr int64_t FEW = 16;                          // rows of an expert for which w streams
constexpr int64_t ROWS = 64 * TALL;                  // of a task otherwise
constexpr int64_t PIECE = 1 << 17, NEAR = 1 << 18;  // bytes of w that stream, that stay near
constexpr int64_t ROOM = 1 << 13;                   // results at hand, no more

struct Gemm {
  const void *x, *w, *bias;
  void* y;
  const int32_t* ends;  // of the experts' rows; null: each has all of them
  int64_t rows, depth, columns, experts, x_row, x_expert, w_expert, w_k, w_column, y_row, y_expert;
};

struct Task {
  int64_t expert, row, end, column, last;  // rows to `end`, columns to `last`
};

template <Type type>
struct Plan {
  const Gemm& g;
  const int64_t threads;
  std::vector<Task> whole;      // one an expert with rows: all of its rows and columns
  std::vector<int64_t> before;  // tasks of the experts before it

  bool dot() const { return g.w_k == 1; }
  bool few(const Task& t) const { return t.end - t.row <= FEW; }
  int64_t rows(const Task& t) const {  // fewer where columns alone do not occupy every thread
    const int64_t T = t.end - t.row, share = (T / (2 * threads) + TALL - 1) / TALL * TALL;
    return few(t) ? T : g.experts * across(t) < 2 * threads ? std::clamp<int64_t>(share, 2 * TALL, ROWS) : ROWS;
  }

  int64_t across(const Task& t) const { return (g.columns + columns(t) - 1) / columns(t); }

  int64_t columns(const Task& t) const {
    const int64_t unit = dot() ? BROAD : PANEL, bytes = few(t) ? PIECE : NEAR;
    const int64_t fit = bytes / (SIZE<type> * std::max<int64_t>(g.depth, 1)) / unit * unit;
    if (!few(t)) return std::clamp<int64_t>(fit, unit, 4 * PANEL);
    if (dot()) return std::clamp<int64_t>(fit, unit, ROOM / FEW);
    const int64_t share = (g.columns / (2 * threads) + unit - 1) / unit * unit;
    return std::clamp<int64_t>(g.experts < 4 * threads ? share : g.columns, unit, ROOM / FEW);
  }

  Plan(const Gemm& gemm, int64_t threads) : g(gemm), threads(threads), before(1, 0) {
    for (int64_t e = 0, start = 0, end; e < g.experts; e++) {
      end = g.ends ? g.ends[e] : g.rows, start = g.ends ? start : 0;
      if (end > start && g.columns) {
        whole.push_back({e, start, end, 0, g.columns});
        const Task& t = whole.back();
        before.push_back(before.back() + across(t) * ((end - start + rows(t) - 1) / rows(t)));
      }
      start = end;
    }
  }

  int64_t count() const { return before.back(); }

  Task operator[](int64_t i) const {
    const int64_t at = std::upper_bound(before.begin(), before.end(), i) - before.begin() - 1;
    Task t = whole[at];
    const int64_t n = i - before[at], wide = columns(t), high = rows(t), down = (t.end - t.row + high - 1) / high;
    t.column = n / down * wide, t.last = std::min(t.column + wide, g.columns);
    t.row += n % down * high, t.end = std::min(t.row + high, t.end);
    return t;
  }

  const void* w(const Task& t) const { return at<type>(g.w, t.expert * g.w_expert + t.column * g.w_column); }
};

template <Type type>
static void finish(const Gemm& g, int64_t expert, int64_t row, int64_t rows, int64_t column, int64_t columns,
                   const float* y, int64_t y_row) {
  for (int64_t t = 0; t < rows; t++) {
    void* to = (void*)at<type>(g.y, expert * g.y_expert + (row + t) * g.y_row + column);
    for (int64_t m = 0; m < columns; m += 16) {
      V sum = load<FLOAT32>(y + t * y_row, m, columns - m);
      if (g.bias) sum += load<type>(g.bias, column + m, columns - m);
      store<type>(to, m, sum, columns - m);
    }
  }
}

// Memory of a thread that keeps its size from call to call, at a multiple of 64 bytes.
static inline void* scratch(int64_t bytes) {
  static thread_local std::unique_ptr<char[]> room;
  static thread_local int64_t size = 0;
  if (bytes > size) room.reset(new char[bytes + 64]), size = bytes;
  return (void*)(((uintptr_t)room.get() + 63) / 64 * 64);
}

template <Type type>
static void run(const Plan<type>& plan, const Task& task, const void* next) {
  const Gemm& g = plan.g;
  const int64_t K = g.depth, M = task.last - task.column, y_row = (M + PANEL - 1) / PANEL * PANEL;
  const bool few = task.end - task.row <= FEW;
  const void* w = plan.w(task);
  const void* x[FEW];
  alignas(64) float y[ROOM];
  auto point = [&](int64_t row, int64_t rows) {
    for (int64_t t = 0; t < rows; t++) x[t] = at<type>(g.x, task.expert * g.x_expert + (row + t) * g.x_row);
  };
  const int64_t panel = panel_size<type>(K), rows = task.end - task.row, tall = few ? rows : TALL;
  const bool pack = !few && !plan.dot();
  char* panels = pack ? (char*)scratch(panel * ((M + PANEL - 1) / PANEL)) : nullptr;
  if (pack) pack_panels<type>(w, g.w_k, M, K, panels);
  for (int64_t row = task.row; row < task.end; row += tall) {
    const int64_t T = std::min(tall, task.end - row);
    point(row, T);
    if (pack)
      for (int64_t m = 0; m < M; m += PANEL) panel_block<type>(x, T, panels + m / PANEL * panel, K, y + m, y_row);
    else if (plan.dot() && few)
      dot_block<type>(x, T, w, g.w_column, M, K, y, y_row, next);
    else if (plan.dot())
      dot_pass<type>(x, T, w, g.w_column, M, K, y, y_row, next, (row - task.row) / tall, (rows + tall - 1) / tall);
    else
      axpy_block<type>(x, T, w, g.w_k, M, K, y, y_row, next);
    finish<type>(g, task.expert, row, T, task.column, M, y, y_row);
  }
}

// Numbers 0 to n, an equal run of neighbours to each thread; who has done his takes from the others'.
struct Shares {
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::vector<Share> shares;

  Shares(int64_t n, int64_t threads) : shares(threads) {
    for (int64_t t = 0; t < threads; t++) shares[t].next = n * t / threads, shares[t].end = n * (t + 1) / threads;
  }

  int64_t take(int64_t thread) {  // -1: there is none
    for (size_t i = 0; i < shares.size(); i++) {
      Share& share = shares[(thread + i) % shares.size()];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      if (const int64_t at = share.next++; at < share.end) return at;
    }
    return -1;
  }
};

template <Type type>
static void gemm_all(const Gemm& g, int threads) {
  const Plan<type> plan(g, threads);
  const int64_t work = (g.ends ? g.rows : g.rows * g.experts) * g.depth * g.columns;
  threads = work < SMALL ? 1 : (int)std::clamp<int64_t>(plan.count(), 1, threads);
  Shares shares(plan.count(), threads);
#pragma omp parallel num_threads(threads)
  for (int64_t me = omp_get_thread_num(), i = shares.take(me), then; i >= 0; i = then) {
    then = shares.take(me);
    const Task task = plan[i];
    run<type>(plan, task, plan.w(then < 0 ? task : plan[then]));
  }
}
