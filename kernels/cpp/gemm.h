// y[n, m] = Σ_k x[n, k] · w[e(n)][k, m] + bias[m], summed over k in one order for every number of rows.
//
// Where a column of w is contiguous ("dot"), sixteen lanes add up every sixteenth product and one tree adds the lanes.
// Where a row of w is contiguous ("axpy"), each output adds its products one after another. Rows and columns are tiled
// and divided over threads; the sum never is. Two-byte operands are widened first, which is exact.
#pragma once
#include <vector>

#include "simd.h"

constexpr int64_t ROWS = 128, COLUMNS = 16 * TILE;  // of a task
constexpr int64_t FEW = 8;  // rows up to which a two-byte matrix is widened on the fly

struct Gemm {  // for `run` x is wide already
  const void *x, *w;
  const float* bias;
  void* y;
  int64_t rows, depth, columns, x_row, w_expert, w_k, w_column;
};

struct Task {
  int64_t expert, row, end, column;
};

template <int T, int F, Type type>
static inline void dot_tile(const float* x, int64_t x_row, const void* w, int64_t w_column, int64_t K, float* y) {
  V sum[T * F] = {};
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    V a[T];
    for (int t = 0; t < T; t++) a[t] = load<FLOAT32>(x + t * x_row, k);
    for (int f = 0; f < F; f++) {
      V b = load<type>(at<type>(w, f * w_column), k);
      for (int t = 0; t < T; t++) sum[t * F + f] = fma(a[t], b, sum[t * F + f]);
    }
  }
  if (k < K)
    for (int f = 0; f < F; f++) {
      V b = load<type>(at<type>(w, f * w_column), k, K - k);
      for (int t = 0; t < T; t++) sum[t * F + f] = fma(load<FLOAT32>(x + t * x_row, k, K - k), b, sum[t * F + f]);
    }
  reduce_all<T * F>(sum, y);
}

template <int T, int F, Type type>
static inline void axpy_tile(const float* x, int64_t x_row, const void* w, int64_t w_k, int64_t K, float* y) {
  V sum[T * F] = {};
  for (int64_t k = 0; k < K; k++) {
    V b[F];
    for (int f = 0; f < F; f++) b[f] = load<type>(at<type>(w, k * w_k), 16 * f);
    for (int t = 0; t < T; t++) {
      V a = all(x[t * x_row + k]);
      for (int f = 0; f < F; f++) sum[t * F + f] = fma(a, b[f], sum[t * F + f]);
    }
  }
  std::memcpy(y, sum, sizeof sum);
}

template <int T, Type type>
static void strip(const float* x, int64_t x_row, const void* w, int64_t w_k, int64_t w_column, int64_t K, int64_t M,
                  float* y) {  // y [T, COLUMNS]
  alignas(64) float found[T * COLUMNS];
  if (w_k != 1) {
    axpy_tile<T, TILE, type>(x, x_row, w, w_k, K, found);
    for (int t = 0; t < T; t++) std::memcpy(y + t * COLUMNS, found + t * COLUMNS, 4 * COLUMNS);
    return;
  }
  int64_t m = 0;
  for (; m + TILE <= M; m += TILE) {
    dot_tile<T, TILE, type>(x, x_row, at<type>(w, m * w_column), w_column, K, found);
    for (int t = 0; t < T; t++) std::memcpy(y + t * COLUMNS + m, found + t * TILE, 4 * TILE);
  }
  for (; m < M; m++) {
    dot_tile<T, 1, type>(x, x_row, at<type>(w, m * w_column), w_column, K, found);
    for (int t = 0; t < T; t++) y[t * COLUMNS + m] = found[t];
  }
}

template <Type type>
static void strips(int64_t rows, const float* x, int64_t x_row, const void* w, int64_t w_k, int64_t w_column, int64_t K,
                   int64_t M, float* y) {
  int64_t t = 0;
  for (; t + TILE <= rows; t += TILE) strip<TILE, type>(x + t * x_row, x_row, w, w_k, w_column, K, M, y + t * COLUMNS);
  for (; t < rows; t++) strip<1, type>(x + t * x_row, x_row, w, w_k, w_column, K, M, y + t * COLUMNS);
}

template <Type type>
static void run(const Gemm& g, const Task& task, std::vector<float>& room) {
  const int64_t K = g.depth, T = task.end - task.row, M = std::min(COLUMNS, g.columns - task.column);
  const bool dot = g.w_k == 1;
  const bool pack = (type != FLOAT32 && T > FEW) || (!dot && M < COLUMNS);
  room.resize(ROWS * COLUMNS + COLUMNS * K);
  float *y = room.data(), *w_wide = y + ROWS * COLUMNS;
  const float* x = (const float*)g.x + task.row * g.x_row;
  const void* w = at<type>(g.w, task.expert * g.w_expert + task.column * g.w_column);
  if (!pack) {
    strips<type>(T, x, g.x_row, w, g.w_k, g.w_column, K, M, y);
  } else if (dot) {
    for (int64_t m = 0; m < M; m++) widen_row<type>(at<type>(w, m * g.w_column), w_wide + m * K, K);
    strips<FLOAT32>(T, x, g.x_row, w_wide, 1, K, K, M, y);
  } else {
    for (int64_t k = 0; k < K; k++)
      for (int64_t m = 0; m < COLUMNS; m += 16)
        store<FLOAT32>(w_wide, k * COLUMNS + m,
                       m < M ? load<type>(at<type>(w, k * g.w_k), m, M - m) : V{});
    strips<FLOAT32>(T, x, g.x_row, w_wide, COLUMNS, 1, K, M, y);
  }
  for (int64_t t = 0; t < T; t++)
    for (int64_t m = 0; m < M; m += 16) {
      V sum = load<FLOAT32>(y + t * COLUMNS, m, M - m);
      if (g.bias) sum += load<FLOAT32>(g.bias, task.column + m, M - m);
      store<type>((char*)g.y + (type == FLOAT32 ? 4 : 2) * ((task.row + t) * g.columns + task.column), m, sum, M - m);
    }
}

template <Type type>
static void gemm_all(Gemm g, const int32_t* ends, int64_t experts, int threads) {
  std::vector<Task> tasks;
  for (int64_t e = 0, start = 0; e < experts; start = ends[e++])
    for (int64_t column = 0; column < g.columns; column += COLUMNS)
      for (int64_t row = start; row < ends[e]; row += ROWS)
        tasks.push_back({e, row, std::min<int64_t>(row + ROWS, ends[e]), column});
  const void* narrow_x = g.x;
  std::vector<float> wide(type == FLOAT32 ? 0 : g.rows * g.depth);
  if (type != FLOAT32) g.x = wide.data(), g.x_row = g.depth;
#pragma omp parallel num_threads(g.rows * g.depth * g.columns < SMALL ? 1 : threads)
  {
    std::vector<float> room;
    if (type != FLOAT32) {
#pragma omp for
      for (int64_t i = 0; i < g.rows * g.depth; i += g.depth)
        widen_row<type>(at<type>(narrow_x, i), wide.data() + i, g.depth);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)tasks.size(); i++) run<type>(g, tasks[i], room);
  }
}
