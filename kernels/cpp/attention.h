// softmax(scale · q kᵀ + bias) v for packed rows and for pages: one function of a query row and its keys in order.
//
// Of one row: each score is sixteen lanes over d and one tree; the sum of the exponentials has lanes counted from the
// row's first key; values are added key after key. Rows that share keys are computed together, sums never divided.
#pragma once
#include <vector>

#include "simd.h"

struct Attention {
  const void *q, *k, *v;
  void* out;
  const int32_t *cu_q, *keys, *table;     // query borders [B+1]; key borders [B+1], or contexts [B] where page > 0
  const float *sinks, *bias;              // [H], [H, 2 · longest + 1], or null
  int64_t sequences, heads, kv_heads, d, d_v, k_row, v_row, k_head, v_head, table_row, page, longest, causal, window;
  float scale;
};

struct Row {
  int64_t token, head, place, first, last;  // keys first to last are seen
};

constexpr int R = TILE;

static void look(const Attention& a, Row& row, int64_t keys) {
  row.first = a.window ? std::max<int64_t>(0, row.place - a.window + 1) : 0;
  row.last = a.causal ? row.place + 1 : a.window ? row.place + a.window : keys;
  row.last = std::min(row.last, keys), row.first = std::min(row.first, std::max<int64_t>(row.last, 0));
}

template <int n, int keys, Type type>
static inline void score(const float* q, int64_t q_row, const void* const* k, int64_t d, float* out) {
  V sum[n * keys] = {};
  for (int64_t i = 0; i < d; i += 16)
    for (int j = 0; j < keys; j++) {
      V b = load<type>(k[j], i, d - i);
      for (int r = 0; r < n; r++) sum[r * keys + j] = fma(load<FLOAT32>(q + r * q_row, i), b, sum[r * keys + j]);
    }
  reduce_all<n * keys>(sum, out);
}

// Scores become exponentials; returns their sum.
static float soften(float* s, int64_t n, float sink, bool sinks) {
  float most = sinks ? sink : -INF;
  for (int64_t i = 0; i < n; i++) most = s[i] > most ? s[i] : most;
  V sum{};
  for (int64_t i = 0; i < n; i += 16) {
    V e = exponential(load<FLOAT32>(s, i, n - i) - most);
    if (n - i < 16)
      for (int64_t lane = n - i; lane < 16; lane++) e[lane] = 0;
    store<FLOAT32>(s, i, e, n - i);
    sum += e;
  }
  return reduce(sum) + (sinks ? exponential(all(sink - most))[0] : 0.0f);
}

template <int n, int columns, Type type>
static inline void add_values(const Row* rows, const float* s, int64_t s_row, int64_t from, const void* const* v,
                              int64_t count, int64_t column, int64_t d, float* out) {
  V sum[n * columns] = {};
  int64_t shared = 0, border = count;
  for (int r = 0; r < n; r++) {
    shared = std::max(shared, rows[r].first - from);
    border = std::min(border, rows[r].last - from);
  }
  for (int64_t j = 0; j < count; j++) {
    const bool everyone = j >= shared && j < border;
    V b[columns];
    for (int c = 0; c < columns; c++) b[c] = load<type>(v[j], column + 16 * c, d - column - 16 * c);
    for (int r = 0; r < n; r++)
      if (everyone || (j >= rows[r].first - from && j < rows[r].last - from))
        for (int c = 0; c < columns; c++) sum[r * columns + c] = fma(all(s[r * s_row + j]), b[c], sum[r * columns + c]);
  }
  std::memcpy(out, sum, sizeof sum);
}

struct Room {
  std::vector<float> q, s;
  std::vector<const void*> k, v;
};

template <int n, Type type, Type cached>
static void attend(const Attention& a, int64_t b, int64_t kv_head, const Row* rows, Room& room) {
  int64_t from = rows[0].first, to = rows[0].last;
  for (int r = 1; r < n; r++) from = std::min(from, rows[r].first), to = std::max(to, rows[r].last);
  const int64_t count = std::max<int64_t>(to - from, 0), width = (a.d + 15) / 16 * 16, length = (count + 15) / 16 * 16;
  room.q.assign(n * width, 0.0f), room.s.resize(n * length), room.k.resize(count), room.v.resize(count);
  for (int r = 0; r < n; r++)
    widen_row<type>(at<type>(a.q, (rows[r].token * a.heads + rows[r].head) * a.d), room.q.data() + r * width, a.d);
  for (int64_t j = 0; j < count; j++) {
    int64_t p = from + j, row = a.page ? a.table[b * a.table_row + p / a.page] * a.page + p % a.page : a.keys[b] + p;
    room.k[j] = at<cached>(a.k, row * a.k_row + kv_head * a.k_head);
    room.v[j] = at<cached>(a.v, row * a.v_row + kv_head * a.v_head);
  }
  float found[n * TILE], total[n];
  for (int64_t j = 0; j < count;) {
    const int keys = count - j >= TILE ? TILE : 1;
    if (keys == TILE) score<n, TILE, cached>(room.q.data(), width, room.k.data() + j, a.d, found);
    else score<n, 1, cached>(room.q.data(), width, room.k.data() + j, a.d, found);
    for (int r = 0; r < n; r++)
      for (int i = 0; i < keys; i++) {
        float s = found[r * keys + i] * a.scale;
        if (a.bias) {
          int64_t ahead = std::clamp(from + j + i - rows[r].place, -a.longest, a.longest);
          s += a.bias[rows[r].head * (2 * a.longest + 1) + ahead + a.longest];
        }
        room.s[r * length + j + i] = s;
      }
    j += keys;
  }
  for (int r = 0; r < n; r++)
    total[r] = soften(room.s.data() + r * length + rows[r].first - from, rows[r].last - rows[r].first,
                      a.sinks ? a.sinks[rows[r].head] : 0.0f, a.sinks);
  alignas(64) float sum[n * TILE * 16];
  for (int64_t column = 0; column < a.d_v; column += 16 * TILE) {
    add_values<n, TILE, cached>(rows, room.s.data(), length, from, room.v.data(), count, column, a.d_v, sum);
    for (int r = 0; r < n; r++)
      for (int64_t c = 0; c < 16 * TILE && column + c < a.d_v; c += 16) {
        V x = rows[r].last > rows[r].first ? load<FLOAT32>(sum, r * 16 * TILE + c) / total[r] : V{};
        store<type>((char*)a.out + (type == FLOAT32 ? 4 : 2) * (rows[r].token * a.heads + rows[r].head) * a.d_v,
                    column + c, x, a.d_v - column - c);
      }
  }
}

template <Type type, Type cached>
static void attend_all(const Attention& a, int threads) {
  struct Piece { int64_t b, kv_head, row, keys; };
  int64_t work = 0;
  std::vector<Piece> pieces;
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t b = 0; b < a.sequences; b++) {
    const int64_t rows = (a.cu_q[b + 1] - a.cu_q[b]) * group, keys = a.page ? a.keys[b] : a.keys[b + 1] - a.keys[b];
    for (int64_t g = 0; g < a.kv_heads; g++)
      for (int64_t row = 0; row < rows; row += R) pieces.push_back({b, g, row, keys});
    work += rows * a.kv_heads * keys * a.d;
  }
#pragma omp parallel num_threads(work < SMALL ? 1 : threads)
  {
    Room room;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)pieces.size(); i++) {
      const Piece& piece = pieces[i];
      const int64_t start = a.cu_q[piece.b], queries = a.cu_q[piece.b + 1] - start;
      const int n = (int)std::min<int64_t>(R, queries * group - piece.row);
      Row rows[R];
      for (int r = 0; r < n; r++) {
        const int64_t query = (piece.row + r) / group, head = piece.kv_head * group + (piece.row + r) % group;
        rows[r] = {start + query, head, piece.keys - queries + query, 0, 0};
        look(a, rows[r], piece.keys);
      }
      int r = 0;
      if (n == R) attend<R, type, cached>(a, piece.b, piece.kv_head, rows, room), r = R;
      if (n - r >= 2) attend<2, type, cached>(a, piece.b, piece.kv_head, rows + r, room), r += 2;
      if (n - r >= 1) attend<1, type, cached>(a, piece.b, piece.kv_head, rows + r, room);
    }
  }
}
