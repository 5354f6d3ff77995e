// Attention of packed sequences in bfloat16, forward and backward, with no scores in memory (Dao 2307.08691).
//
// Blocks of BLOCK keys meet blocks of BLOCK queries. Scores are held with a query a lane, so that a softmax is made of
// whole vectors:
//
//     forward    S = k qᵀ    P = exp(scale · S - lse)    oᵀ = Σ vᵀ P
//     backward   dP = v gᵀ   dS = P · (dP - Σ g o)       dv = P g    dk = dS q    dqᵀ = Σ kᵀ dS
//
// Operands are copied once a head into the two layouts that a product wants, zeros behind their ends: rows of words of
// two numbers, neighbours along the sum (left), and these words with a column a lane (right). A sequence and a head of
// keys are one thread's, so no result depends on the number of threads; sums run over blocks in order.
#include <memory>

#include "attention.h"
#include "kernels.h"

struct Flash {
  const uint16_t *q, *k, *v;  // [T, H, d], [., G, d], [., G, d]
  const int32_t *cu_q, *cu_k;
  uint16_t* out;
  float* lse;  // [T, H]
  const uint16_t* grad;
  uint16_t *dq, *dk, *dv;
  int64_t sequences, heads, kv_heads, d, causal, window;
  float scale;
};

// sum + a · b of words: their low halves, then their high ones.
static inline V mac(VU a, VU b, V sum) {
#if defined(__AVX512BF16__)
  return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return fma((V)(a & 0xFFFF0000u), (V)(b & 0xFFFF0000u), fma((V)(a << 16), (V)(b << 16), sum));
#endif
}

static inline V mac(uint32_t a, VU b, V sum) {
#if defined(__AVX512BF16__)
  return mac(VU{} + a, b, sum);
#else
  const uint32_t halves[2] = {a << 16, a & 0xFFFF0000u};
  float x[2];
  std::memcpy(x, halves, 8);
  return fma(all(x[1]), (V)(b & 0xFFFF0000u), fma(all(x[0]), (V)(b << 16), sum));
#endif
}

static inline VU join(Half low, Half high) {
  return __builtin_convertvector(low, VU) | (__builtin_convertvector(high, VU) << 16);
}

// Two rows of numbers as words of bfloat16: the first's in the low halves.
static inline VU pair(V low, V high) {
  return join(narrow<BFLOAT16>(low), narrow<BFLOAT16>(high));
}

static inline VU words(const uint32_t* x) {
  VU y;
  std::memcpy(&y, x, 64);
  return y;
}

// c[m, n] (+)= Σ_i a[m, i] · b[i, n] for words i, ascending; m a multiple of `tall`, n of 32.
template <int tall>
static void strip(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t steps, float* c,
                  int64_t c_row, int64_t n, bool add) {
  for (int64_t j = 0; j < n; j += 32) {
    V sum[tall][2];
#pragma GCC unroll 8
    for (int r = 0; r < tall; r++)
      for (int half = 0; half < 2; half++) sum[r][half] = add ? load<FLOAT32>(c + r * c_row, j + 16 * half) : V{};
    for (int64_t i = 0; i < steps; i++) {
      const VU low = words(b + i * b_row + j), high = words(b + i * b_row + j + 16);
#pragma GCC unroll 8
      for (int r = 0; r < tall; r++) {
        const uint32_t x = a[r * a_row + i];
        sum[r][0] = mac(x, low, sum[r][0]), sum[r][1] = mac(x, high, sum[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < tall; r++)
      for (int half = 0; half < 2; half++) store<FLOAT32>(c + r * c_row, j + 16 * half, sum[r][half]);
  }
}

static void product(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t steps, float* c,
                    int64_t c_row, int64_t m, int64_t n, bool add) {
#if defined(__AVX512F__)
  constexpr int tall = 8;
#else
  constexpr int tall = 2;
#endif
  for (int64_t r = 0; r < m; r += tall) strip<tall>(a + r * a_row, a_row, b, b_row, steps, c + r * c_row, c_row, n, add);
}

// to[c, r] = from[r, c] of words; rows and columns are multiples of 16.
static void turn(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) {
      V x[16];
      for (int i = 0; i < 16; i++) std::memcpy(&x[i], from + (r + i) * from_row + c, 64);
      transpose(x);
      for (int i = 0; i < 16; i++) std::memcpy(to + (c + i) * to_row + r, &x[i], 64);
    }
}

// One head of a tensor [., heads, d]: n rows in float words of d / 2, followed by zeros up to a whole block.
struct Operand {
  int64_t rows, padded, d;
  std::unique_ptr<uint32_t[]> left, right, across;  // [n, d / 2]; [d / 2, n]; word i of it has rows 2 i, 2 i + 1: [n / 2, d]

  Operand(const uint16_t* from, int64_t row, int64_t n, int64_t d, bool wants_across = true)
      : rows(n), padded(up(n, BLOCK)), d(d), left(new uint32_t[padded * d / 2]), right(new uint32_t[padded * d / 2]) {
    for (int64_t i = 0; i < n; i++) std::memcpy(left.get() + i * d / 2, from + i * row, 2 * d);
    std::memset(left.get() + n * d / 2, 0, (padded - n) * 2 * d);
    turn(left.get(), d / 2, right.get(), padded, padded, d / 2);
    if (!wants_across) return;
    across.reset(new uint32_t[padded * d / 2]);
    for (int64_t i = 0; i < padded / 2; i++) {
      const uint16_t *low = (const uint16_t*)(left.get() + i * d), *high = low + d;
      for (int64_t c = 0; c < d; c += 16) {
        Half a, b;
        std::memcpy(&a, low + c, 32), std::memcpy(&b, high + c, 32);
        const VU both = join(a, b);
        std::memcpy(across.get() + i * d + c, &both, 64);
      }
    }
  }

  // The rows of its transpose: [d, n / 2].
  std::unique_ptr<uint32_t[]> upright() const {
    std::unique_ptr<uint32_t[]> to(new uint32_t[padded * d / 2]);
    turn(across.get(), d, to.get(), padded / 2, padded / 2, d);
    return to;
  }
};

// Which keys a query sees: first to last.
struct Sight {
  int64_t S, L, ahead, window;
  bool causal;
  Sight(const Flash& a, int64_t S, int64_t L) : S(S), L(L), ahead(L - S), window(a.window), causal(a.causal) {}
  int64_t first(int64_t m) const { return window ? std::max<int64_t>(m + ahead - window + 1, 0) : 0; }
  int64_t last(int64_t m) const {
    const int64_t most = causal ? m + ahead + 1 : window ? m + ahead + window : L;
    return m < S ? std::max<int64_t>(std::min(most, L), 0) : 0;
  }
  // Does a query from `m` see a key from `n`, each a block?
  bool meet(int64_t m, int64_t n) const {
    const int64_t end = std::min(m + BLOCK, S) - 1;
    return first(m) < n + BLOCK && last(end) > n;
  }
  // Do all of them see all?
  bool all(int64_t m, int64_t n) const { return m + BLOCK <= S && first(m + BLOCK - 1) <= n && last(m) >= n + BLOCK; }
};

static inline V logarithm(V x) {
  for (int i = 0; i < 16; i++) x[i] = std::log(x[i]);
  return x;
}

// Rows of a tensor from a transposed block [d, BLOCK], times a number a lane.
static void put(const float* block, int64_t d, V* times, uint16_t* to, int64_t row, int64_t rows) {
  alignas(64) float scaled[256 * BLOCK], turned[BLOCK * 256];
  for (int64_t c = 0; c < d; c++)
    for (int64_t i = 0; i < BLOCK / 16; i++)
      store<FLOAT32>(scaled + c * BLOCK, 16 * i, load<FLOAT32>(block + c * BLOCK, 16 * i) * times[i]);
  turn((const uint32_t*)scaled, BLOCK, (uint32_t*)turned, d, d, BLOCK);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < d; c += 16) store<BFLOAT16>(to + i * row, c, load<FLOAT32>(turned + i * d, c));
}

// The block's scores as exponents: scale · S, -inf where a query does not see a key.
static void exponents(const Sight& sight, float* scores, int64_t m, int64_t n, float scale) {
  const bool whole = sight.all(m, n);
  for (int64_t i = 0; i < BLOCK; i += 16) {
    VI first, last;
    for (int64_t lane = 0; lane < 16; lane++)
      first[lane] = sight.first(m + i + lane) - n, last[lane] = sight.last(m + i + lane) - n;
    for (int64_t r = 0; r < BLOCK; r++) {
      const V s = load<FLOAT32>(scores + r * BLOCK, i) * scale;
      const VI key = VI{} + (int32_t)r;
      store<FLOAT32>(scores + r * BLOCK, i, whole ? s : (key >= first) & (key < last) ? s : all(-INF));
    }
  }
}

static void forward_head(const Flash& a, const Sight& sight, const Operand& k, const uint32_t* v_upright, int64_t first,
                         int64_t head) {
  const int64_t d = a.d, row = a.heads * d, keys = k.padded;
  const Operand q(a.q + first * row + head * d, row, sight.S, d, false);
  alignas(64) float scores[BLOCK * BLOCK], sums[256 * BLOCK];
  alignas(64) uint32_t p[BLOCK / 2 * BLOCK];
  for (int64_t m = 0; m < sight.S; m += BLOCK) {
    V most[4], total[4];
    for (int i = 0; i < 4; i++) most[i] = all(-INF), total[i] = V{};
    std::memset(sums, 0, 4 * d * BLOCK);
    for (int64_t n = 0; n < keys; n += BLOCK) {
      if (!sight.meet(m, n)) continue;
      product(k.left.get() + n * d / 2, d / 2, q.right.get() + m, q.padded, d / 2, scores, BLOCK, BLOCK, BLOCK, false);
      exponents(sight, scores, m, n, a.scale);
      for (int i = 0; i < 4; i++) {
        V top = most[i];
        for (int64_t r = 0; r < BLOCK; r++) {
          const V s = load<FLOAT32>(scores + r * BLOCK, 16 * i);
          top = s > top ? s : top;
        }
        const V base = top == -INF ? V{} : top, fade = exponential(most[i] - base);
        V sum = total[i] * fade;
        for (int64_t r = 0; r < BLOCK; r += 2) {
          const V x = exponential(load<FLOAT32>(scores + r * BLOCK, 16 * i) - base);
          const V y = exponential(load<FLOAT32>(scores + (r + 1) * BLOCK, 16 * i) - base);
          const VU both = pair(x, y);
          sum += x + y;
          std::memcpy(p + r / 2 * BLOCK + 16 * i, &both, 64);
        }
        for (int64_t c = 0; c < d; c++)
          store<FLOAT32>(sums + c * BLOCK, 16 * i, load<FLOAT32>(sums + c * BLOCK, 16 * i) * fade);
        most[i] = top, total[i] = sum;
      }
      product(v_upright + n / 2, keys / 2, p, BLOCK, BLOCK / 2, sums, BLOCK, d, BLOCK, true);
    }
    V times[4];
    const int64_t rows = std::min(BLOCK, sight.S - m);
    for (int i = 0; i < 4; i++) {
      const V lse = most[i] + logarithm(total[i]);
      times[i] = total[i] == 0.0f ? V{} : 1.0f / total[i];
      for (int64_t j = 0; j < 16 && 16 * i + j < rows; j++)
        a.lse[(first + m + 16 * i + j) * a.heads + head] = total[i][j] == 0 ? INF : lse[j];
    }
    put(sums, d, times, a.out + (first + m) * row + head * d, row, rows);
  }
}

// Σ g · o of each row, added as g · v is: where a query sees one key, whose value o is, they have the same bits.
static void meetings(const Operand& grad, const Operand& out, float* to) {
  for (int64_t m = 0; m < grad.padded; m += 16) {
    V sum{};
    for (int64_t i = 0; i < grad.d / 2; i++)
      sum = mac(words(out.right.get() + i * out.padded + m), words(grad.right.get() + i * grad.padded + m), sum);
    store<FLOAT32>(to, m, sum);
  }
}

// Adds to dk and dv [keys, d], in float32; writes dq.
static void backward_head(const Flash& a, const Sight& sight, const Operand& k, const uint32_t* k_upright,
                          const Operand& v, int64_t first, int64_t head, float* dk, float* dv) {
  const int64_t d = a.d, row = a.heads * d, keys = k.padded, place = first * row + head * d;
  const Operand q(a.q + place, row, sight.S, d), grad(a.grad + place, row, sight.S, d);
  std::unique_ptr<float[]> delta(new float[q.padded]), lse(new float[q.padded]), dq(new float[q.padded * d]());
  meetings(grad, Operand(a.out + place, row, sight.S, d, false), delta.get());
  for (int64_t m = 0; m < q.padded; m++) lse[m] = m < sight.S ? a.lse[(first + m) * a.heads + head] : INF;
  alignas(64) float p[BLOCK * BLOCK], dp[BLOCK * BLOCK];
  alignas(64) uint16_t p_rows[BLOCK * BLOCK], ds_rows[BLOCK * BLOCK];
  alignas(64) uint32_t ds[BLOCK / 2 * BLOCK];
  for (int64_t n = 0; n < keys; n += BLOCK)
    for (int64_t m = 0; m < q.padded; m += BLOCK) {
      if (!sight.meet(m, n)) continue;
      product(k.left.get() + n * d / 2, d / 2, q.right.get() + m, q.padded, d / 2, p, BLOCK, BLOCK, BLOCK, false);
      product(v.left.get() + n * d / 2, d / 2, grad.right.get() + m, q.padded, d / 2, dp, BLOCK, BLOCK, BLOCK, false);
      exponents(sight, p, m, n, a.scale);
      for (int64_t r = 0; r < BLOCK; r += 2)
        for (int64_t i = 0; i < BLOCK; i += 16) {
          V change[2];
          for (int64_t s = 0; s < 2; s++) {
            const V weight = exponential(load<FLOAT32>(p + (r + s) * BLOCK, i) - load<FLOAT32>(lse.get() + m, i));
            change[s] = weight * (load<FLOAT32>(dp + (r + s) * BLOCK, i) - load<FLOAT32>(delta.get() + m, i)) * a.scale;
            store<BFLOAT16>(p_rows + (r + s) * BLOCK, i, weight), store<BFLOAT16>(ds_rows + (r + s) * BLOCK, i, change[s]);
          }
          const VU both = pair(change[0], change[1]);
          std::memcpy(ds + r / 2 * BLOCK + i, &both, 64);
        }
      const uint32_t *across = q.across.get() + m / 2 * d, *grads = grad.across.get() + m / 2 * d;
      product((const uint32_t*)p_rows, BLOCK / 2, grads, d, BLOCK / 2, dv + n * d, d, BLOCK, d, true);
      product((const uint32_t*)ds_rows, BLOCK / 2, across, d, BLOCK / 2, dk + n * d, d, BLOCK, d, true);
      product(k_upright + n / 2, keys / 2, ds, BLOCK, BLOCK / 2, dq.get() + m * d, BLOCK, d, BLOCK, true);
    }
  V ones[4];
  for (auto& one : ones) one = all(1.0f);
  for (int64_t m = 0; m < sight.S; m += BLOCK)
    put(dq.get() + m * d, d, ones, a.dq + place + m * row, row, std::min(BLOCK, sight.S - m));
}

static void narrow_rows(const float* from, uint16_t* to, int64_t row, int64_t rows, int64_t d) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < d; c += 16) store<BFLOAT16>(to + i * row, c, load<FLOAT32>(from + i * d, c));
}

// The heads of queries that read one head of keys of one sequence.
static void unit(const Flash& a, int64_t b, int64_t g, bool back) {
  const int64_t first = a.cu_q[b], start = a.cu_k[b], d = a.d, row = a.kv_heads * d, group = a.heads / a.kv_heads;
  const Sight sight(a, a.cu_q[b + 1] - first, a.cu_k[b + 1] - start);
  const int64_t place = start * row + g * d;
  const Operand k(a.k + place, row, sight.L, d), v(a.v + place, row, sight.L, d);
  if (!back) {
    const auto upright = v.upright();
    for (int64_t h = 0; h < group; h++) forward_head(a, sight, k, upright.get(), first, g * group + h);
    return;
  }
  const auto upright = k.upright();
  std::unique_ptr<float[]> dk(new float[k.padded * d]()), dv(new float[k.padded * d]());
  for (int64_t h = 0; h < group; h++)
    backward_head(a, sight, k, upright.get(), v, first, g * group + h, dk.get(), dv.get());
  narrow_rows(dk.get(), a.dk + place, row, sight.L, d), narrow_rows(dv.get(), a.dv + place, row, sight.L, d);
}

extern "C" void turnout_flash(const Flash* given, int back, int threads) {
  const Flash a = *given;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < a.sequences * a.kv_heads; i++) unit(a, i / a.kv_heads, i % a.kv_heads, back);
}
