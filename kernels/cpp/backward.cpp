// What a training step does beside its matrix products: activation and norm backwards, sums of gathered rows, squares.
// Each row is one thread's; what is summed over rows is summed in blocks of a fixed size, block after block, so that no
// result depends on the number of threads.
#include "kernels.h"

constexpr int64_t ROWS = 64;      // of a block whose weight gradients are summed by one thread
constexpr int64_t BLOCK = 16384;  // squares that one thread adds up

// Of h = silu(gate) · up with dh = d · weight: dz = (dgate, dup), h · weight, and the sum of d · h.
template <Type type>
static void swiglu_backward_rows(const void* z, const void* d, const float* weight, void* dz, void* hidden, float* dots,
                                 int64_t rows, int64_t F, int threads) {
#pragma omp parallel for num_threads(rows * F < SMALL ? 1 : threads)
  for (int64_t t = 0; t < rows; t++) {
    const V scale = all(weight ? weight[t] : 1.0f);
    const void *gates = at<type>(z, 2 * t * F), *ups = at<type>(z, (2 * t + 1) * F);
    V dot{};
    for (int64_t i = 0; i < F; i += 16) {
      const int64_t n = F - i;
      V gate = load<type>(gates, i, n), up = load<type>(ups, i, n), grad = load<type>(at<type>(d, t * F), i, n);
      V sigmoid = 1.0f / (1.0f + exponential(-gate)), silu = gate * sigmoid, h = silu * up;
      dot = fma(grad, h, dot);
      grad *= scale;
      V slope = sigmoid * fma(gate, 1.0f - sigmoid, all(1.0f));
      store<type>((void*)at<type>(dz, 2 * t * F), i, grad * up * slope, n);
      store<type>((void*)at<type>(dz, (2 * t + 1) * F), i, grad * silu, n);
      store<type>((void*)at<type>(hidden, t * F), i, h * scale, n);
    }
    if (dots) dots[t] = reduce(dot);
  }
}

// out[t] = Σ_k weights[t, k] · rows[slots[t, k]], k ascending; a slot below 0 adds nothing.
template <Type type>
static void gather_sum_rows(const void* rows, const int64_t* slots, const float* weights, void* out, int64_t T,
                            int64_t K, int64_t D, int threads) {
#pragma omp parallel for num_threads(T * K * D < SMALL ? 1 : threads)
  for (int64_t t = 0; t < T; t++)
    for (int64_t i = 0; i < D; i += 16) {
      V total{};
      for (int64_t k = t * K; k < (t + 1) * K; k++) {
        if (slots[k] < 0) continue;
        V x = load<type>(at<type>(rows, slots[k] * D), i, D - i);
        total += weights ? x * weights[k] : x;
      }
      store<type>((void*)at<type>(out, t * D), i, total, D - i);
    }
}

// Of out = gather_sum(rows, slots, weights), whose row n is choice order[n]: the gradients of rows and weights.
template <Type type>
static void gather_sum_backward_rows(const void* d, const void* rows, const int64_t* order, const float* weights,
                                     void* drows, float* dweights, int64_t N, int64_t K, int64_t D, int threads) {
#pragma omp parallel for num_threads(N * D < SMALL ? 1 : threads)
  for (int64_t n = 0; n < N; n++) {
    const void *grads = at<type>(d, order[n] / K * D), *row = at<type>(rows, n * D);
    const V weight = all(weights[order[n]]);
    V dot{};
    for (int64_t i = 0; i < D; i += 16) {
      V grad = load<type>(grads, i, D - i);
      dot = fma(grad, load<type>(row, i, D - i), dot);
      store<type>((void*)at<type>(drows, n * D), i, grad * weight, D - i);
    }
    dweights[order[n]] = reduce(dot);
  }
}

// y = weight · x · turn with turn = 1 / sqrt(mean(x²) + eps), which is kept.
template <Type type>
static void norm_rows(const void* x, const float* weight, void* y, float* turns, int64_t rows, int64_t D, float eps,
                      int threads) {
#pragma omp parallel for num_threads(rows * D < SMALL ? 1 : threads)
  for (int64_t t = 0; t < rows; t++) {
    const void* row = at<type>(x, t * D);
    V squares{};
    for (int64_t i = 0; i < D; i += 16) {
      V a = load<type>(row, i, D - i);
      squares = fma(a, a, squares);
    }
    turns[t] = 1.0f / std::sqrt(reduce(squares) / D + eps);
    for (int64_t i = 0; i < D; i += 16)
      store<type>((void*)at<type>(y, t * D), i,
                  load<type>(row, i, D - i) * turns[t] * load<FLOAT32>(weight, i, D - i), D - i);
  }
}

// dx = turn · (w · dy - x · turn² · mean(w · dy · x)) and dweight = Σ_t dy · x · turn, in blocks of ROWS.
template <Type type>
static void norm_backward_rows(const void* x, const float* weight, const float* turns, const void* dy, void* dx,
                               float* parts, float* dweight, int64_t rows, int64_t D, int threads) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(rows * D < SMALL ? 1 : threads)
  for (int64_t b = 0; b < blocks; b++) {
    float* part = parts + b * D;
    std::memset(part, 0, 4 * D);
    for (int64_t t = b * ROWS; t < std::min(rows, (b + 1) * ROWS); t++) {
      const void *row = at<type>(x, t * D), *grads = at<type>(dy, t * D);
      const float turn = turns[t];
      V dot{};
      for (int64_t i = 0; i < D; i += 16)
        dot = fma(load<type>(row, i, D - i), load<type>(grads, i, D - i) * load<FLOAT32>(weight, i, D - i), dot);
      const float pull = reduce(dot) / D * turn * turn;
      for (int64_t i = 0; i < D; i += 16) {
        const int64_t n = D - i;
        V a = load<type>(row, i, n), grad = load<type>(grads, i, n);
        store<FLOAT32>(part, i, fma(grad, a * turn, load<FLOAT32>(part, i, n)), n);
        store<type>((void*)at<type>(dx, t * D), i, (grad * load<FLOAT32>(weight, i, n) - a * pull) * turn, n);
      }
    }
  }
  for (int64_t i = 0; i < D; i += 16) {
    V total{};
    for (int64_t b = 0; b < blocks; b++) total += load<FLOAT32>(parts + b * D, i, D - i);
    store<FLOAT32>(dweight, i, total, D - i);
  }
}

// Every head of row t: (a, b) → (a · cos - b · sin · turn, b · cos + a · sin · turn); turn -1 is the way back.
template <Type type>
static void rotate_rows(const void* x, const float* cos, const float* sin, void* y, int64_t rows, int64_t heads,
                        int64_t h, float turn, int threads) {
#pragma omp parallel for num_threads(rows * heads * h < SMALL ? 1 : threads)
  for (int64_t t = 0; t < rows; t++)
    for (int64_t head = t * heads; head < (t + 1) * heads; head++) {
      const void *first = at<type>(x, 2 * head * h), *second = at<type>(x, (2 * head + 1) * h);
      for (int64_t i = 0; i < h; i += 16) {
        const int64_t n = h - i;
        V a = load<type>(first, i, n), b = load<type>(second, i, n);
        V c = load<FLOAT32>(cos + t * h, i, n), s = load<FLOAT32>(sin + t * h, i, n) * turn;
        store<type>((void*)at<type>(y, 2 * head * h), i, a * c - b * s, n);
        store<type>((void*)at<type>(y, (2 * head + 1) * h), i, b * c + a * s, n);
      }
    }
}

// losses[t] = logsumexp(x[t]) - x[t, target]; with `learns` x becomes its gradient. A target below 0: nothing at all.
template <Type type>
static void cross_entropy_rows(void* x, const int64_t* targets, float* losses, int64_t rows, int64_t N, bool learns,
                               int threads) {
#pragma omp parallel for num_threads(rows * N < SMALL ? 1 : threads)
  for (int64_t t = 0; t < rows; t++) {
    void* row = (void*)at<type>(x, t * N);
    const int64_t target = targets[t];
    losses[t] = 0;
    if (target < 0) {
      if (learns) std::memset(row, 0, N * (type == FLOAT32 ? 4 : 2));
      continue;
    }
    V most = all(-INF), total{};
    for (int64_t i = 0; i < N; i += 16) {
      V a = load<type>(row, i, N - i);
      if (N - i < 16)
        for (int64_t lane = N - i; lane < 16; lane++) a[lane] = -INF;
      most = a > most || a != a ? a : most;
    }
    float top = most[0];
    for (int lane = 1; lane < 16; lane++) top = most[lane] > top || most[lane] != most[lane] ? most[lane] : top;
    for (int64_t i = 0; i < N; i += 16) {
      V e = exponential(load<type>(row, i, N - i) - top);
      if (N - i < 16)
        for (int64_t lane = N - i; lane < 16; lane++) e[lane] = 0;
      total += e;
    }
    const float sum = reduce(total), own = load<type>(at<type>(row, target), 0, 1)[0];
    losses[t] = std::log(sum) + (top - own);
    if (!learns) continue;
    const float share = 1.0f / sum;
    const float pull = exponential(all(own - top))[0] * share - 1.0f;
    for (int64_t i = 0; i < N; i += 16)
      store<type>(row, i, exponential(load<type>(row, i, N - i) - top) * share, N - i);
    store<type>((void*)at<type>(row, target), 0, all(pull), 1);
  }
}

// parts[b] = Σ x² over BLOCK numbers, in float64.
template <Type type>
static void squares(const void* x, double* parts, int64_t count, int threads) {
  const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(count < SMALL ? 1 : threads)
  for (int64_t b = 0; b < blocks; b++) {
    double lanes[16] = {};
    const int64_t end = std::min(count, (b + 1) * BLOCK);
    for (int64_t i = b * BLOCK; i < end; i += 16) {
      V a = load<type>(x, i, end - i);
      for (int lane = 0; lane < 16; lane++) lanes[lane] += (double)a[lane] * a[lane];
    }
    double total = 0;
    for (int lane = 0; lane < 16; lane++) total += lanes[lane];
    parts[b] = total;
  }
}

extern "C" {

void turnout_cross_entropy(int type, void* x, const int64_t* targets, float* losses, int64_t rows, int64_t N,
                           int64_t learns, int threads) {
#define CALL(T) cross_entropy_rows<T>(x, targets, losses, rows, N, learns, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_turn_heads(int type, const void* x, const float* cos, const float* sin, void* y, int64_t rows, int64_t heads,
                        int64_t h, float turn, int threads) {
#define CALL(T) rotate_rows<T>(x, cos, sin, y, rows, heads, h, turn, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_swiglu_backward(int type, const void* z, const void* d, const float* weight, void* dz, void* hidden,
                             float* dots, int64_t rows, int64_t F, int threads) {
#define CALL(T) swiglu_backward_rows<T>(z, d, weight, dz, hidden, dots, rows, F, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_gather_sum(int type, const void* rows, const int64_t* slots, const float* weights, void* out, int64_t T,
                        int64_t K, int64_t D, int threads) {
#define CALL(C) gather_sum_rows<C>(rows, slots, weights, out, T, K, D, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_gather_sum_backward(int type, const void* d, const void* rows, const int64_t* order, const float* weights,
                                 void* drows, float* dweights, int64_t N, int64_t K, int64_t D, int threads) {
#define CALL(C) gather_sum_backward_rows<C>(d, rows, order, weights, drows, dweights, N, K, D, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_norm(int type, const void* x, const float* weight, void* y, float* turns, int64_t rows, int64_t D,
                  float eps, int threads) {
#define CALL(T) norm_rows<T>(x, weight, y, turns, rows, D, eps, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_norm_backward(int type, const void* x, const float* weight, const float* turns, const void* dy, void* dx,
                           float* parts, float* dweight, int64_t rows, int64_t D, int threads) {
#define CALL(T) norm_backward_rows<T>(x, weight, turns, dy, dx, parts, dweight, rows, D, threads)
  BY_TYPE(type, CALL)
#undef CALL
}

void turnout_squares(int type, const void* x, double* parts, int64_t count, int threads) {
#define CALL(T) squares<T>(x, parts, count, threads)
  BY_TYPE(type, CALL)
#undef CALL
}
}
