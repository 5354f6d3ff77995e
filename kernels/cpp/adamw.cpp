// AdamW in one pass: a number's step depends on nothing beside it, whatever piece of a tensor it comes in.
#include "kernels.h"

constexpr int64_t BLOCK = 16384;  // numbers that one thread takes at a time

struct AdamW {
  float scale, keep, fresh1, fresh2, rate, root, eps;  // of grad; 1 - lr · decay, 1 - β1, 1 - β2, lr / bias1, √bias2
};

static inline V square_root(V x) {
  V y;
#if defined(__AVX512F__)
  y = (V)_mm512_sqrt_ps((__m512)x);
#else
  __m128 q[4];
  std::memcpy(q, &x, 64);
  for (auto& some : q) some = _mm_sqrt_ps(some);
  std::memcpy(&y, q, 64);
#endif
  return y;
}

template <Type type>
static void step(float* weight, const void* grads, float* mean, float* square, int64_t count, AdamW a, int threads) {
  const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(count < SMALL ? 1 : threads)
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = b * BLOCK; i < std::min(count, (b + 1) * BLOCK); i += 16) {
      const int64_t n = count - i;
      V grad = load<type>(grads, i, n) * a.scale, w = load<FLOAT32>(weight, i, n) * a.keep;
      V m = load<FLOAT32>(mean, i, n), s = load<FLOAT32>(square, i, n);
      m = fma(grad - m, all(a.fresh1), m), s = fma(grad * grad - s, all(a.fresh2), s);
      store<FLOAT32>(mean, i, m, n), store<FLOAT32>(square, i, s, n);
      store<FLOAT32>(weight, i, w - a.rate * m / (square_root(s) / a.root + a.eps), n);
    }
}

extern "C" void turnout_adamw(int type, float* weight, const void* grads, float* mean, float* square, int64_t count,
                              float scale, float keep, float fresh1, float fresh2, float rate, float root, float eps,
                              int threads) {
  const AdamW a{scale, keep, fresh1, fresh2, rate, root, eps};
#define CALL(T) step<T>(weight, grads, mean, square, count, a, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
