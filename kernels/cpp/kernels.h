// What every unit shares. The kernels are called through ctypes: a row's result never depends on its companions nor on
// the threads.
#pragma once
#include "simd.h"

#define BY_TYPE(type, call)                      \
  switch (type) {                                \
    case FLOAT32: call(FLOAT32); break;          \
    case BFLOAT16: call(BFLOAT16); break;        \
    default: call(FLOAT16);                      \
  }
