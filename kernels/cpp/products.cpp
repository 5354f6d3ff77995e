// Matrix products.
#include "gemm.h"
#include "kernels.h"

extern "C" void turnout_gemm(int type, const Gemm* g, int threads) {
#define CALL(T) gemm_all<T>(*g, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
