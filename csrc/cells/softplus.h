// log(1 + e^x) over any lane type of numerics.h.
#pragma once
#include "dual.h"

namespace torch_ext {

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

} // namespace torch_ext
