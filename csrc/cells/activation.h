// The candidate's activation in minGRU and minLSTM: the identity, or g of Feng et al. 2024 (arXiv:2410.01201), appendix
// B: g(x) = x + 0.5 for x >= 0, sigmoid(x) below, which keeps the state positive.
#pragma once
#include "numerics.h"

namespace torch_ext {

template <class T>
struct Activated {
  T value, derivative;
};

template <class T>
TORCH_EXT_HD T activate(T x, bool g) {
  if (!g) return x;
  return at_least(x, 0) + sigmoid(at_most(x, 0)); // sigmoid(0) is the 0.5
}
template <class T>
TORCH_EXT_HD Activated<T> activate_with_derivative(T x, bool g) {
  if (!g) return {x, x * 0 + 1};
  const T s = sigmoid(at_most(x, 0)), positive = nonnegative(x);
  return {at_least(x, 0) + s, fused((1 - positive) * s, 1 - s, positive)};
}

} // namespace torch_ext
