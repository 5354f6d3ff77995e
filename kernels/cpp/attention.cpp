// Attention over packed rows and pages.
#include "attention.h"
#include "kernels.h"

extern "C" void turnout_attention(int type, int cached, const Attention* a, int threads) {
#define CALL(T) \
  (cached == type ? attend_all<T, T>(*a, threads) : cached == FLOAT32 ? attend_all<T, FLOAT32>(*a, threads) \
   : cached == BFLOAT16 ? attend_all<T, BFLOAT16>(*a, threads) : attend_all<T, FLOAT16>(*a, threads))
  BY_TYPE(type, CALL)
#undef CALL
}
