// Norm, activation and rotation, row by row.
#include "rowwise.h"

template <Type type>
static void norm_rows(const void* x, const void* y, int w_type, const void* w, void* sum, void* normed, int64_t T,
                      int64_t D, float eps, int threads) {
#pragma omp parallel for num_threads(T * D < SMALL ? 1 : threads)
  for (int64_t t = 0; t < T; t++) {
    const void* row = at<type>(x, t * D);
    if (y) {
      void* to = (void*)at<type>(sum, t * D);
      for (int64_t i = 0; i < D; i += 16)
        store<type>(to, i, load<type>(row, i, D - i) + load<type>(at<type>(y, t * D), i, D - i), D - i);
      row = to;
    }
    norm_row<type>(row, w_type, w, (void*)at<type>(normed, t * D), D, eps);
  }
}

template <Type type>
static void turn_rows(const void* x, const float* cos, const float* sin, void* y, int64_t T, int64_t H, int64_t h,
                      int64_t x_token, int64_t x_head, int threads) {
#pragma omp parallel for num_threads(T * H * h < SMALL ? 1 : threads)
  for (int64_t t = 0; t < T; t++)
    for (int64_t j = 0; j < H; j++)
      turn_row<type>(at<type>(x, t * x_token + j * x_head), cos + t * h, sin + t * h,
                     (void*)at<type>(y, (t * H + j) * 2 * h), h);
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

// normed = norm(x), or with y: sum = x + y, normed = norm(sum)
void turnout_add_rms_norm(int type, const void* x, const void* y, int w_type, const void* w, void* sum, void* normed,
                          int64_t T, int64_t D, float eps, int threads) {
#define CALL(TYPE) norm_rows<TYPE>(x, y, w_type, w, sum, normed, T, D, eps, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_rotate(int type, const void* x, const float* cos, const float* sin, void* y, int64_t T, int64_t H,
                    int64_t h, int64_t x_token, int64_t x_head, int threads) {
#define CALL(TYPE) turn_rows<TYPE>(x, cos, sin, y, T, H, h, x_token, x_head, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_swiglu(int type, const void* x, void* y, int64_t rows, int64_t F, int threads) {
#define CALL(T) swiglu_rows<T>(x, y, rows, F, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
}
