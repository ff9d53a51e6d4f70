// The real-expert part of a mixture of experts on a CPU, forward and backward: one plain C interface, no header of torch.
//
//   value_t = sum over k with 0 <= i < N of weights[t,k] * down[i] (silu(gate[i] u_t) * (up[i] u_t)),   i = slots[t,k]
//
// Picks are sorted by expert (a stable counting sort). The experts' matrix products are those of the BLAS that torch carries,
// handed in by address. An expert's rows are gathered, multiplied, gated and multiplied again tile by tile, while they are in
// cache. The weight is folded into the inner activation before the product with `down`, so that its gradient is a dot product
// of inner width and the unweighted value is never needed.
//
// Same bits for the same input, whatever the number of threads: an expert's products are done by one thread in an order that
// depends on the counts alone, and rows are added to their token in the order of the experts.

#include "common.cpp"

namespace {

constexpr int64_t kTile = 256;            // rows of an expert that are worked on at once: they and its weights fit a level-2 cache
constexpr int64_t kWaveElements = 1 << 21;  // rows x width waiting to be added to their tokens when several threads work
constexpr int64_t kTransposeFrom = 24;    // rows from which a transposed copy of an expert's weights pays

#ifdef __AVX__
// out [8, 8] = in [8, 8] transposed, rows `stride_in` and `stride_out` apart.
inline void transpose_8x8(const float* in, int64_t stride_in, float* out, int64_t stride_out) {
  __m256 x[8], y[8];
  for (int i = 0; i < 4; ++i) {
    const float *top = in + i * stride_in, *low = top + 4 * stride_in;
    x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(top)), _mm_loadu_ps(low), 1);
    x[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(top + 4)), _mm_loadu_ps(low + 4), 1);
  }
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4, out += 4 * stride_out) {
    _mm256_storeu_ps(out, _mm256_shuffle_ps(y[i], y[i + 2], 0x44));
    _mm256_storeu_ps(out + stride_out, _mm256_shuffle_ps(y[i], y[i + 2], 0xEE));
    _mm256_storeu_ps(out + 2 * stride_out, _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44));
    _mm256_storeu_ps(out + 3 * stride_out, _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xEE));
  }
}
#endif

// out [columns, rows] = in [rows, columns] transposed. BLAS does the same inside a product with a transposed operand, but slowly.
template <class T>
void transpose(const T* in, int64_t rows, int64_t columns, T* out) {
  int64_t r = 0;
#ifdef __AVX__
  if constexpr (sizeof(T) == 4) {
    for (; r + 16 <= rows; r += 16) {  // 16 rows: whole cache lines of `out` at once
      int64_t c = 0;
      for (; c + 8 <= columns; c += 8) {
        const float* ahead = in + (r + 16) * columns + c * 16;  // the next 16 rows, line by line; past the end it is harmless
        for (int64_t line = 0; line < 8; ++line) __builtin_prefetch(ahead + 16 * line);
        for (int64_t i = 0; i < 16; i += 8) transpose_8x8(in + (r + i) * columns + c, columns, out + c * rows + r + i, rows);
      }
      for (; c < columns; ++c)
        for (int i = 0; i < 16; ++i) out[c * rows + r + i] = in[(r + i) * columns + c];
    }
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * rows + r] = in[r * columns + c];
}

template <class T>
struct Problem {
  const T *u, *weights, *gate_up, *down;
  const int64_t *order, *offsets;  // picks (t K + k) sorted by expert; first row of each expert in that order, and their end
  T* inner;                        // [P, 2F] pre-activations, in the sorted order; null when nothing asks for a gradient
  int64_t tokens, topk, hidden, experts, width;
};

template <class T>
void gather(const T* from, const int64_t* picks, int64_t rows, int64_t topk, int64_t hidden, T* to) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * hidden, from + picks[r] / topk * hidden, hidden * sizeof(T));
}

// Adds rows to their tokens, in the columns [first, end), one row after the other.
template <class T>
void scatter(const T* rows_of, const int64_t* picks, int64_t rows, int64_t topk, int64_t hidden, int64_t first, int64_t end, T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    T* __restrict target = to + picks[r] / topk * hidden;
    const T* __restrict source = rows_of + r * hidden;
    for (int64_t c = first; c < end; ++c) target[c] += source[c];
  }
}

int64_t rows_of(const int64_t* offsets, int64_t expert) { return offsets[expert + 1] - offsets[expert]; }

// Runs `work(expert, scratch, rows)` for every expert; what it leaves in `rows` [its rows, hidden] is added to `to` (unless null).
// `work` calls `done(first row, rows)` as tiles become ready. Returns false when there is no memory.
template <class T, class Work>
bool over_experts(const Problem<T>& p, int64_t scratch_elements, int threads, T* to, const Work& work) {
  const int64_t* offsets = p.offsets;
  if (to) std::memset(to, 0, p.tokens * p.hidden * sizeof(T));
  if (threads <= 1) {
    const int before = set_threads_of_torch(1);
    Scratch<T> scratch(scratch_elements + (to ? kTile * p.hidden : 0));
    if (scratch.block) {
      T* tile = scratch.block + scratch_elements;
      for (int64_t e = 0; e < p.experts; ++e)
        work(e, scratch.block, [&](int64_t) { return tile; },
             [&](int64_t first, int64_t rows) { scatter(tile, p.order + first, rows, p.topk, p.hidden, 0, p.hidden, to); });
    }
    set_threads_of_torch(before);
    return scratch.block != nullptr;
  }
  // Waves of experts: their rows wait side by side, then every thread adds its own columns of them, in the order of the experts.
  const int64_t most = to ? std::max<int64_t>(kWaveElements / std::max<int64_t>(p.hidden, 1), 1) : INT64_MAX;
  auto wave_end = [&](int64_t e) {
    int64_t end = e + 1;
    while (end < p.experts && offsets[end + 1] - offsets[e] <= most) ++end;
    return end;
  };
  int64_t waiting_rows = 0;
  for (int64_t e = 0; to && e < p.experts; e = wave_end(e)) waiting_rows = std::max(waiting_rows, offsets[wave_end(e)] - offsets[e]);
  Scratch<T> waiting(waiting_rows * p.hidden);
  std::atomic<bool> memory{waiting.block != nullptr};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
#ifdef _OPENMP
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
#else
    const int64_t me = 0, team = 1;
#endif
    const int before = set_threads_of_torch(1);
    Scratch<T> scratch(scratch_elements);
    if (!scratch.block) memory = false;
    const int64_t blocks = (p.hidden + 15) / 16;
    const int64_t first_column = std::min(blocks * me / team * 16, p.hidden), end_column = std::min(blocks * (me + 1) / team * 16, p.hidden);
#ifdef _OPENMP
#pragma omp barrier
#endif
    const bool enough = memory;
    for (int64_t begin = 0; enough && begin < p.experts;) {
      const int64_t end = wave_end(begin), start = offsets[begin];
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (int64_t e = begin; e < end; ++e)
        work(e, scratch.block, [&](int64_t first) { return waiting.block + (first - start) * p.hidden; }, [](int64_t, int64_t) {});
      if (to) {
        scatter(waiting.block, p.order + start, offsets[end] - start, p.topk, p.hidden, first_column, end_column, to);
#ifdef _OPENMP
#pragma omp barrier
#endif
      }
      begin = end;
    }
    set_threads_of_torch(before);
  }
  return memory;
}

template <class T>
bool forward(const Problem<T>& p, T* out, int threads) {
  const int64_t H = p.hidden, F = p.width;
  const int64_t need = kTile * H + kTile * F + kTile * 2 * F + 3 * F * H;
  if (p.inner) large_pages(p.inner, p.offsets[p.experts] * 2 * F * sizeof(T));
  return over_experts<T>(p, need, threads, out, [&](int64_t e, T* scratch, auto&& place, auto&& done) {
    const int64_t end = p.offsets[e + 1], count = rows_of(p.offsets, e);
    if (count == 0) return;
    T *x = scratch, *h = x + kTile * H, *own = h + kTile * F, *gate_up_t = own + kTile * 2 * F, *down_t = gate_up_t + 2 * F * H;
    const T *gate_up = p.gate_up + e * 2 * F * H, *down = p.down + e * H * F;
    const bool copy = sizeof(T) == 4 && count >= kTransposeFrom;
    if (copy) {
      transpose(gate_up, 2 * F, H, gate_up_t);
      transpose(down, H, F, down_t);
    }
    for (int64_t first = p.offsets[e]; first < end; first += kTile) {
      const int64_t rows = std::min(kTile, end - first);
      const int64_t* picks = p.order + first;
      T* z = p.inner ? p.inner + first * 2 * F : own;
      gather(p.u, picks, rows, p.topk, H, x);
      if (copy)
        product(false, false, rows, 2 * F, H, x, H, gate_up_t, 2 * F, z, 2 * F, false);
      else
        product(false, true, rows, 2 * F, H, x, H, gate_up, H, z, 2 * F, false);
      for (int64_t r = 0; r < rows; ++r) {
        const T weight = p.weights[picks[r]];
        const T *__restrict gate = z + r * 2 * F, *__restrict up = gate + F;
        T* __restrict row = h + r * F;
        for (int64_t f = 0; f < F; ++f) row[f] = weight * up[f] * (gate[f] / (T(1) + exponential(-gate[f])));
      }
      T* y = place(first);
      if (copy)
        product(false, false, rows, H, F, h, F, down_t, H, y, H, false);
      else
        product(false, true, rows, H, F, h, F, down, F, y, H, false);
      done(first, rows);
    }
  });
}

// Gradients; a null target is left out. `d_gate_up` and `d_down` are written whole, zeros for experts without tokens.
template <class T>
bool backward(const Problem<T>& p, const T* d_out, T* d_u, T* d_weights, T* d_gate_up, T* d_down, int threads) {
  const int64_t H = p.hidden, F = p.width;
  large_pages(d_gate_up, p.experts * 2 * F * H * sizeof(T));
  large_pages(d_down, p.experts * H * F * sizeof(T));
  if (d_weights) std::memset(d_weights, 0, p.tokens * p.topk * sizeof(T));
  const int64_t need = 2 * kTile * H + kTile * F + kTile * 2 * F;
  return over_experts<T>(p, need, threads, d_u, [&](int64_t e, T* scratch, auto&& place, auto&& done) {
    const int64_t end = p.offsets[e + 1];
    T *x = scratch, *dy = x + kTile * H, *h = dy + kTile * H, *dz = h + kTile * F;
    const T *gate_up = p.gate_up + e * 2 * F * H, *down = p.down + e * H * F;
    T* to_gate_up = d_gate_up ? d_gate_up + e * 2 * F * H : nullptr;
    T* to_down = d_down ? d_down + e * H * F : nullptr;
    if (p.offsets[e] == end) {
      if (to_gate_up) std::memset(to_gate_up, 0, 2 * F * H * sizeof(T));
      if (to_down) std::memset(to_down, 0, H * F * sizeof(T));
      return;
    }
    for (int64_t first = p.offsets[e]; first < end; first += kTile) {
      const int64_t rows = std::min(kTile, end - first);
      const int64_t* picks = p.order + first;
      const bool add = first > p.offsets[e];
      gather(d_out, picks, rows, p.topk, H, dy);
      product(false, false, rows, F, H, dy, H, down, F, h, F, false);  // gradient of the weighted inner activation
      for (int64_t r = 0; r < rows; ++r) {
        const T weight = p.weights[picks[r]];
        const T *__restrict gate = p.inner + (first + r) * 2 * F, *__restrict up = gate + F;
        T *__restrict row = h + r * F, *__restrict d_gate = dz + r * 2 * F, *__restrict d_up = d_gate + F;
        T sum[16] = {};  // a fixed order of summation that is also a vector's
        int64_t f = 0;
        auto one = [&](int64_t i, T& total) {
          const T sigmoid = T(1) / (T(1) + exponential(-gate[i])), silu = gate[i] * sigmoid;
          const T activation = silu * up[i], d = row[i], weighted = d * weight;
          total += d * activation;
          d_up[i] = weighted * silu;
          d_gate[i] = weighted * up[i] * (sigmoid + silu * (T(1) - sigmoid));
          row[i] = weight * activation;
        };
        for (; f + 16 <= F; f += 16)
          for (int64_t i = 0; i < 16; ++i) one(f + i, sum[i]);
        for (; f < F; ++f) one(f, sum[f % 16]);
        if (d_weights) {
          T total = 0;
          for (const T part : sum) total += part;
          d_weights[picks[r]] = total;
        }
      }
      if (to_down) product(true, false, H, F, rows, dy, H, h, F, to_down, F, add);
      if (to_gate_up) {
        gather(p.u, picks, rows, p.topk, H, x);
        product(true, false, 2 * F, H, rows, dz, 2 * F, x, H, to_gate_up, H, add);
      }
      if (d_u) {
        T* dx = place(first);
        product(false, false, rows, H, 2 * F, dz, 2 * F, gate_up, H, dx, H, false);
        done(first, rows);
      }
    }
  });
}

}  // namespace

extern "C" {

// Sorts the picks with 0 <= slot < experts by expert, stably. order [picks] and offsets [experts + 1] are written; returns their number.
int64_t longcat_sort_picks(const int64_t* slots, int64_t picks, int64_t experts, int64_t* order, int64_t* offsets) {
  std::memset(offsets, 0, (experts + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < picks; ++i)
    if (slots[i] >= 0 && slots[i] < experts) ++offsets[slots[i] + 1];
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  const int64_t total = offsets[experts];
  for (int64_t i = 0; i < picks; ++i)  // offsets[e] runs from an expert's first row to its end, which is the next one's first
    if (slots[i] >= 0 && slots[i] < experts) order[offsets[slots[i]]++] = i;
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
  return total;
}

#define LONGCAT_MIXTURE(T, SUFFIX)                                                                                                    \
  int longcat_forward_##SUFFIX(const T* u, const T* weights, const T* gate_up, const T* down, const int64_t* order,                   \
                               const int64_t* offsets, T* inner, int64_t tokens, int64_t topk, int64_t hidden, int64_t experts,        \
                               int64_t width, int64_t threads, T* out) {                                                              \
    return forward<T>({u, weights, gate_up, down, order, offsets, inner, tokens, topk, hidden, experts, width}, out,                  \
                      usable_threads(threads, experts));                                                                              \
  }                                                                                                                                   \
  int longcat_backward_##SUFFIX(const T* u, const T* weights, const T* gate_up, const T* down, const int64_t* order,                  \
                                const int64_t* offsets, T* inner, int64_t tokens, int64_t topk, int64_t hidden, int64_t experts,       \
                                int64_t width, int64_t threads, const T* d_out, T* d_u, T* d_weights, T* d_gate_up, T* d_down) {      \
    return backward<T>({u, weights, gate_up, down, order, offsets, inner, tokens, topk, hidden, experts, width}, d_out, d_u,          \
                       d_weights, d_gate_up, d_down, usable_threads(threads, experts));                                               \
  }

LONGCAT_MIXTURE(float, f32)
LONGCAT_MIXTURE(double, f64)

}  // extern "C"
