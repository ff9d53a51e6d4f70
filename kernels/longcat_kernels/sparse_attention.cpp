// Attention to selected keys on a CPU, forward and backward: one plain C interface, no header of torch. One key and one value for all
// heads, which is MLA in its absorbed form:
//
//   out_{t,h} = sum_s p[t,h,s] v_s,   p[t,h,s] = exp(scale q_{t,h} . k_s - lse_{t,h}) over the selected s,   mass_{t,s} = mean_h p[t,h,s]
//
// A query's heads share its keys, so that a row, read where it lies, meets eight heads at once (sparse_rows.cpp). Rows come from far
// away: those of the next query are asked for while this one is worked on. Kept for the backward pass: lse. It makes the scores anew, and
//
//   D_{t,h} = d_out_{t,h} . out_{t,h},   ds = p (d_out_{t,h} . v_s - D_{t,h}),   dq = scale ds k,   dk_s = scale sum ds q,   dv_s = sum p d_out.
//
// Keys of a window are no case of their own: neighbouring queries find them in cache, where these products come as near to the
// processor's speed as those of a BLAS (tried: a block of queries by all keys of its windows; equal time for twice the code).
// Same bits for the same input, whatever the number of threads: one thread does a query forward, and a row of the batch backward.

#include "sparse_rows.cpp"

namespace {
namespace sparse {

constexpr int64_t kUnit = 64;  // queries that a thread takes at once

enum Outcome { kNoMemory = 0, kDone = 1, kNotASelection = 2, kNotAWindow = 3 };

struct Sizes {
  int64_t batch, queries, heads, keys, width, value_width, topk, window;
  int64_t steps_q[3], steps_k[2], steps_v[2];  // elements from a batch row, query and head (key) to the next
  int64_t steps_d_out[3], steps_dk[2], steps_dv[2];
  int64_t joint;  // dv is part of dk, in its first columns
};

// A query's selection: `count` keys `at`, the first `far` of which are not in its window. It stands at the key `self`.
struct Picks {
  const int32_t* at;
  int64_t count, far, self;
};

Picks picks(const int32_t* row, const Sizes& z, int64_t t) {
  int64_t none = 0;
  while (none < z.topk && row[none] < 0) ++none;
  const int64_t count = z.topk - none;
  return {row + none, count, count - std::min(z.window, count), z.keys - z.queries + t};
}

// Rising, visible to the query, and ending with the window that was promised.
Outcome check(const Picks& p) {
  bool rising = true;
  for (int64_t n = 1; n < p.count; ++n) rising &= p.at[n] > p.at[n - 1];
  if (!rising || (p.count && p.at[p.count - 1] > p.self)) return kNotASelection;
  const int64_t window = p.count - p.far;
  return !window || (p.at[p.far] == p.self - window + 1 && p.at[p.count - 1] == p.self) ? kDone : kNotAWindow;
}

// One thread's memory for one query. Widths are whole vectors, heads whole groups; zeros fill up.
template <class T>
struct Space {
  int64_t heads, width, value_width;
  T *q, *given, *out, *dq;             // [heads, width or value width]
  T *turned, *given_turned;            // of one group, interleaved
  T *scores, *d_scores;                // [topk, kHeads]
  T *lse, *mean;                       // [heads]
  int64_t elements = 0;

  Space(const Sizes& z, T* memory)
      : heads(up(z.heads, kHeads)), width(up(z.width, kLanes<T>)), value_width(up(z.value_width, kLanes<T>)) {
    const auto take = [&](int64_t count) {
      T* part = memory ? memory + elements : nullptr;
      elements += up(count, 64 / sizeof(T));
      return part;
    };
    const int64_t slots = up(z.topk, kKeys) + 1;
    q = take(heads * width), given = take(heads * value_width), out = take(heads * value_width), dq = take(heads * width);
    turned = take(kHeads * width), given_turned = take(kHeads * value_width);
    scores = take(slots * kHeads), d_scores = take(slots * kHeads);
    lse = take(heads), mean = take(heads);
  }
};

// to [more_heads, more_width] = factor from [heads, width], zeros where it has grown.
template <class T>
void copy_in(const T* from, int64_t step, int64_t heads, int64_t width, T factor, T* to, int64_t more_heads, int64_t more_width) {
  for (int64_t h = 0; h < more_heads; ++h, to += more_width) {
    const T* __restrict row = from + h * step;
    const int64_t wide = h < heads ? width : 0;
    for (int64_t i = 0; i < wide; ++i) to[i] = factor * row[i];
    std::fill(to + wide, to + more_width, T(0));
  }
}

// to [heads, width] = factor of that part of from [.., more_width].
template <class T>
void copy_out(const T* from, int64_t heads, int64_t width, T factor, T* __restrict to, int64_t more_width) {
  for (int64_t h = 0; h < heads; ++h, to += width) {
    const T* __restrict row = from + h * more_width;
    for (int64_t i = 0; i < width; ++i) to[i] = factor * row[i];
  }
}

template <class T>
T dot(const T* __restrict a, const T* __restrict b, int64_t width) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

// One query and group of heads: scores [count, kHeads] become weights that sum to 1, 0 for heads that fill up the group. Then
// mass[n] += share sum_h weights[n][h].
template <class T>
void softmax(T* __restrict scores, int64_t count, int64_t heads, T* lse, T share, T* __restrict mass) {
  constexpr int G = kHeads, L = std::max(kLanes<T>, G);
  const int64_t end = up(count * G, L);
  std::fill(scores + count * G, scores + end, T(-INFINITY));
  T most[L], sum[L] = {}, factor[L];
  std::fill(most, most + L, T(-INFINITY));
  for (int64_t i = 0; i < end; i += L)
    for (int j = 0; j < L; ++j) most[j] = scores[i + j] > most[j] ? scores[i + j] : most[j];
  for (int j = G; j < L; ++j) most[j % G] = std::max(most[j % G], most[j]);
  for (int j = G; j < L; ++j) most[j] = most[j % G];
  for (int64_t i = 0; i < end; i += L)
    for (int j = 0; j < L; ++j) scores[i + j] = exponential(scores[i + j] - most[j]);
  std::fill(scores + count * G, scores + end, T(0));
  for (int64_t i = 0; i < end; i += L)
    for (int j = 0; j < L; ++j) sum[j] += scores[i + j];
  for (int j = G; j < L; ++j) sum[j % G] += sum[j];
  for (int j = 0; j < L; ++j) factor[j] = j % G < heads ? T(1) / sum[j % G] : T(0);
  for (int h = 0; h < std::min<int64_t>(G, heads); ++h) lse[h] = most[h] + std::log(sum[h]);
  for (int64_t i = 0; i < end; i += L)
    for (int j = 0; j < L; ++j) scores[i + j] *= factor[j];
  for (int64_t n = 0; n < count; ++n) {
    T together = 0;
    for (int h = 0; h < G; ++h) together += scores[n * G + h];
    mass[n] += share * together;
  }
}

// One query and group of heads: scores become weights p, and d_scores, which are d_out . v, become p (d_out . v - D).
template <class T>
void softmax_backward(T* __restrict scores, T* __restrict d_scores, int64_t count, const T* lse, const T* mean) {
  constexpr int G = kHeads, L = std::max(kLanes<T>, G);
  T shift[L], middle[L];
  for (int j = 0; j < L; ++j) shift[j] = lse[j % G], middle[j] = mean[j % G];
  for (int64_t i = 0; i < count * G; i += L)
    for (int j = 0; j < L; ++j) {
      scores[i + j] = exponential(scores[i + j] - shift[j]);
      d_scores[i + j] = scores[i + j] * (d_scores[i + j] - middle[j]);
    }
}

// The queries [begin, end) of one row of the batch.
template <class T>
Outcome attend(const Sizes& z, const T* q, const T* k, const T* v, const int32_t* indices, T scale, T* out, T* lse, T* mass, T* memory,
               int64_t b, int64_t begin, int64_t end) {
  const Space<T> own(z, memory);
  const int64_t D = own.width, V = own.value_width, step_k = z.steps_k[1];
  k += b * z.steps_k[0], v += b * z.steps_v[0], q += b * z.steps_q[0];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = b * z.queries + t;
    const Picks p = picks(indices + row * z.topk, z, t), ahead = t + 1 < end ? picks(indices + (row + 1) * z.topk, z, t + 1) : Picks{};
    const Outcome found = check(p);
    if (found != kDone) return found;
    T *sums = lse + row * z.heads, *masses = mass + row * z.topk;
    copy_in(q + t * z.steps_q[1], z.steps_q[2], z.heads, z.width, scale, own.q, own.heads, D);
    std::fill(own.out, own.out + own.heads * V, T(0));
    std::fill(masses, masses + z.topk, T(0));
    if (!p.count) std::fill(sums, sums + z.heads, T(-INFINITY));
    for (int64_t h = 0; h < own.heads && p.count; h += kHeads) {
      interleave(own.q + h * D, D, own.turned);
      dots({k, step_k, D, p.at, p.count}, own.turned, own.scores, {k, step_k, D, ahead.at, h ? 0 : ahead.far});
      softmax(own.scores, p.count, z.heads - h, sums + h, T(1) / z.heads, masses + z.topk - p.count);
      accumulate({v, z.steps_v[1], V, p.at, p.count}, own.scores, own.out + h * V);
    }
    copy_out(own.out, z.heads, z.value_width, T(1), out + row * z.heads * z.value_width, V);
  }
  return kDone;
}

template <class T>
void zero(T* to, int64_t count) {
  large_pages(to, count * sizeof(T));
  std::fill(to, to + count, T(0));
}

// Gradients of one row of the batch; where a target has no memory it is left out.
template <class T>
void attend_backward(const Sizes& z, const T* q, const T* k, const T* v, const int32_t* indices, T scale, const T* out, const T* lse,
                     const T* d_out, T* dq, T* dk, T* dv, T* memory, int64_t b) {
  const Space<T> own(z, memory);
  const int64_t D = own.width, V = own.value_width, step_k = z.steps_k[1], step_v = z.steps_v[1], step_dk = z.steps_dk[1];
  k += b * z.steps_k[0], v += b * z.steps_v[0], q += b * z.steps_q[0], d_out += b * z.steps_d_out[0];
  if (dk) zero(dk += b * z.steps_dk[0], z.keys * step_dk);
  if (dv) zero(dv += b * z.steps_dv[0], z.keys * z.steps_dv[1]);
  for (int64_t t = 0; t < z.queries; ++t) {
    const int64_t row = b * z.queries + t;
    const Picks p = picks(indices + row * z.topk, z, t), ahead = t + 1 < z.queries ? picks(indices + (row + 1) * z.topk, z, t + 1) : Picks{};
    copy_in(q + t * z.steps_q[1], z.steps_q[2], z.heads, z.width, scale, own.q, own.heads, D);
    copy_in(d_out + t * z.steps_d_out[1], z.steps_d_out[2], z.heads, z.value_width, T(1), own.given, own.heads, V);
    std::fill(own.dq, own.dq + own.heads * D, T(0));
    std::fill(own.lse, own.lse + own.heads, T(0));  // heads that fill up the group: weights of some size, which meet zeros alone
    std::copy(lse + row * z.heads, lse + (row + 1) * z.heads, own.lse);
    std::fill(own.mean, own.mean + own.heads, T(0));
    for (int64_t h = 0; h < z.heads; ++h) own.mean[h] = dot(own.given + h * V, out + (row * z.heads + h) * z.value_width, z.value_width);
    for (int64_t h = 0; h < own.heads && p.count; h += kHeads) {
      const T *query = own.q + h * D, *given = own.given + h * V;
      const Rows<T> keys{k, step_k, D, p.at, p.count}, values{v, step_v, V, p.at, p.count};
      const int64_t next = h ? 0 : ahead.far;
      interleave(query, D, own.turned);
      interleave(given, V, own.given_turned);
      dots(keys, own.turned, own.scores, {k, step_k, D, ahead.at, next});
      dots(values, own.given_turned, own.d_scores, {dk ? dk : v, dk ? step_dk : step_v, dk ? D : V, ahead.at, next});
      softmax_backward(own.scores, own.d_scores, p.count, own.lse + h, own.mean + h);
      if (dq) accumulate(keys, own.d_scores, own.dq + h * D);
      if (dk) scatter(dk, step_dk, p.at, p.count, own.d_scores, query, D, own.scores, z.joint ? given : nullptr, V);
      if (dv) scatter<T>(dv, z.steps_dv[1], p.at, p.count, own.scores, given, V, nullptr, nullptr, 0);
    }
    if (dq) copy_out(own.dq, z.heads, z.width, scale, dq + row * z.heads * z.width, D);
  }
}

// Runs `work(memory, unit)` for every unit; kNoMemory, or what some unit found amiss.
template <class T, class Work>
int over_units(const Sizes& z, int64_t units, int64_t wanted, const Work& work) {
  std::atomic<int> outcome{kDone};
  const int threads = usable_threads(wanted, units);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    Scratch<T> scratch(Space<T>(z, nullptr).elements);
    if (!scratch.block) outcome = kNoMemory;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t i = 0; i < units; ++i) {
      const Outcome found = scratch.block ? work(scratch.block, i) : kNoMemory;
      if (found != kDone) outcome = found;
    }
  }
  (void)threads;
  return outcome;
}

}  // namespace sparse
}  // namespace

extern "C" {

// Bytes of a whole vector: rows of k, v, dk and dv are as wide as whole vectors. What is behind the width of q is 0 in k, or nothing at
// all; what is behind that of v is finite, and of no effect.
int64_t longcat_sparse_vector() { return sparse::kBytes; }

// `sizes`: the members of sparse::Sizes, in their order. Dense: indices and mass [B,T,K], out [B,T,H,d_v], lse [B,T,H], dq [B,T,H,d].
#define LONGCAT_SPARSE(T, SUFFIX)                                                                                                      \
  int longcat_sparse_forward_##SUFFIX(const T* q, const T* k, const T* v, const int32_t* indices, T* out, T* lse, T* mass,             \
                                      const int64_t* sizes, double scale, int64_t threads) {                                           \
    sparse::Sizes z;                                                                                                                   \
    std::memcpy(&z, sizes, sizeof z);                                                                                                  \
    const int64_t units = (z.queries + sparse::kUnit - 1) / sparse::kUnit;                                                             \
    return sparse::over_units<T>(z, z.batch * units, threads, [&](T* memory, int64_t i) {                                              \
      const int64_t begin = i % units * sparse::kUnit, end = std::min(begin + sparse::kUnit, z.queries);                               \
      return sparse::attend<T>(z, q, k, v, indices, T(scale), out, lse, mass, memory, i / units, begin, end);                          \
    });                                                                                                                                \
  }                                                                                                                                    \
  int longcat_sparse_backward_##SUFFIX(const T* q, const T* k, const T* v, const int32_t* indices, T* out, T* lse, T*,                 \
                                       const int64_t* sizes, double scale, int64_t threads, const T* d_out, T* dq, T* dk, T* dv) {     \
    sparse::Sizes z;                                                                                                                   \
    std::memcpy(&z, sizes, sizeof z);                                                                                                  \
    return sparse::over_units<T>(z, z.batch, threads, [&](T* memory, int64_t b) {                                                      \
      sparse::attend_backward<T>(z, q, k, v, indices, T(scale), out, lse, d_out, dq, dk, dv, memory, b);                               \
      return sparse::kDone;                                                                                                            \
    });                                                                                                                                \
  }

LONGCAT_SPARSE(float, f32)
LONGCAT_SPARSE(double, f64)

}  // extern "C"
