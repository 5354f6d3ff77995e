// softmax(scale · q kᵀ + bias) v for packed rows and for pages: one function of a query row and its keys in order.
//
// Keys are taken in chunks of CHUNK, counted from the sequence's first. Of a row and a chunk: each score is summed over
// d in one lane, in ascending order, float32's in stretches that are added up; the exponentials' sum has sixteen lanes,
// key j in lane j mod 16, and one tree; values are added key after key. Chunks are merged in order. How rows are tiled
// and chunks are divided over threads never shows.
//
// bfloat16 queries meet bfloat16 or int8 pages in products of pairs (two neighbours along d, or two keys, are a step of
// dpbf16; probabilities are rounded to bfloat16); all else is widened to float32 first. The scale of an int8 row
// multiplies its score and its probability.
#pragma once
#include "simd.h"

constexpr int INT8 = 3;                     // a type of pages beside those of simd.h
constexpr int64_t CHUNK = 256, BLOCK = 64;  // keys
constexpr int64_t ROWS = 128;               // of a unit
constexpr int64_t STRETCH = 128;            // numbers of d
#if defined(__AVX512F__)
constexpr int TALL = 8;  // rows of the largest tile of accumulators, two vectors wide
#else
constexpr int TALL = 2;
#endif

struct Attention {
  const void *q, *k, *v;
  void* out;
  const int32_t *cu_q, *keys, *table;  // query borders [B+1]; key borders [B+1], or contexts [B] where page > 0
  const float *sinks, *bias;           // [H], [H, 2 · longest + 1], or null
  const float *scales_k, *scales_v;    // of int8 pages, [blocks, page, G], or null
  int64_t sequences, heads, kv_heads, d, d_v, q_row, q_head, k_block, k_row, k_head, v_block, v_row, v_head, table_row,
      page, longest, causal, window;
  float scale;
};

struct Row {
  int64_t token, place, first, last;  // keys first to last are seen
  bool sees(int64_t c) const { return last > first && first < (c + 1) * CHUNK && last > c * CHUNK; }
};

static inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline int64_t bytes(int type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }

// Sixteen numbers from i, zeros past n more.
template <int type>
static inline V wide(const void* row, int64_t i, int64_t n) {
  if constexpr (type == INT8) {
    V x{};
    for (int j = 0; j < 16 && j < n; j++) x[j] = ((const int8_t*)row)[i + j];
    return x;
  } else {
    return load<(Type)type>(row, i, n);
  }
}

#if defined(__AVX512BF16__)
// 32 numbers from i as bfloat16, zeros past n more.
template <int type>
static inline __m512i narrow_pairs(const void* row, int64_t i, int64_t n) {
  const __mmask32 here = n >= 32 ? ~0u : (1u << n) - 1;
  if constexpr (type == BFLOAT16) return _mm512_maskz_loadu_epi16(here, (const uint16_t*)row + i);
  const __m256i x = _mm256_maskz_loadu_epi8(here, (const int8_t*)row + i);
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 2^x for x <= 0 within 1e-7, 0 below -150; NaN stays.
static inline V power(V x) {
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-160.0f), (__m512)x), n = _mm512_roundscale_ps(y, 0);
  V r = (V)_mm512_sub_ps(y, n), p = fma(all(1.326697039e-03f), r, all(9.675459746e-03f));
  p = fma(p, r, all(5.550742616e-02f)), p = fma(p, r, all(2.402212175e-01f));
  p = fma(p, r, all(6.931469492e-01f)), p = fma(p, r, all(1.0f));
  return (V)_mm512_scalef_ps((__m512)p, n);
}
#endif

// e^x, or 2^x where scores are in units of log 2.
template <bool pairs>
static inline V raise(V x) {
#if defined(__AVX512BF16__)
  if constexpr (pairs) return power(x);
#endif
  return exponential(x);
}

template <bool pairs>
static inline V multiply_add(V a, V b, V c) {
#if defined(__AVX512BF16__)
  if constexpr (pairs) return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  return fma(a, b, c);
}

static inline V spread(const float* x) {
#if defined(__AVX512F__)
  return (V)_mm512_set1_ps(*x);
#else
  return all(*x);
#endif
}

// Rows that are read next, fetched line by line while others are multiplied: all at once would wait for one another.
struct Ahead {
  const char* base = nullptr;
  const int64_t* at = nullptr;
  int64_t rows = 0, bytes = 0, line = 0;
  void fetch() {
    if (!rows) return;
    _mm_prefetch(base + *at + line, _MM_HINT_T0);
    line += 64;
    if (line >= bytes) line = 0, at++, rows--;
  }
};

enum Sum { NEW, FURTHER, APART };  // c = Σ; Σ begins with c; c += Σ

// c[r, 16 n lanes] (+)= Σ_i a[r, i] · b[i, 16 n lanes], i ascending; with pairs a number is two of bfloat16.
template <bool pairs, int rows, int n>
static inline void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t steps, float* c,
                        int64_t c_row, Sum how, Ahead& ahead) {
  Ahead next = ahead;
  V sum[rows][n];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) sum[r][j] = how == FURTHER ? load<FLOAT32>(c + r * c_row, 16 * j) : V{};
  for (int64_t i = 0; i < steps; i++) {
    if (next.rows)
#pragma GCC unroll 4
      for (int j = 0; j < n / 2; j++) next.fetch();
    V y[n];
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) y[j] = load<FLOAT32>(b + i * b_row, 16 * j);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const V x = spread(a + r * a_row + i);
#pragma GCC unroll 4
      for (int j = 0; j < n; j++) sum[r][j] = multiply_add<pairs>(x, y[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) {
      if (how == APART) sum[r][j] += load<FLOAT32>(c + r * c_row, 16 * j);
      store<FLOAT32>(c + r * c_row, 16 * j, sum[r][j]);
    }
  ahead = next;
}

// The same for up to TALL rows and any multiple of 64 lanes.
template <bool pairs>
static void product(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t steps, float* c,
                    int64_t c_row, int64_t lanes, Sum how, Ahead& ahead) {
#define TILE_OF(T, N)                                                                     \
  for (int64_t j = 0; j < lanes; j += 16 * N)                                             \
    tile<pairs, T, N>(a, a_row, b + j, b_row, steps, c + j, c_row, how, ahead);           \
  a += T * a_row, c += T * c_row, rows -= T;
  while (rows >= TALL) { TILE_OF(TALL, 2) }
#if defined(__AVX512F__)
  if (rows >= 4) { TILE_OF(4, 4) }
  if (rows >= 2) { TILE_OF(2, 4) }
#endif
  if (rows >= 1) { TILE_OF(1, 4) }
#undef TILE_OF
}

// Scores of a block of keys. In float32 stretches are added up: rounding grows with a stretch, not with all of d.
template <bool pairs>
static void meet(int64_t rows, const float* q, int64_t q_row, const float* keys, int64_t depth, float* s,
                 Ahead& ahead) {
  const int64_t stretch = pairs ? depth : STRETCH;
  for (int64_t i = 0; i < depth; i += stretch)
    product<pairs>(rows, q + i, q_row, keys + i * BLOCK, BLOCK, std::min(stretch, depth - i), s, CHUNK, BLOCK,
                   i ? APART : NEW, ahead);
}

static inline void transpose(V* x) {  // sixteen by sixteen
#if defined(__AVX512F__)
  __m512i y[16], z[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      z[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      z[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(z[j], z[j + 4], 0x88), b = _mm512_shuffle_i32x4(z[j], z[j + 4], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(z[j + 8], z[j + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(z[j + 8], z[j + 12], 0xDD);
    x[j] = (V)_mm512_shuffle_i32x4(a, c, 0x88), x[j + 8] = (V)_mm512_shuffle_i32x4(a, c, 0xDD);
    x[j + 4] = (V)_mm512_shuffle_i32x4(b, d, 0x88), x[j + 12] = (V)_mm512_shuffle_i32x4(b, d, 0xDD);
  }
#else
  V y[16];
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) y[j][i] = x[i][j];
  std::memcpy(x, y, sizeof y);
#endif
}

// Where the keys of a block lie; null where there is none that is wanted.
struct Places {
  const char* row[BLOCK];
};

// panel[i, j] = number (or pair) i of key j, zero past d and where there is no key.
template <bool pairs, int type>
static void pack_keys(const Places& at, int64_t d, int64_t lo, int64_t hi, const char* zeros, float* panel,
                      Ahead& ahead) {
  constexpr int64_t numbers = pairs ? 32 : 16;
  for (int64_t key = lo / 16 * 16; key < hi; key += 16)
    for (int64_t i = 0; i < d; i += numbers) {
      V x[16];
      for (int j = 0; j < 16; j++) {
        const char* row = at.row[key + j] ? at.row[key + j] : zeros;
#if defined(__AVX512BF16__)
        if constexpr (pairs) x[j] = (V)narrow_pairs<type>(row, i, d - i);
#endif
        if constexpr (!pairs) x[j] = wide<type>(row, i, d - i);
      }
      for (int j = 0; j < 8 && ahead.rows; j++) ahead.fetch();
      transpose(x);
      for (int t = 0; t < 16; t++) store<FLOAT32>(panel + (i * 16 / numbers + t) * BLOCK, key, x[t]);
    }
}

// panel[j, c] = column c of key j, or of the pair of keys j; zero where there is no key.
template <bool pairs, int type>
static void pack_values(const Places& at, int64_t d, int64_t width, int64_t lo, int64_t hi, const char* zeros,
                        float* panel, Ahead& ahead) {
#if defined(__AVX512BF16__)
  if constexpr (pairs) {
    alignas(64) static const uint16_t turn[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i low = _mm512_load_si512(turn[0]), high = _mm512_load_si512(turn[1]);
    for (int64_t key = lo / 2 * 2; key < hi; key += 2) {
      const char *row = at.row[key] ? at.row[key] : zeros, *other = at.row[key + 1] ? at.row[key + 1] : zeros;
      float* to = panel + key / 2 * width;
      for (int64_t i = 0; i < d; i += 32) {
        const __m512i a = narrow_pairs<type>(row, i, d - i), b = narrow_pairs<type>(other, i, d - i);
        store<FLOAT32>(to, i, (V)_mm512_permutex2var_epi16(a, low, b));
        store<FLOAT32>(to, i + 16, (V)_mm512_permutex2var_epi16(a, high, b));
        ahead.fetch();
      }
    }
    return;
  }
#endif
  for (int64_t key = lo; key < hi; key++)
    for (int64_t i = 0; i < d; i += 16)
      store<FLOAT32>(panel + key * width, i, wide<type>(at.row[key] ? at.row[key] : zeros, i, d - i));
}

static inline float highest(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int j = 1; j < 16; j++) top = x[j] > top ? x[j] : top;
  return top;
#endif
}

// Scores s of keys lo to hi of a chunk become shares p of keys from to end, 0 where unseen. Returns their (most, sum).
struct Soft {
  float most, sum;
};

template <bool pairs>
static Soft soften(float* s, int64_t lo, int64_t hi, int64_t from, int64_t end, float scale, const float* scales_k,
                   const float* scales_v, const float* bias, int64_t ahead, int64_t longest, float* p) {
  static const V lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  V most = all(-INF), sum{};
  for (int64_t i = lo / 16 * 16; i < hi; i += 16) {
    V x = load<FLOAT32>(s, i);
    if (scales_k) x *= load<FLOAT32>(scales_k, i);
    x *= scale;
    if (bias)
      for (int j = 0; j < 16; j++)
        x[j] += bias[std::clamp(i + j + ahead, -longest, longest) + longest] * (pairs ? 1.44269504f : 1.0f);
    if (i < lo || i + 16 > hi) x = (lane >= (float)(lo - i)) & (lane < (float)(hi - i)) ? x : all(-INF);
    store<FLOAT32>(s, i, x);
    most = x > most ? x : most;
  }
  const float top = highest(most);
  const float base = top == -INF ? 0.0f : top;
  for (int64_t i = from / 16 * 16; i < end; i += 16) {
    V e{};
    if (i + 16 > lo && i < hi) {
      e = raise<pairs>(load<FLOAT32>(s, i) - base);
      const auto seen = (lane >= (float)(lo - i)) & (lane < (float)(hi - i));
      e = seen ? e : V{};
      sum += e;
      if (scales_v) e = seen ? e * load<FLOAT32>(scales_v, i) : V{};
    }
#if defined(__AVX512BF16__)
    if constexpr (pairs) _mm256_storeu_si256((__m256i*)p + i / 16, (__m256i)_mm512_cvtneps_pbh((__m512)e));
#endif
    if constexpr (!pairs) store<FLOAT32>(p, i, e);
  }
  return {top, reduce(sum)};
}

// What is known of a row after some chunks: out[lanes], then most and sum.
template <bool pairs>
static void fold(float* into, const float* more, int64_t lanes, bool first) {
  if (first) {
    std::memcpy(into, more, 4 * (lanes + 2));
    return;
  }
  const float top = std::max(into[lanes], more[lanes]), base = top == -INF ? 0.0f : top;
  const V a = raise<pairs>(all(into[lanes] - base)), b = raise<pairs>(all(more[lanes] - base));
  for (int64_t i = 0; i < lanes; i += 16)
    store<FLOAT32>(into, i, fma(load<FLOAT32>(more, i), b, load<FLOAT32>(into, i) * a));
  into[lanes + 1] = more[lanes + 1] * b[0] + into[lanes + 1] * a[0];
  into[lanes] = top;
}
