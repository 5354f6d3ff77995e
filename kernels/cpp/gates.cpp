// The choice of experts: the k highest ranks of a token's row, and their weights.
//
// Ranks are compared as whole numbers, so that no order of operations can matter. E experts, K choices.
#include "kernels.h"

constexpr int64_t MOST = 1024;  // experts
constexpr int32_t NEVER = INT32_MIN;
constexpr int32_t LAST = (int32_t)0x807FFFFF;  // of -infinity

enum Score { SOFTMAX, SIGMOID, CHOSEN };

struct Gates {
  const float *logits, *gates, *bias;  // [T, E]; gates and bias of SIGMOID alone, bias or null
  const int64_t* given;                // [T, K] or null
  int64_t* ids;
  float* weights;
  int64_t tokens, experts, choices, groups, top_groups, best, score, renormalize;
  float scale;
};

// Whole numbers in the order of the floats: NaN above all, both zeros one.
static inline VI ordered(V x) {
  const VI bits = (VI)(x + 0.0f);
  const VI key = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return x == x ? key : VI{} + INT32_MAX;
}

// Where the highest of n keys (a multiple of sixteen lies there) is, the first of several; it is taken out.
static inline int64_t take_highest(int32_t* keys, int64_t n) {
  VI most = VI{} + NEVER;
  for (int64_t i = 0; i < n; i += 16) {
    VI k;
    std::memcpy(&k, keys + i, 64);
    most = k > most ? k : most;
  }
  int32_t highest = most[0];
  for (int i = 1; i < 16; i++) highest = std::max(highest, (int32_t)most[i]);
  int64_t at = 0;
  while (at < n - 1 && keys[at] != highest) at++;
  keys[at] = NEVER;
  return at;
}

// Leaves the keys of the best groups; a group's score is the sum of its `best` highest.
static void limit(const Gates& g, const float* rank, int32_t* keys) {
  const int64_t size = g.experts / g.groups;
  alignas(64) float scores[MOST];
  alignas(64) int32_t own[MOST];
  for (int64_t i = 0; i < g.groups; i++) {
    for (int64_t j = 0; j < (size + 15) / 16 * 16; j++) own[j] = j < size ? keys[i * size + j] : NEVER;
    scores[i] = rank[i * size + take_highest(own, size)];
    for (int64_t j = 1; j < g.best; j++) scores[i] += rank[i * size + take_highest(own, size)];
  }
  for (int64_t i = 0; i < g.groups; i += 16) {
    const VI k = ordered(load<FLOAT32>(scores, i, g.groups - i));
    std::memcpy(own + i, &k, 64);
  }
  for (int64_t i = g.groups; i % 16; i++) own[i] = NEVER;
  bool inside[MOST] = {};
  for (int64_t i = 0; i < g.top_groups; i++) inside[take_highest(own, g.groups)] = true;
  for (int64_t e = 0; e < g.experts; e++)
    if (!inside[e / size]) keys[e] = LAST;
}

static void choose(const Gates& g, int64_t t, int64_t* ids) {
  const float* from = (g.score == SIGMOID ? g.gates : g.logits) + t * g.experts;
  alignas(64) float rank[MOST];
  alignas(64) int32_t keys[MOST];
  for (int64_t e = 0; e < g.experts; e += 16) {
    const int64_t n = g.experts - e;
    V x = load<FLOAT32>(from, e, n);
    if (g.bias) x += load<FLOAT32>(g.bias, e, n);
    store<FLOAT32>(rank, e, x);
    const VI k = ordered(x);
    std::memcpy(keys + e, &k, 64);
  }
  for (int64_t e = g.experts; e % 16; e++) keys[e] = NEVER;
  if (g.top_groups < g.groups) limit(g, rank, keys);
  for (int64_t k = 0; k < g.choices; k++) ids[k] = take_highest(keys, g.experts);
}

static float log_sigmoid(float x) { return std::min(x, 0.0f) - std::log1p(std::exp(-std::fabs(x))); }

// softmax of K numbers, in place
static void soften(float* x, int64_t K) {
  float most = x[0], sum = 0;
  for (int64_t k = 1; k < K; k++) most = x[k] > most ? x[k] : most;
  for (int64_t k = 0; k < K; k++) x[k] = std::exp(x[k] - most), sum += x[k];
  for (int64_t k = 0; k < K; k++) x[k] /= sum;
}

static void weigh(const Gates& g, int64_t t, const int64_t* ids, float* w) {
  const float* logits = g.logits + t * g.experts;
  const bool shares = g.score == CHOSEN || (g.score == SIGMOID && g.renormalize);
  if (g.score == SOFTMAX) {
    float most = logits[0];
    for (int64_t e = 1; e < g.experts; e++) most = logits[e] > most ? logits[e] : most;
    alignas(64) float share[MOST];
    V sum{};
    for (int64_t e = 0; e < g.experts; e += 16) {
      V p = exponential(load<FLOAT32>(logits, e, g.experts - e) - most);
      for (int64_t lane = g.experts - e; lane < 16; lane++) p[lane] = 0;
      store<FLOAT32>(share, e, p);
      sum += p;
    }
    const float total = reduce(sum);
    float chosen = 0;
    for (int64_t k = 0; k < g.choices; k++) w[k] = share[ids[k]] / total, chosen += w[k];
    if (g.renormalize)
      for (int64_t k = 0; k < g.choices; k++) w[k] /= chosen;
  } else {
    for (int64_t k = 0; k < g.choices; k++) {
      const float x = logits[ids[k]];
      w[k] = g.score == CHOSEN ? x : shares ? log_sigmoid(x) : g.gates[t * g.experts + ids[k]];
    }
    if (shares) soften(w, g.choices);
  }
  for (int64_t k = 0; k < g.choices; k++) w[k] *= g.scale;
}

extern "C" void turnout_top_k_gates(const Gates* g, int threads) {
#pragma omp parallel for num_threads(g->tokens * g->experts < SMALL ? 1 : threads)
  for (int64_t t = 0; t < g->tokens; t++) {
    const int64_t* given = g->given ? g->given + t * g->choices : nullptr;
    if (!given) choose(*g, t, g->ids + t * g->choices);
    weigh(*g, t, given ? given : g->ids + t * g->choices, g->weights + t * g->choices);
  }
}
