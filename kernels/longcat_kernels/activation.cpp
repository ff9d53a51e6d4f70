// SiLU(gate) * up, element by element, forward and backward in one pass each: one plain C interface, no header of torch.
//
//   y = g s(g) u,   s(g) = 1 / (1 + exp(-g));   dg = d u s (1 + g (1 - s)),   du = d g s
//
// Same bits for the same input, whatever the number of threads: pieces begin at the same elements always.

#include "common.cpp"

namespace {

constexpr int64_t kPiece = 1 << 14;  // elements

template <class Work>
void over_pieces(int64_t elements, int64_t wanted, const Work& work) {
  const int64_t pieces = (elements + kPiece - 1) / kPiece;
  const int threads = usable_threads(wanted, pieces);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
  for (int64_t i = 0; i < pieces; ++i) work(i * kPiece, std::min((i + 1) * kPiece, elements));
  (void)threads;
}

template <class T>
void gated(const T* __restrict gate, const T* __restrict up, int64_t elements, int64_t threads, T* __restrict out) {
  over_pieces(elements, threads, [=](int64_t i, int64_t end) {
    for (; i < end; ++i) out[i] = gate[i] / (T(1) + exponential(-gate[i])) * up[i];
  });
}

template <class T>
void gated_backward(const T* __restrict gate, const T* __restrict up, int64_t elements, int64_t threads, const T* __restrict d,
                    T* __restrict d_gate, T* __restrict d_up) {
  over_pieces(elements, threads, [=](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const T sigmoid = T(1) / (T(1) + exponential(-gate[i])), silu = gate[i] * sigmoid, given = d[i];
      d_gate[i] = given * up[i] * (sigmoid + silu * (T(1) - sigmoid));
      d_up[i] = given * silu;
    }
  });
}

}  // namespace

extern "C" {

#define LONGCAT_ACTIVATION(T, SUFFIX)                                                                                                 \
  void longcat_gated_forward_##SUFFIX(const T* gate, const T* up, int64_t elements, int64_t threads, T* out) {                        \
    gated<T>(gate, up, elements, threads, out);                                                                                       \
  }                                                                                                                                   \
  void longcat_gated_backward_##SUFFIX(const T* gate, const T* up, int64_t elements, int64_t threads, const T* d, T* d_gate, T* d_up) { \
    gated_backward<T>(gate, up, elements, threads, d, d_gate, d_up);                                                                  \
  }

LONGCAT_ACTIVATION(float, f32)
LONGCAT_ACTIVATION(double, f64)

}  // extern "C"
