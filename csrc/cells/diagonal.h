// The contract of a diagonal cell, h <- a(x) h + b(x), and what every driver does with one.
//
// A cell is a small struct:
//   static constexpr const char* name;
//   static constexpr bool complex;                 also runs on Complex lanes?
//   explicit Cell(unsigned flags);                 its options as bits
//   template <class T> struct Input { T ...; };    the tensors that run over time, one field each, all of type T
//   template <class T> Affine<T> affine(Input<T> x) const;
// and, where it saves instructions, the backward of one step:
//   template <class T> Gradient<T, Input> vjp(Input<T> x, T h_before, T dh) const;
//   static constexpr unsigned gradient_reads;      bit i: do `vjp` and the `a` of `affine` depend on input i? All: leave out
// It has no loop, no pointer and no tensor library. Without `vjp`, dual numbers differentiate `affine`.
#pragma once
#include "dual.h"

namespace torch_ext {

template <class T>
struct Affine {
  T a, b; // h = a h_before + b
};

// What the backward of one step yields: the gradients of the inputs and of h_before, which is conj(a) dh.
template <class T, template <class> class Input>
struct Gradient {
  Input<T> dx;
  T dh_before;
};

template <class Cell>
constexpr int num_inputs = int(sizeof(typename Cell::template Input<float>) / sizeof(float));

// Does the gradient of a step depend on input i? Backward drivers do not load those on which it does not.
template <class Cell>
TORCH_EXT_HD constexpr bool gradient_reads(int i) {
  if constexpr (requires { Cell::gradient_reads; })
    return Cell::gradient_reads >> i & 1;
  else
    return true;
}

// Fields to array and back, so that cells use names and drivers use loops.
template <class Cell, class T>
TORCH_EXT_HD typename Cell::template Input<T> pack(const T* v) {
  constexpr int N = num_inputs<Cell>;
  static_assert(N >= 1 && N <= 4, "a diagonal cell has one to four inputs");
  if constexpr (N == 1) return {v[0]};
  if constexpr (N == 2) return {v[0], v[1]};
  if constexpr (N == 3) return {v[0], v[1], v[2]};
  if constexpr (N == 4) return {v[0], v[1], v[2], v[3]};
}
template <class Cell, class T>
TORCH_EXT_HD void unpack(const typename Cell::template Input<T>& x, T* v) {
  constexpr int N = num_inputs<Cell>;
  if constexpr (N == 1) {
    const auto& [a] = x;
    v[0] = a;
  }
  if constexpr (N == 2) {
    const auto& [a, b] = x;
    v[0] = a, v[1] = b;
  }
  if constexpr (N == 3) {
    const auto& [a, b, c] = x;
    v[0] = a, v[1] = b, v[2] = c;
  }
  if constexpr (N == 4) {
    const auto& [a, b, c, d] = x;
    v[0] = a, v[1] = b, v[2] = c, v[3] = d;
  }
}

// The gradient by dual numbers. With h = a h_before + b, dx = dh (h_before da/dx + db/dx).
template <class Cell, class T>
TORCH_EXT_HD Gradient<T, Cell::template Input> dual_vjp(
    const Cell& cell, typename Cell::template Input<T> x, T h_before, T dh) {
  constexpr int N = num_inputs<Cell>;
  T v[N], dx[N];
  unpack<Cell, T>(x, v);
  Dual<T, N> seeded[N];
  for (int i = 0; i < N; ++i)
    seeded[i] = Dual<T, N>::make(v[i], [&](int j) { return i == j ? v[i] * 0 + 1 : v[i] * 0; });
  const Affine<Dual<T, N>> step = cell.affine(pack<Cell, Dual<T, N>>(seeded));
  for (int i = 0; i < N; ++i) dx[i] = dh * fused(h_before, step.a.d[i], step.b.d[i]);
  return {pack<Cell, T>(dx), dh * step.a.v};
}

// One step. The sum of two products neither overflows where h does not nor turns an infinity into NaN; with b = z v and
// a = 1 - z, h_before + z (v - h_before) would be an instruction less and would do both.
template <class Cell, class T>
TORCH_EXT_HD T step(const Cell& cell, typename Cell::template Input<T> x, T h_before) {
  const Affine<T> f = cell.affine(x);
  return fused(f.a, h_before, f.b);
}

// The gradient of one step: the cell's own, or else by dual numbers.
template <class Cell, class T>
TORCH_EXT_HD Gradient<T, Cell::template Input> step_vjp(
    const Cell& cell, typename Cell::template Input<T> x, T h_before, T dh) {
  if constexpr (requires { cell.vjp(x, h_before, dh); }) {
    return cell.vjp(x, h_before, dh);
  } else {
    return dual_vjp(cell, x, h_before, dh);
  }
}

} // namespace torch_ext
