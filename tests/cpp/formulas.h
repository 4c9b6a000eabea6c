// One step of each cell as its paper writes it, in plain double: what the C++ tests trust. No line is shared with csrc.
#pragma once
#include <math.h>

#include <complex>
#include <vector>

namespace torch_ext::test {

inline double plain_sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }
inline double plain_g(double x) { return x >= 0 ? x + 0.5 : plain_sigmoid(x); }

// h = a h_before + b, and what the backward needs: the derivatives of a and b by each input.
template <class T>
struct Step {
  T a, b;
  std::vector<T> da, db;
};

inline double plain_dsigmoid(double x) { return plain_sigmoid(x) * plain_sigmoid(-x); }

template <class T>
Step<T> linear_scan_step(const std::vector<T>& x, unsigned /*flags*/) {
  return {x[0], x[1], {T(1), T(0)}, {T(0), T(1)}};
}

inline double plain_activation(double x, bool g) { return g ? plain_g(x) : x; }
inline double plain_dactivation(double x, bool g) {
  return g ? (x >= 0 ? 1 : plain_dsigmoid(x)) : 1;
}

// flags: 1 = activation "g".
inline Step<double> min_gru_step(const std::vector<double>& x, unsigned flags) {
  const bool g = flags & 1;
  const double z = plain_sigmoid(x[0]), dz = plain_dsigmoid(x[0]), v = plain_activation(x[1], g);
  return {plain_sigmoid(-x[0]), z * v, {-dz, 0}, {dz * v, z * plain_dactivation(x[1], g)}};
}

// flags: 1 = activation "g", 2 = normalised gates.
inline Step<double> min_lstm_step(const std::vector<double>& x, unsigned flags) {
  const bool g = flags & 1, normalize = flags & 2;
  const double f = plain_sigmoid(x[0]), i = plain_sigmoid(x[1]), v = plain_activation(x[2], g);
  const double df = plain_dsigmoid(x[0]), di = plain_dsigmoid(x[1]),
               dv = plain_dactivation(x[2], g);
  if (!normalize) return {f, i * v, {df, 0, 0}, {0, di * v, i * dv}};
  // f' = f / (f + i), i' = i / (f + i). Far below zero f and i vanish together, but f / i = (1 + e^-q) / (1 + e^-p) does
  // not: f' = sigmoid(log f - log i).
  const auto log_sigmoid = [](double y) { return y >= 0 ? -log1p(exp(-y)) : y - log1p(exp(y)); };
  const double d = log_sigmoid(x[0]) - log_sigmoid(x[1]), slope = plain_dsigmoid(d);
  const double dd_df = plain_sigmoid(-x[0]), dd_di = -plain_sigmoid(-x[1]);
  return {
      plain_sigmoid(d),
      plain_sigmoid(-d) * v,
      {slope * dd_df, slope * dd_di, 0},
      {-slope * dd_df * v, -slope * dd_di * v, plain_sigmoid(-d) * dv}};
}

} // namespace torch_ext::test
