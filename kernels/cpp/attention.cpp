// Attention over packed rows and pages: units of rows, divided over threads, long ones chunk by chunk.
#include <atomic>
#include <vector>

#include "decode.h"
#include "kernels.h"

// Rows `row` to `row + rows` of each of `heads` key/value heads of a sequence, and chunks `chunk` to `end` of its keys.
struct Unit {
  int64_t sequence, head, heads, row, rows, chunk, end;
  int64_t part;  // where the result of its one chunk goes, else -1: it has all chunks
  int64_t work() const { return heads * rows * (end - chunk); }
};

struct Room {  // of a thread; kept, so that a step allocates nothing
  std::vector<float> memory;
  float *q, *s, *p, *found, *state, *keys, *values, *scales_k, *scales_v;
  const char* zeros;
  Row rows[ROWS];
  int64_t k_at[CHUNK], v_at[CHUNK], k_next[BLOCK];
  const char *keys_at[CHUNK + SOON], *values_at[CHUNK + SOON];  // of few rows, then those that come next
};

template <bool pairs, int type>  // of the pages
struct Kernel {
  static constexpr int64_t PER = pairs ? 2 : 1;  // numbers of a step
  const Attention& a;
  const int q_type;
  const int64_t group = a.heads / a.kv_heads, depth = up(a.d, PER) / PER, q_width = up(a.d, 32) / PER,
                p_width = CHUNK / PER, lanes = up(a.d_v, BLOCK), record = lanes + 16;
  const float scale = pairs ? a.scale * 1.44269504f : a.scale;

  int64_t queries(int64_t b) const { return a.cu_q[b + 1] - a.cu_q[b]; }
  int64_t keys(int64_t b) const { return a.page ? a.keys[b] : a.keys[b + 1] - a.keys[b]; }

  void look(const Unit& u, Row* rows) const {
    const int64_t all = keys(u.sequence), mine = queries(u.sequence);
    for (int64_t r = 0; r < u.rows; r++) {
      const int64_t query = (u.row + r) / group, place = all - mine + query;
      const int64_t last = std::min(a.causal ? place + 1 : a.window ? place + a.window : all, all);
      const int64_t first = a.window ? std::max<int64_t>(0, place - a.window + 1) : 0;
      rows[r] = {a.cu_q[u.sequence] + query, place, std::min(first, std::max<int64_t>(last, 0)), last};
    }
  }

  void lay_out(Room& room, int64_t rows, int64_t heads) const {
    const int64_t sizes[] = {rows * q_width,        rows * CHUNK,  pairs ? rows * p_width : 0, rows * record,
                             rows * record,         q_width * BLOCK, BLOCK / PER * lanes,      heads * CHUNK,
                             heads * CHUNK,         up(std::max(a.d, a.d_v), 64)};
    float** const parts[] = {&room.q,    &room.s,        &room.p,        &room.found, &room.state, &room.keys,
                             &room.values, &room.scales_k, &room.scales_v};
    int64_t all = 16;
    for (int64_t size : sizes) all += up(size, 16);
    if ((int64_t)room.memory.size() < all) room.memory.resize(all);
    float* at = (float*)up((int64_t)room.memory.data(), 64);
    for (int i = 0; i < 9; i++) *parts[i] = at, at += up(sizes[i], 16);
    std::fill(at, at + sizes[9], 0.0f);
    room.zeros = (const char*)at;
    if (!pairs) room.p = room.s;
  }

  // Queries with zeros past d.
  void take_queries(const Unit& u, Room& room) const {
    for (int64_t i = 0; i < u.heads * u.rows; i++) {
      const int64_t head = (u.head + i / u.rows) * group + (u.row + i % u.rows) % group;
      const char* from = (const char*)a.q + bytes(q_type) * (room.rows[i % u.rows].token * a.q_row + head * a.q_head);
      float* to = room.q + i * q_width;
      std::fill(to, to + q_width, 0.0f);
      if (pairs) std::memcpy(to, from, 2 * a.d);
      else if (q_type == FLOAT32) std::memcpy(to, from, 4 * a.d);
      else if (q_type == BFLOAT16) widen_row<BFLOAT16>(from, to, a.d);
      else widen_row<FLOAT16>(from, to, a.d);
    }
  }

  // Where keys and values first to last lie, in bytes; with scales those too.
  void locate(const Unit& u, int64_t first, int64_t last, int64_t* k_at, int64_t* v_at, float* scales_k,
              float* scales_v) const {
    for (int64_t j = first; j < last;) {
      const int64_t block = a.page ? a.table[u.sequence * a.table_row + j / a.page] : 0;
      const int64_t row = a.page ? j % a.page : a.keys[u.sequence] + j;
      const int64_t n = a.page ? std::min(a.page - row, last - j) : last - j;
      const int64_t k = block * a.k_block + row * a.k_row + u.head * a.k_head;
      const int64_t v = block * a.v_block + row * a.v_row + u.head * a.v_head;
      for (int64_t i = 0; i < n; i++) *k_at++ = bytes(type) * (k + i * a.k_row);
      for (int64_t i = 0; v_at && i < n; i++) *v_at++ = bytes(type) * (v + i * a.v_row);
      if (type == INT8 && scales_k) {
        const int64_t slot = (block * a.page + row) * a.kv_heads + u.head;
        for (int64_t g = 0; g < u.heads; g++)
          for (int64_t i = 0; i < n; i++) {
            scales_k[g * CHUNK + i] = a.scales_k[slot + i * a.kv_heads + g];
            scales_v[g * CHUNK + i] = a.scales_v[slot + i * a.kv_heads + g];
          }
        scales_k += n, scales_v += n;
      }
      j += n;
    }
  }

  // Keys lo to hi of the block that begins at `from`, of the head at `base`.
  Places places(const char* base, const int64_t* at, int64_t from, int64_t lo, int64_t hi) const {
    Places found;
    for (int64_t j = 0; j < BLOCK; j++) found.row[j] = from + j >= lo && from + j < hi ? base + at[from + j] : nullptr;
    return found;
  }

  struct Span {
    int64_t lo, hi;  // in the chunk
  };
  static Span seen(const Row* rows, int64_t n, int64_t base) {
    Span span{CHUNK, 0};
    for (int64_t r = 0; r < n; r++)
      if (rows[r].sees(base / CHUNK)) {
        span.lo = std::min(span.lo, std::max<int64_t>(rows[r].first - base, 0));
        span.hi = std::max(span.hi, std::min<int64_t>(rows[r].last - base, CHUNK));
      }
    return span;
  }

  // Few rows wait for memory: while a head's block is multiplied, the next head's or the next block is fetched.
  Ahead ahead(const Unit& u, const void* base, const int64_t* at, int64_t rows, int64_t width) const {
    return u.rows > 16 ? Ahead{} : Ahead{(const char*)base, at, std::min(rows, BLOCK), bytes(type) * width};
  }

  void score(const Unit& u, Room& room, const Span& all, int64_t base) const {
    const int64_t k_head = bytes(type) * a.k_head;
    for (int64_t from = all.lo / BLOCK * BLOCK; from < all.hi; from += BLOCK) {
      const int64_t lo = std::max(all.lo, from), hi = std::min(all.hi, from + BLOCK);
      Ahead next = hi < all.hi ? ahead(u, a.k, room.k_at + hi, all.hi - hi, (u.heads - 1) * a.k_head + a.d)
                               : ahead(u, a.v, room.v_at + all.lo, all.hi - all.lo, (u.heads - 1) * a.v_head + a.d_v);
      for (int64_t g = 0; g < u.heads; g++) {
        pack_keys<pairs, type>(places((const char*)a.k + g * k_head, room.k_at, from, lo, hi), a.d, lo - from,
                               hi - from, room.zeros, room.keys, next);
        for (int64_t r = 0; r < u.rows; r += TALL) {
          const int64_t n = std::min<int64_t>(TALL, u.rows - r), i = g * u.rows + r;
          const Span own = seen(room.rows + r, n, base);
          if (own.lo < from + BLOCK && own.hi > from)
            meet<pairs>(n, room.q + i * q_width, q_width, room.keys, depth, room.s + i * CHUNK + from, next);
        }
      }
    }
  }

  // Shares of keys `all` times their values, for rows start to stop of every head; `after` keys follow the chunk.
  void weigh(const Unit& u, Room& room, const Span& all, int64_t base, int64_t start, int64_t stop, float* records,
             int64_t after) const {
    const int64_t v_head = bytes(type) * a.v_head;
    for (int64_t from = all.lo / BLOCK * BLOCK; from < all.hi; from += BLOCK) {
      const int64_t lo = std::max(all.lo, from), hi = std::min(all.hi, from + BLOCK);
      Ahead next = hi < all.hi ? ahead(u, a.v, room.v_at + hi, all.hi - hi, (u.heads - 1) * a.v_head + a.d_v)
                               : ahead(u, a.k, room.k_next, after, (u.heads - 1) * a.k_head + a.d);
      for (int64_t g = 0; g < u.heads; g++) {
        pack_values<pairs, type>(places((const char*)a.v + g * v_head, room.v_at, from, lo, hi), a.d_v, lanes,
                                 lo - from, hi - from, room.zeros, room.values, next);
        for (int64_t r = start; r < stop; r += TALL) {
          const int64_t n = std::min<int64_t>(TALL, stop - r), i = g * u.rows + r;
          const Span own = seen(room.rows + r, n, base);
          const int64_t first = std::max(std::max(own.lo, lo), from) / PER;
          const int64_t last = up(std::min(own.hi, hi), PER) / PER;
          if (first < last)
            product<pairs>(n, room.p + i * p_width + first, p_width, room.values + (first - from / PER) * lanes, lanes,
                           last - first, records + i * record, record, lanes, own.lo < from ? FURTHER : NEW, next);
        }
      }
    }
  }

  bool finite(const Unit& u, const Room& room, const Span& all) const {
    V sum{};
    for (int64_t g = 0; g < u.heads; g++)
      for (int64_t j = all.lo; j < all.hi; j++)
        for (int64_t i = 0; i < a.d_v; i += 16)
          sum += 0.0f * wide<type>((const char*)a.v + room.v_at[j] + bytes(type) * g * a.v_head, i, a.d_v - i);
    return reduce(sum) == 0;
  }

  // What chunk c adds to each row that sees some of it: a record, out[lanes], most and sum. `then` is read next.
  void attend(const Unit& u, Room& room, int64_t c, float* records, const Unit* then) const {
    const int64_t base = c * CHUNK, n = u.heads * u.rows;
    const Span all = seen(room.rows, u.rows, base);
    if (all.lo >= all.hi) return;
    locate(u, base + all.lo, base + all.hi, room.k_at + all.lo, room.v_at + all.lo, room.scales_k + all.lo,
           room.scales_v + all.lo);
    const int64_t after = c + 1 < u.end ? std::min(base + CHUNK + BLOCK, keys(u.sequence)) - base - CHUNK : 0;
    locate(u, base + CHUNK, base + CHUNK + after, room.k_next, nullptr, nullptr, nullptr);
    const bool few = waits(u);
    if (few) point(room, all, after, then), score_few(u, room, all);
    else score(u, room, all, base);
    bool ragged = false;
    for (int64_t i = 0; i < n; i++) {
      const Row& row = room.rows[i % u.rows];
      const int64_t g = i / u.rows, head = (u.head + g) * group + (u.row + i % u.rows) % group;
      const Span own = seen(&row, 1, base);
      const Soft found = soften<pairs>(
          room.s + i * CHUNK, own.lo, own.hi, all.lo, all.hi, scale, type == INT8 ? room.scales_k + g * CHUNK : nullptr,
          type == INT8 ? room.scales_v + g * CHUNK : nullptr, a.bias ? a.bias + head * (2 * a.longest + 1) : nullptr,
          base - row.place, a.longest, room.p + i * p_width);
      records[i * record + lanes] = found.most, records[i * record + lanes + 1] = found.sum;
      ragged = ragged || own.lo != all.lo || own.hi != all.hi;
    }
    if (!ragged && few) {
      weigh_few(u, room, all, records);
    } else if (!ragged || finite(u, room, all)) {
      weigh(u, room, all, base, 0, u.rows, records, after);
    } else {
      for (int64_t r = 0; r < u.rows; r++) weigh(u, room, seen(room.rows + r, 1, base), base, r, r + 1, records, 0);
    }
  }

  // Few rows and keys, of sizes that whole registers hold.
  bool waits(const Unit& u) const {
    const int64_t reach = bytes(type) * std::max(u.heads * a.k_head + a.d, u.heads * a.v_head + a.d_v);
    const bool whole = a.d % 32 == 0 && a.d_v % 64 == 0 && reach <= (int64_t)sizeof ZEROS;
    return pairs && u.rows <= FEW && keys(u.sequence) <= CHUNK && whole;
  }

  // Where few rows find the keys of a chunk: zeros about those that are seen, behind them what is read next.
  void point(Room& room, const Span& all, int64_t after, const Unit* then) const {
    const int64_t from = all.lo / 16 * 16, to = up(all.hi, 16);
    for (int64_t j = from; j < to; j++) {
      const bool is = j >= all.lo && j < all.hi;
      room.keys_at[j] = is ? (const char*)a.k + room.k_at[j] : ZEROS;
      room.values_at[j] = is ? (const char*)a.v + room.v_at[j] : ZEROS;
    }
    if (!after && then) {
      Row row;
      look({then->sequence, then->head, then->heads, then->row, 1, 0, 0, 0}, &row);
      const int64_t first = std::max(row.first, then->chunk * CHUNK);
      after = std::clamp<int64_t>(keys(then->sequence) - first, 0, SOON);
      locate(*then, first, first + after, room.k_next, nullptr, nullptr, nullptr);
    }
    for (int64_t j = 0; j < SOON; j++) {
      room.keys_at[to + j] = from + j < to ? room.values_at[from + j] : ZEROS;
      room.values_at[to + j] = j < after ? (const char*)a.k + room.k_next[j] : ZEROS;
    }
  }

  void score_few(const Unit& u, Room& room, const Span& all) const {
#if defined(__AVX512BF16__)
    const int64_t head = bytes(type) * a.k_head;
    for (int64_t j = all.lo / 16 * 16; j < all.hi; j += 16)
      for (int64_t g = 0, both; g < u.heads; g += both) {
        both = std::min<int64_t>(2, u.heads - g);
        for (int64_t r = 0, n; r < u.rows; r += n) {
          n = u.rows - r >= 4 ? 4 : u.rows - r >= 2 ? 2 : 1;
          auto* const run = n == 4   ? (both == 2 ? score_rows<type, 2, 4> : score_rows<type, 1, 4>)
                            : n == 2 ? (both == 2 ? score_rows<type, 2, 2> : score_rows<type, 1, 2>)
                                     : (both == 2 ? score_rows<type, 2, 1> : score_rows<type, 1, 1>);
          const int64_t i = g * u.rows + r;
          run(room.keys_at + j, g * head, head, a.d, room.q + i * q_width, q_width, u.rows, room.s + i * CHUNK + j);
        }
      }
#endif
  }

  void weigh_few(const Unit& u, Room& room, const Span& all, float* records) const {
#if defined(__AVX512BF16__)
    const int64_t start = all.lo / 2 * 2, stop = up(all.hi, 2);
    for (int64_t j = start; j < stop; j += SOON)
      for (int64_t g = 0; g < u.heads; g++)
        for (int64_t r = 0, n; r < u.rows; r += n) {
          n = u.rows - r >= 4 ? 4 : u.rows - r >= 2 ? 2 : 1;
          auto* const run = n == 4 ? weigh_rows<type, 4> : n == 2 ? weigh_rows<type, 2> : weigh_rows<type, 1>;
          const int64_t i = g * u.rows + r;
          for (int64_t m = 0; m < a.d_v; m += BLOCK)
            run(room.values_at + j, bytes(type) * (g * a.v_head + m), std::min(SOON, stop - j) / 2,
                room.p + i * p_width + j / 2, p_width, records + i * record + m, record, j > start);
        }
#endif
  }

  void finish(const Row& row, int64_t head, const float* found) const {
    char* out = (char*)a.out + bytes(q_type) * (row.token * a.heads + head) * a.d_v;
    float total = 1.0f, by = 1.0f;
    if (row.last > row.first) {
      const float most = found[lanes], sink = a.sinks ? a.sinks[head] * (pairs ? 1.44269504f : 1.0f) : -INF;
      const float top = std::max(most, sink), base = top == -INF ? 0.0f : top;
      by = most == base ? 1.0f : raise<pairs>(all(most - base))[0];
      total = found[lanes + 1] * by + (a.sinks ? raise<pairs>(all(sink - base))[0] : 0.0f);
    }
    for (int64_t i = 0; i < a.d_v; i += 16) {
      const V x = row.last > row.first ? load<FLOAT32>(found, i) * by / total : V{};
      if (q_type == FLOAT32) store<FLOAT32>(out, i, x, a.d_v - i);
      else if (q_type == BFLOAT16) store<BFLOAT16>(out, i, x, a.d_v - i);
      else store<FLOAT16>(out, i, x, a.d_v - i);
    }
  }

  void run(const Unit& u, Room& room, float* parts, const Unit* then) const {
    lay_out(room, u.heads * u.rows, u.heads);
    look(u, room.rows);
    take_queries(u, room);
    if (u.part >= 0) return attend(u, room, u.chunk, parts + u.part, then);
    for (int64_t c = u.chunk; c < u.end; c++) {
      attend(u, room, c, room.found, then);
      for (int64_t i = 0; i < u.heads * u.rows; i++) {
        const Row& row = room.rows[i % u.rows];
        if (row.sees(c)) fold<pairs>(room.state + i * record, room.found + i * record, lanes, row.first >= c * CHUNK);
      }
    }
    for (int64_t i = 0; i < u.heads * u.rows; i++)
      finish(room.rows[i % u.rows], (u.head + i / u.rows) * group + (u.row + i % u.rows) % group,
             room.state + i * record);
  }

  // The chunks of a row of a divided unit.
  void merge(const Unit& u, int64_t i, float* parts) const {
    Row row;
    look({u.sequence, u.head, u.heads, u.row + i % u.rows, 1, 0, 0, 0}, &row);
    float* into = nullptr;
    for (int64_t c = u.chunk; c < u.end; c++) {
      float* found = parts + u.part + ((c - u.chunk) * u.heads * u.rows + i) * record;
      if (!row.sees(c)) continue;
      if (into) fold<pairs>(into, found, lanes, false);
      else into = found;
    }
    finish(row, (u.head + i / u.rows) * group + (u.row + i % u.rows) % group, into ? into : parts + u.part);
  }

  // Rows that share keys; few rows are taken with all heads, in the order in which pages have them.
  std::vector<Unit> divide() const {
    std::vector<Unit> units;
    for (int64_t b = 0; b < a.sequences; b++) {
      const int64_t all = queries(b) * group;
      for (int64_t row = 0; row < all; row += ROWS) {
        const int64_t rows = std::min(ROWS, all - row), heads = rows > 16 ? 1 : std::min(a.kv_heads, 64 / rows);
        Unit u{b, 0, 0, row, rows, 0, 0, -1};
        Row ends[2];
        look({b, 0, 1, row, 1, 0, 0, 0}, &ends[0]), look({b, 0, 1, row + rows - 1, 1, 0, 0, 0}, &ends[1]);
        u.chunk = ends[0].first / CHUNK;
        u.end = ends[1].last > ends[0].first ? up(ends[1].last, CHUNK) / CHUNK : u.chunk;
        for (u.head = 0; u.head < a.kv_heads; u.head += u.heads)
          u.heads = std::min(heads, a.kv_heads - u.head), units.push_back(u);
      }
    }
    return units;
  }

  void launch(int threads) const {
    static thread_local std::vector<float> parts;
    std::vector<Unit> units = divide(), tasks, whole;
    int64_t work = 0, room = 0;
    for (const Unit& u : units) work += u.work();
    if (work * CHUNK * a.d < SMALL) threads = 1;
    for (Unit u : units) {
      if (threads > 1 && u.work() * 4 * threads > work && u.end - u.chunk > 1) {
        u.part = room, room += u.heads * u.rows * (u.end - u.chunk) * record;
        whole.push_back(u);
        for (Unit part = u; part.chunk < u.end; part.chunk++, part.part += u.heads * u.rows * record)
          part.end = part.chunk + 1, tasks.push_back(part), part.end = u.end;
      } else {
        tasks.push_back(u);
      }
    }
    if (threads > 1 && (int64_t)tasks.size() < 4 * threads)  // too few to be shared well: halves of the heads
      for (size_t i = tasks.size(); i--;) {
        Unit u = tasks[i];
        const int64_t seen = std::min(keys(u.sequence), (u.end - u.chunk) * CHUNK);
        if (u.heads < 2 || u.heads * u.rows * seen * a.d <= SMALL) continue;
        Unit half = u;
        u.heads /= 2, half.head += u.heads, half.heads -= u.heads;
        if (half.part >= 0) half.part += u.heads * u.rows * record;
        tasks[i] = u, tasks.push_back(half);
      }
    if ((int64_t)parts.size() < room) parts.resize(room);
    std::stable_sort(tasks.begin(), tasks.end(), [](const Unit& x, const Unit& y) { return x.work() > y.work(); });
    float* const at = parts.data();
    std::atomic<size_t> taken{0};
#pragma omp parallel num_threads(threads)
    {
      static thread_local Room own;
      for (size_t i = taken++, then; i < tasks.size(); i = then) {
        then = taken++;
        run(tasks[i], own, at, then < tasks.size() ? &tasks[then] : nullptr);
      }
#pragma omp barrier
      for (const Unit& u : whole) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < u.heads * u.rows; i++) merge(u, i, at);
      }
    }
  }
};

template <bool pairs, int type>
static void attend_all(const Attention& a, int q_type, int threads) {
  Kernel<pairs, type>{a, q_type}.launch(threads);
}

extern "C" void turnout_attention(int q_type, int type, const Attention* a, int threads) {
#if defined(__AVX512BF16__)
  if (q_type == BFLOAT16 && type == BFLOAT16) return attend_all<true, BFLOAT16>(*a, q_type, threads);
  if (q_type == BFLOAT16 && type == INT8) return attend_all<true, INT8>(*a, q_type, threads);
#endif
  if (type == FLOAT32) return attend_all<false, FLOAT32>(*a, q_type, threads);
  if (type == BFLOAT16) return attend_all<false, BFLOAT16>(*a, q_type, threads);
  if (type == FLOAT16) return attend_all<false, FLOAT16>(*a, q_type, threads);
  attend_all<false, INT8>(*a, q_type, threads);
}
