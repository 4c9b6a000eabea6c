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
  // p, q and the common reciprocal. Far in the tails exp is constant, which would lose p / q: there the gate that is less
  // negative is held at its distance from that constant. The 1s no longer count then.
  template <class T>
  struct Normalized {
    T p, q, r;
  };
  template <class T>
  TORCH_EXT_HD static Normalized<T> normalized(Input<T> x) {
    const T d = x.forget_gate - x.input_gate;
    const T p = exp(-maximum(x.forget_gate, d - kExpLimit<T>));
    const T q = exp(-maximum(x.input_gate, -kExpLimit<T> - d));
    return {p, q, reciprocal(2 + p + q)};
  }

  template <class T>
  TORCH_EXT_HD Affine<T> affine(Input<T> x) const {
    const T v = activate(x.candidate, g);
    if (!normalize) return {sigmoid(x.forget_gate), sigmoid(x.input_gate) * v};
    const Normalized<T> n = normalized(x);
    const T i = fused(n.p, n.r, n.r);
    // 1 - i, not (1 + q) r: the gates sum to one, so nothing drifts over long times.
    return {1 - i, i * v};
  }
  template <class T>
  TORCH_EXT_HD Gradient<T, Input> vjp(Input<T> x, T h_before, T dh) const {
    const Activated<T> v = activate_with_derivative(x.candidate, g);
    if (!normalize) {
      const T f = sigmoid(x.forget_gate), i = sigmoid(x.input_gate), fdh = f * dh, idh = i * dh;
      return {
          {fused(-f, fdh, fdh) * h_before, fused(-i, idh, idh) * v.value, idh * v.derivative}, fdh};
    }
    const Normalized<T> n = normalized(x);
    const T pr = n.p * n.r, qr = n.q * n.r, f = n.r + qr, i = n.r + pr;
    const T idh = i * dh, w = (h_before - v.value) * dh;
    return {{f * pr * w, i * qr * -w, idh * v.derivative}, dh - idh};
  }
};

} // namespace torch_ext
