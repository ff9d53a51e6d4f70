// Indexing on a CPU: which keys each query attends to, flat or in two stages. One plain C interface, no header of torch.
//
//   I[t,s] = sum_j w[t,j] ReLU(q[t,j] . k_s)
//   S_t    = first `sinks` visible keys + last `window` visible keys + the best of the rest by I, `topk` together
//
// Keys are laid out anew once, a dimension of some neighbours side by side. Blocks of queries meet them in chunks: the products of some
// heads with some keys stay in registers until they are summed to scores, and of the scores only those above the query's bar are kept.
// A query's list grows to twice what is wanted; then the bar rises to where about the wanted number stays. Nothing is sorted: keys come
// in rising order and keep it. A key that equals the bar came after as many that are no worse, so that of equal ranks the earlier goes
// first. Queries that take all they see are not scored. A score has the same bits wherever it is computed.
//
// In two stages (LSA's hierarchical indexing), the same is done with one key a sub-block, summed to page scores, and then with the
// tokens of each page for the queries that keep it, page after page, so that its keys are near when the next query needs them. Same
// bits for the same input, whatever the number of threads.

#include "best.cpp"
#include "common.cpp"

namespace {
namespace indexing {

constexpr int64_t kBlock = 64;           // queries of a unit of work
constexpr int64_t kCached = 32 * 1024;   // bytes of the keys that all queries of a block meet before the next ones: a level-1 cache
constexpr int kTile = 4;                 // heads, and vectors of keys, whose products are in registers at once
#if defined(__AVX512F__)
constexpr int64_t kBytes = 64;  // of a vector
#elif defined(__AVX__)
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif
constexpr int kWide = kBytes < 64 ? 2 : kTile;  // vectors at once; there are half as many registers

template <class T>
struct Lanes {
  static constexpr int64_t count = kBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kBytes)));
};

struct Sizes {
  int64_t batch, queries, keys, heads, width, key_batch, key_row;  // the last two: distances between keys, in elements
  int64_t topk, sinks, window;
  int64_t page, block, pages, minmax;  // page 0: one stage
  int64_t room() const { return std::min(topk, keys); }
  int64_t pooled_width() const { return minmax ? 2 * width : width; }
  int64_t whole_pages() const { return page ? keys / page : 0; }  // only sub-blocks of whole pages have a pooled key
};

// Keys as the products want them: [vectors of keys][dimension][keys of a vector].
template <class T>
struct Packed {
  static constexpr int64_t lanes = Lanes<T>::count;
  T* data;
  int64_t width;
  static int64_t elements(int64_t keys, int64_t width) { return (keys + lanes - 1) / lanes * lanes * width; }
  T* at(int64_t s) const { return data + s / lanes * lanes * width + s % lanes; }  // its dimensions are `lanes` apart
};

// total[v] += sum over kHeads heads of w[j] max(q[j] . key, 0), for kVectors vectors of keys.
template <class T, int kHeads, int kVectors>
void weigh(const T* __restrict q, const T* __restrict w, int64_t width, const T* __restrict keys, typename Lanes<T>::Vector* total) {
  using Vector = typename Lanes<T>::Vector;
  Vector products[kHeads][kVectors] = {};
  for (int64_t d = 0; d < width; ++d) {
    Vector key[kVectors];
    for (int v = 0; v < kVectors; ++v) key[v] = reinterpret_cast<const Vector*>(keys)[v * width + d];
    for (int j = 0; j < kHeads; ++j)
      for (int v = 0; v < kVectors; ++v) products[j][v] += key[v] * q[j * width + d];
  }
  for (int j = 0; j < kHeads; ++j)
    for (int v = 0; v < kVectors; ++v) total[v] += w[j] * (products[j][v] > T(0) ? products[j][v] : Vector{});
}

// One query's scores of kVectors vectors of keys.
template <class T, int kVectors>
void tile(const T* q, const T* w, int64_t heads, int64_t width, const T* keys, T* out) {
  typename Lanes<T>::Vector total[kVectors] = {};
  int64_t j = 0;
  for (; j + kTile <= heads; j += kTile) weigh<T, kTile, kVectors>(q + j * width, w + j, width, keys, total);
  switch (heads - j) {
    case 3: weigh<T, 3, kVectors>(q + j * width, w + j, width, keys, total); break;
    case 2: weigh<T, 2, kVectors>(q + j * width, w + j, width, keys, total); break;
    case 1: weigh<T, 1, kVectors>(q + j * width, w + j, width, keys, total); break;
  }
  std::memcpy(out, total, sizeof total);
}

// Keys [first, end), of which one query's are ranked.
struct Range {
  int64_t first, end;
};

// The keys [first, end) that one query sees.
struct Seen {
  int64_t first, end;
  int64_t count() const { return end - first; }
  int64_t own(const Sizes& z) const { return (end - 1) / z.page; }  // its own page
};

// One thread's lists, and the two halves of minmax's queries.
template <class T>
struct Work {
  Scratch<T> numbers;
  Scratch<int32_t> places;
  Scratch<uint64_t> keepers;  // of each page: a bit for each query of the block; all 0 between two blocks
  Best<T> tokens[kBlock], pages[kBlock];

  static int64_t tokens_room(const Sizes& z) { return Best<T>::room(std::min(z.topk - z.sinks - z.window, z.keys)); }
  static int64_t pages_room(const Sizes& z) { return z.page ? Best<T>::room(std::min(z.pages - 1, z.whole_pages())) : 0; }
  static int64_t lists(const Sizes& z) { return kBlock * (tokens_room(z) + pages_room(z)); }

  explicit Work(const Sizes& z)
      : numbers(lists(z) + (z.minmax ? kBlock * z.heads * z.pooled_width() : 0)), places(lists(z)), keepers(z.whole_pages() + 1) {
    if (!*this) return;
    std::fill(keepers.block, keepers.block + z.whole_pages() + 1, 0);
    const int64_t all = kBlock * tokens_room(z);
    for (int64_t r = 0; r < kBlock; ++r) {
      tokens[r].values = numbers.block + r * tokens_room(z);
      tokens[r].keys = places.block + r * tokens_room(z);
      pages[r].values = numbers.block + all + r * pages_room(z);
      pages[r].keys = places.block + all + r * pages_room(z);
    }
  }
  explicit operator bool() const { return numbers.block && places.block && keepers.block; }

  // [max(q, 0) ; min(q, 0)] of some queries: times [largest ; smallest key] the sum over d of max(q_d kmax_d, q_d kmin_d).
  const T* signed_parts(const Sizes& z, const T* q, int64_t rows) {
    T* out = numbers.block + lists(z);
    for (int64_t i = 0; i < rows * z.heads; ++i)
      for (int64_t d = 0; d < z.width; ++d) {
        out[i * 2 * z.width + d] = std::max(q[i * z.width + d], T(0));
        out[i * 2 * z.width + z.width + d] = std::min(q[i * z.width + d], T(0));
      }
    return out;
  }
};

// Calls take(first key, end, scores of these keys) for one query and its keys, in chunks.
template <class T, class Take>
void score(const T* q, const T* w, int64_t heads, const Packed<T>& keys, const Range& range, const Take& take) {
  constexpr int64_t lanes = Packed<T>::lanes;
  alignas(kBytes) T scores[kChunk + kSlack];
  for (int64_t chunk = range.first / lanes * lanes; chunk < range.end; chunk += kChunk) {
    const int64_t end = std::min(chunk + kChunk, range.end), from = std::max(chunk, range.first);
    int64_t s = chunk;
    for (; s + (kWide - 1) * lanes < end; s += kWide * lanes) tile<T, kWide>(q, w, heads, keys.width, keys.at(s), scores + (s - chunk));
    for (; s < end; s += lanes) tile<T, 1>(q, w, heads, keys.width, keys.at(s), scores + (s - chunk));
    take(from, end, scores + (from - chunk));
  }
}

// The same for several queries: take(r, first key, end, scores). All meet the same keys before the next ones.
template <class T, class Take>
void score_all(const Sizes& z, const T* q, const T* w, int64_t rows, const Packed<T>& keys, const Range* ranges, const Take& take) {
  int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;
  for (int64_t r = 0; r < rows; ++r)
    if (ranges[r].first < ranges[r].end) {
      begin = std::min(begin, ranges[r].first);
      end = std::max(end, ranges[r].end);
    }
  const int64_t tile = kTile * Packed<T>::lanes, fits = kCached / static_cast<int64_t>(sizeof(T)) / keys.width;
  const int64_t step = std::min(std::max(fits / tile * tile, tile), kChunk);
  for (int64_t chunk = begin / tile * tile; chunk < end; chunk += step)
    for (int64_t r = 0; r < rows; ++r) {
      const Range part{std::max(ranges[r].first, chunk), std::min(ranges[r].end, chunk + step)};
      if (part.first < part.end)
        score(q + r * z.heads * keys.width, w + r * z.heads, z.heads, keys, part,
              [&](int64_t from, int64_t to, const T* x) { take(r, from, to, x); });
    }
}

// Writes a selection: -1, sinks, the best of the rest, window; or all that is seen.
template <class T>
void write(const Sizes& z, const Seen& seen, const Best<T>& best, bool all, int32_t* out) {
  int32_t* at = out + z.room() - (all ? seen.count() : z.sinks + best.count + z.window);
  std::fill(out, at, -1);
  const auto run = [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) *at++ = static_cast<int32_t>(s);
  };
  if (all) return run(seen.first, seen.end);
  run(seen.first, seen.first + z.sinks);
  at = std::copy(best.keys, best.keys + best.count, at);
  run(seen.end - z.window, seen.end);
}

// Stage 1: the pages that queries keep besides their own, into work.pages; `flat` queries keep all. A vector of `pooled` is the same
// sub-block of `lanes` pages side by side (see topk), so that a sum over the vectors of such a group is the scores of its pages.
template <class T>
void rank_pages(const Sizes& z, const T* q, const T* w, int64_t rows, const Packed<T>& pooled, const Seen* seen, const bool* flat,
                Work<T>& work) {
  constexpr int64_t lanes = Packed<T>::lanes;
  using Vector = typename Lanes<T>::Vector;
  const int64_t per_page = z.page / z.block, group = lanes * per_page;
  Range ranges[kBlock];
  Vector sums[kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    ranges[r] = {0, 0};
    if (flat[r]) continue;
    const int64_t own = seen[r].own(z), oldest = seen[r].first / z.page;
    work.pages[r].start(std::min(z.pages - 1, own - oldest));
    if (work.pages[r].wanted > 0) ranges[r] = {oldest / lanes * group, (own + lanes - 1) / lanes * group};
  }
  const T* queries = z.minmax ? work.signed_parts(z, q, rows) : q;
  score_all(z, queries, w, rows, pooled, ranges, [&](int64_t r, int64_t from, int64_t to, const T* x) {
    const int64_t own = seen[r].own(z), oldest = seen[r].first / z.page;
    for (; from < to; from += lanes, x += lanes) {
      const int64_t page = from / group * lanes, part = from % group / lanes;
      Vector scores;
      std::memcpy(&scores, x, sizeof scores);
      // Sub-blocks that begin before the document count 0; only the oldest page has some.
      if (page <= oldest && oldest * z.page + part * z.block < seen[r].first) scores[oldest - page] = 0;
      sums[r] = part ? sums[r] + scores : scores;
      if (part + 1 < per_page) continue;
      T out[lanes + kSlack];
      std::memcpy(out, &sums[r], sizeof sums[r]);
      const int64_t first = std::max(page, oldest);
      work.pages[r].offer(out + (first - page), std::min(page + lanes, own) - first, first);
    }
  });
  for (int64_t r = 0; r < rows; ++r)
    if (!flat[r]) work.pages[r].finish();
}

// Stage 2: ranks the ranges' keys in the pages kept into work.tokens, page after page for all queries that keep it.
template <class T>
void rank_kept(const Sizes& z, const T* q, const T* w, int64_t rows, const Packed<T>& keys, const Seen* seen, const Range* ranges,
               const bool* flat, Work<T>& work) {
  uint64_t* keepers = work.keepers.block;
  int64_t page = z.keys, last = -1;
  for (int64_t r = 0; r < rows; ++r)
    if (!flat[r] && ranges[r].first < ranges[r].end) {
      const uint64_t bit = uint64_t(1) << r;
      const Best<T>& kept = work.pages[r];
      const int64_t own = seen[r].own(z);
      for (int64_t i = 0; i < kept.count; ++i) keepers[kept.keys[i]] |= bit;
      keepers[own] |= bit;
      page = std::min(page, kept.count ? int64_t(kept.keys[0]) : own);
      last = std::max(last, own);
    }
  for (int64_t next = page; page <= last; page = next) {
    for (++next; next <= last && !keepers[next];) ++next;
    // Each query fetches its share of the next page, which is fetched whole when the last one is done.
    const char* ahead = reinterpret_cast<const char*>(keys.at(std::min(next * z.page, z.keys - 1)));
    const int64_t bytes = next <= last ? (std::min((next + 1) * z.page, z.keys) - next * z.page) * keys.width * sizeof(T) : 0;
    const char* const stop = ahead + bytes;
    const int64_t share = bytes / std::max(__builtin_popcountll(keepers[page]), 1) + 1;
    for (uint64_t left = keepers[page]; left; left &= left - 1) {
      for (const char* const to = std::min(ahead + share, stop); ahead < to; ahead += 64) __builtin_prefetch(ahead);
      const int64_t r = __builtin_ctzll(left);
      const Range part{std::max(ranges[r].first, page * z.page), std::min(ranges[r].end, (page + 1) * z.page)};
      if (part.first < part.end)
        score(q + r * z.heads * keys.width, w + r * z.heads, z.heads, keys, part,
              [&](int64_t from, int64_t to, const T* x) { work.tokens[r].offer(x, to - from, from); });
    }
    keepers[page] = 0;
  }
}

// The selections of the queries begin ... begin + rows - 1 of one row of the batch; q, w and out are theirs.
template <class T>
void select_block(const Sizes& z, const T* q, const Packed<T>& keys, const Packed<T>& pooled, const T* w, const int64_t* first,
                  int64_t begin, int64_t rows, int32_t* out, Work<T>& work) {
  Seen seen[kBlock];
  bool all[kBlock], flat[kBlock], paged = false;
  Range ranges[kBlock], dense[kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = std::max<int64_t>(z.keys - z.queries + begin + r + 1, 0);
    seen[r] = {first ? std::min(std::max<int64_t>(first[begin + r], 0), end) : 0, end};
    flat[r] = z.page == 0 || seen[r].count() <= z.pages * z.page;
    all[r] = (flat[r] && seen[r].count() <= z.topk) || seen[r].count() <= z.sinks + z.window;
    const Range middle{seen[r].first + z.sinks, seen[r].end - z.window};
    const int64_t wanted = all[r] ? 0 : std::min(z.topk - z.sinks - z.window, middle.end - middle.first);
    work.tokens[r].start(wanted);
    ranges[r] = wanted ? middle : Range{0, 0};
    dense[r] = flat[r] ? ranges[r] : Range{0, 0};
    paged = paged || !flat[r];
  }
  score_all(z, q, w, rows, keys, dense, [&](int64_t r, int64_t from, int64_t to, const T* x) { work.tokens[r].offer(x, to - from, from); });
  if (paged) {
    rank_pages(z, q, w, rows, pooled, seen, flat, work);
    rank_kept(z, q, w, rows, keys, seen, ranges, flat, work);
  }
  for (int64_t r = 0; r < rows; ++r) {
    work.tokens[r].finish();
    write(z, seen[r], work.tokens[r], all[r], out + r * z.room());
  }
}

// out[d][i] = rows[i][d] for `count` rows, at most a vector of them, `stride` apart; zeros for those that lack.
template <class T>
void turn(const T* __restrict rows, int64_t stride, int64_t width, int64_t count, T* __restrict out) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t d = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    for (; count == lanes && d + 4 <= width; d += 4) {  // four dimensions of rows i, i + 4, i + 8, i + 12; then 4 x 4 of each quarter
      __m512 part[4];
      for (int i = 0; i < 4; ++i) {
        const float* row = rows + i * stride + d;
        part[i] = _mm512_castps128_ps512(_mm_loadu_ps(row));
        part[i] = _mm512_insertf32x4(part[i], _mm_loadu_ps(row + 4 * stride), 1);
        part[i] = _mm512_insertf32x4(part[i], _mm_loadu_ps(row + 8 * stride), 2);
        part[i] = _mm512_insertf32x4(part[i], _mm_loadu_ps(row + 12 * stride), 3);
      }
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(part[0], part[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(part[0], part[1]));
      const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(part[2], part[3])), e = _mm512_castps_pd(_mm512_unpackhi_ps(part[2], part[3]));
      _mm512_storeu_pd(out + d * lanes, _mm512_unpacklo_pd(a, c));
      _mm512_storeu_pd(out + (d + 1) * lanes, _mm512_unpackhi_pd(a, c));
      _mm512_storeu_pd(out + (d + 2) * lanes, _mm512_unpacklo_pd(b, e));
      _mm512_storeu_pd(out + (d + 3) * lanes, _mm512_unpackhi_pd(b, e));
    }
#endif
  for (; d < width; ++d)
    for (int64_t i = 0; i < lanes; ++i) out[d * lanes + i] = i < count ? rows[i * stride + d] : T(0);
}

// The key of a sub-block that begins at `rows`: its mean, or its largest and smallest values.
template <class T>
void pool(const Sizes& z, const T* __restrict rows, T* __restrict out) {
  std::copy(rows, rows + z.width, out);
  if (z.minmax) std::copy(rows, rows + z.width, out + z.width);
  for (int64_t s = 1; s < z.block; ++s) {
    const T* row = rows + s * z.key_row;
    if (z.minmax)
      for (int64_t d = 0; d < z.width; ++d) {
        out[d] = row[d] > out[d] ? row[d] : out[d];
        out[z.width + d] = row[d] < out[z.width + d] ? row[d] : out[z.width + d];
      }
    else
      for (int64_t d = 0; d < z.width; ++d) out[d] += row[d];
  }
  if (!z.minmax)
    for (int64_t d = 0; d < z.width; ++d) out[d] /= static_cast<T>(z.block);
}

template <class T>
bool topk(const Sizes& z, const T* q, const T* k, const T* w, const int64_t* first, int32_t* out, int64_t wanted_threads) {
  const int64_t blocks = (z.queries + kBlock - 1) / kBlock, lanes = Packed<T>::lanes, vectors = (z.keys + lanes - 1) / lanes;
  // Pooled keys lie by groups of `lanes` pages, in these by sub-blocks of a page, and so a vector has one of each page.
  const int64_t per_page = z.page ? z.page / z.block : 0, pooled_vectors = (z.whole_pages() + lanes - 1) / lanes * per_page;
  const int64_t row = Packed<T>::elements(z.keys, z.width), pooled_row = Packed<T>::elements(pooled_vectors * lanes, z.pooled_width());
  const int threads = usable_threads(wanted_threads, z.batch * std::max(blocks, vectors / 64));
  Scratch<T> packed(z.batch * row), pooled(z.batch * pooled_row);
  std::atomic<bool> memory{packed.block && pooled.block};
  const auto keys_of = [&](int64_t b) { return Packed<T>{packed.block + b * row, z.width}; };
  const auto pooled_of = [&](int64_t b) { return Packed<T>{pooled.block + b * pooled_row, z.pooled_width()}; };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    Work<T> work(z);
    Scratch<T> means(lanes * z.pooled_width());
    if (!work || !means.block) memory = false;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t i = 0; i < z.batch * vectors; ++i) {
      const int64_t s = i % vectors * lanes;
      if (memory)
        turn(k + i / vectors * z.key_batch + s * z.key_row, z.key_row, z.width, std::min(lanes, z.keys - s), keys_of(i / vectors).at(s));
    }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t i = 0; i < z.batch * pooled_vectors; ++i) {
      const int64_t b = i / pooled_vectors, n = i % pooled_vectors, page = n / per_page * lanes;
      const int64_t count = std::min(lanes, z.whole_pages() - page);
      if (!memory) continue;
      for (int64_t p = 0; p < count; ++p)
        pool(z, k + b * z.key_batch + ((page + p) * z.page + n % per_page * z.block) * z.key_row, means.block + p * z.pooled_width());
      turn(means.block, z.pooled_width(), z.pooled_width(), count, pooled_of(b).at(n * lanes));
    }
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t i = 0; i < z.batch * blocks; ++i) {
      const int64_t b = i / blocks, begin = (blocks - 1 - i % blocks) * kBlock, at = b * z.queries + begin;  // what sees most goes first
      if (memory)
        select_block(z, q + at * z.heads * z.width, keys_of(b), pooled_of(b), w + at * z.heads, first ? first + b * z.queries : nullptr,
                     begin, std::min(kBlock, z.queries - begin), out + at * z.room(), work);
    }
  }
  (void)threads;
  return memory;
}

}  // namespace indexing
}  // namespace

extern "C" {

// q [batch, queries, heads, width], w [batch, queries, heads], first [batch, queries] or null, out [batch, queries, min(topk, keys)]
// dense; k as `sizes` says, whose numbers are those of indexing::Sizes in their order. 0: no memory.
#define LONGCAT_INDEX_TOPK(T, SUFFIX)                                                                                              \
  int longcat_index_topk_##SUFFIX(const T* q, const T* k, const T* w, const int64_t* first, int32_t* out, const int64_t* sizes,    \
                                  int64_t threads) {                                                                               \
    indexing::Sizes z;                                                                                                             \
    std::memcpy(&z, sizes, sizeof z);                                                                                              \
    return indexing::topk<T>(z, q, k, w, first, out, threads);                                                                     \
  }

LONGCAT_INDEX_TOPK(float, f32)
LONGCAT_INDEX_TOPK(double, f64)

}  // extern "C"
