// minGRU. Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201, section 3.1:
//   z = sigmoid(gate),  h = (1 - z) h_before + z act(candidate)
// in linear space: a convex combination, so no logarithm is needed and rounding errors do not grow with time.
#pragma once
#include "activation.h"
#include "diagonal.h"

namespace torch_ext {

struct MinGru {
  static constexpr const char* name = "min_gru";
  static constexpr bool complex = false;
  static constexpr unsigned kG = 1;
  bool g; // activation "g"
  TORCH_EXT_HD explicit MinGru(unsigned flags) : g(flags & kG) {}

  template <class T>
  struct Input {
    T gate, candidate;
  };
  template <class T>
  TORCH_EXT_HD Affine<T> affine(Input<T> x) const {
    const T z = sigmoid(x.gate);
    return {1 - z, z * activate(x.candidate, g)};
  }
  template <class T>
  TORCH_EXT_HD Gradient<T, Input> vjp(Input<T> x, T h_before, T dh) const {
    const T z = sigmoid(x.gate), zdh = z * dh, carry = dh - zdh; // (1 - z) dh
    if (!g) return {{z * carry * (x.candidate - h_before), zdh}, carry};
    const Activated<T> v = activate_with_derivative(x.candidate, g);
    return {{z * carry * (v.value - h_before), zdh * v.derivative}, carry};
  }
};

} // namespace torch_ext
