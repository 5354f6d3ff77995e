// The mixture of experts.
#include "moe.h"

#include "kernels.h"

extern "C" {

void turnout_moe_mlp(int type, const Moe* m, int threads) {
#define CALL(T) Mixture<T>(*m, threads).run(threads)
  BY_TYPE(type, CALL)
#undef CALL
}

int turnout_moe_pairs() { return pairs<BFLOAT16>; }  // whether bfloat16 has an instruction of its own
}
