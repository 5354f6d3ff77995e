// What is noted of routings: sums over tokens, and the experts of each token in its page.
//
// L layers, T tokens, E experts, K choices. A layer's sums are one thread's, token after token.
#include <vector>

#include "kernels.h"

struct Routes {
  double* sums;          // [L, E + 5]
  const uint8_t* valid;  // [T] or null
  int64_t layers, tokens, experts, choices, sigmoid;
};

struct Pages {
  void* pages;  // [slots, L, K] of two bytes or four
  const int64_t* at;
  int64_t slots, layers, tokens, choices, size;
};

// Of the distribution that is in proportion to e^x: ln Z - Σ e^(x - most) (x - most) / Z.
static double entropy(const float* x, int64_t E) {
  float most = -INF;
  for (int64_t e = 0; e < E; e++) most = x[e] > most ? x[e] : most;
  V sum{}, weighed{};
  for (int64_t e = 0; e < E; e += 16) {
    const V y = load<FLOAT32>(x, e, E - e) - most;
    V p = exponential(y);
    for (int64_t lane = E - e; lane < 16; lane++) p[lane] = 0;
    sum += p, weighed += p == 0.0f ? V{} : p * y;
  }
  const float total = reduce(sum);
  return std::log(total) - reduce(weighed) / total;
}

static double length(const float* x, int64_t E) {
  V sum{};
  for (int64_t e = 0; e < E; e += 16) {
    const V y = load<FLOAT32>(x, e, E - e);
    sum += y * y;
  }
  return std::sqrt(reduce(sum));
}

extern "C" {

void turnout_tally_routes(const Routes* r, const float* const* logits, const int64_t* const* ids,
                          const uint8_t* const* wanted, const uint8_t* const* kept, int threads) {
  const int64_t E = r->experts, K = r->choices;
#pragma omp parallel for num_threads(r->layers * r->tokens * E < SMALL ? 1 : threads)
  for (int64_t l = 0; l < r->layers; l++) {
    double* to = r->sums + l * (E + 5);
    double dropped = 0, entropies = 0, lengths = 0, tokens = 0;
    std::vector<float> log_scores(r->sigmoid ? E : 0);
    for (int64_t t = 0; t < r->tokens; t++) {
      for (int64_t i = t * K; i < (t + 1) * K; i++)
        if (wanted[l][i]) to[ids[l][i]]++, dropped += !kept[l][i];
      if (r->valid && !r->valid[t]) continue;
      const float* x = logits[l] + t * E;
      lengths += length(x, E), tokens++;
      for (size_t e = 0; e < log_scores.size(); e++)
        log_scores[e] = std::min(x[e], 0.0f) - std::log1p(std::exp(-std::fabs(x[e])));
      entropies += entropy(r->sigmoid ? log_scores.data() : x, E);
    }
    to[E] += dropped, to[E + 1] += tokens * K, to[E + 2] += entropies, to[E + 3] += lengths, to[E + 4] += tokens;
  }
}

// 0, and nothing is written, where a slot is none of the pages'.
int turnout_store_routes(const Pages* p, const int64_t* const* ids, const uint8_t* const* kept, int) {
  for (int64_t t = 0; t < p->tokens; t++)
    if ((uint64_t)p->at[t] >= (uint64_t)p->slots) return 0;
  for (int64_t t = 0; t < p->tokens; t++)
    for (int64_t l = 0; l < p->layers; l++)
      for (int64_t k = 0; k < p->choices; k++) {
        const int64_t i = t * p->choices + k, to = (p->at[t] * p->layers + l) * p->choices + k;
        const int64_t id = kept[l][i] ? ids[l][i] : -1 - ids[l][i];
        if (p->size == 2) ((int16_t*)p->pages)[to] = id;
        else ((int32_t*)p->pages)[to] = id;
      }
  return 1;
}
}
