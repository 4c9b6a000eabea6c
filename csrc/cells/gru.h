// GRU. Cho et al. 2014, arXiv:1406.1078: r, z = sigmoid(.), h = (1 - z) n + z h_before, and
//   n = tanh(x_n + r (R_n h_before + bias_n))     the reset gate after the product, as in torch.nn.GRU and cuDNN
//   n = tanh(x_n + R_n (r h_before) + bias_n)     before it, as in the paper
#pragma once
#include "gated.h"

namespace torch_ext {

struct Gru {
  static constexpr const char* name = "gru";
  static constexpr bool two_products = false;
  static constexpr Places<3> from_x{{0, 1, 2}}, from_h{{0, 1, 3}};
  TORCH_EXT_HD explicit Gru(unsigned) {}

  template <class T>
  struct Gates {
    T r, z, n, of_h; // n: x's part; of_h: R_n h + bias_n
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
  TORCH_EXT_HD T output(Gates<T> x, State<T> before, State<T>, T, Weights<T>) const {
    const T n = tanh(fused(sigmoid(x.r), x.of_h, x.n));
    return fused(sigmoid(x.z), before.h, sigmoid(-x.z) * n);
  }
  template <class T>
  TORCH_EXT_HD OutputGradient<Gru, T> output_vjp(
      Gates<T> x, State<T> before, State<T>, T, Weights<T>, T dh) const {
    const T r = sigmoid(x.r), z = sigmoid(x.z), not_z = sigmoid(-x.z), zero = dh * 0,
            n = tanh(fused(r, x.of_h, x.n)), through = not_z * dh,
            dn = fused(-n * n, through, through);
    return {
        {fused(-r, r, r) * (x.of_h * dn), z * not_z * ((before.h - n) * dh), dn, r * dn},
        {z * dh},
        {zero},
        zero,
        {}};
  }
  template <class T>
  TORCH_EXT_HD UpdateGradient<Gru, T> update_vjp(
      Gates<T>, State<T>, State<T>, Weights<T>, State<T> dafter) const {
    const T zero = dafter.h * 0;
    return {{zero, zero, zero, zero}, {zero}, {}};
  }
};

struct GruResetBefore {
  static constexpr const char* name = "gru with the reset gate before the product";
  static constexpr bool two_products = true;
  static constexpr Places<3> from_x{{0, 1, 2}}, from_h{{0, 1, 2}};
  TORCH_EXT_HD explicit GruResetBefore(unsigned) {}

  template <class T>
  struct Gates {
    T r, z, n;
  };
  template <class T>
  struct State {
    T h;
  };
  template <class T>
  struct Weights {};
  template <class T>
  TORCH_EXT_HD T operand(Gates<T> x, T h) const {
    return sigmoid(x.r) * h;
  }
  // Of the gradient of the operand: that of the gate r and of h.
  template <class T>
  struct OperandGradient {
    T r, h;
  };
  template <class T>
  TORCH_EXT_HD OperandGradient<T> operand_vjp(Gates<T> x, T h, T d) const {
    const T r = sigmoid(x.r);
    return {fused(-r, r, r) * (h * d), r * d};
  }
  template <class T>
  TORCH_EXT_HD State<T> update(Gates<T>, State<T> before, Weights<T>) const {
    return before;
  }
  template <class T>
  TORCH_EXT_HD T output(Gates<T> x, State<T> before, State<T>, T, Weights<T>) const {
    return fused(sigmoid(x.z), before.h, sigmoid(-x.z) * tanh(x.n));
  }
  template <class T>
  TORCH_EXT_HD OutputGradient<GruResetBefore, T> output_vjp(
      Gates<T> x, State<T> before, State<T>, T, Weights<T>, T dh) const {
    const T z = sigmoid(x.z), not_z = sigmoid(-x.z), n = tanh(x.n), zero = dh * 0,
            through = not_z * dh;
    return {
        {zero, z * not_z * ((before.h - n) * dh), fused(-n * n, through, through)},
        {z * dh},
        {zero},
        zero,
        {}};
  }
  template <class T>
  TORCH_EXT_HD UpdateGradient<GruResetBefore, T> update_vjp(
      Gates<T>, State<T>, State<T>, Weights<T>, State<T> dafter) const {
    const T zero = dafter.h * 0;
    return {{zero, zero, zero}, {zero}, {}};
  }
};

} // namespace torch_ext
