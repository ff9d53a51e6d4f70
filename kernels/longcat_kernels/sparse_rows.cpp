// What attention to selected keys does with the rows of a matrix, where they lie: products of a query's heads with the rows it selected.
// Of a group of eight heads at once: scores lie as [key][head], and a row is read once for the eight. Included by sparse_attention.cpp.
#pragma once

#include "common.cpp"

#include <type_traits>

namespace {
namespace sparse {

#ifdef __AVX512F__
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(kBytes)));
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(kBytes)));
};
template <class T>
constexpr int kLanes = kBytes / sizeof(T);
constexpr int kHeads = 8;  // of a group
template <class T>
constexpr int kPart = 16 / sizeof(T);  // neighbouring elements of a row that meet some heads of the group in one vector
template <class T>
constexpr int kVectors = kHeads * kPart<T> / kLanes<T>;  // in which a part meets all of them

// What one step works on, so that sums and operands fit the registers.
constexpr int64_t kKeys = kBytes == 64 ? 8 : 2;          // of `dots`
constexpr int64_t kColumns = kBytes == 64 ? 3 : 1;       // vectors of a row, of `accumulate`
constexpr int64_t kAdded = 4;                            // keys of `scatter`
constexpr int64_t kAddedColumns = kBytes == 64 ? 5 : 2;  // vectors of a row, of `scatter`

constexpr int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <class V, class T>
inline V load(const T* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class V, class T>
inline void store(T* to, V x) {
  std::memcpy(to, &x, sizeof x);
}

// One element in every lane.
template <class T>
inline typename Lanes<T>::Vector splat(T x) {
  return x - typename Lanes<T>::Vector{};
}

// kPart neighbouring elements over and over.
template <class T>
inline typename Lanes<T>::Vector splat_part(const T* from) {
  typename Lanes<T>::Vector x;
#ifdef __AVX512F__
  const __m512 bits = _mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(from)));
  std::memcpy(&x, &bits, sizeof x);
#else
  for (int i = 0; i < kLanes<T>; ++i) x[i] = from[i % kPart<T>];
#endif
  return x;
}

// to[i] = from[2 i] + from[2 i + 1]
template <class T>
inline void add_pairs(const T* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[2 * i] + from[2 * i + 1];
}

// The rows at from + at[n] * step.
template <class T>
struct Rows {
  const T* from;
  int64_t step, width;
  const int32_t* at;
  int64_t count;
};

// Asks for rows that the next query needs, so that they are near by then.
template <class T>
inline void fetch(const Rows<T>& rows, int64_t begin, int64_t end) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t n = begin; n < std::min(end, rows.count); ++n)
    for (int64_t c = 0; c < rows.width; c += kCacheLine) __builtin_prefetch(rows.from + rows.at[n] * rows.step + c, 0, 2);
}

// to[n][h] = x_n . q_h for the rows x_n and one group of heads; q as `interleave` lays it out. Writes whole steps of kKeys rows, and
// asks for as many rows of `next` meanwhile.
template <class T>
void dots(const Rows<T>& x, const T* q, T* to, const Rows<T>& next) {
  using V = typename Lanes<T>::Vector;
  constexpr int N = kVectors<T>;
  const int64_t parts = x.width / kPart<T>;
  for (int64_t n = 0; n < x.count; n += kKeys, to += kKeys * kHeads) {
    const T* rows[kKeys];
    for (int64_t i = 0; i < kKeys; ++i) rows[i] = x.from + x.at[std::min(n + i, x.count - 1)] * x.step;
    fetch(next, n, n + kKeys);
    V sums[kKeys][N] = {};
    for (int64_t c = 0; c < parts; ++c) {
      V heads[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) heads[j] = load<V>(q + (c * N + j) * kLanes<T>);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kKeys; ++i) {
        const V part = splat_part(rows[i] + c * kPart<T>);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sums[i][j] += heads[j] * part;
      }
    }
    constexpr int64_t kMade = kKeys * kHeads;
    alignas(kBytes) T apart[kMade * kPart<T>], halves[kMade * 2];
    for (int64_t i = 0; i < kKeys; ++i)
      for (int j = 0; j < N; ++j) store(apart + (i * N + j) * kLanes<T>, sums[i][j]);
    if constexpr (kPart<T> == 4) add_pairs(apart, kMade * 2, halves);
    add_pairs(kPart<T> == 4 ? halves : apart, kMade, to);
  }
}

// to[h][width] += sum_n weights[n][h] x_n for one group of heads; N vectors of columns.
template <class T, int N>
void accumulate_columns(const T* from, int64_t step, const int32_t* at, int64_t count, const T* weights, T* to, int64_t stride) {
  using V = typename Lanes<T>::Vector;
  V sums[kHeads][N];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[h][i] = load<V>(to + h * stride + i * kLanes<T>);
  for (int64_t n = 0; n < count; ++n) {
    const T* row = from + at[n] * step;
    V x[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = load<V>(row + i * kLanes<T>);
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      const V weight = splat(weights[n * kHeads + h]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[h][i] += weight * x[i];
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(to + h * stride + i * kLanes<T>, sums[h][i]);
}

template <class T>
void accumulate(const Rows<T>& x, const T* weights, T* to) {
  const int64_t vectors = x.width / kLanes<T>;
  for (int64_t i = 0, parts = (vectors + kColumns - 1) / kColumns; parts > 0; --parts) {
    const int64_t wide = (vectors - i + parts - 1) / parts, c = i * kLanes<T>;
    (wide == 3   ? accumulate_columns<T, 3>
     : wide == 2 ? accumulate_columns<T, 2>
                 : accumulate_columns<T, 1>)(x.from + c, x.step, x.at, x.count, weights, to + c, x.width);
    i += wide;
  }
}

// to_n[columns] += sum_h a[n][h] x[h][columns] (+ sum_h b[n][h] y[h][columns]) for the rows to_n = to + at[n] * step: Keys of them, N vectors.
template <class T, int Keys, int N, bool Both>
inline void scatter_block(T* to, int64_t step, const int32_t* at, const T* a, const T* x, int64_t stride_x, const T* b, const T* y,
                          int64_t stride_y) {
  using V = typename Lanes<T>::Vector;
  V sums[Keys][N];
#pragma GCC unroll 8
  for (int n = 0; n < Keys; ++n)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[n][i] = load<V>(to + at[n] * step + i * kLanes<T>);
#pragma GCC unroll 1
  for (int h = 0; h < kHeads; ++h) {
    V row[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) row[i] = load<V>(x + h * stride_x + i * kLanes<T>);
#pragma GCC unroll 8
    for (int n = 0; n < Keys; ++n) {
      const V weight = splat(a[n * kHeads + h]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[n][i] += weight * row[i];
    }
    if constexpr (Both) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) row[i] = load<V>(y + h * stride_y + i * kLanes<T>);
#pragma GCC unroll 8
      for (int n = 0; n < Keys; ++n) {
        const V weight = splat(b[n * kHeads + h]);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) sums[n][i] += weight * row[i];
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < Keys; ++n)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(to + at[n] * step + i * kLanes<T>, sums[n][i]);
}

template <class T, int Keys, bool Both>
inline void scatter_columns(int64_t vectors, T* to, int64_t step, const int32_t* at, const T* a, const T* x, int64_t stride_x, const T* b,
                            const T* y, int64_t stride_y) {
  for (int64_t i = 0, parts = (vectors + kAddedColumns - 1) / kAddedColumns; parts > 0; --parts) {
    const int64_t wide = (vectors - i + parts - 1) / parts, c = i * kLanes<T>;
    (wide == 5   ? scatter_block<T, Keys, 5, Both>
     : wide == 4 ? scatter_block<T, Keys, 4, Both>
     : wide == 3 ? scatter_block<T, Keys, 3, Both>
     : wide == 2 ? scatter_block<T, Keys, 2, Both>
                 : scatter_block<T, Keys, 1, Both>)(to + c, step, at, a, x + c, stride_x, b, Both ? y + c : y, stride_y);
    i += wide;
  }
}

// to_n += sum_h a[n][h] x[h] over `width`, and where there is a `y` sum_h b[n][h] y[h] over the first `width_y` columns. The rows are
// apart from each other.
template <class T>
void scatter(T* to, int64_t step, const int32_t* at, int64_t count, const T* a, const T* x, int64_t width, const T* b, const T* y,
             int64_t width_y) {
  const int64_t both = y ? width_y / kLanes<T> : 0, rest = width / kLanes<T> - both, c = both * kLanes<T>;
  const auto rows = [&](auto keys, int64_t n) {
    constexpr int Keys = decltype(keys)::value;
    const T* an = a + n * kHeads;
    if (both) scatter_columns<T, Keys, true>(both, to, step, at + n, an, x, width, b + n * kHeads, y, width_y);
    scatter_columns<T, Keys, false>(rest, to + c, step, at + n, an, x + c, width, nullptr, nullptr, 0);
  };
  int64_t n = 0;
  for (; n + kAdded <= count; n += kAdded) rows(std::integral_constant<int, kAdded>(), n);
  for (; n < count; ++n) rows(std::integral_constant<int, 1>(), n);
}

// [kHeads][width] to [width / kPart][kHeads][kPart].
template <class T>
void interleave(const T* from, int64_t width, T* to) {
  for (int64_t c = 0; c < width; c += kPart<T>)
    for (int h = 0; h < kHeads; ++h, to += kPart<T>) std::memcpy(to, from + h * width + c, kPart<T> * sizeof(T));
}

}  // namespace sparse
}  // namespace
