// Keys and values into their pages; int8 rows are quantised symmetrically, each by its own scale.
#include "kernels.h"

typedef int8_t Bytes __attribute__((vector_size(16)));

struct Store {
  const void* from;
  void* pages;
  float* scales;  // of int8 pages, else null
  const int64_t* slots;
  int64_t rows, heads, d, from_row, from_head, blocks, page, block, row, head;  // strides of pages: block, row of it, head
};

static int64_t bytes(int type) { return type == FLOAT32 ? 4 : 2; }

template <Type type>
static void quantise(const void* from, int64_t d, int8_t* to, float* scale) {
  V most{};
  for (int64_t i = 0; i < d; i += 16) {
    const V x = load<type>(from, i, d - i), size = (V)((VI)x & 0x7FFFFFFF);
    most = (most > size) | (most != most) ? most : size;  // NaN stays
  }
  float top = 0;
  for (int j = 0; j < 16; j++) top = top > most[j] || top != top ? top : most[j];
  *scale = top / 127.0f;
  const bool some = *scale > 0 && *scale < INF;
  for (int64_t i = 0; i < d; i += 16) {
    const V x = some ? load<type>(from, i, d - i) / *scale : V{};
    const VI n = (VI)(x + 12582912.0f) - 0x4B400000;  // 1.5 · 2^23: rounds to a whole number in the low bits
    const Bytes whole = __builtin_convertvector(n, Bytes);
    std::memcpy(to + i, &whole, std::min<int64_t>(16, d - i));
  }
}

template <Type type>
static void store_rows(const Store& s, int to, int threads) {
  const int64_t heads = s.heads, d = s.d;
#pragma omp parallel for num_threads(s.rows * heads * d < SMALL ? 1 : threads)
  for (int64_t t = 0; t < s.rows; t++) {
    const int64_t base = s.slots[t] / s.page * s.block + s.slots[t] % s.page * s.row;
    for (int64_t g = 0; g < heads; g++) {
      const void* from = at<type>(s.from, t * s.from_row + g * s.from_head);
      const int64_t place = base + g * s.head;
      if (s.scales) {
        quantise<type>(from, d, (int8_t*)s.pages + place, s.scales + s.slots[t] * heads + g);
      } else if (to == type) {
        std::memcpy((char*)s.pages + bytes(to) * place, from, bytes(to) * d);
      } else {
        for (int64_t i = 0; i < d; i += 16) {
          const V x = load<type>(from, i, d - i);
          if (to == FLOAT32) store<FLOAT32>((float*)s.pages + place, i, x, d - i);
          else if (to == BFLOAT16) store<BFLOAT16>((uint16_t*)s.pages + place, i, x, d - i);
          else store<FLOAT16>((uint16_t*)s.pages + place, i, x, d - i);
        }
      }
    }
  }
}

// Whether all slots are in the pages; nothing is written where one is not.
extern "C" int turnout_store(int type, int to, const Store* parts, int count, int threads) {
  for (int i = 0; i < count; i++)
    for (int64_t t = 0; t < parts[i].rows; t++)
      if ((uint64_t)parts[i].slots[t] >= (uint64_t)(parts[i].blocks * parts[i].page)) return 0;
  for (int i = 0; i < count; i++) {
#define CALL(T) store_rows<T>(parts[i], to, threads)
    BY_TYPE(type, CALL)
#undef CALL
  }
  return 1;
}
