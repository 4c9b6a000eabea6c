// The contract of a gated cell, state <- cell(x, R h, state): a step whose gates see the units before through a matrix.
//
// A cell is a small struct:
//   static constexpr const char* name;
//   explicit Cell(unsigned flags);                   its options as bits
//   template <class T> struct Gates { T ...; };      what a step depends on besides the state: sums of x and R h + bias
//   template <class T> struct State { T h, ...; };   h first: what the next step's gates see
//   template <class T> struct Weights { T ...; };    numbers per unit (peepholes); may have no fields
//   static constexpr int from_x[], from_h[];         the gates that x has a part in; those that R h + bias has
//   static constexpr bool two_products;              the last of from_h sees `operand` instead of h, made of gates before it
// and the functions below, without loop, pointer or tensor library. A step is `update`, which yields all of the state
// but h, then `output`, which yields h: what it sees of the second state may be normalised in between.
//   State<T> update(Gates<T>, State<T> before, Weights<T>) const;
//   T output(Gates<T>, State<T> before, State<T> after, T seen, Weights<T>) const;
//   T operand(Gates<T>, T h) const;                  where two_products
// and their gradients, `output_vjp`, `update_vjp` and `operand_vjp`, whose oracle is dual numbers. A State of gradients
// may mean something of its own in its later fields: `enter` makes it of the gradients of a final state, `leave` makes
// those of an initial state of it.
#pragma once
#include "softplus.h"
#include "tanh.h"

namespace torch_ext {

// A struct of n fields of type T and an array of n.
template <template <class> class Fields>
inline constexpr int num_fields = __is_empty(Fields<float>)
                                      ? 0
                                      : int(sizeof(Fields<float>) / sizeof(float));
template <template <class> class Fields, class T>
TORCH_EXT_HD Fields<T> to_fields(const T* v) {
  constexpr int N = num_fields<Fields>;
  static_assert(N <= 4, "a gated cell has at most four of each");
  if constexpr (N == 0) return {};
  if constexpr (N == 1) return {v[0]};
  if constexpr (N == 2) return {v[0], v[1]};
  if constexpr (N == 3) return {v[0], v[1], v[2]};
  if constexpr (N == 4) return {v[0], v[1], v[2], v[3]};
}
template <template <class> class Fields, class T>
TORCH_EXT_HD void to_array(const Fields<T>& x, T* v) {
  constexpr int N = num_fields<Fields>;
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

template <class Cell>
inline constexpr int num_gates = num_fields<Cell::template Gates>;
template <class Cell>
inline constexpr int num_states = num_fields<Cell::template State>;
template <class Cell>
inline constexpr int num_weights = num_fields<Cell::template Weights>;
template <class Cell>
inline constexpr int num_from_x = int(Cell::from_x.size());
template <class Cell>
inline constexpr int num_from_h = int(Cell::from_h.size());

// Which gates: std::array is no friend of device code.
template <int N>
struct Places {
  int at[N > 0 ? N : 1];
  TORCH_EXT_HD constexpr int operator[](int i) const { return at[i]; }
  static constexpr int size() { return N; }
};

// What the gradient of a cell's two parts yields.
template <class Cell, class T>
struct OutputGradient {
  typename Cell::template Gates<T> gates;
  typename Cell::template State<T> before, after; // the h of `after` is not set
  T seen;
  typename Cell::template Weights<T> weights;
};
template <class Cell, class T>
struct UpdateGradient {
  typename Cell::template Gates<T> gates;
  typename Cell::template State<T> before;
  typename Cell::template Weights<T> weights;
};

} // namespace torch_ext
