// The best keys of many by their ranks, as `indexing.cpp` takes them: a list with a bar that rises. No library of its own.
#pragma once

#include "common.cpp"

#include <limits>
#include <type_traits>

namespace {
namespace indexing {

constexpr int64_t kChunk = 512;  // keys offered at a time, at most
constexpr int64_t kVector = 16;  // elements worked on at once
constexpr int64_t kSlack = 64;   // elements beyond the end of a buffer that may be read and written

// values[count ...] and keys[count ...] get those of x[0 ... n) above `bar`, the first one being key `first`; returns the new count.
template <class T>
int64_t append(const T* x, int64_t n, T bar, int32_t first, T* values, int32_t* keys, int64_t count) {
  for (int64_t i = 0; i < n; i += kVector) {
    const int64_t end = std::min(i + kVector, n);
    int any = 0;
    for (int64_t s = i; s < end; ++s) any |= x[s] > bar;
    if (!any) continue;
    for (int64_t s = i; s < end; ++s) {
      values[count] = x[s];
      keys[count] = first + static_cast<int32_t>(s);
      count += x[s] > bar;
    }
  }
  return count;
}

#if defined(__AVX512F__) && defined(__AVX512VL__)
template <>
inline int64_t append(const float* x, int64_t n, float bar, int32_t first, float* values, int32_t* keys, int64_t count) {
  const __m512 bars = _mm512_set1_ps(bar);
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < n; i += 64) {  // four vectors that have one, or none at all: a branch for each would be a guess
    __m512 some[4];
    __mmask16 over[4];
    for (int v = 0; v < 4; ++v) {
      some[v] = _mm512_loadu_ps(x + i + 16 * v);
      over[v] = _mm512_cmp_ps_mask(some[v], bars, _CMP_GT_OQ);
    }
    const uint64_t valid = n - i < 64 ? (uint64_t(1) << (n - i)) - 1 : ~uint64_t(0);
    for (int v = 0; v < 4; ++v) over[v] &= static_cast<__mmask16>(valid >> (16 * v));
    if (!(over[0] | over[1] | over[2] | over[3])) continue;
    for (int v = 0; v < 4; ++v) {
      const __m512i key = _mm512_add_epi32(steps, _mm512_set1_epi32(first + static_cast<int32_t>(i) + 16 * v));
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(over[v], some[v]));
      _mm512_storeu_si512(keys + count, _mm512_maskz_compress_epi32(over[v], key));
      count += __builtin_popcount(over[v]);
    }
  }
  return count;
}
#endif

// Keeps what is above `bar`, and the first `equals` of what equals it, in their order; returns how many.
template <class T>
int64_t keep(T* values, int32_t* keys, int64_t count, T bar, int64_t equals) {
  int64_t kept = 0;
#if defined(__AVX512F__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4)
    if (equals == 0) {
      const __m512 bars = _mm512_set1_ps(bar);
      for (int64_t i = 0; i < count; i += 16) {  // what is written was read before: kept <= i
        const __m512 some = _mm512_loadu_ps(values + i);
        const __m512i key = _mm512_loadu_si512(keys + i);
        __mmask16 above = _mm512_cmp_ps_mask(some, bars, _CMP_GT_OQ);
        if (count - i < 16) above &= (1u << (count - i)) - 1;
        _mm512_storeu_ps(values + kept, _mm512_maskz_compress_ps(above, some));
        _mm512_storeu_si512(keys + kept, _mm512_maskz_compress_epi32(above, key));
        kept += __builtin_popcount(above);
      }
      return kept;
    }
#endif
  for (int64_t i = 0; i < count; ++i) {
    const T value = values[i];
    const int32_t key = keys[i];
    const bool equal = value == bar && equals > 0;
    values[kept] = value;
    keys[kept] = key;
    kept += value > bar || equal;
    equals -= equal;
  }
  return kept;
}

// How many of `values`, whose number is a multiple of kVector, are above `bar`.
template <class T>
int64_t above(const T* values, int64_t count, T bar) {
  using Count = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Count counts[kVector] = {}, sum = 0;
  for (int64_t i = 0; i < count; i += kVector)
    for (int64_t s = 0; s < kVector; ++s) counts[s] += values[i + s] > bar;
  for (const Count each : counts) sum += each;
  return sum;
}

// As an integer in the order of the floats, and back.
template <class T>
auto ordered(T x) {
  std::conditional_t<sizeof(T) == 4, int32_t, int64_t> bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits < 0 ? std::numeric_limits<decltype(bits)>::min() - bits : bits;
}
template <class T, class Bits>
T disordered(Bits order) {
  const Bits bits = order < 0 ? std::numeric_limits<Bits>::min() - order : order;
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A value between two others: halves their distance, and after some steps the number of floats between them, which ends soon for any
// numbers. Where no float lies between, `high`.
template <class T>
T between(T low, T high, int step) {
  T middle = low / 2 + high / 2;
  if (step > 12) {
    const auto a = ordered(low), b = ordered(high);
    middle = disordered<T>((a & b) + ((a ^ b) >> 1));
  }
  return middle > low && middle < high ? middle : std::nextafter(low, high);
}

// The best `wanted` keys of those offered, and some more while they come. NaN is never taken.
template <class T>
struct Best {
  T* values;
  int32_t* keys;
  int64_t wanted, count;
  T bar;

  static int64_t limit(int64_t wanted) { return 2 * wanted + 64; }
  static int64_t room(int64_t wanted) { return (limit(wanted) + kChunk + kSlack) / kVector * kVector; }

  // x: ranks of n <= kChunk keys that come after all before, the first of them key `first`.
  void offer(const T* x, int64_t n, int64_t first) {
    count = append(x, n, bar, static_cast<int32_t>(first), values, keys, count);
    if (count > limit(wanted)) raise(wanted / 8);
  }

  void start(int64_t number) {
    wanted = number;
    count = 0;
    bar = -std::numeric_limits<T>::infinity();
  }

  void finish() {
    if (count > wanted) raise(0);
  }

  // Raises the bar so that `wanted` to wanted + spare keys stay.
  void raise(int64_t spare) {
    const int64_t whole = (count + kVector - 1) / kVector * kVector;
    std::fill(values + count, values + whole, -std::numeric_limits<T>::infinity());
    T low = values[0], high = values[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < count; ++i) {
      low = values[i] < low ? values[i] : low;
      high = values[i] > high ? values[i] : high;
    }
    // More than wanted + spare are above `low`, fewer than wanted above `high`.
    int64_t over = above(values, whole, low);
    T found = low;
    for (int step = 0; over > wanted + spare || (step > 0 && over < wanted); ++step) {
      found = between(low, high, step);
      over = above(values, whole, found);
      if (found == high) break;  // they are neighbours, and what equals `high` is too much
      (over < wanted ? high : low) = found;
    }
    bar = found;
    count = keep(values, keys, count, bar, std::max<int64_t>(wanted - over, 0));
  }
};

}  // namespace indexing
}  // namespace
