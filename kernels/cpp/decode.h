// Attention of few rows to few keys: keys and values are turned in registers, once for every row of a group, and what
// is read next is fetched line for line with what is read now, the next sequence's too. The sums are those of
// attention.h, which asks for memory more evenly and so takes longer contexts.
#pragma once
#include "attention.h"

constexpr int64_t FEW = 4;               // rows of a head
constexpr int64_t LEAD = 16, SOON = 32;  // keys, and values, that are taken together while the next ones are fetched
alignas(64) static const char ZEROS[1 << 14] = {};

#if defined(__AVX512BF16__)
// 32 numbers as bfloat16.
template <int type>
static inline __m512i take_pairs(const char* at) {
  if constexpr (type == BFLOAT16) return _mm512_loadu_si512(at);
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at + 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

static inline void fetch(const char* at) { _mm_prefetch(at, _MM_HINT_T0); }

// s[h, r, j] = Σ q[h, r] · key[j] over d, of H heads that are `head` bytes apart, R rows of each and sixteen keys,
// each `at` bytes from its place. Two heads go together, so that one's sums do not wait for themselves.
template <int type, int H, int R>
static void score_rows(const char* const* key, int64_t at, int64_t head, int64_t d, const float* q, int64_t q_width,
                       int64_t rows, float* s) {
  V sum[H][R] = {};
  for (int64_t i = 0; i < d; i += 32)
#pragma GCC unroll 2
    for (int h = 0; h < H; h++) {
      V x[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) x[j] = (V)take_pairs<type>(key[j] + at + h * head + i * bytes(type));
      transpose(x);
#pragma GCC unroll 16
      for (int t = 0; t < 16; t++) {
        fetch(key[t + LEAD] + at + h * head + i * bytes(type));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
          sum[h][r] = multiply_add<true>(spread(q + (h * rows + r) * q_width + i / 2 + t), x[t], sum[h][r]);
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < H * R; i++) store<FLOAT32>(s + (i / R * rows + i % R) * CHUNK, 0, sum[i / R][i % R]);
}

// out[r, c] (+)= Σ p[r, j] · value[2 j, 2 j + 1][c] over pairs of keys, of R rows and 64 columns.
template <int type, int R>
static void weigh_rows(const char* const* value, int64_t at, int64_t pairs, const float* p, int64_t p_width, float* out,
                       int64_t record, bool add) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  constexpr int n = 4;
  V sum[R][n];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < n; c++) sum[r][c] = add ? load<FLOAT32>(out + r * record, 16 * c) : V{};
  for (int64_t j = 0; j < pairs; j++) {
    V y[n];
#pragma GCC unroll 2
    for (int c = 0; c < n; c += 2) {
      const int64_t place = at + bytes(type) * 16 * c;
      const __m512i a = take_pairs<type>(value[2 * j] + place), b = take_pairs<type>(value[2 * j + 1] + place);
      fetch(value[2 * j + SOON] + place), fetch(value[2 * j + 1 + SOON] + place);
      y[c] = (V)_mm512_permutex2var_epi16(a, low, b), y[c + 1] = (V)_mm512_permutex2var_epi16(a, high, b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const V x = spread(p + r * p_width + j);
#pragma GCC unroll 4
      for (int c = 0; c < n; c++) sum[r][c] = multiply_add<true>(x, y[c], sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < n; c++) store<FLOAT32>(out + r * record, 16 * c, sum[r][c]);
}
#endif
