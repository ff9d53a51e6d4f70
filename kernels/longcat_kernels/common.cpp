// What the operators share: the BLAS handed in by address, threads, memory, the exponential. Included by each of them, so that every
// source can be read and compiled alone; no library of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <pthread.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
                       const float*, const int*, const float*, float*, const int*);
using Dgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
                       const double*, const int*, const double*, double*, const int*);
using SetThreads = int (*)(int);

Sgemm sgemm_of_torch = nullptr;
Dgemm dgemm_of_torch = nullptr;
SetThreads set_threads_of_torch = nullptr;

std::atomic<bool> threads_used{false};
std::atomic<bool> child_of_threads{false};  // a forked child of a process whose OpenMP threads ran has none: starting them hangs

// C [rows, columns] = scale A [rows, inner] B [inner, columns] (+ C when `add`), all row-major, rows `stride` elements apart; a
// transposed operand is stored the other way.
template <class T>
void product(bool transpose_a, bool transpose_b, int64_t rows, int64_t columns, int64_t inner, const T* a, int64_t stride_a,
             const T* b, int64_t stride_b, T* c, int64_t stride_c, bool add, T scale = 1) {
  const char ta = transpose_a ? 'T' : 'N', tb = transpose_b ? 'T' : 'N';
  const int m = columns, n = rows, k = inner, lda = stride_b, ldb = stride_a, ldc = stride_c;  // BLAS counts columns first
  const T beta = add ? 1 : 0;
  if constexpr (sizeof(T) == 4)
    sgemm_of_torch(&tb, &ta, &m, &n, &k, &scale, b, &lda, a, &ldb, &beta, c, &ldc);
  else
    dgemm_of_torch(&tb, &ta, &m, &n, &k, &scale, b, &lda, a, &ldb, &beta, c, &ldc);
}

inline double exponential(double x) { return std::exp(x); }

// Cephes' expf in a form that compilers vectorise; within 2 units in the last place between -87 and 88, clamped there.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = std::nearbyint(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;  // a NaN in x stays in p, whatever the bits are
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Asks for pages of 2 MiB where a fresh buffer covers whole ones and is about to be written whole: its first writes then cost
// a tenth (32 MB of gradients: 3 ms in place of 15). A hint only; memory that has its pages already stays as it is.
void large_pages(const void* buffer, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(buffer) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer) + bytes) / kPage * kPage;
  if (buffer && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)buffer, (void)bytes;
#endif
}

// One thread's own memory, reused from one unit of work to the next; freed by the destructor.
template <class T>
struct Scratch {
  T* block = nullptr;
  explicit Scratch(int64_t elements) {
    const size_t unit = elements * sizeof(T) < (1 << 20) ? 4096 : 1 << 21;
    const size_t bytes = std::max<size_t>((elements * sizeof(T) + unit - 1) / unit * unit, unit);
    block = static_cast<T*>(std::aligned_alloc(unit, bytes));
    large_pages(block, bytes);
  }
  ~Scratch() { std::free(block); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Threads to work with, where there are `units` of work that one thread does whole.
int usable_threads(int64_t wanted, int64_t units) {
#ifdef _OPENMP
  const int threads = child_of_threads ? 1 : static_cast<int>(std::max<int64_t>(1, std::min(wanted, units)));
  if (threads > 1) threads_used = true;
  return threads;
#else
  (void)wanted, (void)units;
  return 1;
#endif
}

}  // namespace

extern "C" {

// Once, before anything else: the addresses of sgemm_, dgemm_ and MKL_Set_Num_Threads_Local in the BLAS of this process.
void longcat_set_blas(void* sgemm, void* dgemm, void* set_threads) {
  sgemm_of_torch = reinterpret_cast<Sgemm>(sgemm);
  dgemm_of_torch = reinterpret_cast<Dgemm>(dgemm);
  set_threads_of_torch = reinterpret_cast<SetThreads>(set_threads);
  pthread_atfork(nullptr, nullptr, [] { child_of_threads = child_of_threads || threads_used; });
}

}  // extern "C"
