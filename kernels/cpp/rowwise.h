// One row's norm and one head's rotation, in one order. D width, h = half of a head's numbers.
#pragma once
#include "kernels.h"

// The norm's weights may have another type than the rows.
static inline V weights(int type, const void* w, int64_t i, int64_t n) {
  return type == FLOAT32 ? load<FLOAT32>(w, i, n) : type == BFLOAT16 ? load<BFLOAT16>(w, i, n) : load<FLOAT16>(w, i, n);
}

template <Type type>
static inline void norm_row(const void* x, int w_type, const void* w, void* y, int64_t D, float eps) {
  V squares{};
  for (int64_t i = 0; i < D; i += 16) {
    const V a = load<type>(x, i, D - i);
    squares = fma(a, a, squares);
  }
  const float turn = 1.0f / std::sqrt(reduce(squares) / D + eps);
  for (int64_t i = 0; i < D; i += 16)
    store<type>(y, i, load<type>(x, i, D - i) * turn * weights(w_type, w, i, D - i), D - i);
}

// (a, b) → (a · cos - b · sin, b · cos + a · sin) for a of the first and b of the second half.
template <Type type>
static inline void turn_row(const void* x, const float* cos, const float* sin, void* y, int64_t h) {
  for (int64_t i = 0; i < h; i += 16) {
    const V a = load<type>(x, i, h - i), b = load<type>(at<type>(x, h), i, h - i);
    const V c = load<FLOAT32>(cos, i, h - i), s = load<FLOAT32>(sin, i, h - i);
    store<type>(y, i, a * c - b * s, h - i);
    store<type>((void*)at<type>(y, h), i, b * c + a * s, h - i);
  }
}
