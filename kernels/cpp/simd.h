// Sixteen floats, and what every kernel does with them in the same order on every CPU.
//
// With -ffp-contract=off nothing is fused but where `fma` says so: AVX-512 and AVX2 give the same bits. A CPU without
// FMA rounds twice, always.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint32_t VU __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));  // sixteen numbers of two bytes

enum Type { FLOAT32, BFLOAT16, FLOAT16 };
constexpr int64_t SMALL = 1 << 16;  // multiplications that are not worth a second thread
constexpr float INF = std::numeric_limits<float>::infinity();
#if defined(__AVX512F__)
constexpr int TILE = 4;  // rows and columns of a tile of accumulators that fits the registers
#else
constexpr int TILE = 2;
#endif

static inline V all(float x) { return x - V{}; }

static inline V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
  z[0] = _mm256_fmadd_ps(x[0], y[0], z[0]), z[1] = _mm256_fmadd_ps(x[1], y[1], z[1]);
  std::memcpy(&c, z, 64);
  return c;
#else
  return a * b + c;
#endif
}

// The sum of the lanes as a tree: i with i + 8, i + 4, i + 2, i + 1.
static inline float reduce(V a) {
  __m128 q[4];
  std::memcpy(q, &a, 64);
  __m128 s = _mm_add_ps(_mm_add_ps(q[0], q[2]), _mm_add_ps(q[1], q[3]));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// out[i] = reduce(a[i]) of n vectors; four times four at once where registers allow, by the same tree.
template <int n>
static inline void reduce_all(const V* a, float* out) {
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    __m512 four[4];
    for (int i = 0; i < 4; i++) {
      const __m512 *x = (const __m512*)a + 4 * i;
      __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xEE));
      __m512 t = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xEE));
      four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s, t, 0x88), _mm512_shuffle_f32x4(s, t, 0xDD));
    }
    __m512 s = _mm512_add_ps(_mm512_shuffle_ps(four[0], four[1], 0x44), _mm512_shuffle_ps(four[0], four[1], 0xEE));
    __m512 t = _mm512_add_ps(_mm512_shuffle_ps(four[2], four[3], 0x44), _mm512_shuffle_ps(four[2], four[3], 0xEE));
    __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(s, t, 0x88), _mm512_shuffle_ps(s, t, 0xDD));
    const __m512i turn = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(turn, sums));
    return;
  }
#endif
  for (int i = 0; i < n; i++) out[i] = reduce(a[i]);
}

template <Type type>
static inline V widen(Half h) {
  if constexpr (type == BFLOAT16) return (V)(__builtin_convertvector(h, VU) << 16);
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  __m128i x[2];
  __m256 y[2];
  V out;
  std::memcpy(x, &h, 32);
  y[0] = _mm256_cvtph_ps(x[0]), y[1] = _mm256_cvtph_ps(x[1]);
  std::memcpy(&out, y, 64);
  return out;
#else
  V out;
  _Float16 f[16];
  std::memcpy(f, &h, 32);
  for (int i = 0; i < 16; i++) out[i] = f[i];
  return out;
#endif
}

// The nearest, ties to even.
template <Type type>
static inline Half narrow(V x) {
  if constexpr (type == BFLOAT16) {
    VU u = (VU)x;
    u = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? u : (VU)(VI{} + 0x7FC0), Half);
  }
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  __m256 f[2];
  Half out;
  std::memcpy(f, &x, 64);
  __m128i h[2] = {_mm256_cvtps_ph(f[0], _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(f[1], _MM_FROUND_TO_NEAREST_INT)};
  std::memcpy(&out, h, 32);
  return out;
#else
  _Float16 f[16];
  Half out;
  for (int i = 0; i < 16; i++) f[i] = (_Float16)x[i];
  std::memcpy(&out, f, 32);
  return out;
#endif
}

// Numbers i to i + 16 of a row.
template <Type type>
static inline V load(const void* row, int64_t i) {
  if constexpr (type == FLOAT32) {
    V x;
    std::memcpy(&x, (const float*)row + i, 64);
    return x;
  } else {
    Half h;
    std::memcpy(&h, (const uint16_t*)row + i, 32);
    return widen<type>(h);
  }
}

// As far as the row goes, n numbers more; lanes past that are zero and their memory is not touched.
template <Type type>
static inline V load(const void* row, int64_t i, int64_t n) {
  if (n >= 16) return load<type>(row, i);
  if (n <= 0) return V{};
  uint32_t part[16] = {};
  std::memcpy(part, (const char*)row + i * (type == FLOAT32 ? 4 : 2), n * (type == FLOAT32 ? 4 : 2));
  return load<type>(part, 0);
}

template <Type type>
static inline void store(void* row, int64_t i, V x, int64_t n = 16) {
  if constexpr (type == FLOAT32) {
    if (n >= 16) std::memcpy((float*)row + i, &x, 64);
    else std::memcpy((float*)row + i, &x, 4 * n);
  } else {
    Half h = narrow<type>(x);
    if (n >= 16) std::memcpy((uint16_t*)row + i, &h, 32);
    else std::memcpy((uint16_t*)row + i, &h, 2 * n);
  }
}

template <Type type>
static inline void widen_row(const void* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store<FLOAT32>(to, i, load<type>(from, i, n - i), n - i);
}

template <Type type>
static inline const void* at(const void* base, int64_t i) {
  return (const char*)base + i * (type == FLOAT32 ? 4 : 2);
}

// e^x within 2 ulp, 0 below -87.3 and finite above 88 (Cephes' polynomial); NaN stays.
static inline V exponential(V x) {
  V y = x > 88.0f ? all(88.0f) : x;
  V shifted = fma(y, all(1.44269504f), all(12582912.0f));  // 1.5 · 2^23: rounds to a whole number in the low bits
  V n = shifted - 12582912.0f;
  V r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), y));
  V p = fma(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f)), p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f)), p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  V scaled = (V)((VI)p + ((VI)shifted << 23));
  return x != x ? x : x < -87.3f ? V{} : scaled;
}
