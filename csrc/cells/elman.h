// Elman's network, torch.nn.RNN: h = tanh(x + R h_before + bias), or relu. Elman 1990. And IndRNN, whose units see only
// themselves: h = relu(x + u h_before + bias). Li et al. 2018, arXiv:1803.04831.
#pragma once
#include "gated.h"

namespace torch_ext {

template <class T>
TORCH_EXT_HD T elman_activation(T a, bool relu) {
  return relu ? at_least(a, 0) : tanh(a);
}
// Where a is 0 relu's slope is 0, as torch has it.
template <class T>
TORCH_EXT_HD T elman_slope(T a, bool relu) {
  if (relu) return 1 - nonnegative(-a);
  const T y = tanh(a);
  return fused(-y, y, y * 0 + 1);
}

struct Elman {
  static constexpr const char* name = "elman";
  static constexpr bool two_products = false;
  static constexpr unsigned kRelu = 1;
  static constexpr Places<1> from_x{{0}}, from_h{{0}};
  bool relu;
  TORCH_EXT_HD explicit Elman(unsigned flags) : relu(flags & kRelu) {}

  template <class T>
  struct Gates {
    T a;
  };
  template <class T>
  struct State {
    T h;
  };
  template <class T>
  struct Weights {};
  template <class T>
  TORCH_EXT_HD State<T> update(Gates<T>, State<T> before, Weights<T>) const {
    return before;
  }
  template <class T>
  TORCH_EXT_HD T output(Gates<T> x, State<T>, State<T>, T, Weights<T>) const {
    return elman_activation(x.a, relu);
  }
  template <class T>
  TORCH_EXT_HD OutputGradient<Elman, T> output_vjp(
      Gates<T> x, State<T>, State<T>, T, Weights<T>, T dh) const {
    const T zero = dh * 0;
    return {{elman_slope(x.a, relu) * dh}, {zero}, {zero}, zero, {}};
  }
  template <class T>
  TORCH_EXT_HD UpdateGradient<Elman, T> update_vjp(
      Gates<T>, State<T>, State<T>, Weights<T>, State<T> dafter) const {
    const T zero = dafter.h * 0;
    return {{zero}, {zero}, {}};
  }
};

// The weight of a unit's own h is one of the cell's, and there is no matrix.
struct IndRnn {
  static constexpr const char* name = "ind_rnn";
  static constexpr bool two_products = false;
  static constexpr unsigned kRelu = 1;
  static constexpr Places<1> from_x{{0}};
  static constexpr Places<0> from_h{};
  bool relu;
  TORCH_EXT_HD explicit IndRnn(unsigned flags) : relu(flags & kRelu) {}

  template <class T>
  struct Gates {
    T a;
  };
  template <class T>
  struct State {
    T h;
  };
  template <class T>
  struct Weights {
    T u, bias;
  };
  template <class T>
  TORCH_EXT_HD State<T> update(Gates<T>, State<T> before, Weights<T>) const {
    return before;
  }
  // `seen` is h_before as its own weight sees it: through a mask, where there is one.
  template <class T>
  TORCH_EXT_HD T output(Gates<T> x, State<T>, State<T>, T seen, Weights<T> w) const {
    return elman_activation(fused(w.u, seen, x.a + w.bias), relu);
  }
  template <class T>
  TORCH_EXT_HD OutputGradient<IndRnn, T> output_vjp(
      Gates<T> x, State<T>, State<T>, T seen, Weights<T> w, T dh) const {
    const T zero = dh * 0, da = elman_slope(fused(w.u, seen, x.a + w.bias), relu) * dh;
    return {{da}, {zero}, {zero}, w.u * da, {seen * da, da}};
  }
  template <class T>
  TORCH_EXT_HD UpdateGradient<IndRnn, T> update_vjp(
      Gates<T>, State<T>, State<T>, Weights<T>, State<T> dafter) const {
    const T zero = dafter.h * 0;
    return {{zero}, {zero}, {zero, zero}};
  }
};

} // namespace torch_ext
