// Products of rows with weights of eight or four bits.
//
// A row is x ≈ s · Σ_d 256^d · q_d with digits q_d of eight bits: one, as rows are rounded for W8A8, or two, which hold it
// within 2^-15 of its largest number. A digit's product with the numbers of a group that share a scale is a sum of whole
// numbers, which is exact in every order; lanes, digits, groups and zero points are put together in one order of their
// own. So a row's result never depends on its companions. e4m3 is widened in registers, and meets rows of floats.
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t BLOCK = 64;    // numbers that one instruction multiplies
constexpr int64_t COLUMNS = 256;  // of a task at most
constexpr int64_t AHEAD = 4096;  // bytes that are fetched before they are needed
constexpr int RADIX = 256;       // of the digits

template <int n>
constexpr int GROUP = n < 16 ? n : 16;  // vectors whose lanes are added at once

typedef int8_t Bytes __attribute__((vector_size(16)));

struct Weight {
  const void* q;       // int8 or e4m3 [E, M, K], or two of four bits in a byte: [E, M, K / 2]
  const float* scale;  // [E, M, groups]
  const float* zero;   // the same, or null
  int64_t bits, columns, depth, groups, digits;  // no digits: e4m3
};

inline V first(float x) {
  V a{};
  a[0] = x;
  return a;
}

inline VI first(int32_t x) {
  VI a{};
  a[0] = x;
  return a;
}

struct Rows {
  int64_t width = 0, groups = 0, digits = 0, raise = 0;  // weights are multiplied raised by this, to be unsigned
  std::vector<int8_t> q;        // [T, digits, width], the upper digit first
  std::vector<int32_t> start;   // [T, digits, groups], -raise · Σ_{k in g} q
  std::vector<float> scale, total;  // s; [T, groups], Σ_{k in g} x / s
  std::vector<float> plain;     // [T, width], for e4m3

  void reserve(int64_t rows, const Weight& w) {
    width = (w.depth + BLOCK - 1) / BLOCK * BLOCK, groups = w.groups, digits = w.digits, raise = w.bits == 8 ? 128 : 8;
    q.resize(rows * digits * width), start.resize(rows * digits * groups), total.resize(rows * groups);
    scale.resize(rows), plain.resize(digits ? 0 : rows * width);
  }
};

template <Type type>
void quantize(const void* x, int64_t depth, Rows& rows, int64_t t) {
  const int64_t width = rows.width, group = depth / rows.groups;
  rows.scale[t] = 1;
  if (!rows.digits) {
    for (int64_t i = 0; i < width; i += 16) store<FLOAT32>(rows.plain.data() + t * width, i, load<type>(x, i, depth - i));
    return;
  }
  V most{};
  for (int64_t i = 0; i < depth; i += 16) {
    V a = load<type>(x, i, depth - i);
    a = (V)((VI)a & 0x7FFFFFFF);
    most = a > most || a != a ? a : most;
  }
  float top = 0;
  bool nan = false;
  for (int lane = 0; lane < 16; lane++) nan |= most[lane] != most[lane], top = most[lane] > top ? most[lane] : top;
  const float largest = rows.digits == 1 ? 127.0f : 127.0f * RADIX + 127.0f;
  const float turn = top > 1e-30f ? largest / top : 0.0f;  // no row has smaller numbers but by chance
  const bool broken = nan || top > std::numeric_limits<float>::max();
  rows.scale[t] = broken ? std::numeric_limits<float>::quiet_NaN() : top / largest;
  int8_t* q = rows.q.data() + t * rows.digits * width;
  const V even = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number, ties to even
  for (int64_t i = 0; i < width; i += 16) {
    const V a = broken ? V{} : load<type>(x, i, depth - i) * turn;
    VI n = (VI)(a + even) - (VI)even;
    if (rows.digits == 2) {
      const VI upper = (n + RADIX / 2) >> 8;
      const Bytes bytes = __builtin_convertvector(upper, Bytes);
      std::memcpy(q + i, &bytes, 16);
      n -= upper * RADIX;
    }
    const Bytes bytes = __builtin_convertvector(n, Bytes);
    std::memcpy(q + (rows.digits - 1) * width + i, &bytes, 16);
  }
  for (int64_t g = 0; g < rows.groups; g++) {
    float whole = 0;
    for (int64_t d = 0; d < rows.digits; d++) {
      int32_t sum = 0;
      for (int64_t k = g * group; k < (g + 1) * group; k++) sum += q[d * width + k];
      rows.start[(t * rows.digits + d) * rows.groups + g] = -(int32_t)rows.raise * sum;
      whole = whole * RADIX + sum;
    }
    rows.total[t * rows.groups + g] = whole;
  }
}

// Sixty-four numbers from number k on of one row of weights, raised, and the sums of four each of their products.
#if defined(__AVX512VNNI__)
typedef __m512i Raised;

template <int BITS>
inline Raised raised(const uint8_t* row, int64_t k, int64_t K) {
  if constexpr (BITS == 8) {
    const int64_t n = K - k;
    const uint8_t* w = row + k;
    const __m512i b = n >= BLOCK ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, w);
    _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);
    return _mm512_xor_si512(b, _mm512_set1_epi8((char)128));
  } else {
    const uint8_t* w = row + k / 2;
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)w), low = _mm256_set1_epi8(15);
    _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(bytes, low)),
                              _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), 1);
  }
}

inline VI products(VI sum, const Raised& b, const int8_t* x) {
  return (VI)_mm512_dpbusd_epi32((__m512i)sum, b, _mm512_loadu_si512(x));
}
#else
struct Raised {
  uint8_t b[BLOCK];
};

template <int BITS>
inline Raised raised(const uint8_t* row, int64_t k, int64_t K) {
  Raised out = {};
  if constexpr (BITS == 8) {
    for (int64_t i = 0; i < std::min(BLOCK, K - k); i++) out.b[i] = row[k + i] ^ 128;
  } else {
    for (int64_t i = 0; i < BLOCK / 2; i++) out.b[i] = row[k / 2 + i] & 15, out.b[BLOCK / 2 + i] = row[k / 2 + i] >> 4;
  }
  return out;
}

inline VI products(VI sum, const Raised& b, const int8_t* x) {
  int32_t part[16] = {};
  for (int64_t i = 0; i < BLOCK; i++) part[i / 4] += b.b[i] * x[i];
  VI lanes;
  std::memcpy(&lanes, part, 64);
  return sum + lanes;
}
#endif

// Lanes of Σ_g scale · Σ_{k in g} x · (w - zero) of T rows and F columns from m on, over s; `sum` is part of a tile whose
// rows are `stride` apart.
template <int BITS, int DIGITS, int T, int F>
inline void part(const Weight& w, int64_t m, const Rows& rows, const int32_t* which, V* sum, int stride) {
  const int64_t K = w.depth, groups = w.groups, group = K / groups, row = K * BITS / 8;
  const uint8_t* q = (const uint8_t*)w.q + m * row;
  V own[T * F] = {};
  for (int64_t g = 0; g < groups; g++) {
    VI whole[DIGITS][T * F];
    for (int t = 0; t < T; t++)
      for (int d = 0; d < DIGITS; d++)
        for (int f = 0; f < F; f++) whole[d][t * F + f] = first(rows.start[(which[t] * DIGITS + d) * groups + g]);
    for (int64_t k = g * group; k < (g + 1) * group; k += BLOCK) {
      Raised b[F];
      for (int f = 0; f < F; f++) b[f] = raised<BITS>(q + f * row, k, K);
      for (int t = 0; t < T; t++)
        for (int d = 0; d < DIGITS; d++) {
          const int8_t* x = rows.q.data() + (which[t] * DIGITS + d) * rows.width + k;
          for (int f = 0; f < F; f++) whole[d][t * F + f] = products(whole[d][t * F + f], b[f], x);
        }
    }
    for (int f = 0; f < F; f++) {
      const int64_t place = (m + f) * groups + g;
      for (int t = 0; t < T; t++) {
        V lanes = __builtin_convertvector(whole[0][t * F + f], V);
        if constexpr (DIGITS == 2) lanes = fma(lanes, all(RADIX), __builtin_convertvector(whole[1][t * F + f], V));
        if (w.zero) lanes -= first(w.zero[place] * rows.total[which[t] * groups + g]);
        own[t * F + f] = fma(lanes, all(w.scale[place]), own[t * F + f]);
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int f = 0; f < F; f++) sum[t * stride + f] = own[t * F + f];
}

// Sixteen numbers, of e4m3: its bits are those of a float16 that is smaller by 2^8, put where that has them.
inline V widen_e4m3(const uint8_t* from, int64_t n) {
  typedef uint8_t Sixteen __attribute__((vector_size(16)));
  Sixteen bytes{};
  std::memcpy(&bytes, from, n);
  const Half half = __builtin_convertvector(bytes, Half);
  return widen<FLOAT16>((half & 128) << 8 | (half & 127) << 7);
}

template <int T, int F>
inline void part_floats(const Weight& w, int64_t m, const Rows& rows, const int32_t* which, V* sum, int stride) {
  const int64_t K = w.depth, body = K / 16 * 16;
  const uint8_t* q = (const uint8_t*)w.q + m * K;
  const float* x[T];
  V own[T * F] = {};
  for (int t = 0; t < T; t++) x[t] = rows.plain.data() + which[t] * rows.width;
  for (int64_t k = 0; k < body; k += 16)
    for (int f = 0; f < F; f++) {
      __builtin_prefetch(q + f * K + k + AHEAD);
      const V b = widen_e4m3(q + f * K + k, 16);
      for (int t = 0; t < T; t++) own[t * F + f] = fma(load<FLOAT32>(x[t], k), b, own[t * F + f]);
    }
  for (int f = 0; f < F && body < K; f++) {
    const V b = widen_e4m3(q + f * K + body, K - body);
    for (int t = 0; t < T; t++) own[t * F + f] = fma(load<FLOAT32>(x[t], body), b, own[t * F + f]);
  }
  for (int t = 0; t < T; t++)
    for (int f = 0; f < F; f++) sum[t * stride + f] = own[t * F + f] * all(256.0f * w.scale[m + f]);
}

// y[t, column + f] of T rows and F columns, NEAR of which are read side by side.
template <int BITS, int DIGITS, int T, int F, int NEAR>
inline void tile(const Weight& w, int64_t m, const Rows& rows, const int32_t* which, float* y, int64_t y_row) {
  V sum[T * F];
  float found[T * F];
  for (int f = 0; f < F; f += NEAR) {
    if constexpr (DIGITS) part<BITS, DIGITS, T, NEAR>(w, m + f, rows, which, sum + f, F);
    else part_floats<T, NEAR>(w, m + f, rows, which, sum + f, F);
  }
  for (int i = 0; i < T * F; i += GROUP<T * F>) reduce_all<GROUP<T * F>>(sum + i, found + i);
  for (int t = 0; t < T; t++) {
    constexpr int n = F < 16 ? F : 16;
    for (int f = 0; f < F; f += n)
      store<FLOAT32>(y + t * y_row, f, load<FLOAT32>(found + t * F, f, n) * rows.scale[which[t]], n);
  }
}

// y[t, m] of rows which[0], which[1], ... and columns [from, to). Weights that come from memory are read one row after
// another, which is what it is fastest at; the next rows of x find them in the cache, where four side by side cost least.
template <int BITS, int DIGITS>
void block(const Weight& w, int64_t expert, int64_t from, int64_t to, const Rows& rows, const int32_t* which,
           int64_t count, float* y, int64_t y_row) {
  constexpr int F = 16, MOST = DIGITS == 2 ? 2 : 4;
  for (int64_t m = from; m < to;) {
    const bool whole = m + F <= to;
    const int64_t column = expert * w.columns + m;
    for (int64_t t = 0; t < count;) {
      float* out = y + t * y_row + m - from;
      if (whole && count - t >= MOST) {
        if (t) tile<BITS, DIGITS, MOST, F, 4>(w, column, rows, which + t, out, y_row);
        else tile<BITS, DIGITS, MOST, F, 1>(w, column, rows, which, out, y_row);
        t += MOST;
      } else if (whole) {
        tile<BITS, DIGITS, 1, F, 1>(w, column, rows, which + t, out, y_row), t++;
      } else {
        tile<BITS, DIGITS, 1, 1, 1>(w, column, rows, which + t, out, y_row), t++;
      }
    }
    m += whole ? F : 1;
  }
}

void block(const Weight& w, int64_t expert, int64_t from, int64_t to, const Rows& rows, const int32_t* which,
           int64_t count, float* y, int64_t y_row) {
  const auto run = !w.digits ? block<8, 0> : w.bits == 8 ? (w.digits == 1 ? block<8, 1> : block<8, 2>)
                                           : (w.digits == 1 ? block<4, 1> : block<4, 2>);
  run(w, expert, from, to, rows, which, count, y, y_row);
}

template <Type type>
void linear(const void* x, const Weight& w, const float* bias, void* y, int64_t count, int threads) {
  Rows rows;
  rows.reserve(count, w);
  std::vector<int32_t> which(count);
  for (int64_t t = 0; t < count; t++) which[t] = (int32_t)t;
  const int64_t each = std::clamp<int64_t>(w.columns / (8 * threads) / 16 * 16, 16, COLUMNS);
#pragma omp parallel num_threads(count * w.depth * w.columns < SMALL ? 1 : threads)
  {
    std::vector<float> room(count * each);
#pragma omp for
    for (int64_t t = 0; t < count; t++) quantize<type>(at<type>(x, t * w.depth), w.depth, rows, t);
#pragma omp for schedule(dynamic, 1)
    for (int64_t m = 0; m < w.columns; m += each) {
      const int64_t n = std::min(each, w.columns - m);
      block(w, 0, m, m + n, rows, which.data(), count, room.data(), each);
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < n; i += 16) {
          V sum = load<FLOAT32>(room.data() + t * each, i, n - i);
          if (bias) sum += load<FLOAT32>(bias + m, i, n - i);
          store<type>((void*)at<type>(y, t * w.columns + m), i, sum, n - i);
        }
    }
  }
}

struct Mixture {
  const void* x;
  const int64_t* ids;      // [T, K]
  const float* weights;    // [T, K]
  const uint8_t* kept;     // [T, K], or null: all
  void* y;
  int64_t tokens, choices, experts;
  Weight in, out;
};

// Σ_k weights · (swiglu(x · inᵀ) · outᵀ): gate and up of a few hidden units are one task, so are a few outputs.
template <Type type>
void mix(const Mixture& it, int threads) {
  const int64_t T = it.tokens, N = T * it.choices, D = it.out.columns, F = it.out.depth;
  std::vector<int32_t> start(it.experts + 1), token, slot(N, -1), row;
  for (int64_t i = 0; i < N; i++)
    if (!it.kept || it.kept[i]) start[it.ids[i] + 1]++;
  struct Task { int64_t expert, column; };
  std::vector<Task> up, down;
  for (int64_t e = 0; e < it.experts; e++) {
    if (start[e + 1]) {
      for (int64_t m = 0; m < F; m += COLUMNS / 2) up.push_back({e, m});
      for (int64_t m = 0; m < D; m += COLUMNS) down.push_back({e, m});
    }
    start[e + 1] += start[e];
  }
  const int64_t kept = start[it.experts];
  token.resize(kept), row.resize(kept);
  std::vector<int32_t> next(start.begin(), start.end());
  for (int64_t i = 0; i < N; i++)
    if (!it.kept || it.kept[i]) slot[i] = next[it.ids[i]]++, token[slot[i]] = (int32_t)(i / it.choices);
  for (int64_t n = 0; n < kept; n++) row[n] = (int32_t)n;
  Rows x_rows, h_rows;
  x_rows.reserve(T, it.in), h_rows.reserve(kept, it.out);
  std::vector<float> hidden(kept * F), found(kept * D);
#pragma omp parallel num_threads(kept * D * F < SMALL ? 1 : threads)
  {
    std::vector<float> room;
#pragma omp for
    for (int64_t t = 0; t < T; t++) quantize<type>(at<type>(it.x, t * D), D, x_rows, t);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)up.size(); i++) {
      const int64_t e = up[i].expert, m = up[i].column, n = std::min(COLUMNS / 2, F - m), count = start[e + 1] - start[e];
      room.resize(std::max<int64_t>(room.size(), count * COLUMNS));
      const int32_t* rows = token.data() + start[e];
      block(it.in, e, m, m + n, x_rows, rows, count, room.data(), COLUMNS);
      block(it.in, e, F + m, F + m + n, x_rows, rows, count, room.data() + COLUMNS / 2, COLUMNS);
      for (int64_t t = 0; t < count; t++)
        for (int64_t j = 0; j < n; j += 16) {
          const V gate = load<FLOAT32>(room.data() + t * COLUMNS, j, n - j);
          const V rise = load<FLOAT32>(room.data() + t * COLUMNS + COLUMNS / 2, j, n - j);
          store<FLOAT32>(hidden.data() + (start[e] + t) * F + m, j, gate / (1.0f + exponential(-gate)) * rise, n - j);
        }
    }
#pragma omp for
    for (int64_t n = 0; n < kept; n++) quantize<FLOAT32>(hidden.data() + n * F, F, h_rows, n);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)down.size(); i++) {
      const int64_t e = down[i].expert, m = down[i].column, n = std::min(COLUMNS, D - m);
      block(it.out, e, m, m + n, h_rows, row.data() + start[e], start[e + 1] - start[e], found.data() + start[e] * D + m, D);
    }
#pragma omp for
    for (int64_t t = 0; t < T; t++)
      for (int64_t m = 0; m < D; m += 16) {
        V sum{};
        for (int64_t k = 0; k < it.choices; k++) {
          const int64_t i = t * it.choices + k;
          if (slot[i] >= 0) sum += all(it.weights[i]) * load<FLOAT32>(found.data() + slot[i] * D, m, D - m);
        }
        store<type>((void*)at<type>(it.y, t * D), m, sum, D - m);
      }
  }
}
}  // namespace

extern "C" {

void turnout_quantized_linear(int type, const void* x, const Weight* w, const float* bias, void* y, int64_t rows,
                              int threads) {
#define CALL(T) linear<T>(x, *w, bias, y, rows, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_quantized_moe(int type, const Mixture* it, int threads) {
#define CALL(T) mix<T>(*it, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
}
