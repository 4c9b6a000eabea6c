// h[t] = a[t] h[t-1] + b[t]: the recurrence itself, its coefficients given. Real or complex.
#pragma once
#include "diagonal.h"

namespace torch_ext {

struct LinearScan {
  static constexpr const char* name = "linear_scan";
  static constexpr bool complex = true;
  static constexpr unsigned gradient_reads = 1; // a, not b
  TORCH_EXT_HD explicit LinearScan(unsigned /*flags*/ = 0) {}

  template <class T>
  struct Input {
    T a, b;
  };
  template <class T>
  TORCH_EXT_HD Affine<T> affine(Input<T> x) const {
    return {x.a, x.b};
  }
  template <class T>
  TORCH_EXT_HD Gradient<T, Input> vjp(Input<T> x, T h_before, T dh) const {
    return {{dh * conj(h_before), dh}, conj(x.a) * dh};
  }
};

} // namespace torch_ext
