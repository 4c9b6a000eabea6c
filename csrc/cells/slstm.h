// sLSTM. Beck et al. 2024, arXiv:2405.04517, section 2.2: an exponential input gate, a normaliser n, a stabiliser m.
//   log_f = log sigmoid(.) or the pre-activation itself;  m = max(i, log_f + m_before), i where n_before is 0
//   i' = e^(i - m), f' = e^(log_f + m_before - m);  c = f' c_before + i' tanh(z);  n = f' n_before + i'
//   h = sigmoid(o) c / n
// or n = max(f' n_before + i', 1).
//
// The gradient of m: c, n and m stand for the numbers C = c e^m and N = n e^m, and m itself, which is a maximum. A gradient
// at fixed C and N, mu = dm - c dc - n dn, is what goes to the larger of the two, and it is 0 unless someone asks for the
// gradient of a final state by itself: so that is what is carried in the place of dm, and no sum that cancels.
#pragma once
#include "gated.h"

namespace torch_ext {

struct Slstm {
  static constexpr const char* name = "slstm";
  static constexpr bool two_products = false;
  static constexpr unsigned kExpForget = 1, kAtLeastOne = 2;
  static constexpr Places<4> from_x{{0, 1, 2, 3}}, from_h{{0, 1, 2, 3}};
  bool exp_forget, at_least_one;
  TORCH_EXT_HD explicit Slstm(unsigned flags)
      : exp_forget(flags & kExpForget), at_least_one(flags & kAtLeastOne) {}

  template <class T>
  struct Gates {
    T i, f, z, o;
  };
  template <class T>
  struct State {
    T h, c, n, m;
  };
  template <class T>
  struct Weights {};

  template <class T>
  struct Scales {
    T m, i, f, input_wins;
  };
  template <class T>
  TORCH_EXT_HD Scales<T> scales(Gates<T> x, State<T> before) const {
    const T log_f = exp_forget ? x.f : -softplus(-x.f), carried = log_f + before.m;
    const T empty = nonnegative(before.n) * nonnegative(-before.n);
    const T met = carried - empty * (kDouble<T> ? 1e300 : 1e38), m = maximum(x.i, met);
    return {m, exp(at_most(x.i - m, 0)), exp(at_most(carried - m, 0)), nonnegative(x.i - met)};
  }
  template <class T>
  TORCH_EXT_HD State<T> update(Gates<T> x, State<T> before, Weights<T>) const {
    const Scales<T> s = scales(x, before);
    const T n = fused(s.f, before.n, s.i);
    return {
        before.h, fused(s.f, before.c, s.i * tanh(x.z)), at_least_one ? at_least(n, 1) : n, s.m};
  }
  template <class T>
  TORCH_EXT_HD T output(Gates<T> x, State<T>, State<T> after, T seen, Weights<T>) const {
    return sigmoid(x.o) * (seen * reciprocal(after.n));
  }
  template <class T>
  TORCH_EXT_HD OutputGradient<Slstm, T> output_vjp(
      Gates<T> x, State<T>, State<T> after, T seen, Weights<T>, T dh) const {
    const T o = sigmoid(x.o), r = reciprocal(after.n), ratio = seen * r, zero = dh * 0,
            odh = o * dh;
    return {
        {zero, zero, zero, fused(-o, o, o) * (ratio * dh)},
        {zero, zero, zero, zero},
        {zero, zero, -(ratio * (r * odh)), zero},
        r * odh,
        {}};
  }
  template <class T>
  TORCH_EXT_HD UpdateGradient<Slstm, T> update_vjp(
      Gates<T> x, State<T> before, State<T> after, Weights<T>, State<T> dafter) const {
    const Scales<T> s = scales(x, before);
    const T z = tanh(x.z), zero = dafter.c * 0;
    T dn = dafter.n, mu = dafter.m;
    if (at_least_one) { // n stops at 1, and there N = e^m moves with m
      const T free = nonnegative(fused(s.f, before.n, s.i) - 1);
      mu = fused(1 - free, after.n * dn, mu);
      dn = free * dn;
    }
    const T through_i = s.i * fused(z, dafter.c, dn),
            through_f = s.f * fused(before.c, dafter.c, before.n * dn), to_f = 1 - s.input_wins;
    const T di = fused(s.input_wins, mu, through_i), dlog_f = fused(to_f, mu, through_f),
            iz = s.i * dafter.c;
    return {
        {di, exp_forget ? dlog_f : sigmoid(-x.f) * dlog_f, fused(-z * z, iz, iz), zero},
        {zero, s.f * dafter.c, s.f * dn, to_f * mu},
        {}};
  }
  template <class T>
  TORCH_EXT_HD static State<T> enter(State<T> s, State<T> d) {
    return {d.h, d.c, d.n, d.m - fused(s.c, d.c, s.n * d.n)};
  }
  template <class T>
  TORCH_EXT_HD static State<T> leave(State<T> s, State<T> d) {
    return {d.h, d.c, d.n, d.m + fused(s.c, d.c, s.n * d.n)};
  }
};

} // namespace torch_ext
