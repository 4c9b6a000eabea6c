// minLSTM. Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201, section 3.2:
//   f = sigmoid(forget_gate), i = sigmoid(input_gate);  normalised: f, i <- f / (f + i), i / (f + i)
//   h = f h_before + i act(candidate)
// With p = e^-forget_gate and q = e^-input_gate the normalised gates are f = (1 + q) / (2 + p + q) and
// i = (1 + p) / (2 + p + q): two exponentials and one division.
#pragma once
#include "activation.h"
#include "diagonal.h"

namespace torch_ext {

struct MinLstm {
  static constexpr const char* name = "min_lstm";
  static constexpr bool complex = false;
  static constexpr unsigned kG = 1, kNormalize = 2;
  bool g, normalize;
  TORCH_EXT_HD explicit MinLstm(unsigned flags) : g(flags & kG), normalize(flags & kNormalize) {}

  template <class T>
  struct Input {
    T forget_gate, input_gate, candidate;
  };
  // Numerators and common reciprocal of the normalised gates. Far in the tails p and q would overflow, so both are
  // scaled by e^-shift; the 1s and the 2 would be too, but beside e^80 they no longer count. (1e30: for gates of -inf.)
  template <class T>
  struct Normalized {
    T p, q, r;
  };
  template <class T>
  TORCH_EXT_HD static Normalized<T> normalized(Input<T> x) {
    const T shift = at_most(at_least(-80 - minimum(x.forget_gate, x.input_gate), 0), 1e30);
    const T p = exp(-x.forget_gate - shift), q = exp(-x.input_gate - shift);
    return {p, q, reciprocal(2 + p + q)};
  }
  template <class T>
  TORCH_EXT_HD static T minimum(T x, T y) {
    return -maximum(-x, -y);
  }

  template <class T>
  TORCH_EXT_HD Affine<T> affine(Input<T> x) const {
    const T v = activate(x.candidate, g);
    if (!normalize) return {sigmoid(x.forget_gate), sigmoid(x.input_gate) * v};
    const Normalized<T> n = normalized(x);
    const T i = (1 + n.p) * n.r;
    return {
        1 - i,
        i * v}; // 1 - i, not (1 + q) r: the gates sum to one exactly, so nothing drifts over long times
  }
  template <class T>
  TORCH_EXT_HD Gradient<T, Input> vjp(Input<T> x, T h_before, T dh) const {
    const Activated<T> v = activate_with_derivative(x.candidate, g);
    if (!normalize) {
      const T f = sigmoid(x.forget_gate), i = sigmoid(x.input_gate), idh = i * dh;
      return {{f * (1 - f) * h_before * dh, (1 - i) * idh * v.value, idh * v.derivative}, f};
    }
    const Normalized<T> n = normalized(x);
    const T i = (1 + n.p) * n.r, f = (1 + n.q) * n.r, w = (h_before - v.value) * dh;
    return {{f * (n.p * n.r) * w, -(i * (n.q * n.r) * w), i * dh * v.derivative}, 1 - i};
  }
};

} // namespace torch_ext
