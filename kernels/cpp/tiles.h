// Micro kernels of matrix products: a few rows of x by a few columns of w, float32 sums that have one order each.
//
// "dot", where a column of w lies in one piece: sixteen lanes add up along k, then a tree adds the lanes.
// "axpy", where a row of w does: each output is a lane of its own, and k ascends.
// bfloat16 is multiplied two by two (dpbf16) where the CPU can: a lane then takes k and k + 1 at once, and a step of
// "dot" is 32 numbers; a k past the end is zero. Everywhere else numbers are widened first, which is exact.
// The order of a sum depends on none of the rows, the columns and the tiles about it.
//
// R rows and C columns of a tile, T rows and M columns of a block, K their depth. Rows are pointers: they lie anywhere.
#pragma once
#include <type_traits>

#include "simd.h"

#if defined(__AVX512F__)
constexpr int TALL = 6, BROAD = 4;  // accumulators that fit the registers beside their operands
#else
constexpr int TALL = 2, BROAD = 2;
#endif
constexpr int PANEL = 16 * BROAD;  // columns of an "axpy" tile

#if defined(__AVX512BF16__)
template <Type type>
constexpr bool pairs = type == BFLOAT16;
typedef __m512bh Pairs;
#else
template <Type type>
constexpr bool pairs = false;
typedef V Pairs;
#endif
template <Type type>
using Operand = std::conditional_t<pairs<type>, Pairs, V>;
template <Type type>
constexpr int64_t STEP = pairs<type> ? 32 : 16;  // of "dot" along k
template <Type type>
constexpr int64_t SIZE = type == FLOAT32 ? 4 : 2;
template <Type type>
constexpr int64_t DEEP = pairs<type> ? 2 : 1;  // of "axpy" along k

// What is read next is fetched while something else is computed: from `at` on, a line each `by` bytes.
struct Ahead {
  const char* at;  // or null
  int64_t by;
};

static inline void fetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// Numbers k to k + STEP of a row; with n, no more than n of them, the rest zero.
template <Type type>
static inline Operand<type> take(const void* row, int64_t k) {
#if defined(__AVX512BF16__)
  if constexpr (pairs<type>) return (__m512bh)_mm512_loadu_si512((const uint16_t*)row + k);
  else
#endif
    return load<type>(row, k);
}

template <Type type>
static inline Operand<type> take(const void* row, int64_t k, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (pairs<type>)
    return (__m512bh)_mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, (const uint16_t*)row + k);
  else
#endif
    return load<type>(row, k, n);
}

// The DEEP numbers from k on in every lane; the last of an odd number has a zero beside it.
template <Type type, bool whole = true>
static inline Operand<type> spread(const void* row, int64_t k) {
#if defined(__AVX512BF16__)
  if constexpr (pairs<type>) {
    uint32_t two = 0;
    std::memcpy(&two, (const uint16_t*)row + k, whole ? 4 : 2);
    return (__m512bh)_mm512_set1_epi32(two);
  } else
#endif
  if constexpr (type == FLOAT32) {
    return all(((const float*)row)[k]);
  } else {
    return widen<type>(Half{} + ((const uint16_t*)row)[k]);
  }
}

// DEEP rows of w over SPAN columns as DEEP operands of sixteen columns each, in order. Not `whole`: there is no second
// row; not `full`: only n columns. What is not there is zero.
template <Type type>
constexpr int64_t SPAN = 16 * DEEP<type>;

template <Type type, bool whole, bool full>
static inline void weave(const void* w, int64_t w_k, int64_t n, Operand<type>* out) {
#if defined(__AVX512BF16__)
  if constexpr (pairs<type>) {
    const uint16_t* row = (const uint16_t*)w;
    const __mmask32 seen = full ? ~0u : (1u << n) - 1;
    const __m512i a = full ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi16(seen, row);
    const __m512i b = !whole ? _mm512_setzero_si512()
                      : full ? _mm512_loadu_si512(row + w_k) : _mm512_maskz_loadu_epi16(seen, row + w_k);
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    out[0] = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
    out[1] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_add_epi16(low, _mm512_set1_epi16(16)), b);
  } else
#endif
  if constexpr (full) {
    out[0] = load<type>(w, 0);
  } else {
    out[0] = load<type>(w, 0, n);
  }
}

#if defined(__AVX512BF16__)
static inline V mac(Pairs a, Pairs b, V sum) { return (V)_mm512_dpbf16_ps((__m512)sum, a, b); }
#endif
static inline V mac(V a, V b, V sum) { return fma(a, b, sum); }

#if defined(__AVX512F__)
// The first two levels of four trees; after them the lanes of one are neighbours.
static inline __m512 fold(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 t = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  return _mm512_add_ps(_mm512_shuffle_f32x4(s, t, 0x88), _mm512_shuffle_f32x4(s, t, 0xDD));
}

// The last two of sixteen, to n rows of four.
static inline void fold_rows(__m512 a, __m512 b, __m512 c, __m512 d, int n, float* y, int64_t y_row) {
  __m512 s = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  __m512 t = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x44), _mm512_shuffle_ps(c, d, 0xEE));
  __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(s, t, 0x88), _mm512_shuffle_ps(s, t, 0xDD));
  const __m512i turn = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  sums = _mm512_permutexvar_ps(turn, sums);
  _mm_storeu_ps(y, _mm512_castps512_ps128(sums));
  if (n > 1) _mm_storeu_ps(y + y_row, _mm512_extractf32x4_ps(sums, 1));
  if (n > 2) _mm_storeu_ps(y + 2 * y_row, _mm512_extractf32x4_ps(sums, 2));
  if (n > 3) _mm_storeu_ps(y + 3 * y_row, _mm512_extractf32x4_ps(sums, 3));
}
#endif

// y[r, c] = reduce(sum[r, c]), four rows of four at once where registers allow, by the same tree.
template <int R, int C>
static inline void reduce_tile(const V* sum, float* y, int64_t y_row) {
#if defined(__AVX512F__)
  if constexpr (C == 4) {
    __m512 row[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      const V* of = sum + 4 * (r < R ? r : R - 1);
      row[r] = fold((__m512)of[0], (__m512)of[1], (__m512)of[2], (__m512)of[3]);
    }
    fold_rows(row[0], row[1], row[2], row[3], R, y, y_row);
    if constexpr (R > 4) fold_rows(row[4], row[5], row[6], row[7], R - 4, y + 4 * y_row, y_row);
    return;
  }
#endif
#pragma GCC unroll 32
  for (int i = 0; i < R * C; i++) y[i / C * y_row + i % C] = reduce(sum[i]);
}

// y[r, c] = Σ_k x[r][k] · w[c][k]. C lines are fetched a step. Not inline: among other code compilers put the
// accumulators into memory.
template <Type type, int R, int C>
[[gnu::noinline]] static void dot_tile(const void* const* x, const void* const* w, int64_t K, float* y, int64_t y_row,
                                       Ahead ahead) {
  V sum[R * C];
#pragma GCC unroll 32
  for (int i = 0; i < R * C; i++) sum[i] = V{};
  int64_t k = 0;
  for (; k + STEP<type> <= K; k += STEP<type>) {
    Operand<type> b[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      b[c] = take<type>(w[c], k);
      if (ahead.at) fetch(ahead.at), ahead.at += ahead.by;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Operand<type> a = take<type>(x[r], k);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sum[r * C + c] = mac(a, b[c], sum[r * C + c]);
    }
  }
  if (k < K) {
    Operand<type> b[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) b[c] = take<type>(w[c], k, K - k);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Operand<type> a = take<type>(x[r], k, K - k);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sum[r * C + c] = mac(a, b[c], sum[r * C + c]);
    }
  }
  reduce_tile<R, C>(sum, y, y_row);
}

// The same for T rows; `ahead` is shared out among their tiles.
template <Type type, int C>
static void dot_rows(const void* const* x, int64_t T, const void* const* w, int64_t K, float* y, int64_t y_row,
                     Ahead ahead = {}) {
  const int64_t tiles = (T + TALL - 1) / TALL;
  if (ahead.at) ahead.by = (ahead.by + tiles - 1) / tiles;
  for (int64_t t = 0, n; t < T; t += n) {
    n = TALL == 6 && T - t == 8 ? 4 : std::min<int64_t>(T - t, TALL);
    float* to = y + t * y_row;
    if constexpr (TALL == 6) {
      if (n == 6) dot_tile<type, 6, C>(x + t, w, K, to, y_row, ahead);
      else if (n >= 4) n = 4, dot_tile<type, 4, C>(x + t, w, K, to, y_row, ahead);
    }
    if (n == 3) n = 2;
    if (n == 2) dot_tile<type, 2, C>(x + t, w, K, to, y_row, ahead);
    else if (n == 1) dot_tile<type, 1, C>(x + t, w, K, to, y_row, ahead);
    if (ahead.at) ahead.at += ahead.by * C * (K / STEP<type>);
  }
}

// y[t, m] of T rows and M columns that lie `w_column` numbers apart: for few rows. With `next`, the columns that come
// next are fetched meanwhile in the order in which they lie: at the end, what lies there.
template <Type type>
static void dot_block(const void* const* x, int64_t T, const void* w, int64_t w_column, int64_t M, int64_t K, float* y,
                      int64_t y_row, const void* next = nullptr) {
  const void* columns[BROAD];
  for (int64_t m = 0, n; m < M; m += n) {
    n = M - m < BROAD ? 1 : BROAD;
    for (int64_t c = 0; c < n; c++) columns[c] = at<type>(w, (m + c) * w_column);
    const void* after = m + n < M ? at<type>(w, (m + n) * w_column) : next;
    const Ahead ahead = {next ? (const char*)after : nullptr, STEP<type> * SIZE<type>};
    if (n == 1) dot_rows<type, 1>(x, T, columns, K, y + m, y_row, ahead);
    else dot_rows<type, BROAD>(x, T, columns, K, y + m, y_row, ahead);
  }
}

// The same for rows up to TALL of many, which pass M columns that stay near: part `part` of `parts` of the M columns
// from `next` on is fetched.
template <Type type>
static void dot_pass(const void* const* x, int64_t T, const void* w, int64_t w_column, int64_t M, int64_t K, float* y,
                     int64_t y_row, const void* next = nullptr, int64_t part = 0, int64_t parts = 1) {
  const void* columns[BROAD];
  const int64_t bytes = M * K * SIZE<type>;
  Ahead ahead = {next ? (const char*)next + bytes * part / parts : nullptr, STEP<type> * SIZE<type> / parts + 1};
  for (int64_t m = 0, n; m < M; m += n) {
    n = M - m < BROAD ? 1 : BROAD;
    for (int64_t c = 0; c < n; c++) columns[c] = at<type>(w, (m + c) * w_column);
    if (n == 1) dot_rows<type, 1>(x, T, columns, K, y + m, y_row, ahead);
    else dot_rows<type, BROAD>(x, T, columns, K, y + m, y_row, ahead);
    if (ahead.at) ahead.at += ahead.by * n * (K / STEP<type>);
  }
}

// S steps of R rows over M columns, of a block of SPAN columns after another; not `full`: of one that is not whole.
template <Type type, int R, int S, bool whole, bool full>
[[gnu::noinline]] static void axpy_tile(const void* const* x, int64_t k, const void* w, int64_t w_k, int64_t M,
                                        float* y, int64_t y_row, const char* next) {
  constexpr int64_t L = DEEP<type>, LINES = S * L * SPAN<type> * SIZE<type> / 64;  // of a step
  int64_t line = 0;
  for (int64_t m = 0; m < M; m += SPAN<type>) {
    V sum[R * L];
#pragma GCC unroll 16
    for (int i = 0; i < R * L; i++) {
      const float* from = y + i / L * y_row;
      const int64_t column = m + 16 * (i % L);
      sum[i] = full ? load<FLOAT32>(from, column) : load<FLOAT32>(from, column, M - column);
    }
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      Operand<type> b[L];
      const void* from = at<type>(w, s * L * w_k + m);
      weave<type, whole, full>(from, w_k, M - m, b);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Operand<type> a = spread<type, whole>(x[r], k + s * L);
#pragma GCC unroll 2
        for (int l = 0; l < L; l++) sum[r * L + l] = mac(a, b[l], sum[r * L + l]);
      }
    }
    if (next) {
      for (int i = 0; i < LINES; i++) fetch(next + 64 * (line + i));
      line += LINES;
      if (64 * line >= M * SIZE<type>) line = 0, next += w_k * SIZE<type>;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * L; i++) {
      const int64_t column = m + 16 * (i % L);
      if (full) store<FLOAT32>(y + i / L * y_row, column, sum[i]);
      else if (column < M) store<FLOAT32>(y + i / L * y_row, column, sum[i], M - column);
    }
  }
}

// y[t, m] += Σ over S steps from k on of x[t][k] · w[k][m]; w stands at row k, the rows from `next` on are fetched.
template <Type type, int S, bool whole = true>
static void axpy_rows(const void* const* x, int64_t T, int64_t k, const void* w, int64_t w_k, int64_t M, float* y,
                      int64_t y_row, const char* next = nullptr) {
  for (int64_t t = 0, n; t < T; t += n, next = nullptr) {
    n = T - t >= TALL ? TALL : T - t >= 4 ? 4 : T - t >= 2 ? 2 : 1;
    float* to = y + t * y_row;
    const int64_t full = M / SPAN<type> * SPAN<type>;
#define TILE_OF(R)                                                                                                  \
  axpy_tile<type, R, S, whole, true>(x + t, k, w, w_k, full, to, y_row, next);                                      \
  if (full < M) axpy_tile<type, R, S, whole, false>(x + t, k, at<type>(w, full), w_k, M - full, to + full, y_row,   \
                                               nullptr)
    if constexpr (TALL > 4) {
      if (n == TALL) { TILE_OF(TALL); }
      else if (n == 4) { TILE_OF(4); }
    }
    if (n == 2) { TILE_OF(2); }
    else if (n == 1) { TILE_OF(1); }
#undef TILE_OF
  }
}

// y[t, m] = Σ_k x[t][k] · w[k][m] of T rows and M columns, w read row after row as it lies: for few rows. M floats a
// row should stay near. With `next`, the rows that come next are fetched meanwhile: at the end, what lies there.
template <Type type>
static void axpy_block(const void* const* x, int64_t T, const void* w, int64_t w_k, int64_t M, int64_t K, float* y,
                       int64_t y_row, const void* next = nullptr) {
  constexpr int S = 4;
  constexpr int64_t L = DEEP<type>;
  for (int64_t t = 0; t < T; t++) std::memset(y + t * y_row, 0, 4 * M);
  for (int64_t k = 0; k < K;) {
    const void* from = at<type>(w, k * w_k);
    const void* after = k + 2 * S * L <= K ? at<type>(from, S * L * w_k) : next;
    if (K - k >= S * L) axpy_rows<type, S>(x, T, k, from, w_k, M, y, y_row, next ? (const char*)after : nullptr);
    else if (K - k >= L) axpy_rows<type, 1>(x, T, k, from, w_k, M, y, y_row);
    else axpy_rows<type, 1, false>(x, T, k, from, w_k, M, y, y_row);
    k += K - k >= S * L ? S * L : L;
  }
}

// Columns of w as operands one after another, in panels of PANEL columns: for many rows. A panel has panel_size bytes;
// columns past M are zero.
template <Type type>
static inline int64_t panel_size(int64_t K) {
  return (K + DEEP<type> - 1) / DEEP<type> * BROAD * sizeof(V);
}

template <Type type>
static void pack_panels(const void* w, int64_t w_k, int64_t M, int64_t K, void* room) {
  constexpr int64_t L = DEEP<type>, SOON = 16;
  const int64_t panel = panel_size<type>(K);
  for (int64_t k = 0; k < K; k += L)
    for (int64_t m = 0; m < M || m % PANEL; m += SPAN<type>) {
      const char* from = (const char*)at<type>(w, k * w_k + m);
      auto* to = (Operand<type>*)((char*)room + m / PANEL * panel) + k / L * BROAD + m % PANEL / 16;
      const int64_t n = std::clamp<int64_t>(M - m, 0, SPAN<type>);
      for (int64_t l = 0; l < L; l++) fetch(from + (SOON + l) * w_k * SIZE<type>);
      const bool whole = k + L <= K, full = n == SPAN<type>;
      if (whole && full) weave<type, true, true>(from, w_k, n, to);
      else if (whole) weave<type, true, false>(from, w_k, n, to);
      else if (full) weave<type, false, true>(from, w_k, n, to);
      else weave<type, false, false>(from, w_k, n, to);
    }
}

// y[r, m] of R rows and the PANEL columns of a panel.
template <Type type, int R>
[[gnu::noinline]] static void panel_tile(const void* const* x, const void* panel, int64_t K, float* y, int64_t y_row) {
  constexpr int64_t L = DEEP<type>;
  V sum[R * BROAD];
#pragma GCC unroll 32
  for (int i = 0; i < R * BROAD; i++) sum[i] = V{};
  auto* b = (const Operand<type>*)panel;
  int64_t k = 0;
  for (; k + L <= K; k += L, b += BROAD)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Operand<type> a = spread<type>(x[r], k);
#pragma GCC unroll 8
      for (int c = 0; c < BROAD; c++) sum[r * BROAD + c] = mac(a, b[c], sum[r * BROAD + c]);
    }
  if (k < K)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Operand<type> a = spread<type, false>(x[r], k);
#pragma GCC unroll 8
      for (int c = 0; c < BROAD; c++) sum[r * BROAD + c] = mac(a, b[c], sum[r * BROAD + c]);
    }
#pragma GCC unroll 32
  for (int i = 0; i < R * BROAD; i++) store<FLOAT32>(y + i / BROAD * y_row, 16 * (i % BROAD), sum[i]);
}

template <Type type>
static void panel_block(const void* const* x, int64_t T, const void* panel, int64_t K, float* y, int64_t y_row) {
  for (int64_t t = 0, n; t < T; t += n) {
    n = T - t >= TALL ? TALL : T - t >= 2 ? 2 : 1;
    float* to = y + t * y_row;
    if (TALL > 2 && n == TALL) panel_tile<type, TALL>(x + t, panel, K, to, y_row);
    else if (n == 2) panel_tile<type, 2>(x + t, panel, K, to, y_row);
    else panel_tile<type, 1>(x + t, panel, K, to, y_row);
  }
}
