// LSTM. Hochreiter and Schmidhuber 1997; with the forget gate of Gers et al. 2000. torch.nn.LSTM's equations:
//   i, f, o = sigmoid(.), g = tanh(.);  c = f c_before + i g;  h = o tanh(c)
// Peepholes (Gers et al. 2002): i and f also see c_before, o sees c, each by a weight per unit. Coupled (Greff et al. 2017,
// arXiv:1503.04069, CIFG): i = 1 - f.
#pragma once
#include "gated.h"

namespace torch_ext {

template <bool kCoupled>
struct LstmCell;

template <>
struct LstmCell<false> {
  static constexpr const char* name = "lstm";
  static constexpr bool two_products = false;
  static constexpr unsigned kPeephole = 1;
  static constexpr Places<4> from_x{{0, 1, 2, 3}}, from_h{{0, 1, 2, 3}};
  bool peephole;
  TORCH_EXT_HD explicit LstmCell(unsigned flags) : peephole(flags & kPeephole) {}

  template <class T>
  struct Gates {
    T i, f, g, o;
  };
  template <class T>
  struct State {
    T h, c;
  };
  template <class T>
  struct Weights {
    T i, f, o;
  };
  template <class T>
  TORCH_EXT_HD State<T> update(Gates<T> x, State<T> before, Weights<T> w) const {
    const T i = sigmoid(peephole ? fused(w.i, before.c, x.i) : x.i),
            f = sigmoid(peephole ? fused(w.f, before.c, x.f) : x.f);
    return {before.h, fused(f, before.c, i * tanh(x.g))};
  }
  template <class T>
  TORCH_EXT_HD T output(Gates<T> x, State<T>, State<T> after, T seen, Weights<T> w) const {
    return sigmoid(peephole ? fused(w.o, after.c, x.o) : x.o) * tanh(seen);
  }
  template <class T>
  TORCH_EXT_HD OutputGradient<LstmCell, T> output_vjp(
      Gates<T> x, State<T>, State<T> after, T seen, Weights<T> w, T dh) const {
    const T o = sigmoid(peephole ? fused(w.o, after.c, x.o) : x.o), t = tanh(seen), zero = dh * 0;
    const T dx = fused(-o, o, o) * (t * dh), dt = o * dh;
    return {
        {zero, zero, zero, dx},
        {zero, zero},
        {zero, peephole ? w.o * dx : zero},
        fused(-t * t, dt, dt),
        {zero, zero, peephole ? after.c * dx : zero}};
  }
  template <class T>
  TORCH_EXT_HD UpdateGradient<LstmCell, T> update_vjp(
      Gates<T> x, State<T> before, State<T>, Weights<T> w, State<T> dafter) const {
    const T i = sigmoid(peephole ? fused(w.i, before.c, x.i) : x.i),
            f = sigmoid(peephole ? fused(w.f, before.c, x.f) : x.f), g = tanh(x.g),
            zero = dafter.c * 0;
    const T dc = dafter.c, di = fused(-i, i, i) * (g * dc), df = fused(-f, f, f) * (before.c * dc),
            ig = i * dc, dg = fused(-g * g, ig, ig);
    T dbefore = f * dc;
    if (peephole) dbefore = fused(w.i, di, fused(w.f, df, dbefore));
    return {
        {di, df, dg, zero},
        {zero, dbefore},
        {peephole ? before.c * di : zero, peephole ? before.c * df : zero, zero}};
  }
};

template <>
struct LstmCell<true> {
  static constexpr const char* name = "lstm with coupled gates";
  static constexpr bool two_products = false;
  static constexpr unsigned kPeephole = 1;
  static constexpr Places<3> from_x{{0, 1, 2}}, from_h{{0, 1, 2}};
  bool peephole;
  TORCH_EXT_HD explicit LstmCell(unsigned flags) : peephole(flags & kPeephole) {}

  template <class T>
  struct Gates {
    T f, g, o;
  };
  template <class T>
  struct State {
    T h, c;
  };
  template <class T>
  struct Weights {
    T f, o;
  };
  template <class T>
  TORCH_EXT_HD State<T> update(Gates<T> x, State<T> before, Weights<T> w) const {
    const T a = peephole ? fused(w.f, before.c, x.f) : x.f;
    return {before.h, fused(sigmoid(a), before.c, sigmoid(-a) * tanh(x.g))};
  }
  template <class T>
  TORCH_EXT_HD T output(Gates<T> x, State<T>, State<T> after, T seen, Weights<T> w) const {
    return sigmoid(peephole ? fused(w.o, after.c, x.o) : x.o) * tanh(seen);
  }
  template <class T>
  TORCH_EXT_HD OutputGradient<LstmCell, T> output_vjp(
      Gates<T> x, State<T>, State<T> after, T seen, Weights<T> w, T dh) const {
    const T o = sigmoid(peephole ? fused(w.o, after.c, x.o) : x.o), t = tanh(seen), zero = dh * 0;
    const T dx = fused(-o, o, o) * (t * dh), dt = o * dh;
    return {
        {zero, zero, dx},
        {zero, zero},
        {zero, peephole ? w.o * dx : zero},
        fused(-t * t, dt, dt),
        {zero, peephole ? after.c * dx : zero}};
  }
  template <class T>
  TORCH_EXT_HD UpdateGradient<LstmCell, T> update_vjp(
      Gates<T> x, State<T> before, State<T>, Weights<T> w, State<T> dafter) const {
    const T a = peephole ? fused(w.f, before.c, x.f) : x.f, f = sigmoid(a), i = sigmoid(-a),
            g = tanh(x.g), dc = dafter.c, zero = dc * 0;
    const T df = f * i * ((before.c - g) * dc), ig = i * dc;
    T dbefore = f * dc;
    if (peephole) dbefore = fused(w.f, df, dbefore);
    return {
        {df, fused(-g * g, ig, ig), zero},
        {zero, dbefore},
        {peephole ? before.c * df : zero, zero}};
  }
};
using Lstm = LstmCell<false>;
using CoupledLstm = LstmCell<true>;

} // namespace torch_ext
