// Micro kernels for rows that are packed: what a step takes of each of them lies side by side.
//
// A pass is as many rows as have their sums in registers, whatever their number: R rows of x, packed, by C columns of w
// as they lie. The sums have the orders of tiles.h.
#pragma once
#include <utility>

#include "tiles.h"

#if defined(__AVX512F__)
constexpr int PASS = 12;  // rows, at most
#else
constexpr int PASS = 2;
#endif
constexpr int WIDE = 16 * BROAD;  // columns of an "axpy" tile, at most
template <int R>
constexpr int ACROSS = R <= TALL ? BROAD : 2;  // vectors of an "axpy" tile
template <int R>
constexpr int BESIDE = R < 5 ? 2 : ACROSS<R>;  // columns of a "dot" tile: few, where memory is what is waited for

// R rows of a step of "dot" after another, zeros past the end.
template <Type type>
static void pack_rows(const void* const* x, int64_t R, int64_t K, V* to) {
  for (int64_t k = 0; k < K; k += STEP<type>)
    for (int64_t r = 0; r < R; r++, to++) {
      const auto part = k + STEP<type> <= K ? take<type>(x[r], k) : take<type>(x[r], k, K - k);
      std::memcpy(to, &part, sizeof part);
    }
}

// y[i] = Σ_k x[r][k] · w[c][k]. As a step of "axpy" wants them: DEEP columns of a row side by side, then the next row.
template <Type type, int R>
[[gnu::noinline]] static void dot_packed(const V* x, const char* const* w, int64_t K, float* y, Ahead ahead) {
  constexpr int C = BESIDE<R>, L = DEEP<type>, N = R * C;
  V sum[N];
#pragma GCC unroll 32
  for (int i = 0; i < N; i++) sum[i] = V{};
  int64_t k = 0;
  for (; k + STEP<type> <= K; k += STEP<type>, x += R) {
    Operand<type> b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      b[c] = take<type>(w[c], k);
      fetch(ahead.at), ahead.at += ahead.by;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const auto a = (Operand<type>)x[r];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sum[(c / L * R + r) * L + c % L] = mac(a, b[c], sum[(c / L * R + r) * L + c % L]);
    }
  }
  if (k < K) {
    Operand<type> b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) b[c] = take<type>(w[c], k, K - k);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const auto a = (Operand<type>)x[r];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sum[(c / L * R + r) * L + c % L] = mac(a, b[c], sum[(c / L * R + r) * L + c % L]);
    }
  }
#if defined(__AVX512F__)
#pragma GCC unroll 2
  for (int i = 0; i < N; i += 16) {
    __m512 four[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const int at = i + 4 * j, end = N - 1;
      if (at < N)
        four[j] = fold((__m512)sum[at], (__m512)sum[std::min(at + 1, end)], (__m512)sum[std::min(at + 2, end)],
                       (__m512)sum[std::min(at + 3, end)]);
      else four[j] = four[0];
    }
    fold_rows(four[0], four[1], four[2], four[3], 4, y + i, 4);
  }
#else
#pragma GCC unroll 32
  for (int i = 0; i < N; i++) y[i] = reduce(sum[i]);
#endif
}

// The lines of some rows of w and then of what is read next, asked for in the order in which they lie.
struct Walk {
  const char *at, *end;
  int64_t wide, by, left;  // bytes of a row that are read, from its start to the next one's, rows
  const char* then;

  Walk(const char* at, int64_t wide, int64_t by, int64_t left, const char* then)
      : at(at), end(at + wide), wide(wide), by(by), left(left), then(then) {
    if (left <= 0) left = 1, turn();
  }

  inline void turn() { at = --left ? end - wide + by : then, end = at + wide; }

  inline void step() {
    fetch(at);
    at += 64;
    if (at >= end) turn();
  }
};

// DEEP rows of w over 32 columns as operands, quickly: pairs leave the columns in an order of their own.
template <Type type>
static inline void mingle(const char* w, int64_t w_k, Operand<type>* out) {
#if defined(__AVX512BF16__)
  if constexpr (pairs<type>) {
    __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + w_k);
    asm("" : "+v"(a), "+v"(b));  // or they are loaded twice
    out[0] = (__m512bh)_mm512_unpacklo_epi16(a, b), out[1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
  } else
#endif
    out[0] = load<type>(w, 0), out[1] = load<type>(w, 16);
}

// The sums of these columns in their order.
template <Type type>
static inline void order(const float* y, V* out) {
  V a = load<FLOAT32>(y, 0), b = load<FLOAT32>(y, 16);
#if defined(__AVX512BF16__)
  if constexpr (pairs<type>) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    out[0] = (V)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
    out[1] = (V)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)b);
    return;
  }
#endif
  out[0] = a, out[1] = b;
}

// y[m / C][r][m % C] += Σ_k x[k][r] · w[k][m] for `steps` steps of R rows and M columns, whole tiles of C vectors; each
// 32 of them in the order of `mingle`. `fresh`: of nothing. A row of w has w_k bytes. A tile takes `block` steps at a
// time, and meanwhile `lines` are walked.
template <Type type, int R>
[[gnu::noinline]] static void axpy_packed(const void* x, int64_t steps, int64_t block, const char* w, int64_t w_k,
                                          int64_t M, float* y, bool fresh, Walk& ahead, int64_t lines) {
  constexpr int L = DEEP<type>, C = ACROSS<R>;
  Walk walk = ahead;
  for (auto* of = (const float*)x; steps > 0; steps -= block, of += block * R, w += block * L * w_k, fresh = false) {
    block = std::min(block, steps);
    for (int64_t m = 0; m < M; m += 16 * C) {
      V sum[R * C];
      float* to = y + m * R;
      if (fresh) {
#pragma GCC unroll 32
        for (int i = 0; i < R * C; i++) sum[i] = V{};
      } else {
#pragma GCC unroll 32
        for (int i = 0; i < R * C; i++) sum[i] = load<FLOAT32>(to, 16 * i);
      }
      const char* row = w + m * SIZE<type>;
      for (int64_t s = 0; s < block; s++, row += L * w_k) {
        for (int64_t i = s; i < lines; i += block) walk.step();
        Operand<type> b[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; c += 2) mingle<type>(row + 16 * c * SIZE<type>, w_k, b + c);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const auto a = (Operand<type>)all(of[s * R + r]);
#pragma GCC unroll 4
          for (int c = 0; c < C; c++) sum[r * C + c] = mac(a, b[c], sum[r * C + c]);
        }
      }
#pragma GCC unroll 32
      for (int i = 0; i < R * C; i++) store<FLOAT32>(to, 16 * i, sum[i]);
    }
  }
  ahead = walk;
}

// The two for R rows, the columns of the first and of the second.
struct Tiles {
  decltype(&dot_packed<FLOAT32, 1>) dot;
  decltype(&axpy_packed<FLOAT32, 1>) axpy;
  int64_t across, wide;
};

template <Type type, int... R>
static const Tiles& tiles(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Tiles of[] = {
      {dot_packed<type, R + 1>, axpy_packed<type, R + 1>, BESIDE<R + 1>, 16 * ACROSS<R + 1>}...};
  return of[rows - 1];
}

template <Type type>
static const Tiles& tiles(int64_t rows) {
  return tiles<type>(rows, std::make_integer_sequence<int, PASS>());
}
