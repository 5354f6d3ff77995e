// The mixture of experts.
#include "moe.h"

#include "kernels.h"

#if defined(__AVX512BF16__)
using BFloat16 = Pairs;
#else
using BFloat16 = Widened<BFLOAT16>;
#endif

extern "C" {

void turnout_moe_mlp(int type, const Moe* m, int threads) {
  switch (type) {
    case FLOAT32: Mixture<Widened<FLOAT32>>(*m, threads).run(threads); break;
    case BFLOAT16: Mixture<BFloat16>(*m, threads).run(threads); break;
    default: Mixture<Widened<FLOAT16>>(*m, threads).run(threads);
  }
}

int turnout_moe_pairs() { return !std::is_same<BFloat16, Widened<BFLOAT16>>::value; }  // whether bfloat16 has an instruction of its own
}
