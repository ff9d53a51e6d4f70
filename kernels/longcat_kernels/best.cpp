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
#if defined(__AVX512F__) && defined(__BMI2__)
  if constexpr (sizeof(T) == 4) {
    const __m512 bars = _mm512_set1_ps(bar);
    for (int64_t i = 0; i < count; i += 16) {  // what is written was read before: kept <= i
      const __m512 some = _mm512_loadu_ps(values + i);
      const __m512i key = _mm512_loadu_si512(keys + i);
      const uint32_t valid = count - i < 16 ? (1u << (count - i)) - 1 : 0xffff;
      uint32_t taken = _mm512_cmp_ps_mask(some, bars, _CMP_GT_OQ) & valid;
      if (equals > 0) {
        const uint32_t first = equals < 16 ? (1u << equals) - 1 : 0xffff;
        const uint32_t equal = _pdep_u32(first, _mm512_cmp_ps_mask(some, bars, _CMP_EQ_OQ) & valid);
        equals -= __builtin_popcount(equal);
        taken |= equal;
      }
      _mm512_storeu_ps(values + kept, _mm512_maskz_compress_ps(taken, some));
      _mm512_storeu_si512(keys + kept, _mm512_maskz_compress_epi32(taken, key));
      kept += __builtin_popcount(taken);
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
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 bars = _mm512_set1_ps(bar);
    for (int64_t i = 0; i < count; i += kVector)
      sum += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), bars, _CMP_GT_OQ));
    return sum;
  }
#endif
  for (int64_t i = 0; i < count; i += kVector)
    for (int64_t s = 0; s < kVector; ++s) counts[s] += values[i + s] > bar;
  for (const Count each : counts) sum += each;
  return sum;
}

// `out`, with room for a vector more, gets those of `values` that are above `low` and not above `high`; returns how many.
template <class T>
int64_t within(const T* values, int64_t count, T low, T high, T* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kVector) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      const __m512 some = _mm512_loadu_ps(values + i);
      const __mmask16 in = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(some, _mm512_set1_ps(low), _CMP_GT_OQ), some, _mm512_set1_ps(high),
                                                   _CMP_LE_OQ);
      _mm512_storeu_ps(out + found, _mm512_maskz_compress_ps(in, some));
      found += __builtin_popcount(in);
      continue;
    }
#endif
    int any = 0;
    for (int64_t s = i; s < i + kVector; ++s) any |= (values[s] > low) & (values[s] <= high);
    for (int64_t s = i; any && s < i + kVector; ++s) {
      out[found] = values[s];
      found += (values[s] > low) & (values[s] <= high);
    }
  }
  return found;
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

// The float in the middle of those between two others; `low` where there is none. First of all 0, and what is next to it: scores of
// products none of which is positive tie there.
template <class T>
T middle(T low, T high) {
  if (low < 0 && high > 0) return 0;
  if (low < 0 && high == 0) return std::nextafter(high, low);
  const auto a = ordered(low), b = ordered(high);
  return disordered<T>((a & b) + ((a ^ b) >> 1));
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

  // Raises the bar so that `wanted` to wanted + spare keys stay. Guesses where: first as if ranks were spread normally (whose quantile
  // is about that of the logistic distribution), then along a line; each third guess halves the floats left, so that it ends soon for any.
  void raise(int64_t spare) {
    const int64_t whole = (count + kVector - 1) / kVector * kVector;
    typedef T Some __attribute__((vector_size(kVector * sizeof(T))));
    Some sums = {}, squares = {}, next;
    for (int64_t i = 0; i + kVector <= count; i += kVector) {  // the last few do not matter to a guess
      std::memcpy(&next, values + i, sizeof next);
      sums += next;
      squares += next * next;
    }
    T sum = 0, square = 0;
    for (int64_t s = 0; s < kVector; ++s) {
      sum += sums[s];
      square += squares[s];
    }
    std::fill(values + count, values + whole, -std::numeric_limits<T>::infinity());
    const T total = static_cast<T>(count), target = static_cast<T>(wanted) + static_cast<T>(spare) / 2;
    const T summed = static_cast<T>(count / kVector * kVector), mean = sum / summed;
    const T scale = std::sqrt(square / summed - mean * mean) * T(0.5875), margin = spare < kVector / 2 ? kVector / 4 : 0;
    T guess = mean + scale * std::log(total / target - 1), density = target * (1 - target / total) / scale;
    // More than wanted + spare are above `low`, fewer than wanted above `high`.
    T low = std::nextafter(bar, -std::numeric_limits<T>::infinity()), high = std::numeric_limits<T>::infinity(), before = 0;
    int64_t over_low = count, over_high = 0, over_before = 0, equals = 0;
    for (int step = 0; over_low > wanted + spare; ++step) {
      if (over_low - over_high <= kVector) {
        equals = settle(whole, low, high, wanted - over_high);
        break;
      }
      if (!(guess > low && guess < high) || step % 3 == 2) guess = middle(low, high);
      if (guess == low) {  // they are neighbours, and what equals `high` is too much
        bar = high;
        equals = wanted - over_high;
        break;
      }
      const int64_t over = above(values, whole, guess);
      if (step > 0 && over != over_before) density = static_cast<T>(over_before - over) / (guess - before);
      before = guess;
      over_before = over;
      if (over < wanted) {
        high = guess;
        over_high = over;
      } else {
        bar = low = guess;
        over_low = over;
      }
      // Beyond the place looked for, that it may lie between two close bars.
      guess += (static_cast<T>(over) - target + (over < wanted ? -margin : margin)) / density;
    }
    count = keep(values, keys, count, bar, equals);
  }

  // Puts the bar below the best `number` of those, at most kVector, that are above `low` and not above `high`; where the next one ties
  // with the last of them, at both, and returns how many of such are to stay.
  int64_t settle(int64_t whole, T low, T high, int64_t number) {
    T some[2 * kVector];
    int64_t found = within(values, whole, low, high, some);
    std::fill(some + found, some + kVector, -std::numeric_limits<T>::infinity());
    int32_t better[kVector] = {};  // how many
    for (int64_t i = 0; i < kVector; ++i)
      for (int64_t s = 0; s < kVector; ++s) better[s] += some[i] > some[s];
    int64_t last = 0, over = 0;  // the one that comes as number `number`, or ties with it
    for (int64_t s = 0; s < found; ++s)
      if (better[s] < number && better[s] >= over) last = s, over = better[s];
    bar = some[last];
    int64_t same = 0;
    for (int64_t s = 0; s < found; ++s) same += some[s] == bar;
    if (over + same > number) return number - over;
    bar = std::nextafter(bar, -std::numeric_limits<T>::infinity());
    return 0;
  }
};

}  // namespace indexing
}  // namespace
