// The activation x sigmoid(x), over any lane type of numerics.h.
#pragma once
#include "numerics.h"

namespace torch_ext {

// x sigmoid(x). Range: all x, infinite ones too. Below -kExpLimit sigmoid has stopped falling, where its product with x
// would grow again: from there on the result stays at -kExpLimit e^-kExpLimit, 1.4e-33 from the exact one.
template <class T>
TORCH_EXT_HD T silu(T x) {
  const T bounded = at_least(x, -kExpLimit<T>);
  return bounded * sigmoid(bounded);
}

// Its derivative s (1 + x (1 - s)), s = sigmoid(x). 1 - s comes as e^-x s, so that it is exact where it is small; bounds
// on x on both sides for the same reason as above.
template <class T>
TORCH_EXT_HD T silu_derivative(T x) {
  const T bounded = at_least(at_most(x, kExpLimit<T>), -kExpLimit<T>);
  const T power = exp(-bounded), s = reciprocal(1 + power);
  return s * fused(bounded, power * s, T(1));
}

} // namespace torch_ext
