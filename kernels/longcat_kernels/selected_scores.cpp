// Index scores of chosen pairs on a CPU, forward and backward: one plain C interface, no header of torch.
//
//   I[t,i] = sum_j w[t,j] ReLU(p[t,j,i]),   p[t,j,i] = q[t,j] . k_s,   s = indices[t,i]; -inf where s = -1
//
// and with d = dL/dI, g[t,j,i] = d[t,i] w[t,j] where p[t,j,i] > 0, else 0:
//
//   dw[t,j] = sum_i d[t,i] ReLU(p[t,j,i]),   dq[t,j] = sum_i g[t,j,i] k_s,   dk_s = sum over t, j and i with indices[t,i] = s of g q[t,j]
//
// The keys of one query are gathered, some hundreds at a time. Nothing is kept for the backward pass: it multiplies again. Queries are
// cut into parts of their own dk, which are added in their order; so same bits for the same input, whatever the number of threads.

#include "best.cpp"
#include "common.cpp"

namespace {
namespace selected {

using indexing::kChunk;
using indexing::kVector;

constexpr int64_t kLine = kChunk + kVector;
constexpr int64_t kParts = 8;      // of a row's queries, at most
constexpr int64_t kFewest = 64;    // queries of a part, at least

struct Sizes {
  int64_t batch, queries, keys, heads, width, topk, key_batch, key_row;  // the last two: distances between keys, in elements
  int64_t parts() const { return std::max<int64_t>(1, std::min(kParts, queries / kFewest)); }
};

template <class T>
struct Pointers {
  const T *q, *k, *w;
  const int32_t* indices;
  T* out;
  const T* d;
  T *dq, *dk, *dw;
};

enum Outcome : int { kNoMemory = 0, kDone = 1, kNoSuchKey = 2 };

// The keys' rows, zeros where there is none; false where a number is that of no key.
template <class T>
bool gather(const Sizes& z, const T* k, const int32_t* indices, int64_t count, T* rows) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t s = indices[i];
    if (s >= z.keys || s < -1) return false;
    if (s < 0)
      std::fill(rows + i * z.width, rows + (i + 1) * z.width, T(0));
    else
      std::memcpy(rows + i * z.width, k + s * z.key_row, z.width * sizeof(T));
  }
  return true;
}

// One query's scores, or its gradients where `backward`; dk is added to. at: the query's number in the batch.
template <class T, bool backward>
bool one_query(const Sizes& z, const Pointers<T>& to, int64_t at, const T* k, T* dk, T* products, T* rows, T* more) {
  const T *q = to.q + at * z.heads * z.width, *w = to.w + at * z.heads;
  const int32_t* indices = to.indices + at * z.topk;
  T* out = to.out + at * z.topk;
  T *dq = backward && to.dq ? to.dq + at * z.heads * z.width : nullptr, *dw = backward && to.dw ? to.dw + at * z.heads : nullptr;
  if (dq) std::fill(dq, dq + z.heads * z.width, T(0));
  if (dw) std::fill(dw, dw + z.heads, T(0));
  int64_t begin = 0;
  while (begin < z.topk && indices[begin] == -1) ++begin;
  if (!backward) std::fill(out, out + begin, -std::numeric_limits<T>::infinity());
  for (; begin < z.topk; begin += kChunk) {
    const int64_t count = std::min(kChunk, z.topk - begin);
    if (!gather(z, k, indices + begin, count, rows)) return false;
    product(false, true, z.heads, count, z.width, q, z.width, rows, z.width, products, kLine, false);
    if constexpr (!backward) {
      T* __restrict scores = more;
      std::fill(scores, scores + count, T(0));
      for (int64_t j = 0; j < z.heads; ++j) {
        const T weight = w[j], *__restrict p = products + j * kLine;
        for (int64_t i = 0; i < count; ++i) scores[i] += weight * (p[i] < 0 ? T(0) : p[i]);  // a NaN stays one
      }
      for (int64_t i = 0; i < count; ++i) out[begin + i] = indices[begin + i] < 0 ? -std::numeric_limits<T>::infinity() : scores[i];
    } else {
      T* __restrict d = more;
      for (int64_t i = 0; i < count; ++i) d[i] = indices[begin + i] < 0 ? T(0) : to.d[at * z.topk + begin + i];
      for (int64_t j = 0; j < z.heads; ++j) {
        const T weight = w[j];
        T *__restrict p = products + j * kLine, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) {
          const bool on = p[i] > 0;
          sum += d[i] * (on ? p[i] : T(0));
          p[i] = on ? d[i] * weight : T(0);
        }
        if (dw) dw[j] += sum;
      }
      if (dq) product(false, false, z.heads, z.width, count, products, kLine, rows, z.width, dq, z.width, true);
      if (dk) {
        product(true, false, count, z.width, z.heads, products, kLine, q, z.width, rows, z.width, false);
        for (int64_t i = 0; i < count; ++i) {
          if (indices[begin + i] < 0) continue;
          T* __restrict sum = dk + indices[begin + i] * z.width;
          for (int64_t c = 0; c < z.width; ++c) sum[c] += rows[i * z.width + c];
        }
      }
    }
  }
  return true;
}

template <class T, bool backward>
Outcome run(const Sizes& z, const Pointers<T>& to, int64_t wanted_threads) {
  // Forward, a part is just some queries; backward, each but the first needs a dk of its own.
  const int64_t parts = backward ? z.parts() : (z.queries + kFewest - 1) / kFewest, units = z.batch * parts, dk_row = z.keys * z.width;
  const int threads = usable_threads(wanted_threads, units);
  Scratch<T> sums(backward && to.dk ? z.batch * (parts - 1) * dk_row : 0);
  std::atomic<int> outcome{sums.block ? kDone : kNoMemory};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    const int before = set_threads_of_torch(1);
    Scratch<T> scratch(z.heads * kLine + kChunk * z.width + kLine);
    if (!scratch.block) outcome = kNoMemory;
    T *products = scratch.block, *rows = products + z.heads * kLine, *more = rows + kChunk * z.width;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t i = 0; i < units; ++i) {
      const int64_t b = i / parts, part = i % parts, begin = z.queries * part / parts, end = z.queries * (part + 1) / parts;
      T* dk = !backward || !to.dk ? nullptr : part ? sums.block + (b * (parts - 1) + part - 1) * dk_row : to.dk + b * dk_row;
      if (!scratch.block || outcome != kDone) continue;
      if (dk) std::fill(dk, dk + dk_row, T(0));
      for (int64_t t = begin; t < end; ++t)
        if (!one_query<T, backward>(z, to, b * z.queries + t, to.k + b * z.key_batch, dk, products, rows, more)) outcome = kNoSuchKey;
    }
    if (backward && to.dk) {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (int64_t i = 0; i < z.batch * z.keys; ++i) {
        T* __restrict sum = to.dk + i * z.width;
        for (int64_t part = 1; part < parts && outcome == kDone; ++part) {
          const T* __restrict add = sums.block + ((i / z.keys * (parts - 1) + part - 1) * z.keys + i % z.keys) * z.width;
          for (int64_t c = 0; c < z.width; ++c) sum[c] += add[c];
        }
      }
    }
    set_threads_of_torch(before);
  }
  (void)threads;
  return static_cast<Outcome>(outcome.load());
}

}  // namespace selected
}  // namespace

extern "C" {

// q [batch, queries, heads, width], w [batch, queries, heads], indices, out and d [batch, queries, topk] dense, and so are dq, dk and dw,
// of which null ones are left out; k as `sizes` says, whose numbers are those of selected::Sizes in their order. Returns an Outcome.
#define LONGCAT_SELECTED(T, SUFFIX)                                                                                                 \
  int longcat_selected_forward_##SUFFIX(const T* q, const T* k, const T* w, const int32_t* indices, T* out, const int64_t* sizes,   \
                                        int64_t threads) {                                                                          \
    selected::Sizes z;                                                                                                              \
    std::memcpy(&z, sizes, sizeof z);                                                                                               \
    return selected::run<T, false>(z, {q, k, w, indices, out, nullptr, nullptr, nullptr, nullptr}, threads);                        \
  }                                                                                                                                 \
  int longcat_selected_backward_##SUFFIX(const T* q, const T* k, const T* w, const int32_t* indices, T* out, const int64_t* sizes,  \
                                         int64_t threads, const T* d, T* dq, T* dk, T* dw) {                                        \
    selected::Sizes z;                                                                                                              \
    std::memcpy(&z, sizes, sizeof z);                                                                                               \
    return selected::run<T, true>(z, {q, k, w, indices, out, d, dq, dk, dw}, threads);                                              \
  }

LONGCAT_SELECTED(float, f32)
LONGCAT_SELECTED(double, f64)

}  // extern "C"
