// Queries, keys and values of a layer, from its rows: projected, normalised and rotated, a head at a time.
//
// The columns of a few heads are read once for all rows, as gemm.h reads them. The sums are those of `linear`, each
// result is rounded where the operations one after another would round it, and so the bits are theirs.
// T rows of D numbers, H query and G key/value heads of d numbers.
#include "gemm.h"
#include "rowwise.h"

struct Heads {
  const void *x, *w[3];
  void* y[3];
  const void* norm[2];  // of queries and keys, or null
  const float *cos, *sin;
  int64_t rows, depth, heads, kv_heads, d, norm_type;
  float eps;

  int64_t count(int64_t which) const { return which ? kv_heads : heads; }
};

namespace {

template <Type type>
inline V rounded(V x) {
  if constexpr (type == FLOAT32) return x;
  if constexpr (type == FLOAT16) return widen<type>(narrow<type>(x));
  const VU u = (VU)x;
  return x == x ? (V)((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000) : (V)(VU{} + 0x7FC00000);
}

// One row's sums of one head of 16 n numbers, in registers until they are whole; `norm` may be null, so may `cos`.
template <Type type, int n>
void complete(const float* sums, const float* norm, float eps, const float* cos, const float* sin, void* y) {
  V x[n];
  for (int i = 0; i < n; i++) x[i] = rounded<type>(load<FLOAT32>(sums, 16 * i));
  if (norm) {
    V squares{};
    for (int i = 0; i < n; i++) squares = fma(x[i], x[i], squares);
    const float turn = 1.0f / std::sqrt(reduce(squares) / (16 * n) + eps);
    for (int i = 0; i < n; i++) x[i] = rounded<type>(x[i] * turn * load<FLOAT32>(norm, 16 * i));
  }
  for (int i = 0; i < n / 2; i++) {
    const V a = x[i], b = x[n / 2 + i];
    const V c = cos ? load<FLOAT32>(cos, 16 * i) : V{}, s = cos ? load<FLOAT32>(sin, 16 * i) : V{};
    store<type>(y, 16 * i, cos ? a * c - b * s : a);
    store<type>(y, 16 * i + 8 * n, cos ? b * c + a * s : b);
  }
}

// The same for any size.
template <Type type>
void complete(const float* sums, const float* norm, float eps, const float* cos, const float* sin, void* y, int64_t d) {
  if (d == 64) return complete<type, 4>(sums, norm, eps, cos, sin, y);
  if (d == 128) return complete<type, 8>(sums, norm, eps, cos, sin, y);
  for (int64_t i = 0; i < d; i += 16) store<type>(y, i, load<FLOAT32>(sums, i, d - i), d - i);
  if (norm) norm_row<type>(y, FLOAT32, norm, y, d, eps);
  if (cos) turn_row<type>(y, cos, sin, y, d / 2);
}

struct Slice {
  int64_t which, head, heads, row, end;
};

template <Type type>
struct Cut {  // into slices, those of the same heads one after another
  const Heads& it;
  int64_t wide, high;  // heads and rows of a slice

  Cut(const Heads& it, int64_t threads) : it(it), high(std::max<int64_t>(it.rows, 1)) {
    const bool few = it.rows <= FEW;
    const int64_t head = std::max<int64_t>(it.d * it.depth * SIZE<type>, 1);
    const int64_t most = std::max<int64_t>(4 * PANEL / std::max<int64_t>(it.d, 1), 1);
    wide = std::clamp<int64_t>((few ? PIECE : NEAR) / head, 1, most);
    const int64_t share = (it.rows / (2 * threads) + TALL - 1) / TALL * TALL;
    if (!few) high = across() < 2 * threads ? std::clamp<int64_t>(share, 2 * TALL, ROWS) : ROWS;
  }

  int64_t across(int64_t which) const { return (it.count(which) + wide - 1) / wide; }
  int64_t across() const { return across(0) + 2 * across(1); }
  int64_t down() const { return (it.rows + high - 1) / high; }

  Slice operator[](int64_t i) const {
    int64_t which = 0, at = i / down();
    while (at >= across(which)) at -= across(which++);
    const int64_t row = i % down() * high;
    return {which, at * wide, std::min(wide, it.count(which) - at * wide), row, std::min(row + high, it.rows)};
  }

  const void* w(const Slice& s) const { return at<type>(it.w[s.which], s.head * it.d * it.depth); }
};

template <Type type>
void run(const Cut<type>& cut, const Slice& s, const void* next) {
  const Heads& it = cut.it;
  const int64_t d = it.d, K = it.depth, M = s.heads * d, rows = s.end - s.row;
  const int64_t tall = rows <= FEW ? rows : TALL, parts = (rows + tall - 1) / tall;
  float* const norm = (float*)scratch(4 * (d + 16 + tall * M)), *const sums = norm + (d + 15) / 16 * 16;
  const bool normed = s.which < 2 && it.norm[s.which];
  if (normed)
    for (int64_t i = 0; i < d; i += 16)
      store<FLOAT32>(norm, i, weights(it.norm_type, it.norm[s.which], i, d - i), d - i);
  const void* x[FEW];
  for (int64_t row = s.row; row < s.end; row += tall) {
    const int64_t T = std::min(tall, s.end - row);
    for (int64_t t = 0; t < T; t++) x[t] = at<type>(it.x, (row + t) * K);
    if (rows <= FEW) dot_block<type>(x, T, cut.w(s), K, M, K, sums, M, next);
    else dot_pass<type>(x, T, cut.w(s), K, M, K, sums, M, next, (row - s.row) / tall, parts);
    for (int64_t t = row; t < row + T; t++)
      for (int64_t h = 0; h < s.heads; h++)
        complete<type>(sums + (t - row) * M + h * d, normed ? norm : nullptr, it.eps,
                       s.which < 2 ? it.cos + t * d / 2 : nullptr, it.sin + t * d / 2,
                       (void*)at<type>(it.y[s.which], (t * it.count(s.which) + s.head + h) * d), d);
  }
}

template <Type type>
void all_heads(const Heads& it, int threads) {
  const Cut<type> cut(it, threads);
  const int64_t n = cut.across() * cut.down(), work = it.rows * it.depth * (it.heads + 2 * it.kv_heads) * it.d;
  threads = work < SMALL ? 1 : (int)std::clamp<int64_t>(n, 1, threads);
  Shares shares(n, threads);
#pragma omp parallel num_threads(threads)
  for (int64_t me = omp_get_thread_num(), i = shares.take(me), then; i >= 0; i = then) {
    then = shares.take(me);
    run<type>(cut, cut[i], cut.w(cut[then < 0 ? i : then]));
  }
}

}  // namespace

extern "C" void turnout_heads(int type, const Heads* it, int threads) {
#define CALL(T) all_heads<T>(*it, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
