// Compression: the largest elements of every row stay, and what isn't zero goes into tiles under a bitmap.
//
// Compiled with attention.cpp and called by compression.py, which mirrors the structs below; tiles.py says what a tile
// is. Numbers are looked at as bits: those of a size grow with it, whatever the dtype.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" {
struct Sizes {
  void *x;
  int64_t sizes[4], strides[4];  // in elements; the last are the channels of a row
  int32_t kept, ties;            // how many stay, and whether all do that equal the last of them
  uint32_t infinity;             // its bits
  int32_t item, threads;         // bytes of an element
};

struct Encoding {
  const void *dense;    // [rows, width]
  const int64_t *rows;  // [blocks + 1], first row of a block
  int64_t blocks;
  int32_t width, tiles, by_channel, item, threads;
  uint64_t *bits;    // [blocks, tiles]
  int64_t *starts;   // [blocks]: how many elements, of `words`; where the first is, for `elements`
  void *values;
};
}

namespace {

constexpr int BLOCK = 64, HALF = 32;
constexpr int WIDEST = 256;

// Calls f(first, last) for pieces of `count`, on some threads.
template <class F> void share(int64_t count, int64_t piece, int threads, F f) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t first; (first = next.fetch_add(piece)) < count;) f(first, std::min(first + piece, count));
  };
  threads = int(std::min<int64_t>(threads, (count + piece - 1) / piece));
#if defined(_OPENMP)
#pragma omp parallel num_threads(std::max(1, threads))
  work();
#else
  std::vector<std::thread> others;
  for (int t = 1; t < threads; t++) others.emplace_back(work);
  work();
  for (auto &other : others) other.join();
#endif
}

template <class U> constexpr U without_sign() { return U(U(~U(0)) >> 1); }

template <class U> inline int at_least(const U *size, int width, U least) {
  U count = 0;  // of the same width, so that it is counted in vectors
  for (int i = 0; i < width; i++) count = U(count + U(size[i] >= least));
  return int(count);
}

// Zeroes all elements of a row but the largest.
template <class U> void keep_largest_of(U *row, int64_t stride, int width, const Sizes &a) {
  U size[WIDEST];
  const U nan = U(a.infinity + 1);
  U most = 0;
  for (int i = 0; i < width; i++) {
    size[i] = std::min<U>(row[i * stride] & without_sign<U>(), nan);  // one NaN is as large as another
    most = std::max(most, size[i]);
  }
  if (a.kept == 0) {
    for (int i = 0; i < width; i++) row[i * stride] = 0;
    return;
  }
  // the largest number that is reached by as many as stay
  U low = 0, high = U(most + 1);
  int count = width;
  while (count > a.kept && U(high - low) > 1) {
    const U middle = U(low + (high - low) / 2);
    const int found = at_least(size, width, middle);
    if (found >= a.kept) low = middle, count = found;
    else high = middle;
  }
  if (a.ties) {
    // nothing is at least NaN
    for (int i = 0; i < width; i++)
      if (size[i] < low || size[i] == nan) row[i * stride] = 0;
    return;
  }
  int spare = count - a.kept;  // equals of the last that leave, from the highest channel on
  for (int i = width - 1; i >= 0; i--)
    if (size[i] < low || (size[i] == low && spare-- > 0)) row[i * stride] = 0;
}

template <class U> void keep_largest_by(const Sizes &a) {
  const int64_t *n = a.sizes, *step = a.strides;
  share(n[0] * n[1] * n[2], 256, a.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const int64_t at = r / (n[1] * n[2]) * step[0] + r / n[2] % n[1] * step[1] + r % n[2] * step[2];
      keep_largest_of(static_cast<U *>(a.x) + at, step[3], int(n[3]), a);
    }
  });
}

template <class U> inline uint64_t is_there(U x) { return (x & without_sign<U>()) != 0; }

// Words of a block in which a lane is a token: halves of the block by pairs of channels.
template <class U> void words_by_token(const U *x, int rows, int width, int pairs, uint64_t *bits) {
  std::fill(bits, bits + 2 * pairs, 0);
  for (int r = 0; r < rows; r++, x += width) {
    uint64_t *word = bits + r / HALF * pairs;
    const int shift = 2 * (r % HALF);
    for (int p = 0; p < width / 2; p++)
      word[p] |= (is_there(x[2 * p]) | is_there(x[2 * p + 1]) << 1) << shift;
    if (width % 2) word[pairs - 1] |= is_there(x[width - 1]) << shift;
  }
}

// Words of a block in which a lane is a channel: 32 channels by pairs of tokens.
template <class U> void words_by_channel(const U *x, int rows, int width, int columns, uint64_t *bits) {
  std::fill(bits, bits + HALF * columns, 0);
  for (int r = 0; r < rows; r++, x += width)
    for (int c = 0; c < columns; c++) {
      uint64_t word = 0;
      const int some = std::min(HALF, width - c * HALF);
      for (int l = 0; l < some; l++) word |= is_there(x[c * HALF + l]) << (2 * l);
      bits[c * HALF + r / 2] |= word << (r % 2);
    }
}

template <class U> void words_of(const Encoding &a) {
  share(a.blocks, 4, a.threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      const U *x = static_cast<const U *>(a.dense) + a.rows[b] * a.width;
      const int rows = int(a.rows[b + 1] - a.rows[b]);
      uint64_t *bits = a.bits + b * a.tiles;
      if (a.by_channel) words_by_channel(x, rows, a.width, a.tiles / HALF, bits);
      else words_by_token(x, rows, a.width, a.tiles / 2, bits);
      int64_t count = 0;
      for (int t = 0; t < a.tiles; t++) count += __builtin_popcountll(bits[t]);
      a.starts[b] = count;
    }
  });
}

template <class U> void elements_of(const Encoding &a) {
  share(a.blocks, 4, a.threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      const U *x = static_cast<const U *>(a.dense) + a.rows[b] * a.width;
      U *out = static_cast<U *>(a.values) + a.starts[b];
      for (int t = 0; t < a.tiles; t++)
        // the place of bit 0, and what lanes and steps are apart
        for (uint64_t word = a.bits[b * a.tiles + t]; word; word &= word - 1) {
          const int bit = __builtin_ctzll(word), lane = bit / 2, step = bit % 2;
          const int row = a.by_channel ? 2 * (t % HALF) + step : t / (a.tiles / 2) * HALF + lane;
          const int channel = a.by_channel ? t / HALF * HALF + lane : 2 * (t % (a.tiles / 2)) + step;
          *out++ = x[int64_t(row) * a.width + channel];
        }
    }
  });
}

}  // namespace

extern "C" void keep_largest(const Sizes *a) {
  if (a->item == 4) keep_largest_by<uint32_t>(*a);
  else keep_largest_by<uint16_t>(*a);
}

// The bits of all blocks, and how many elements each has.
extern "C" void encode_words(const Encoding *a) {
  if (a->item == 4) words_of<uint32_t>(*a);
  else words_of<uint16_t>(*a);
}

// The elements of all blocks, in the order of their bits.
extern "C" void encode_elements(const Encoding *a) {
  if (a->item == 4) elements_of<uint32_t>(*a);
  else elements_of<uint16_t>(*a);
}
