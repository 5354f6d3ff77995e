// Products of rows, rounded to eight bits as they come, with weights of eight or four bits.
//
// A row is x ≈ s · q with q in ±127. Eight bits: y[m] = s · scale[m] · Σ_k q[k] · w[m][k], a sum of whole numbers, which is
// exact in every order. Four bits: y[m] = s · Σ_g scale[m][g] · Σ_{k in g} q[k] · (w[m][k] - 8): a group's sum is exact, the
// groups are added in one order. So a row's result never depends on its companions.
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t BLOCK = 64;    // numbers that one instruction multiplies
constexpr int64_t COLUMNS = 256;  // of a task
constexpr int64_t AHEAD = 4096;  // bytes that are fetched before they are needed

template <int n>
constexpr int GROUP = n < 16 ? n : 16;  // vectors whose lanes are added at once

typedef int8_t Bytes __attribute__((vector_size(16)));

struct Weight {
  const void* q;        // int8 [E, M, K], or two of four bits in a byte: [E, M, K / 2]
  const float* scale;   // [E, M], or [E, M, groups]
  int64_t bits, columns, depth, groups;
};

struct Rows {  // rows as whole numbers; `raised` holds q + 128 for the eight-bit product, whose one operand is unsigned
  int64_t width = 0, groups = 0;
  std::vector<int8_t> q;
  std::vector<float> scale, lowered;  // s; -8 · Σ_{k in g} q, for four bits
  std::vector<int32_t> sums;

  void reserve(int64_t rows, const Weight& w) {
    width = (w.depth + BLOCK - 1) / BLOCK * BLOCK, groups = w.bits == 4 ? w.groups : 0;
    q.resize(rows * width), scale.resize(rows), lowered.resize(rows * groups), sums.resize(rows);
  }
};

template <Type type>
void quantize(const void* x, int64_t depth, Rows& rows, int64_t t) {
  V most{};
  for (int64_t i = 0; i < depth; i += 16) {
    V a = load<type>(x, i, depth - i);
    a = (V)((VI)a & 0x7FFFFFFF);
    most = a > most || a != a ? a : most;
  }
  float top = 0;
  bool nan = false;
  for (int lane = 0; lane < 16; lane++) nan |= most[lane] != most[lane], top = most[lane] > top ? most[lane] : top;
  const float turn = top > 0 ? 127.0f / top : 0.0f;
  const bool broken = nan || top > std::numeric_limits<float>::max();
  rows.scale[t] = broken ? std::numeric_limits<float>::quiet_NaN() : top / 127.0f;
  int8_t* q = rows.q.data() + t * rows.width;
  const V even = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number, ties to even
  for (int64_t i = 0; i < rows.width; i += 16) {
    V a = broken ? V{} : load<type>(x, i, depth - i) * turn;
    VI n = (VI)(a + even) - (VI)even;
    const Bytes bytes = __builtin_convertvector(n, Bytes);
    std::memcpy(q + i, &bytes, 16);
  }
  rows.sums[t] = 0;
  for (int64_t k = 0; k < depth; k++) rows.sums[t] += q[k];
  const int64_t group = rows.groups ? depth / rows.groups : 0;
  for (int64_t g = 0; g < rows.groups; g++) {
    int32_t sum = 0;
    for (int64_t k = g * group; k < (g + 1) * group; k++) sum += q[k];
    rows.lowered[t * rows.groups + g] = -8.0f * sum;
  }
}

#if defined(__AVX512VNNI__)
inline __m512i some(const int8_t* w, int64_t n) {
  return n >= BLOCK ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, w);
}

inline __m512i nibbles(const uint8_t* w) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)w), low = _mm256_set1_epi8(15);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(bytes, low)),
                            _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), 1);
}
#endif

// The sums of the lanes of n vectors of whole numbers; sixteen at once by transposing.
template <int n>
inline void totals(const VI* a, int32_t* out) {
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    __m512i four[4];
    for (int i = 0; i < 4; i++) {
      const __m512i* x = (const __m512i*)a + 4 * i;
      const __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
      const __m512i t = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
      four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(s, t), _mm512_unpackhi_epi64(s, t));
    }
    const __m512i s = _mm512_add_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x88),
                                       _mm512_shuffle_i32x4(four[0], four[1], 0xDD));
    const __m512i t = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2], four[3], 0x88),
                                       _mm512_shuffle_i32x4(four[2], four[3], 0xDD));
    const __m512i sums = _mm512_add_epi32(_mm512_shuffle_i32x4(s, t, 0x88), _mm512_shuffle_i32x4(s, t, 0xDD));
    _mm512_storeu_si512(out, sums);
    return;
  }
#endif
  for (int i = 0; i < n; i++) {
    out[i] = 0;
    for (int lane = 0; lane < 16; lane++) out[i] += a[i][lane];
  }
}

// Lanes of Σ_k (q + 128) · w of T rows and F columns; `sum` is part of a tile whose rows are `stride` apart.
template <int T, int F>
inline void tile8(const int8_t* const* x, const int8_t* w, int64_t K, VI* sum, int stride) {
  VI own[T * F] = {};
#if defined(__AVX512VNNI__)
  for (int64_t k = 0; k < K; k += BLOCK) {
    __m512i b[F];
    for (int f = 0; f < F; f++) {
      b[f] = _mm512_xor_si512(some(w + f * K + k, K - k), _mm512_set1_epi8((char)128));
      _mm_prefetch(w + f * K + k + AHEAD, _MM_HINT_T0);
    }
    for (int t = 0; t < T; t++) {
      const __m512i a = _mm512_loadu_si512(x[t] + k);
      for (int f = 0; f < F; f++) own[t * F + f] = (VI)_mm512_dpbusd_epi32((__m512i)own[t * F + f], b[f], a);
    }
  }
#else
  for (int t = 0; t < T; t++)
    for (int f = 0; f < F; f++) {
      int32_t total = 0;
      for (int64_t k = 0; k < K; k++) total += x[t][k] * (w[f * K + k] + 128);
      own[t * F + f][0] = total;
    }
#endif
  for (int t = 0; t < T; t++)
    for (int f = 0; f < F; f++) sum[t * stride + f] = own[t * F + f];
}

// Lanes of Σ_g scale · (Σ_{k in g} q · w), w not yet lowered by 8.
template <int T, int F>
inline void tile4(const int8_t* const* x, const uint8_t* w, const float* scale, int64_t K, int64_t groups, V* sum,
                  int stride) {
  const int64_t group = K / groups;
  V own[T * F] = {};
  for (int64_t g = 0; g < groups; g++) {
    VI whole[T * F] = {};
    for (int64_t k = g * group; k < (g + 1) * group; k += BLOCK) {
#if defined(__AVX512VNNI__)
      __m512i b[F];
      for (int f = 0; f < F; f++) {
        b[f] = nibbles(w + (f * K + k) / 2);
        _mm_prefetch((const char*)w + (f * K + k) / 2 + AHEAD, _MM_HINT_T0);
      }
      for (int t = 0; t < T; t++) {
        const __m512i a = _mm512_loadu_si512(x[t] + k);
        for (int f = 0; f < F; f++) whole[t * F + f] = (VI)_mm512_dpbusd_epi32((__m512i)whole[t * F + f], b[f], a);
      }
#else
      for (int t = 0; t < T; t++)
        for (int f = 0; f < F; f++) {
          const uint8_t* bytes = w + (f * K + k) / 2;
          int32_t part[16] = {};
          for (int i = 0; i < 32; i++) part[i / 4] += (bytes[i] & 15) * x[t][k + i];
          for (int i = 0; i < 32; i++) part[8 + i / 4] += (bytes[i] >> 4) * x[t][k + 32 + i];
          VI lanes;
          std::memcpy(&lanes, part, 64);
          whole[t * F + f] += lanes;
        }
#endif
    }
    for (int t = 0; t < T; t++)
      for (int f = 0; f < F; f++)
        own[t * F + f] = fma(__builtin_convertvector(whole[t * F + f], V), all(scale[f * groups + g]), own[t * F + f]);
  }
  for (int t = 0; t < T; t++)
    for (int f = 0; f < F; f++) sum[t * stride + f] = own[t * F + f];
}

// y[t, column + f] of T rows and F columns, NEAR of which are read side by side.
template <int T, int F, int NEAR>
inline void tile(const Weight& w, int64_t expert, int64_t column, const Rows& rows, const int32_t* which, float* y,
                 int64_t y_row) {
  const int64_t K = w.depth, m = expert * w.columns + column;
  if (w.bits == 8) {
    const int8_t* x[T];
    VI sum[T * F];
    int32_t found[T * F];
    for (int t = 0; t < T; t++) x[t] = rows.q.data() + which[t] * rows.width;
    for (int f = 0; f < F; f += NEAR) tile8<T, NEAR>(x, (const int8_t*)w.q + (m + f) * K, K, sum + f, F);
    for (int i = 0; i < T * F; i += GROUP<T * F>) totals<GROUP<T * F>>(sum + i, found + i);
    for (int f = 0; f < F; f += 16) {
      constexpr int n = F < 16 ? F : 16;
      const V scale = load<FLOAT32>(w.scale + m, f, n);
      for (int t = 0; t < T; t++) {
        VI whole{};
        std::memcpy(&whole, found + t * F + f, 4 * n);
        const V product = __builtin_convertvector(whole - 128 * rows.sums[which[t]], V) * scale * rows.scale[which[t]];
        store<FLOAT32>(y + t * y_row, f, product, n);
      }
    }
    return;
  }
  const int8_t* x[T];
  V sum[T * F];
  float found[T * F];
  for (int t = 0; t < T; t++) x[t] = rows.q.data() + which[t] * rows.width;
  const float* scale = w.scale + m * w.groups;
  for (int f = 0; f < F; f += NEAR)
    tile4<T, NEAR>(x, (const uint8_t*)w.q + (m + f) * K / 2, scale + f * w.groups, K, w.groups, sum + f, F);
  for (int64_t g = 0; g < w.groups; g += 16)
    for (int t = 0; t < T; t++) {
      const V lowered = load<FLOAT32>(rows.lowered.data() + which[t] * w.groups, g, w.groups - g);
      for (int f = 0; f < F; f++)
        sum[t * F + f] = fma(load<FLOAT32>(scale + f * w.groups, g, w.groups - g), lowered, sum[t * F + f]);
    }
  for (int i = 0; i < T * F; i += GROUP<T * F>) reduce_all<GROUP<T * F>>(sum + i, found + i);
  for (int t = 0; t < T; t++)
    for (int f = 0; f < F; f += 16) {
      const int n = std::min(F, 16);
      store<FLOAT32>(y + t * y_row, f, load<FLOAT32>(found + t * F, f, n) * rows.scale[which[t]], n);
    }
}

// y[t, m] of rows which[0], which[1], ... and columns [from, to). Weights that come from memory are read one row after
// another, which is what it is fastest at; the next rows of x find them in the cache, where four side by side cost least.
void block(const Weight& w, int64_t expert, int64_t from, int64_t to, const Rows& rows, const int32_t* which,
           int64_t count, float* y, int64_t y_row) {
  constexpr int F = 16;
  for (int64_t m = from; m < to;) {
    const bool whole = m + F <= to;
    for (int64_t t = 0; t < count;) {
      float* out = y + t * y_row + m - from;
      if (whole && count - t >= 4) {
        if (t) tile<4, F, 4>(w, expert, m, rows, which + t, out, y_row);
        else tile<4, F, 1>(w, expert, m, rows, which, out, y_row);
        t += 4;
      } else if (whole && count - t >= 2) {
        tile<2, F, 1>(w, expert, m, rows, which + t, out, y_row), t += 2;
      } else if (whole) {
        tile<1, F, 1>(w, expert, m, rows, which + t, out, y_row), t++;
      } else {
        tile<1, 1, 1>(w, expert, m, rows, which + t, out, y_row), t++;
      }
    }
    m += whole ? F : 1;
  }
}

template <Type type>
void linear(const void* x, const Weight& w, const float* bias, void* y, int64_t count, int threads) {
  Rows rows;
  rows.reserve(count, w);
  std::vector<int32_t> which(count);
  for (int64_t t = 0; t < count; t++) which[t] = (int32_t)t;
#pragma omp parallel num_threads(count * w.depth * w.columns < SMALL ? 1 : threads)
  {
    std::vector<float> room(count * COLUMNS);
#pragma omp for
    for (int64_t t = 0; t < count; t++) quantize<type>(at<type>(x, t * w.depth), w.depth, rows, t);
#pragma omp for schedule(dynamic, 1)
    for (int64_t m = 0; m < w.columns; m += COLUMNS) {
      const int64_t n = std::min(COLUMNS, w.columns - m);
      block(w, 0, m, m + n, rows, which.data(), count, room.data(), COLUMNS);
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < n; i += 16) {
          V sum = load<FLOAT32>(room.data() + t * COLUMNS, i, n - i);
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
