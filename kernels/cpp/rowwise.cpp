// Norm and activation, row by row.
#include "kernels.h"

template <Type type>
static void rms_norm_rows(const void* x, const float* weight, void* y, int64_t rows, int64_t D, float eps,
                          int threads) {
#pragma omp parallel for num_threads(rows * D < SMALL ? 1 : threads)
  for (int64_t t = 0; t < rows; t++) {
    const void* row = at<type>(x, t * D);
    V squares{};
    for (int64_t i = 0; i < D; i += 16) {
      V a = load<type>(row, i, D - i);
      squares = fma(a, a, squares);
    }
    const float turn = 1.0f / std::sqrt(reduce(squares) / D + eps);
    for (int64_t i = 0; i < D; i += 16) {
      V a = load<type>(row, i, D - i) * turn * load<FLOAT32>(weight, i, D - i);
      store<type>((void*)at<type>(y, t * D), i, a, D - i);
    }
  }
}

template <Type type>
static void swiglu_rows(const void* x, void* y, int64_t rows, int64_t F, int threads) {
#pragma omp parallel for num_threads(rows * F < SMALL ? 1 : threads)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t i = 0; i < F; i += 16) {
      V gate = load<type>(at<type>(x, 2 * t * F), i, F - i), up = load<type>(at<type>(x, (2 * t + 1) * F), i, F - i);
      V silu = gate / (1.0f + exponential(-gate));
      store<type>((void*)at<type>(y, t * F), i, silu * up, F - i);
    }
}

extern "C" {

void turnout_rms_norm(int type, const void* x, const float* weight, void* y, int64_t rows, int64_t D, float eps,
                      int threads) {
#define CALL(T) rms_norm_rows<T>(x, weight, y, rows, D, eps, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_swiglu(int type, const void* x, void* y, int64_t rows, int64_t F, int threads) {
#define CALL(T) swiglu_rows<T>(x, y, rows, F, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
}
