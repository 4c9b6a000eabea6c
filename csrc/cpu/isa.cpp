// Compiled once per instruction set, with TORCH_EXT_ISA naming it: the table of all CPU kernels, and those of
// the diagonal family.
#include "causal_conv1d_isa.h"
#include "diagonal.h"
#include "matrix_memory_isa.h"
#include "projection_isa.h"
#include "selective_scan_isa.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {
namespace {

template <class Cell>
constexpr void list(KernelTable& t) {
  constexpr int c = DiagonalCells::index<Cell>();
  const auto add = [&]<class S>(DType dtype, S) {
    t.forward[c][int(dtype)] = &Diagonal<Cell, S>::forward;
    t.backward[c][int(dtype)] = &Diagonal<Cell, S>::backward;
  };
  add(DType::f32, float{});
  add(DType::f64, double{});
  add(DType::bf16, BFloat16{});
  add(DType::f16, Half{});
  if constexpr (Cell::complex) {
    add(DType::c64, torch_ext::Complex<float>{});
    add(DType::c128, torch_ext::Complex<double>{});
  }
}
template <class... Cell>
constexpr void list_all(KernelTable& t, Cells<Cell...>) {
  static_assert(sizeof...(Cell) <= kMaxCells);
  (list<Cell>(t), ...);
}

using V = Vec<float>;
using M = Stored<float>;

// to[i] = value(i) for whole groups of four vectors.
template <bool kStream, class F>
TORCH_EXT_HD void fill(float* to, int64_t n, F value) {
  for (int64_t i = 0; i + 4 * V::kLanes <= n; i += 4 * V::kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      put<false, kStream>(to + i + k * V::kLanes, value(i + k * V::kLanes), 0);
  if (kStream) fence_streams();
}
void copy(float* to, const float* from, int64_t n, bool stream) {
  const auto value = [from](int64_t i) __attribute__((always_inline)) { return M::load(from + i); };
  return stream ? fill<true>(to, n, value) : fill<false>(to, n, value);
}
void triad(float* to, const float* x, const float* y, int64_t n, bool stream) {
  const V scale(0.5f);
  const auto value = [=](int64_t i) __attribute__((always_inline)) {
    return scale * M::load(x + i) + M::load(y + i);
  };
  return stream ? fill<true>(to, n, value) : fill<false>(to, n, value);
}
void exponentials(float* to, const float* x, int64_t n) {
  fill<false>(
      to, n, [x](int64_t i) __attribute__((always_inline)) { return exp(M::load(x + i)); });
}
void multiply_adds(float* x, int64_t repeats) {
  V s[kMultiplyAdds], scale = M::load(x);
  for (int k = 0; k < kMultiplyAdds; ++k)
    s[k] = M::load(x + k * V::kLanes); // none is another's copy
  for (int64_t r = 0; r < repeats; ++r)
#pragma GCC unroll 16
    for (int k = 0; k < kMultiplyAdds; ++k) s[k] = fused(s[k], scale, scale);
  V sum(0.f);
  for (const V& v : s) sum = sum + v;
  M::store(x, sum);
}

constexpr KernelTable make_table() {
#define TORCH_EXT_STRING(x) #x
#define TORCH_EXT_NAME(x) TORCH_EXT_STRING(x)
  KernelTable t{
      TORCH_EXT_NAME(TORCH_EXT_ISA),
      kVectorBytes,
      {},
      {},
      {},
      {},
      copy,
      triad,
      exponentials,
      multiply_adds};
  list_all(t, DiagonalCells{});
  list_causal_conv1d(t);
  list_projections(t);
  list_selective_scan(t);
  list_matrix_memory(t);
  return t;
}

} // namespace

extern constinit const KernelTable kTable = make_table();

} // namespace torch_ext::cpu::TORCH_EXT_ISA
