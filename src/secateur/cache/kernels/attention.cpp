// Decode attention over a mixed store: dense rows, rows without some channels, and tiles under a bitmap.
//
// Compiled by compiler.py and called by cpu.py, which mirrors the structs below; rows.py says what a tile is. A unit of
// work is some blocks of one segment (a key-value head of a sequence): logits of all query heads that share it, their
// softmax, and the weighted sum of values, so that nothing is expanded twice. Units are merged by their maxima.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#else
#include <atomic>
#include <thread>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

extern "C" {
struct Side {
  int32_t kind;             // 0 dense rows, 1 rows of some channels, 2 bitmap
  int32_t width;            // E, channels of a whole row
  int32_t stored;           // channels of a stored row (kinds 0 and 1)
  int32_t tiles;            // tiles of a block (kind 2)
  const void *x;            // rows, or the elements that stay
  int64_t size;             // elements of x
  const uint64_t *bits;     // [blocks, tiles]
  const int64_t *starts;    // [blocks], first element
  const int16_t *channels;  // [segments, stored]
};

struct Part {
  Side keys, values;
  const int64_t *rows;       // [blocks + 1], first row of a block; null: every segment has `length` rows
  const int64_t *blocks;     // [segments + 1], first block of a segment
  const int32_t *positions;  // [rows] in the text, or null: row r of a segment is token r
  int64_t length;
};

struct Problem {
  int32_t batch, heads, kv_heads, tokens, key_width, value_width, dtype, threads;
  float scaling, softcap;  // 0: none
  const float *query;      // [batch, heads, tokens, key_width]
  const uint16_t *query16; // the same in bfloat16, where that is the dtype
  float *out;              // [batch, tokens, heads, value_width]
  const void *mask;        // null, or by position of the text
  int32_t mask_kind;       // 1: one byte, 0 = unseen; 2: float to be added
  int32_t causal;
  int64_t mask_batch, mask_token;  // strides
  int64_t first;                   // position of the first new token
};
}

namespace {

constexpr int BLOCK = 64;  // rows
constexpr int HALF = 32;   // lanes of a tile, which has two steps for each
constexpr float LOWEST = -3.402823466e38f;

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef float v16u __attribute__((vector_size(64), aligned(4), may_alias));

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

inline v16 load(const float *p) { return *reinterpret_cast<const v16u *>(p); }
inline void store(float *p, v16 x) { *reinterpret_cast<v16u *>(p) = x; }
inline v16 splat(float x) { return x - v16{}; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13, bits;
  float out;
  if (rest >= 0x0f800000) {
    bits = rest + 0x70000000;  // inf, NaN
  } else {
    // 2^112 moves the exponent, and makes what was subnormal normal
    std::memcpy(&out, &rest, 4);
    out *= 5.192296858534828e33f;
    std::memcpy(&bits, &out, 4);
  }
  bits |= sign;
  std::memcpy(&out, &bits, 4);
  return out;
}

// 16 consecutive elements
inline v16 load16(const float *p) { return load(p); }
#if defined(__AVX512F__)
inline v16 load16(const bf16 *p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  return (v16)_mm512_slli_epi32(wide, 16);
}
inline v16 load16(const half *p) {
  return (v16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline v16 join(__m256 low, __m256 high) {
  v16 out;
  std::memcpy(&out, &low, 32);
  std::memcpy(reinterpret_cast<char *>(&out) + 32, &high, 32);
  return out;
}
inline __m256 load8(const bf16 *p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline __m256 load8(const half *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline __m256 load8(const float *p) { return _mm256_loadu_ps(p); }
inline v16 load16(const bf16 *p) { return join(load8(p), load8(p + 8)); }
inline v16 load16(const half *p) { return join(load8(p), load8(p + 8)); }
#else
template <class S> inline v16 load16(const S *p) {
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = to_float(p[i]);
  return load(out);
}
#endif

template <class S> inline v16 load_some(const S *p, int count) {
  S out[16] = {};
  std::memcpy(out, p, sizeof(S) * count);
  return load16(out);
}

// Elements of x in the places of the bits of mask, zeros elsewhere; as many as 16 elements may be read.
#if defined(__AVX512F__)
template <class S> inline v16 expand16(uint32_t mask, const S *p) {
  return (v16)_mm512_maskz_expand_ps(__mmask16(mask), (__m512)load16(p));
}
#elif defined(__AVX2__) && defined(__F16C__)
struct Places {
  uint64_t of[256];  // which element belongs into each of 8 places
  Places() {
    for (int mask = 0; mask < 256; mask++) {
      uint64_t packed = 0, next = 0;
      for (int lane = 0; lane < 8; lane++)
        if (mask >> lane & 1) packed |= next++ << (8 * lane);
      of[mask] = packed;
    }
  }
};
const Places places;
inline __m256 spread(uint32_t mask, __m256 x) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(places.of[mask])));
  __m256i there = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), lanes), lanes);
  return _mm256_and_ps(_mm256_permutevar8x32_ps(x, index), _mm256_castsi256_ps(there));
}
template <class S> inline v16 expand16(uint32_t mask, const S *p) {
  uint32_t low = mask & 255;
  return join(spread(low, load8(p)), spread(mask >> 8, load8(p + __builtin_popcount(low))));
}
#else
template <class S> inline v16 expand16(uint32_t mask, const S *p) {
  float out[16] = {};
  for (; mask; mask &= mask - 1) out[__builtin_ctz(mask)] = to_float(*p++);
  return load(out);
}
#endif

// How a tile is multiplied. Lanes hold two steps each, side by side, and so do coefficients.
// How far ahead elements are asked for, in bytes: several tiles, and across pages, where processors don't look by
// themselves.
constexpr int AHEAD = 2048;
template <class S> inline void ask_ahead(const S *p) {
  const char *ahead = reinterpret_cast<const char *>(p) + AHEAD;
  __builtin_prefetch(ahead);
  if (sizeof(S) == 4) __builtin_prefetch(ahead + 64);
}

template <class S> struct Plain {
  static constexpr int VECTORS = 4;
  using Coefficient = float;
  using Vector = v16;
  static inline void expand(uint64_t mask, const S *&p, Vector *x) {
    const S *next = p + __builtin_popcountll(mask);
    ask_ahead(p);
    x[0] = expand16(uint32_t(mask) & 0xffff, p);
    x[1] = expand16(uint32_t(mask >> 16) & 0xffff, p + __builtin_popcountll(mask & 0xffff));
    x[2] = expand16(uint32_t(mask >> 32) & 0xffff, p + __builtin_popcountll(mask & 0xffffffff));
    x[3] = expand16(uint32_t(mask >> 48), p + __builtin_popcountll(mask & 0xffffffffffff));
    p = next;
  }
  static inline Vector both(const float *c) {
    typedef double d8 __attribute__((vector_size(64)));
    double pair;
    std::memcpy(&pair, c, 8);
    return (v16)d8{pair, pair, pair, pair, pair, pair, pair, pair};
  }
  static inline v16 add(v16 sum, Vector c, Vector x) { return sum + c * x; }
  // sums of the two steps of every lane
  static inline void fold(const float *sums, float *out) {
    for (int i = 0; i < HALF; i++) out[i] = sums[2 * i] + sums[2 * i + 1];
  }
};

template <class S> struct Steps : Plain<S> {};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
// Products of pairs of bfloat16 are summed by one instruction.
template <> struct Steps<bf16> {
  static constexpr int VECTORS = 2;
  using Coefficient = uint16_t;
  using Vector = __m512i;
  static inline void expand(uint64_t mask, const bf16 *&p, Vector *x) {
    const bf16 *next = p + __builtin_popcountll(mask);
    ask_ahead(p);
    x[0] = _mm512_maskz_expand_epi16(__mmask32(mask), _mm512_loadu_si512(p));
    x[1] = _mm512_maskz_expand_epi16(__mmask32(mask >> 32),
                                     _mm512_loadu_si512(p + __builtin_popcountll(mask & 0xffffffff)));
    p = next;
  }
  static inline Vector both(const uint16_t *c) {
    int32_t pair;
    std::memcpy(&pair, c, 4);
    return _mm512_set1_epi32(pair);
  }
  static inline v16 add(v16 sum, Vector c, Vector x) {
    return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)c, (__m512bh)x);
  }
  static inline void fold(const float *sums, float *out) { std::memcpy(out, sums, sizeof(float) * HALF); }
};
#endif

template <class S> constexpr bool pairs16() { return sizeof(typename Steps<S>::Coefficient) == 2; }

#if defined(__AVX512F__)
constexpr int TOGETHER = 6;  // queries whose sums fit into 32 registers
#else
constexpr int TOGETHER = 1;
#endif

// Tiles that are expanded as they are read, and tiles that were expanded before.
template <class S> struct Compressed {
  const uint64_t *bits;
  const S *p;
  inline void operator()(int t, typename Steps<S>::Vector *x) { Steps<S>::expand(bits[t], p, x); }
};
template <class S> struct Expanded {
  const typename Steps<S>::Vector *all;
  inline void operator()(int t, typename Steps<S>::Vector *x) const {
    for (int i = 0; i < Steps<S>::VECTORS; i++) x[i] = all[t * Steps<S>::VECTORS + i];
  }
};

// sums[m] += coefficients[m, 2 t : 2 t + 2] * tile t, for M queries; what comes behind these tiles
template <class P, int M, class Next>
Next multiply(Next next, int tiles, const typename P::Coefficient *c, int64_t stride, float *sums) {
  constexpr int V = P::VECTORS;
  v16 sum[M][V];
  for (int m = 0; m < M; m++)
    for (int i = 0; i < V; i++) sum[m][i] = load(sums + (m * V + i) * 16);
  for (int t = 0; t < tiles; t++) {
    typename P::Vector x[V];
    next(t, x);
    for (int m = 0; m < M; m++) {
      auto both = P::both(c + m * stride + 2 * t);
      for (int i = 0; i < V; i++) sum[m][i] = P::add(sum[m][i], both, x[i]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < V; i++) store(sums + (m * V + i) * 16, sum[m][i]);
  return next;
}

template <class P, class Next>
Next multiply_by(int queries, Next next, int tiles, const typename P::Coefficient *c, int64_t stride, float *sums) {
  switch (queries) {
#if defined(__AVX512F__)
    case 6: return multiply<P, 6>(next, tiles, c, stride, sums);
    case 5: return multiply<P, 5>(next, tiles, c, stride, sums);
    case 4: return multiply<P, 4>(next, tiles, c, stride, sums);
    case 3: return multiply<P, 3>(next, tiles, c, stride, sums);
    case 2: return multiply<P, 2>(next, tiles, c, stride, sums);
#endif
    default: return multiply<P, 1>(next, tiles, c, stride, sums);
  }
}

// A run of tiles, which is expanded once: in registers where the sums of all queries fit beside it.
template <class S>
const S *run(const uint64_t *bits, const S *p, int tiles, int queries, const typename Steps<S>::Coefficient *c,
             int64_t stride, float *sums, typename Steps<S>::Vector *expanded) {
  using P = Steps<S>;
  if (queries <= TOGETHER) return multiply_by<P>(queries, Compressed<S>{bits, p}, tiles, c, stride, sums).p;
  for (int t = 0; t < tiles; t++) P::expand(bits[t], p, expanded + t * P::VECTORS);
  const Expanded<S> next{expanded};
  for (int m = 0; m < queries; m += TOGETHER)
    multiply_by<P>(std::min(TOGETHER, queries - m), next, tiles, c + m * stride, stride,
                   sums + m * P::VECTORS * 16);
  return p;
}

// out[r] = sum of the lanes of x[r], for 16 vectors: sums of neighbours, four times
inline v16 neighbours(v16 a, v16 b) {
  const i16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}
inline v16 lane_sums(v16 *x) {
  for (int count = 16; count > 1; count /= 2)
    for (int i = 0; i < count / 2; i++) x[i] = neighbours(x[2 * i], x[2 * i + 1]);
  return x[0];
}

// logits[m, r] = q[m] . x[r] over `width` channels, for M queries and as many as 16 rows
template <class S, int M>
void dense_logits16(const S *x, int rows, int width, const float *q, int64_t q_stride, float *logits, int64_t stride) {
  const int whole = width & ~15;
  v16 sums[M][16] = {};
  for (int r = 0; r < rows; r++) {
    const S *row = x + int64_t(r) * width;
    v16 sum[M] = {};
    for (int c = 0; c < whole; c += 16) {
      v16 k = load16(row + c);
      for (int m = 0; m < M; m++) sum[m] += k * load(q + m * q_stride + c);
    }
    if (whole < width) {
      v16 k = load_some(row + whole, width - whole);
      for (int m = 0; m < M; m++) sum[m] += k * load(q + m * q_stride + whole);
    }
    for (int m = 0; m < M; m++) sums[m][r] = sum[m];
  }
  for (int m = 0; m < M; m++) store(logits + m * stride, lane_sums(sums[m]));
}

// out[m] += weights[m, r] * x[r] for M queries and 16 V channels, of which `some` are there
template <class S, int M, int V>
void dense_mix16(const S *x, int rows, int width, int some, const float *weights, int64_t stride, float *out,
                 int64_t out_stride) {
  v16 sum[M][V];
  for (int m = 0; m < M; m++)
    for (int i = 0; i < V; i++) sum[m][i] = load(out + m * out_stride + 16 * i);
  for (int r = 0; r < rows; r++) {
    const S *row = x + int64_t(r) * width;
    __builtin_prefetch(row + 16 * int64_t(width));
    for (int i = 0; i < V; i++) {
      v16 v = some >= 16 * V ? load16(row + 16 * i) : load_some(row, some);
      for (int m = 0; m < M; m++) sum[m][i] += splat(weights[m * stride + r]) * v;
    }
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < V; i++) store(out + m * out_stride + 16 * i, sum[m][i]);
}

// Calls f with the number of queries at a time as a constant.
template <class F> void by_four(int queries, F f) {
  for (int m = 0; m < queries; m += 4) switch (std::min(4, queries - m)) {
      case 4: f(m, std::integral_constant<int, 4>()); break;
      case 3: f(m, std::integral_constant<int, 3>()); break;
      case 2: f(m, std::integral_constant<int, 2>()); break;
      default: f(m, std::integral_constant<int, 1>());
    }
}

template <class S>
void dense_logits(const S *x, int rows, int width, int queries, const float *q, int64_t q_stride, float *logits,
                  int64_t stride) {
  for (int r = 0; r < rows; r += 16)
    by_four(queries, [&](int m, auto count) {
      dense_logits16<S, count()>(x + int64_t(r) * width, std::min(16, rows - r), width, q + m * q_stride, q_stride,
                                 logits + m * stride + r, stride);
    });
}

template <class S>
void dense_mix(const S *x, int rows, int width, int queries, const float *weights, int64_t stride, float *out,
               int64_t out_stride) {
  by_four(queries, [&](int m, auto count) {
    const float *w = weights + m * stride;
    float *sums = out + m * out_stride;
    int c = 0;
    for (; c + 64 <= width; c += 64)
      dense_mix16<S, count(), 4>(x + c, rows, width, 64, w, stride, sums + c, out_stride);
    for (; c < width; c += 16)
      dense_mix16<S, count(), 1>(x + c, rows, width, std::min(16, width - c), w, stride, sums + c, out_stride);
  });
}

// e^x for x <= 0, relative error below 2^-22; 0 below e^-87
inline v16 exponential(v16 x) {
  const v16 magic = splat(12582912.0f);
  v16 t = x * 1.44269504f + magic, n = t - magic;
  v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  v16 e = p * r * r + r + 1.0f;
  i16 power = ((i16)t - (i16)magic + 127) << 23;
  v16 out = e * (v16)power;
  i16 there = x > splat(-87.0f);
  return (v16)((i16)out & there);
}

struct Unit {
  int part, segment;
  int64_t first, count;  // blocks
  int64_t sums;          // where its results begin
};

struct Scratch {
  std::vector<float> logits, sums, query;
  std::vector<uint16_t> weights16;
  std::vector<v16> expanded;
  std::vector<char> elements;
};

inline int64_t padded(int64_t n) { return (n + HALF - 1) / HALF * HALF; }

// Where the rows of a block lie.
inline int64_t first_row(const Part &part, int64_t segment, int64_t block) {
  return part.rows ? part.rows[block] : segment * part.length + block * BLOCK;
}
inline int rows_of(const Part &part, int64_t block) {
  return int(part.rows ? part.rows[block + 1] - part.rows[block] : std::min<int64_t>(BLOCK, part.length - block * BLOCK));
}

// The elements of a block, behind which a vector can be read whole.
template <class S> const S *elements(const Side &side, int64_t block, Scratch &scratch) {
  const S *x = static_cast<const S *>(side.x);
  const int64_t start = side.starts[block], most = int64_t(side.tiles) * BLOCK + BLOCK;
  if (start + most <= side.size) return x + start;
  scratch.elements.resize(most * sizeof(S));
  std::memcpy(scratch.elements.data(), x + start, std::min(most, side.size - start) * sizeof(S));
  return reinterpret_cast<const S *>(scratch.elements.data());
}

template <class S, class C> const C *coefficients(const float *plain, const uint16_t *short_ones) {
  if constexpr (pairs16<S>()) return short_ones;
  else return plain;
}

template <class S> class Attention {
  using P = Steps<S>;
  using C = typename P::Coefficient;
  static constexpr int WIDTH = P::VECTORS * 16;  // sums of a tile

 public:
  Attention(const Problem &problem, const Part *parts, int count) : a(problem), parts(parts) {
    queries = a.heads / a.kv_heads * a.tokens;
    value_width = padded(a.value_width);
    size = queries * (2 + value_width);
    int64_t total = 0;
    for (int p = 0; p < count; p++) total += blocks(p, int64_t(a.batch) * a.kv_heads);
    // some units for each thread, so that all end together, and not so few rows that merging counts
    const int64_t most = std::clamp<int64_t>(total / (4 * a.threads), 4, 16);
    for (int p = 0; p < count; p++)
      for (int s = 0; s < a.batch * a.kv_heads; s++) {
        const int64_t begin = parts[p].blocks ? parts[p].blocks[s] : 0, end = begin + of_segment(p, s);
        for (int64_t b = begin; b < end; b += most)
          units.push_back({p, s, b, std::min(most, end - b), int64_t(units.size()) * size});
      }
    results.resize(units.size() * size);
  }

  void compute() {
    const int threads = int(std::min<int64_t>(a.threads, std::max<int64_t>(1, int64_t(units.size()))));
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    {
      Scratch scratch;
#pragma omp for schedule(dynamic)
      for (size_t u = 0; u < units.size(); u++) compute(units[u], scratch);
    }
#else
    std::atomic<size_t> next{0};
    auto work = [&] {
      Scratch scratch;
      for (size_t u; (u = next++) < units.size();) compute(units[u], scratch);
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(work);
    work();
    for (auto &other : others) other.join();
#endif
    merge();
  }

 private:
  int64_t of_segment(int p, int64_t s) const {
    const Part &part = parts[p];
    return part.blocks ? part.blocks[s + 1] - part.blocks[s] : (part.length + BLOCK - 1) / BLOCK;
  }
  int64_t blocks(int p, int64_t segments) const {
    const Part &part = parts[p];
    return part.blocks ? part.blocks[segments] : segments * ((part.length + BLOCK - 1) / BLOCK);
  }

  // A unit's maxima [queries], sums of weights [queries] and weighted sums of values [queries, value_width].
  void compute(const Unit &unit, Scratch &scratch) {
    const Part &part = parts[unit.part];
    const int64_t stride = unit.count * BLOCK;
    scratch.logits.resize(queries * stride);
    float *logits = scratch.logits.data(), *found = results.data() + unit.sums;
    int64_t rows = 0;
    std::vector<int64_t> offsets(unit.count);  // of blocks among the logits; two rows of a tile never lie apart
    for (int64_t b = 0; b < unit.count; b++) offsets[b] = b * BLOCK;
    rows = stride;
    for (int m = 0; m < queries; m++) {
      // what a block lacks of its 64 rows is as if it weren't there
      for (int64_t b = 0; b < unit.count; b++)
        for (int r = rows_of(part, unit.first + b); r < BLOCK; r++) logits[m * stride + b * BLOCK + r] = -INFINITY;
    }
    key_products(part, unit, scratch, logits, stride);
    for (int64_t b = 0; b < unit.count; b++) finish_logits(part, unit, b, logits, stride);
    float *maxima = found, *totals = found + queries, *mixed = found + 2 * queries;
    for (int m = 0; m < queries; m++) {
      float *row = logits + m * stride;
      v16 high = splat(LOWEST);
      for (int64_t i = 0; i < rows; i += 16) {
        v16 x = load(row + i);
        i16 more = x > high;
        high = (v16)(((i16)x & more) | ((i16)high & ~more));
      }
      float maximum = LOWEST;
      for (int i = 0; i < 16; i++) maximum = std::max(maximum, high[i]);
      v16 total = {};
      for (int64_t i = 0; i < rows; i += 16) {
        v16 weight = exponential(load(row + i) - maximum);
        store(row + i, weight);
        total += weight;
      }
      maxima[m] = maximum;
      totals[m] = 0;
      for (int i = 0; i < 16; i++) totals[m] += total[i];
    }
    std::fill(mixed, mixed + queries * value_width, 0.0f);
    mix_values(part, unit, scratch, logits, stride, mixed);
  }

  void key_products(const Part &part, const Unit &unit, Scratch &scratch, float *logits, int64_t stride) {
    const Side &keys = part.keys;
    const int64_t q_stride = padded(a.key_width), of_segment = unit.segment * queries * q_stride;
    const float *q = a.query + of_segment;
    if (keys.kind == 2) {
      scratch.expanded.resize(keys.tiles / 2 * P::VECTORS);
      scratch.sums.resize(queries * WIDTH);
      const C *c = coefficients<S, C>(q, a.query16 ? a.query16 + of_segment : nullptr);
      for (int64_t b = 0; b < unit.count; b++) {
        const int64_t block = unit.first + b;
        const int rows = rows_of(part, block);
        const S *x = elements<S>(keys, block, scratch);
        for (int side = 0; side * HALF < rows; side++) {
          std::fill(scratch.sums.begin(), scratch.sums.end(), 0.0f);
          x = run<S>(keys.bits + block * keys.tiles + side * keys.tiles / 2, x, keys.tiles / 2, queries, c, q_stride,
                     scratch.sums.data(), reinterpret_cast<typename P::Vector *>(scratch.expanded.data()));
          float folded[HALF];
          for (int m = 0; m < queries; m++) {
            P::fold(scratch.sums.data() + m * WIDTH, folded);
            std::copy(folded, folded + std::min(HALF, rows - side * HALF),
                      logits + m * stride + b * BLOCK + side * HALF);
          }
        }
      }
      return;
    }
    int64_t width = q_stride;
    if (keys.kind == 1) {
      width = padded(keys.stored);
      scratch.query.assign(queries * width, 0.0f);
      const int16_t *channels = keys.channels + int64_t(unit.segment) * keys.stored;
      for (int m = 0; m < queries; m++)
        for (int i = 0; i < keys.stored; i++) scratch.query[m * width + i] = q[m * q_stride + channels[i]];
      q = scratch.query.data();
    }
    std::vector<float> &found = scratch.sums;
    found.resize(queries * BLOCK);
    for (int64_t b = 0; b < unit.count; b++) {
      const int rows = rows_of(part, unit.first + b);
      const S *x = static_cast<const S *>(keys.x) + first_row(part, unit.segment, unit.first + b) * keys.stored;
      dense_logits(x, rows, keys.stored, queries, q, width, found.data(), BLOCK);
      for (int m = 0; m < queries; m++)
        std::copy(found.data() + m * BLOCK, found.data() + m * BLOCK + rows, logits + m * stride + b * BLOCK);
    }
  }

  // Scaling, softcap and mask of the rows of one block.
  void finish_logits(const Part &part, const Unit &unit, int64_t b, float *logits, int64_t stride) {
    const int64_t block = unit.first + b, row = first_row(part, unit.segment, block);
    const int64_t segment_row = part.blocks ? part.rows[part.blocks[unit.segment]] : unit.segment * part.length;
    const int rows = rows_of(part, block);
    const int64_t sequence = unit.segment / a.kv_heads;
    for (int m = 0; m < queries; m++) {
      float *x = logits + m * stride + b * BLOCK;
      for (int i = 0; i < BLOCK; i += 16) {
        v16 scaled = load(x + i) * a.scaling;
        if (a.softcap != 0.0f) {
          v16 t = scaled / a.softcap, size = (v16)((i16)t & 0x7fffffff);
          v16 e = exponential(size * -2.0f);
          v16 tanh = (1.0f - e) / (1.0f + e);
          scaled = (v16)((i16)tanh | ((i16)t & int32_t(0x80000000))) * a.softcap;
        }
        store(x + i, scaled);
      }
      // softcap would turn what isn't there into a number
      for (int r = rows; r < BLOCK; r++) x[r] = -INFINITY;
      if (!a.mask && !a.causal) continue;
      const int64_t token = m % a.tokens;
      for (int r = 0; r < rows; r++) {
        const int64_t at = part.positions ? part.positions[row + r] : row - segment_row + r;
        const int64_t place = sequence * a.mask_batch + token * a.mask_token + at;
        if (a.causal && at > a.first + token) x[r] = LOWEST;
        else if (a.mask_kind == 1 && !static_cast<const uint8_t *>(a.mask)[place]) x[r] = LOWEST;
        else if (a.mask_kind == 2) x[r] = std::max(x[r] + static_cast<const float *>(a.mask)[place], LOWEST);
      }
    }
  }

  void mix_values(const Part &part, const Unit &unit, Scratch &scratch, const float *weights, int64_t stride,
                  float *mixed) {
    const Side &values = part.values;
    if (values.kind == 2) {
      const C *c = coefficients<S, C>(weights, nullptr);
      if constexpr (pairs16<S>()) c = shortened(weights, queries * stride, scratch);
      const int columns = values.tiles / HALF;
      scratch.expanded.resize(HALF * P::VECTORS);
      scratch.sums.assign(columns * queries * WIDTH, 0.0f);
      for (int64_t b = 0; b < unit.count; b++) {
        const int64_t block = unit.first + b;
        const S *x = elements<S>(values, block, scratch);
        for (int column = 0; column < columns; column++)
          x = run<S>(values.bits + block * values.tiles + column * HALF, x, HALF, queries, c + b * BLOCK, stride,
                     scratch.sums.data() + column * queries * WIDTH,
                     reinterpret_cast<typename P::Vector *>(scratch.expanded.data()));
      }
      for (int column = 0; column < columns; column++)
        for (int m = 0; m < queries; m++)
          P::fold(scratch.sums.data() + (column * queries + m) * WIDTH, mixed + m * value_width + column * HALF);
      return;
    }
    const int64_t width = values.kind == 1 ? padded(values.stored) : value_width;
    float *out = mixed;
    if (values.kind == 1) {
      scratch.sums.assign(queries * width, 0.0f);
      out = scratch.sums.data();
    }
    for (int64_t b = 0; b < unit.count; b++) {
      const int64_t row = first_row(part, unit.segment, unit.first + b);
      dense_mix(static_cast<const S *>(values.x) + row * values.stored, rows_of(part, unit.first + b), values.stored,
                queries, weights + b * BLOCK, stride, out, width);
    }
    if (values.kind == 1) {
      const int16_t *channels = values.channels + int64_t(unit.segment) * values.stored;
      for (int m = 0; m < queries; m++)
        for (int i = 0; i < values.stored; i++) mixed[m * value_width + channels[i]] = out[m * width + i];
    }
  }

  static const uint16_t *shortened(const float *x, int64_t count, Scratch &scratch) {
    scratch.weights16.resize(count);
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < count; i += 16) {
      __m256bh few = _mm512_cvtneps_pbh((__m512)load(x + i));
      std::memcpy(scratch.weights16.data() + i, &few, 32);
    }
#endif
    return scratch.weights16.data();
  }

  void merge() {
    const int group = a.heads / a.kv_heads;
    std::vector<float> high(int64_t(a.batch) * a.kv_heads * queries, LOWEST), total(high.size(), 0.0f);
    for (const Unit &unit : units)
      for (int m = 0; m < queries; m++) {
        float &best = high[unit.segment * queries + m];
        best = std::max(best, results[unit.sums + m]);
      }
    std::fill(a.out, a.out + int64_t(a.batch) * a.tokens * a.heads * a.value_width, 0.0f);
    auto row = [&](int segment, int m) {
      const int64_t b = segment / a.kv_heads, head = int64_t(segment % a.kv_heads) * group + m / a.tokens;
      return a.out + ((b * a.tokens + m % a.tokens) * a.heads + head) * a.value_width;
    };
    for (const Unit &unit : units) {
      const float *found = results.data() + unit.sums;
      for (int m = 0; m < queries; m++) {
        const float factor = std::exp(found[m] - high[unit.segment * queries + m]);
        total[unit.segment * queries + m] += factor * found[queries + m];
        const float *mixed = found + 2 * queries + m * value_width;
        float *out = row(unit.segment, m);
        for (int i = 0; i < a.value_width; i++) out[i] += factor * mixed[i];
      }
    }
    for (int s = 0; s < a.batch * a.kv_heads; s++)
      for (int m = 0; m < queries; m++) {
        float *out = row(s, m);
        for (int i = 0; i < a.value_width; i++) out[i] /= total[s * queries + m];
      }
  }

  const Problem &a;
  const Part *parts;
  int64_t queries, value_width, size;
  std::vector<Unit> units;
  std::vector<float> results;
};

}  // namespace

extern "C" void attend(const Problem *problem, const Part *parts, int32_t count) {
  if (problem->dtype == 0) Attention<float>(*problem, parts, count).compute();
  else if (problem->dtype == 1) Attention<bf16>(*problem, parts, count).compute();
  else Attention<half>(*problem, parts, count).compute();
}

// What instructions it was compiled for, and whether threads come from OpenMP.
extern "C" const char *built_for() {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  return "AVX-512 with bfloat16";
#elif defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__) && defined(__F16C__)
  return "AVX2";
#else
  return "any processor";
#endif
}
