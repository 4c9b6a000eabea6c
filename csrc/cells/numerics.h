// Elementary functions of a lane, and what a lane is.
//
// A cell (min_gru.h, ...) is written once over a lane type T. T is float or double on a GPU thread, cpu/simd.h's Vec on
// the CPU, Dual<T, N> (dual.h) for derivatives, and core/tensor_lane.h's TensorLane to run the same mathematics as
// differentiable tensor code. Every lane type offers + - * (also with a number on either side), unary -, and
//
//   exp(x)           e^x, but never infinite: from x = kExpLimit<T> on it is constant; NaN stays NaN
//   reciprocal(x)    1 / x, for |x| in [2^-126, 2^126]
//   fused(x, y, z)   x y + z, rounded once where the machine can
//   at_least(x, c)   max(x, c); derivative 1 where x >= c, else 0; NaN stays NaN
//   at_most(x, c)    min(x, c); derivative 1 where x < c, else 0; NaN stays NaN
//   maximum(x, y)    the larger; derivative to x where x >= y, else to y
//   nonnegative(x)   1 where x >= 0, else 0
//   conj(x)          complex conjugate; x itself where lanes are real
//
// The CPU kernels are compiled without contraction of products and sums to fused ones: the compiler would choose which,
// differently from loop to loop, and results would depend on how the work is cut. A cell says `fused` where it wants it.
//
// This file has the scalar ones, and what follows from them for every lane.
#pragma once
#include <math.h>

#ifdef __CUDACC__
#define TORCH_EXT_HD __host__ __device__ __forceinline__
#define TORCH_EXT_UNROLL(n) _Pragma("unroll")
#else
#define TORCH_EXT_HD inline __attribute__((always_inline))
#define TORCH_EXT_PRAGMA(text) _Pragma(#text)
#define TORCH_EXT_UNROLL(n) TORCH_EXT_PRAGMA(GCC unroll n)
#endif

namespace torch_ext {

template <class T>
inline constexpr float kExpLimit =
    80; // products with e^80 stay far from float's largest number, e^88.7
template <>
inline constexpr double kExpLimit<double> = 700;
template <class T>
requires requires { typename T::Scalar; }
inline constexpr auto kExpLimit<T> = kExpLimit<typename T::Scalar>;

// e^x for x in [-87, 80] from a 2^x: 2^(x log2 e) suffers from the rounding of the product, d, which the factor 1 + d mends.
// From an exact 2^x, 2 ULP for |x| <= 20, 5 at the ends.
template <class Exp2>
TORCH_EXT_HD float exp_by_exp2(float x, Exp2 exp2) {
  constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
  const float t = x * kLog2E, d = ::fmaf(t, -kLn2, x), e = exp2(t);
  return ::fmaf(e, d, e);
}
TORCH_EXT_HD float exp(float x) {
#ifdef __CUDA_ARCH__ // half of expf's instructions; constant below e^-87, where floats end
#if __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %0, 0f42A00000;" : "+f"(x)); // 80
  asm("max.NaN.f32 %0, %0, 0fC2AE0000;" : "+f"(x)); // -87
#else
  x = x > 80.f ? 80.f : x < -87.f ? -87.f : x;
#endif
  return exp_by_exp2(x, [](float t) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
    return e;
  });
#else
  return ::expf(x > 80.f ? 80.f : x);
#endif
}
TORCH_EXT_HD double exp(double x) { return ::exp(x > 700. ? 700. : x); }
TORCH_EXT_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y; // 1 ULP, in one instruction instead of ten
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}
TORCH_EXT_HD double reciprocal(double x) { return 1. / x; }
TORCH_EXT_HD float fused(float x, float y, float z) {
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMAF)
  return ::fmaf(x, y, z);
#else
  return x * y + z; // a correctly rounded one would be a slow call
#endif
}
TORCH_EXT_HD double fused(double x, double y, double z) {
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMA)
  return ::fma(x, y, z);
#else
  return x * y + z;
#endif
}
TORCH_EXT_HD float at_least(float x, double c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 // one instruction instead of two
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(float(c)));
  return x;
#else
  return x < float(c) ? float(c) : x;
#endif
}
TORCH_EXT_HD double at_least(double x, double c) { return x < c ? c : x; }
TORCH_EXT_HD float at_most(float x, double c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(float(c)));
  return x;
#else
  return x > float(c) ? float(c) : x;
#endif
}
TORCH_EXT_HD double at_most(double x, double c) { return x > c ? c : x; }
TORCH_EXT_HD float maximum(float x, float y) { return x < y ? y : x; }
TORCH_EXT_HD double maximum(double x, double y) { return x < y ? y : x; }
TORCH_EXT_HD float nonnegative(float x) { return x >= 0.f ? 1.f : 0.f; }
TORCH_EXT_HD double nonnegative(double x) { return x >= 0. ? 1. : 0.; }
TORCH_EXT_HD float conj(float x) { return x; }
TORCH_EXT_HD double conj(double x) { return x; }

// 1 / (1 + e^-x). Range: all x; far below zero it stops at e^-80 (float). Derivative: s (1 - s).
template <class T>
TORCH_EXT_HD T sigmoid(T x) {
  return reciprocal(1 + exp(-x));
}

// A complex number over real lanes: all that a complex linear scan needs.
template <class T>
struct Complex {
  T re, im;
  TORCH_EXT_HD friend Complex operator+(Complex x, Complex y) { return {x.re + y.re, x.im + y.im}; }
  TORCH_EXT_HD friend Complex operator*(Complex x, Complex y) {
    return {fused(x.re, y.re, -(x.im * y.im)), fused(x.re, y.im, x.im * y.re)};
  }
  TORCH_EXT_HD friend Complex fused(Complex x, Complex y, Complex z) {
    return {
        fused(-x.im, y.im, fused(x.re, y.re, z.re)), fused(x.im, y.re, fused(x.re, y.im, z.im))};
  }
  TORCH_EXT_HD friend Complex conj(Complex x) { return {x.re, -x.im}; }
};

} // namespace torch_ext
