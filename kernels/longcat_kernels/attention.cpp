// Softmax attention on a CPU, forward and backward: one plain C interface, no header of torch.
//
//   out_t = sum_s p[t,s] v_s,   p[t,s] = exp(scale q_t . k_s - lse_t) over the visible s,   lse_t = log sum_s exp(scale q_t . k_s)
//
// Of one head, queries are worked on in blocks. A block meets only the keys from the first to the last that one of its rows may see
// (causal: up to the diagonal; packed documents: those of its own documents), in chunks whose scores stay in cache, with a running
// maximum (FlashAttention, arXiv 2205.14135). Kept for the backward pass: lse. It lays out the scores anew, and
//
//   D_t = d_out_t . out_t,   ds[t,s] = p[t,s] (d_out_t . v_s - D_t),   dq = scale ds k,   dk = scale ds^T q,   dv = p^T d_out.
//
// Matrix products are those of the BLAS that torch carries, on the tensors as they lie. Rows that see nothing give 0, and so do their
// gradients. Same bits for the same input, whatever the number of threads: one thread does a head, block after block.

#include "common.cpp"

#include <vector>

namespace {

constexpr int64_t kQueries = 64;    // of a block at most
constexpr int64_t kFewest = 16;     // of a block at least, where it could end earlier because the next row's keys are all others
constexpr int64_t kKeys = 512;      // of a chunk: its scores, 0.25 MiB in fp32 (twice that backward), fit a level-2 cache
constexpr int64_t kLine = kKeys + 16;  // elements from one row of scores to the next; a power of 2 would collide in the cache

constexpr int64_t kVector = 16;        // elements worked on at once; chunks and lines are multiples of it

// [batch, heads, rows, width], the last dimension dense; distances in elements.
template <class T>
struct View {
  T* data;
  int64_t batch, head, row;
  View(T* data, const int64_t* strides) : data(data), batch(strides[0]), head(strides[1]), row(strides[2]) {}
  T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

struct Sizes {
  int64_t batch, heads, queries, keys, width, value_width, mask_batches, mask_heads;
};

// The keys that one query may see are among [first, end): all of them when `solid`, else those that the mask marks.
struct Row {
  int64_t first, end;
  bool solid;
};

struct Block {
  int64_t begin, end, first_key, end_key;
};

// What is visible in one head; heads that share a mask share it.
struct Plan {
  const uint8_t* mask;  // [queries, keys], rows `stride` apart; null: plain causal, the last query sees all
  int64_t stride;
  std::vector<Row> rows;
  std::vector<Block> blocks;
};

Row visible(const uint8_t* mask, int64_t keys) {
  const void* found = std::memchr(mask, 1, keys);
  if (!found) return {0, 0, true};
  const int64_t first = static_cast<const uint8_t*>(found) - mask;
  int64_t end = keys, count = 0;
  while (!mask[end - 1]) --end;
  for (int64_t s = first; s < end; ++s) count += mask[s];
  return {first, end, count == end - first};
}

void plan(Plan& to, const Sizes& z, int threads) {
  to.rows.resize(z.queries);
  Row* rows = to.rows.data();
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1 && to.mask)
#endif
  for (int64_t t = 0; t < z.queries; ++t) {
    const int64_t seen = std::max<int64_t>(z.keys - z.queries + t + 1, 0);
    rows[t] = to.mask ? visible(to.mask + t * to.stride, z.keys) : Row{0, seen, true};
  }
  (void)threads;
  Block block{0, 0, z.keys, 0};
  for (int64_t t = 0; t < z.queries; ++t) {
    const bool apart = rows[t].first >= block.end_key && block.end_key > 0 && rows[t].end > 0;
    if (t - block.begin == kQueries || (apart && t - block.begin >= kFewest)) {
      to.blocks.push_back(block);
      block = {t, t, z.keys, 0};
    }
    block.end = t + 1;
    if (rows[t].end > 0) {
      block.first_key = std::min(block.first_key, rows[t].first);
      block.end_key = std::max(block.end_key, rows[t].end);
    }
  }
  to.blocks.push_back(block);
}

std::vector<Plan> plans(const Sizes& z, const uint8_t* mask, const int64_t* strides, int threads) {
  std::vector<Plan> all;
  for (int64_t b = 0; b < z.mask_batches; ++b)
    for (int64_t h = 0; h < z.mask_heads; ++h) {
      all.push_back({mask ? mask + b * strides[0] + h * strides[1] : nullptr, strides[2], {}, {}});
      plan(all.back(), z, threads);
    }
  return all;
}

// One row of a chunk of scores: its visible part [first, end) and, where that has gaps, the mask of it.
struct Part {
  int64_t first, end;
  const uint8_t* mask;
  Part(const Plan& p, int64_t t, int64_t chunk, int64_t keys) {
    const Row& row = p.rows[t];
    first = std::min(std::max(row.first - chunk, int64_t(0)), keys);
    end = std::max(std::min(row.end - chunk, keys), first);
    mask = row.solid ? nullptr : p.mask + t * p.stride + chunk;
  }
};

// x[s] = exp(x[s] - shift) where visible, else 0; returns their sum. Whole vectors, and zeros after them: rows at the diagonal end
// anywhere, and single elements would cost as much as the vectors.
template <class T>
T exponentials(T* __restrict x, const Part& part, int64_t keys, T shift) {
  const int64_t begin = part.first / kVector * kVector, end = (part.end + kVector - 1) / kVector * kVector;
  for (int64_t s = begin; s < end; s += kVector)
    for (int64_t i = s; i < s + kVector; ++i) x[i] = exponential(x[i] - shift);
  if (part.mask)
    for (int64_t s = part.first; s < part.end; ++s) x[s] = part.mask[s] ? x[s] : T(0);
  std::fill(x, x + part.first, T(0));
  std::fill(x + part.end, x + std::max(keys, end), T(0));
  T sums[kVector] = {}, sum = 0;
  for (int64_t s = begin; s < end; s += kVector)
    for (int64_t i = 0; i < kVector; ++i) sums[i] += x[s + i];
  for (const T part_sum : sums) sum += part_sum;
  return sum;
}

template <class T>
T maximum(const T* __restrict x, const Part& part, T most) {
  if (part.mask) {
    const uint8_t* __restrict mask = part.mask;
#pragma omp simd reduction(max : most)
    for (int64_t s = part.first; s < part.end; ++s) {
      const T value = mask[s] ? x[s] : -INFINITY;
      most = value > most ? value : most;
    }
  } else {
#pragma omp simd reduction(max : most)
    for (int64_t s = part.first; s < part.end; ++s) most = x[s] > most ? x[s] : most;
  }
  return most;
}

template <class T>
T dot(const T* __restrict a, const T* __restrict b, int64_t width) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T>
void zero(T* rows, int64_t count, int64_t width, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) std::fill(rows + r * stride, rows + r * stride + width, T(0));
}

// Runs `work(batch, head, plan, scratch)` for every head; false when there is no memory.
template <class T, class Work>
bool over_heads(const Sizes& z, const std::vector<Plan>& all, int64_t scratch_elements, int threads, const Work& work) {
  std::atomic<bool> memory{true};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    const int before = set_threads_of_torch(1);
    Scratch<T> scratch(scratch_elements);
    if (!scratch.block) memory = false;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t i = 0; i < z.batch * z.heads; ++i) {
      const int64_t b = i / z.heads, h = i % z.heads;
      const Plan& p = all[(z.mask_batches > 1 ? b : 0) * z.mask_heads + (z.mask_heads > 1 ? h : 0)];
      if (scratch.block) work(b, h, p, scratch.block);
    }
    set_threads_of_torch(before);
  }
  return memory;
}

template <class T>
bool attend(const Sizes& z, const View<const T>& q, const View<const T>& k, const View<const T>& v, const std::vector<Plan>& all, T scale,
            const View<T>& out, T* lse, int threads) {
  return over_heads<T>(z, all, kQueries * kLine, threads, [&](int64_t b, int64_t h, const Plan& p, T* scores) {
    T* kept = lse + (b * z.heads + h) * z.queries;
    T most[kQueries], sum[kQueries];
    for (const Block& block : p.blocks) {
      const int64_t rows = block.end - block.begin;
      T* to = out.at(b, h) + block.begin * out.row;
      if (block.end_key == 0) zero(to, rows, z.value_width, out.row);
      std::fill(most, most + rows, T(-INFINITY));
      std::fill(sum, sum + rows, T(0));
      for (int64_t chunk = block.first_key; chunk < block.end_key; chunk += kKeys) {
        const int64_t keys = std::min(kKeys, block.end_key - chunk);
        product(false, true, rows, keys, z.width, q.at(b, h) + block.begin * q.row, q.row, k.at(b, h) + chunk * k.row, k.row, scores, kLine,
                false, scale);
        for (int64_t r = 0; r < rows; ++r) {
          T* row = scores + r * kLine;
          const Part part(p, block.begin + r, chunk, keys);
          const T larger = maximum(row, part, most[r]), factor = larger == most[r] ? T(1) : exponential(most[r] - larger);
          sum[r] = sum[r] * factor + exponentials(row, part, keys, larger);
          most[r] = larger;
          if (chunk > block.first_key && factor != T(1))
            for (int64_t i = 0; i < z.value_width; ++i) to[r * out.row + i] *= factor;
        }
        product(false, false, rows, z.value_width, keys, scores, kLine, v.at(b, h) + chunk * v.row, v.row, to, out.row,
                chunk > block.first_key);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const bool seen = p.rows[block.begin + r].end > 0;
        const T share = seen ? T(1) / sum[r] : T(0);
        kept[block.begin + r] = seen ? most[r] + std::log(sum[r]) : T(-INFINITY);
        for (int64_t i = 0; i < z.value_width; ++i) to[r * out.row + i] *= share;
      }
    }
  });
}

// Gradients; where a target has no memory it is left out.
template <class T>
bool attend_backward(const Sizes& z, const View<const T>& q, const View<const T>& k, const View<const T>& v, const std::vector<Plan>& all,
                     T scale, const View<T>& out, const T* lse, const View<const T>& d_out, const View<T>& dq, const View<T>& dk,
                     const View<T>& dv, int threads) {
  return over_heads<T>(z, all, 2 * kQueries * kLine, threads, [&](int64_t b, int64_t h, const Plan& p, T* shares) {
    T* ds = shares + kQueries * kLine;
    const T* kept = lse + (b * z.heads + h) * z.queries;
    if (dk.data) zero(dk.at(b, h), z.keys, z.width, dk.row);
    if (dv.data) zero(dv.at(b, h), z.keys, z.value_width, dv.row);
    for (const Block& block : p.blocks) {
      const int64_t rows = block.end - block.begin;
      const T *query = q.at(b, h) + block.begin * q.row, *given = d_out.at(b, h) + block.begin * d_out.row;
      const T* made = out.at(b, h) + block.begin * out.row;
      if (block.end_key == 0 && dq.data) zero(dq.at(b, h) + block.begin * dq.row, rows, z.width, dq.row);
      T mean[kQueries];
      for (int64_t r = 0; r < rows; ++r) mean[r] = dot(given + r * d_out.row, made + r * out.row, z.value_width);
      for (int64_t chunk = block.first_key; chunk < block.end_key; chunk += kKeys) {
        const int64_t keys = std::min(kKeys, block.end_key - chunk);
        const T *key = k.at(b, h) + chunk * k.row, *value = v.at(b, h) + chunk * v.row;
        product(false, true, rows, keys, z.width, query, q.row, key, k.row, shares, kLine, false, scale);
        product(false, true, rows, keys, z.value_width, given, d_out.row, value, v.row, ds, kLine, false);
        for (int64_t r = 0; r < rows; ++r) {
          T *__restrict share = shares + r * kLine, *__restrict d = ds + r * kLine;
          const Part part(p, block.begin + r, chunk, keys);
          exponentials(share, part, keys, kept[block.begin + r]);
          const T middle = mean[r];
          for (int64_t s = 0; s < keys; ++s) d[s] = share[s] * (d[s] - middle);
        }
        if (dv.data)
          product(true, false, keys, z.value_width, rows, shares, kLine, given, d_out.row, dv.at(b, h) + chunk * dv.row, dv.row, true);
        if (dq.data)
          product(false, false, rows, z.width, keys, ds, kLine, key, k.row, dq.at(b, h) + block.begin * dq.row, dq.row,
                  chunk > block.first_key, scale);
        if (dk.data) product(true, false, keys, z.width, rows, ds, kLine, query, q.row, dk.at(b, h) + chunk * dk.row, dk.row, true, scale);
      }
    }
  });
}

}  // namespace

extern "C" {

// `sizes`: batch, heads, queries, keys, width, value width, batches and heads of the mask (1 where shared). `strides`, in elements, of
// the dimensions batch, head and row of q, k, v, out, mask, and backward of d_out, dq, dk, dv too. lse [batch, heads, queries].
#define LONGCAT_ATTENTION(T, SUFFIX)                                                                                                  \
  int longcat_attention_forward_##SUFFIX(const T* q, const T* k, const T* v, T* out, const uint8_t* mask, T* lse, const int64_t* sizes, \
                                         const int64_t* strides, double scale, int64_t threads) try {                                 \
    Sizes z;                                                                                                                          \
    std::memcpy(&z, sizes, sizeof z);                                                                                                 \
    const int team = usable_threads(threads, z.batch * z.heads);                                                                      \
    return attend<T>(z, {q, strides}, {k, strides + 3}, {v, strides + 6}, plans(z, mask, strides + 12, team), T(scale),               \
                     {out, strides + 9}, lse, team);                                                                                  \
  } catch (const std::bad_alloc&) {                                                                                                   \
    return 0;                                                                                                                         \
  }                                                                                                                                   \
  int longcat_attention_backward_##SUFFIX(const T* q, const T* k, const T* v, T* out, const uint8_t* mask, T* lse, const int64_t* sizes, \
                                          const int64_t* strides, double scale, int64_t threads, const T* d_out, T* dq, T* dk,        \
                                          T* dv) try {                                                                                \
    Sizes z;                                                                                                                          \
    std::memcpy(&z, sizes, sizeof z);                                                                                                 \
    const int team = usable_threads(threads, z.batch * z.heads);                                                                      \
    return attend_backward<T>(z, {q, strides}, {k, strides + 3}, {v, strides + 6}, plans(z, mask, strides + 12, team), T(scale),      \
                              {out, strides + 9}, lse, {d_out, strides + 15}, {dq, strides + 18}, {dk, strides + 21},                 \
                              {dv, strides + 24}, team);                                                                              \
  } catch (const std::bad_alloc&) {                                                                                                   \
    return 0;                                                                                                                         \
  }

LONGCAT_ATTENTION(float, f32)
LONGCAT_ATTENTION(double, f64)

}  // extern "C"
