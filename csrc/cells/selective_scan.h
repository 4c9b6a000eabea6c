// One step of Mamba's selective scan. Gu and Dao 2023, arXiv:2312.00752, section 3:
//   time_step = softplus(delta),  h = exp(time_step A) h_before + time_step B u,  y = C h + D u,  out = y silu(z)
// over a real lane T for what a channel has one of, and a lane H for its states: T itself or Complex<T>. The gradient of a
// step is written out; dual numbers over the functions before it are its oracle.
#pragma once
#include "dual.h"
#include "silu.h"

namespace torch_ext {

// A in the units that a decay wants: octaves, and half turns. Rounding it costs what rounding time_step A would.
inline constexpr double kOctave = 0.69314718055994530942, kHalfTurn = 3.14159265358979323846;
template <class T>
TORCH_EXT_HD T in_octaves(T A) {
  return A * T(1 / kOctave);
}
template <class T>
TORCH_EXT_HD Complex<T> in_octaves(Complex<T> A) {
  return {A.re * T(1 / kOctave), A.im * T(1 / kHalfTurn)};
}
// Backwards, for a gradient: of a sum over products with what in_octaves gave.
template <class T>
TORCH_EXT_HD T out_of_octaves(T sum) {
  return sum * T(kOctave);
}
template <class T>
TORCH_EXT_HD T out_of_octaves(Complex<T> sum) {
  return fused(sum.re, T(kOctave), sum.im * T(kHalfTurn));
}

template <class T>
inline constexpr bool kDouble = 100 < kExpLimit<T>;

// The same number in every lane.
template <class T>
TORCH_EXT_HD T number(double x) {
  if constexpr (requires(T dual) { dual.d; }) {
    return T{number<typename T::Scalar>(x), {}};
  } else if constexpr (requires { typename T::Scalar; }) {
    return T(typename T::Scalar(x));
  } else {
    return T(x);
  }
}

// 2^x, but never infinite: constant from exp's limit on.
template <class T>
inline constexpr double kExp2Limit = kDouble<T> ? 1009 : 115;
TORCH_EXT_HD float exp2(float x) {
#ifdef __CUDA_ARCH__ // two instructions instead of seven
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(at_most(x, kExp2Limit<float>)));
  return power;
#else
  return ::exp2f(at_most(x, kExp2Limit<float>));
#endif
}
TORCH_EXT_HD double exp2(double x) { return ::exp2(at_most(x, kExp2Limit<double>)); }
template <class T, int N>
TORCH_EXT_HD Dual<T, N> exp2(Dual<T, N> x) {
  const T power = exp2(x.v), slope = power * kOctave * (1 - nonnegative(x.v - kExp2Limit<T>));
  return Dual<T, N>::make(power, [&](int i) { return slope * x.d[i]; });
}

// log(1 + e^x); x itself beyond 20, as torch and mamba_ssm have it. log(1 + e) = 2 artanh(e / (2 + e)), by its series in
// s = e / (2 + e) <= 1/3: the first term left out is below the last place.
template <class T>
TORCH_EXT_HD T softplus(T x) {
  constexpr int kTerms = kDouble<T> ? 17 : 8;
  const T e = exp(at_most(x, 0) - at_least(x, 0)); // e^-|x|
  const T s = e * reciprocal(2 + e), square = s * s;
  T sum = number<T>(2. / (2 * kTerms - 1));
  TORCH_EXT_UNROLL(17)
  for (int i = kTerms - 2; i >= 0; --i) sum = fused(sum, square, number<T>(2. / (2 * i + 1)));
  return fused(nonnegative(20 - x) * s, sum, at_least(x, 0));
}

// The step from one token to the next, as a channel sees it.
template <class T>
TORCH_EXT_HD T time_step(T delta, bool through_softplus) {
  return through_softplus ? softplus(delta) : delta;
}
template <class T>
TORCH_EXT_HD T time_step_slope(T delta, bool through_softplus) {
  if (!through_softplus) return number<T>(1);
  const T below = nonnegative(20 - delta);
  return fused(below, sigmoid(delta), 1 - below);
}

template <class T>
TORCH_EXT_HD T decay(T time_step, T A) {
  return exp2(time_step * A);
}
// e^(i pi x): x is an even number of half turns and an odd or even one more, and a rest of at most half of one.
template <class T>
TORCH_EXT_HD Complex<T> decay(T time_step, Complex<T> A) {
  constexpr int kTerms = kDouble<T> ? 12 : 7;
  const T magic = T(kDouble<T> ? 6755399441055744. : 12582912.); // adding it rounds to an integer
  const T x = time_step * A.im, n = (x + magic) - magic;
  const T half = n * T(0.5), odd = half - ((half + magic) - magic), sign = 1 - 8 * (odd * odd);
  const T r = at_most(at_least(x - n, -0.5), 0.5) * T(kHalfTurn), square = r * r;
  T sine = number<T>(1), cosine = sine;
  TORCH_EXT_UNROLL(12)
  for (int i = kTerms - 1; i > 0; --i) {
    sine = fused(sine * square, T(-1. / (2 * i * (2 * i + 1))), T(1));
    cosine = fused(cosine * square, T(-1. / (2 * i * (2 * i - 1))), T(1));
  }
  const T size = exp2(time_step * A.re) * sign;
  return {size * cosine, size * (r * sine)};
}

// Products of a channel's real number with a state's.
template <class T>
TORCH_EXT_HD T scaled(T x, T y) {
  return x * y;
}
template <class T>
TORCH_EXT_HD Complex<T> scaled(T x, Complex<T> y) {
  return {x * y.re, x * y.im};
}
template <class T>
TORCH_EXT_HD T add_scaled(T x, T y, T sum) {
  return fused(x, y, sum);
}
template <class T>
TORCH_EXT_HD Complex<T> add_scaled(T x, Complex<T> y, Complex<T> sum) {
  return {fused(x, y.re, sum.re), fused(x, y.im, sum.im)};
}
// The real part of x y, added to a sum.
template <class T>
TORCH_EXT_HD T add_real(T x, T y, T sum) {
  return fused(x, y, sum);
}
template <class T>
TORCH_EXT_HD T add_real(Complex<T> x, Complex<T> y, T sum) {
  return fused(-x.im, y.im, fused(x.re, y.re, sum));
}
// conj(x) y part by part, added up: what the gradient of A's units is made of.
template <class T>
TORCH_EXT_HD T add_parts(T x, T y, T sum) {
  return fused(x, y, sum);
}
template <class T>
TORCH_EXT_HD Complex<T> add_parts(Complex<T> x, Complex<T> y, Complex<T> sum) {
  return {fused(x.re, y.re, sum.re), fused(x.im, y.im, sum.im)};
}

// One state, one step. A is in octaves, input is time_step u.
template <class T, class H>
struct ScanStep {
  H decay, h;
};
template <class T, class H>
TORCH_EXT_HD ScanStep<T, H> scan_step(T time_step, T input, H A, H B, H h_before) {
  const H a = decay(time_step, A);
  return {a, fused(a, h_before, scaled(input, B))};
}

// The part of y that the sum over states makes: twice its real part where states are complex.
template <class H>
inline constexpr bool kComplexLane = false;
template <class T>
inline constexpr bool kComplexLane<Complex<T>> = true;
template <class H>
inline constexpr double kReadout = kComplexLane<H> ? 2 : 1;

template <class T>
struct Gate {
  T value, slope;
};
template <class T>
TORCH_EXT_HD Gate<T> silu_with_slope(
    T z) { // silu and silu_derivative, which say why there are bounds
  const T bounded = at_least(z, -kExpLimit<T>), both = at_most(bounded, kExpLimit<T>);
  const T power = exp(-both), s = reciprocal(1 + power);
  return {bounded * s, s * fused(both, power * s, number<T>(1))};
}

// The gradient of one state's step. The sums are those of a token, over its states: `input` the gradient of time_step u,
// `parts` that of time_step, still in the units of A; those of B, C and A are sums over channels or tokens.
// grad_y counts kReadout times; grad_h is the gradient that has come from the step after, and becomes that of h_before.
template <class T, class H>
struct ScanSums {
  T input;
  H parts;
};
template <class T, class H>
TORCH_EXT_HD void scan_step_vjp(
    T time_step, T input, H A, H B, H C, H decay, H h_before, H h, T grad_y, H& grad_h, H& grad_A,
    H& grad_B, H& grad_C, ScanSums<T, H>& sums) {
  const H all = add_scaled(grad_y, conj(C), grad_h);
  grad_C = add_scaled(grad_y, conj(h), grad_C);
  grad_B = add_scaled(input, all, grad_B);
  sums.input = add_real(all, conj(B), sums.input);
  grad_h = all * conj(decay);
  const H exponent = grad_h * conj(h_before); // the gradient of time_step A
  sums.parts = add_parts(A, exponent, sums.parts);
  grad_A = add_scaled(time_step, exponent, grad_A);
}

} // namespace torch_ext
