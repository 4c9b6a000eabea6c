// Dual numbers with N partial derivatives over any lane type: a cell run on them yields its own derivative. They are
// the backward of a cell that has no hand-written one, and the oracle of every cell that has.
#pragma once
#include "numerics.h"

namespace torch_ext {

template <class T, int N>
struct Dual {
  using Scalar = T;
  T v;
  T d[N];

  template <class F>
  TORCH_EXT_HD static Dual make(T value, F derivative) {
    Dual r{value, {}};
    for (int i = 0; i < N; ++i) r.d[i] = derivative(i);
    return r;
  }

  TORCH_EXT_HD friend Dual operator+(Dual x, Dual y) {
    return make(x.v + y.v, [&](int i) { return x.d[i] + y.d[i]; });
  }
  TORCH_EXT_HD friend Dual operator-(Dual x, Dual y) {
    return make(x.v - y.v, [&](int i) { return x.d[i] - y.d[i]; });
  }
  TORCH_EXT_HD friend Dual operator*(Dual x, Dual y) {
    return make(x.v * y.v, [&](int i) { return fused(x.d[i], y.v, x.v * y.d[i]); });
  }
  TORCH_EXT_HD friend Dual fused(Dual x, Dual y, Dual z) { return x * y + z; }
  TORCH_EXT_HD friend Dual operator-(Dual x) {
    return make(-x.v, [&](int i) { return -x.d[i]; });
  }
  TORCH_EXT_HD friend Dual operator+(Dual x, double c) {
    return make(x.v + c, [&](int i) { return x.d[i]; });
  }
  TORCH_EXT_HD friend Dual operator+(double c, Dual x) { return x + c; }
  TORCH_EXT_HD friend Dual operator-(Dual x, double c) {
    return make(x.v - c, [&](int i) { return x.d[i]; });
  }
  TORCH_EXT_HD friend Dual operator-(double c, Dual x) {
    return make(c - x.v, [&](int i) { return -x.d[i]; });
  }
  TORCH_EXT_HD friend Dual operator*(Dual x, double c) {
    return make(x.v * c, [&](int i) { return x.d[i] * c; });
  }
  TORCH_EXT_HD friend Dual operator*(double c, Dual x) { return x * c; }

  TORCH_EXT_HD friend Dual exp(Dual x) {
    T e = exp(x.v), slope = e * (1 - nonnegative(x.v - kExpLimit<T>));
    return make(e, [&](int i) { return slope * x.d[i]; });
  }
  TORCH_EXT_HD friend Dual reciprocal(Dual x) {
    T r = reciprocal(x.v);
    return make(r, [&](int i) { return -(r * r * x.d[i]); });
  }
  TORCH_EXT_HD friend Dual at_least(Dual x, double c) {
    T mine = nonnegative(x.v - c);
    return make(at_least(x.v, c), [&](int i) { return mine * x.d[i]; });
  }
  TORCH_EXT_HD friend Dual at_most(Dual x, double c) {
    T mine = 1 - nonnegative(x.v - c);
    return make(at_most(x.v, c), [&](int i) { return mine * x.d[i]; });
  }
  TORCH_EXT_HD friend Dual maximum(Dual x, Dual y) {
    T mine = nonnegative(x.v - y.v);
    return make(maximum(x.v, y.v), [&](int i) { return mine * x.d[i] + (1 - mine) * y.d[i]; });
  }
  TORCH_EXT_HD friend Dual nonnegative(Dual x) {
    return make(nonnegative(x.v), [&](int i) { return x.d[i] * 0; });
  }
  TORCH_EXT_HD friend Dual conj(Dual x) { return x; }
};

} // namespace torch_ext
