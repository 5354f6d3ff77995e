// Matrix products.
#include "gemm.h"
#include "kernels.h"

extern "C" void turnout_gemm(int type, const Gemm* g, const int32_t* ends, int64_t experts, int threads) {
#define CALL(T) gemm_all<T>(*g, ends, experts, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
