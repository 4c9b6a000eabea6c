// The CPU's lane type: Vec<float> or Vec<double>, one vector register of the instruction set that this translation unit
// is compiled for. isa.cpp is compiled once per set (TORCH_EXT_ISA = generic, avx2, avx512), and everything here lives in
// a namespace of that name, so that the linker can never hand AVX-512 code to a machine without it. For the same reason
// these files include intrinsics and C headers only.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // in GCC 12's own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#include "../cells/numerics.h"
#include "../core/types.h"

namespace torch_ext::cpu {
// Does the machine have AVX512-BF16? No set of its own: one instruction.
extern const bool has_bfloat16;
} // namespace torch_ext::cpu

namespace torch_ext::cpu::TORCH_EXT_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16; // SSE2, NEON
#endif

template <class S>
struct Bits;
template <>
struct Bits<float> {
  typedef float Raw __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Bits<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};

template <class S>
struct Vec {
  static constexpr int kLanes = kVectorBytes / int(sizeof(S));
  using Scalar = S;
  using Raw = typename Bits<S>::Raw;
  using Int = typename Bits<S>::Int;
  Raw v;

  Vec() = default;
  TORCH_EXT_HD Vec(Raw raw) : v(raw) {}
  TORCH_EXT_HD Vec(S x) : v(x - Raw{}) {}

  TORCH_EXT_HD friend Vec operator+(Vec x, Vec y) { return x.v + y.v; }
  TORCH_EXT_HD friend Vec operator-(Vec x, Vec y) { return x.v - y.v; }
  TORCH_EXT_HD friend Vec operator*(Vec x, Vec y) { return x.v * y.v; }
  TORCH_EXT_HD friend Vec operator-(Vec x) { return -x.v; }
  TORCH_EXT_HD friend Vec conj(Vec x) { return x; }
  TORCH_EXT_HD friend Vec nonnegative(Vec x) { return x.v >= Raw{} ? Vec(S(1)).v : Raw{}; }
  TORCH_EXT_HD friend Vec maximum(Vec x, Vec y) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return (Raw)_mm512_max_ps(y.v, x.v); // x where either is NaN
#elif defined(__AVX2__)
    if constexpr (sizeof(S) == 4) return (Raw)_mm256_max_ps(y.v, x.v);
#endif
    return x.v < y.v ? y.v : x.v;
  }
  TORCH_EXT_HD friend Vec at_least(Vec x, double c) {
    const Raw bound = Vec(S(c)).v;
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4)
      return (Raw)_mm512_max_ps(bound, x.v); // the second operand where either is NaN
#elif defined(__AVX2__)
    if constexpr (sizeof(S) == 4) return (Raw)_mm256_max_ps(bound, x.v);
#endif
    return x.v < bound ? bound : x.v;
  }
  TORCH_EXT_HD friend Vec at_most(Vec x, double c) {
    const Raw bound = Vec(S(c)).v;
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return (Raw)_mm512_min_ps(bound, x.v);
#elif defined(__AVX2__)
    if constexpr (sizeof(S) == 4) return (Raw)_mm256_min_ps(bound, x.v);
#endif
    return x.v > bound ? bound : x.v;
  }
};

TORCH_EXT_HD Vec<float> fused(Vec<float> x, Vec<float> y, Vec<float> z) {
#if defined(__AVX512F__)
  return (Vec<float>::Raw)_mm512_fmadd_ps(x.v, y.v, z.v);
#elif defined(__FMA__)
  return (Vec<float>::Raw)_mm256_fmadd_ps(x.v, y.v, z.v);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < Vec<float>::kLanes; ++i) z.v[i] = torch_ext::fused(x.v[i], y.v[i], z.v[i]);
  return z;
#else
  return x * y + z;
#endif
}
TORCH_EXT_HD Vec<double> fused(Vec<double> x, Vec<double> y, Vec<double> z) {
#if defined(__AVX512F__)
  return (Vec<double>::Raw)_mm512_fmadd_pd(x.v, y.v, z.v);
#elif defined(__FMA__)
  return (Vec<double>::Raw)_mm256_fmadd_pd(x.v, y.v, z.v);
#elif defined(__FP_FAST_FMA)
  for (int i = 0; i < Vec<double>::kLanes; ++i) z.v[i] = torch_ext::fused(x.v[i], y.v[i], z.v[i]);
  return z;
#else
  return x * y + z;
#endif
}

// 1 / x. Range: |x| in [2^-126, 2^126]. Float with AVX-512: at most 1 ULP (14-bit estimate and one Newton step); else
// the correctly rounded quotient.
TORCH_EXT_HD Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const __m512 r = _mm512_rcp14_ps(x.v);
  return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(x.v, r, _mm512_set1_ps(1.f)), r);
#else
  return Vec<float>(1.f).v / x.v;
#endif
}
TORCH_EXT_HD Vec<double> reciprocal(Vec<double> x) { return Vec<double>(1.).v / x.v; }

#if defined(__AVX512F__)
// 2^(j/32), less j << 18: a shift by 18 of a number of 32nds carries the whole of it, j included.
inline constexpr uint32_t kPowersOf32nds[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
#endif

// e^x = 2^n e^r, n the integer nearest to x log2(e) and r = x - n log(2); with AVX-512 n counts 32nds of an octave, and
// 2^(n/32) comes from a table. A fused multiply-add makes r exact but for the rounding of log(2) itself, which costs
// 3e-9 |x|; without one log(2) comes in two parts. sign = -1 yields e^-x. For sign * x in [-87, 88].
TORCH_EXT_HD Vec<float> exp_bounded(Vec<float> x, float sign) {
  using V = Vec<float>;
  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits.
  constexpr float kMagic = 12582912.f;
#if defined(__AVX512F__)
  const V shifted = fused(x, V(sign * 46.16624130844683f), V(kMagic));
  const V r = fused(shifted - V(kMagic), V(-0.021660849392498290f), x * V(sign));
  const __m512i n = (__m512i)shifted.v;
  const __m512i power = _mm512_permutex2var_epi32(
      _mm512_loadu_si512(kPowersOf32nds), n, _mm512_loadu_si512(kPowersOf32nds + 16));
  const V t = V::Raw(_mm512_add_epi32(power, _mm512_slli_epi32(n, 18)));
  // e^r - 1; the relative error of t p + t is 5.4e-8
  const V p = r * fused(r, V(0.5f), V(1.0000146627426147f));
  return fused(t, p, t);
#else
  // With the exponent's bias in the bits that are moved into its place: 2^n, and a product that keeps NaN, whatever its
  // bits.
  const V shifted = fused(x, V(sign * 1.4426950408889634f), V(kMagic + 127)),
          n = shifted - V(kMagic + 127);
#if defined(__FP_FAST_FMAF)
  const V r = fused(n, V(-0.69314718055994531f), x * V(sign));
#else
  const V r = (x * V(sign) - n * V(0.693359375f)) - n * V(-2.12194440e-4f);
#endif
  // Degree 5, minimax in the relative error (9.2e-8); the value at 0 is 1 exactly.
  V p = V(0.008290315046906471f);
  p = fused(p, r, V(0.04189793020486832f));
  p = fused(p, r, V(0.1666763573884964f));
  p = fused(p, r, V(0.4999915063381195f));
  p = fused(p, r, V(0.9999997615814209f));
  p = fused(p, r, V(1.f));
  return p * V((V::Raw)((V::Int)shifted.v << 23));
#endif
}

// e^x, saturated at e^80. Range: all x; below -87 it stops at 1.6e-38. Error: at most 3 ULP for |x| <= 20, 6 ULP beyond.
TORCH_EXT_HD Vec<float> exp(Vec<float> x) { return exp_bounded(at_least(at_most(x, 80), -87), 1); }

// 1 / (1 + e^-x); stops at e^-80 below. The same as numerics.h's for any lane, with fewer instructions.
TORCH_EXT_HD Vec<float> sigmoid(Vec<float> x) {
  return reciprocal(1 + exp_bounded(at_most(at_least(x, -80), 87), -1));
}

inline constexpr double kInverseFactorial[] = {
    1. / 6227020800,
    1. / 479001600,
    1. / 39916800,
    1. / 3628800,
    1. / 362880,
    1. / 40320,
    1. / 5040,
    1. / 720,
    1. / 120,
    1. / 24,
    1. / 6,
    1. / 2,
    1.,
    1.}; // of 13, 12, .. 0

// As in cells/silu.h for any lane, with fewer instructions: one bound serves both x and the exponential.
TORCH_EXT_HD Vec<float> silu(Vec<float> x) {
  const Vec<float> bounded = at_least(x, -80);
  return bounded * reciprocal(1 + exp_bounded(at_most(bounded, 87), -1));
}
TORCH_EXT_HD Vec<float> silu_derivative(Vec<float> x) {
  const Vec<float> bounded = at_least(at_most(x, 80), -80), power = exp_bounded(bounded, -1),
                   s = reciprocal(1 + power);
  return s * fused(bounded, power * s, Vec<float>(1.f));
}

// e^x, saturated at e^700; below -708 it stops near 2^-1022. Error: at most 2 ULP. Taylor's series of degree 13 on
// |x - n log(2)| <= log(2) / 2, whose remainder there is 4e-18.
TORCH_EXT_HD Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  x = at_least(at_most(x, 700), -708);
  constexpr double kMagic = 6755399441055744. + 1023; // 1.5 * 2^52, and the exponent's bias
  const V shifted = fused(x, V(1.4426950408889634), V(kMagic)), n = shifted - V(kMagic);
  const V f = fused(n, V(-1.90821492927058770002e-10), fused(n, V(-0.693147180369123816490), x));
  V p = V(kInverseFactorial[0]);
#pragma GCC unroll 13
  for (int i = 1; i < 14; ++i) p = fused(p, f, V(kInverseFactorial[i]));
  return p * V((V::Raw)((V::Int)shifted.v << 52));
}

// 2^x, saturated at 2^115 (2^1009 in double), 0 or near it below -126 (-1022). Error: at most 2 ULP for |x| <= 30.
TORCH_EXT_HD Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
#if defined(__AVX512F__)
  // As exp_bounded. The bounds are set to the bits of `shifted`, which are in order: instructions that find a free port.
  const V shifted = x + V(393216.f), r = x - (shifted - V(393216.f));
  const __m512i n = _mm512_max_epi32(
      _mm512_min_epi32((__m512i)shifted.v, (__m512i)V(393216.f + 115).v),
      (__m512i)V(393216.f - 126).v);
  const __m512i power = _mm512_permutex2var_epi32(
      _mm512_loadu_si512(kPowersOf32nds), n, _mm512_loadu_si512(kPowersOf32nds + 16));
  const V t = V::Raw(_mm512_add_epi32(power, _mm512_slli_epi32(n, 18)));
  // Taylor's series of 2^r - 1, a degree more than e^x needs: a decay just below 1 is multiplied up over thousands of steps,
  // and a slope that is off by 1e-5, as the best one of degree 2 has it, would be a rate that is off by as much.
  const V p = r * fused(
                      r, fused(r, V(0.055504108664821576f), V(0.24022650695910072f)),
                      V(0.69314718055994531f));
  return fused(t, p, t);
#else
  x = at_least(at_most(x, 115), -126);
  const V shifted = x + V(12583039.f), r = x - (shifted - V(12583039.f));
  // exp_bounded's polynomial, its argument in octaves
  V p = V(0.0013264727727616567f);
  p = fused(p, r, V(0.009671512849267927f));
  p = fused(p, r, V(0.05550733591408644f));
  p = fused(p, r, V(0.240222426153651f));
  p = fused(p, r, V(0.6931470153007794f));
  p = fused(p, r, V(1.f));
  return p * V((V::Raw)((V::Int)shifted.v << 23));
#endif
}
TORCH_EXT_HD Vec<double> exp2(Vec<double> x) {
  using V = Vec<double>;
  x = at_least(at_most(x, 1009), -1022);
  constexpr double kMagic = 6755399441055744. + 1023; // 1.5 * 2^52, and the exponent's bias
  const V shifted = x + V(kMagic), f = (x - (shifted - V(kMagic))) * V(0.69314718055994530942);
  V p = V(kInverseFactorial[0]);
#pragma GCC unroll 13
  for (int i = 1; i < 14; ++i) p = fused(p, f, V(kInverseFactorial[i]));
  return p * V((V::Raw)((V::Int)shifted.v << 52));
}

// ---- lanes against registers ----

// Half of the exchange between rows x and y that a transposition makes at distance s: pieces of s lanes, of x and y in
// turn, kHigh: those that lie s further on.
template <int... I>
struct Places {};
template <int s, bool kHigh, class S, int... I>
TORCH_EXT_HD Vec<S> exchange(Vec<S> x, Vec<S> y, Places<I...>) {
  return __builtin_shufflevector(
      x.v, y.v, ((I & s) ? (I & ~s) + (kHigh ? s : 0) + Vec<S>::kLanes : I + (kHigh ? s : 0))...);
}
template <int n, int... I>
TORCH_EXT_HD auto places() {
  if constexpr (n == 0) {
    return Places<I...>{};
  } else {
    return places<n - 1, n - 1, I...>();
  }
}

// r[i] lane j becomes r[j] lane i, for kLanes registers.
template <class S, int s = Vec<S>::kLanes / 2>
TORCH_EXT_HD void transpose(Vec<S>* r) {
  constexpr auto kPlaces = decltype(places<Vec<S>::kLanes>()){};
#pragma GCC unroll 16
  for (int i = 0; i < Vec<S>::kLanes; ++i) {
    if (i & s) continue;
    const Vec<S> x = r[i], y = r[i + s];
    r[i] = exchange<s, false>(x, y, kPlaces);
    r[i + s] = exchange<s, true>(x, y, kPlaces);
  }
  if constexpr (s > 1) transpose<S, s / 2>(r);
}

// The sums of kLanes registers, the i-th in lane i: the rows of the transposition, added up as soon as they may be.
template <class S, int s = Vec<S>::kLanes / 2>
TORCH_EXT_HD Vec<S> sums_of(Vec<S>* r) {
  constexpr auto kPlaces = decltype(places<Vec<S>::kLanes>()){};
#pragma GCC unroll 8
  for (int i = 0; i < s; ++i) {
    const Vec<S> x = r[i], y = r[i + s];
    r[i] = exchange<s, false>(x, y, kPlaces) + exchange<s, true>(x, y, kPlaces);
  }
  if constexpr (s > 1) {
    return sums_of<S, s / 2>(r);
  } else {
    return r[0];
  }
}

// ---- memory: the lane type of a stored type, and conversion on the way ----

typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__)
// The high half of each 32-bit lane from a table of places; the low one is zero.
inline constexpr uint16_t kHighHalves[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                             0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
#endif
TORCH_EXT_HD Vec<float> widen(U16 raw, BFloat16) {
#if defined(__AVX512F__) // one instruction instead of two
  return (Vec<float>::Raw)_mm512_maskz_permutexvar_epi16(
      0xaaaaaaaa, _mm512_loadu_si512(kHighHalves), _mm512_castsi256_si512((__m256i)raw));
#else
  const U32 bits = __builtin_convertvector(raw, U32) << 16;
  return (Vec<float>::Raw)bits;
#endif
}
TORCH_EXT_HD U16 narrow(Vec<float> x, BFloat16) { // to nearest, ties to even; NaN stays NaN
#if defined(__AVX512F__)
  // Denormal numbers become zero, as they do in arithmetic. The flag is read anew each time, or the compiler would make a
  // second copy of every loop.
  if (*(const volatile bool*)&has_bfloat16) {
    U16 result;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(result) : "v"(x.v));
    return result;
  }
#endif
  const U32 u = (U32)x.v, rounded = u + 0x7fff + ((u >> 16) & 1);
#if defined(__AVX512F__)
  const __m512i kept = _mm512_mask_or_epi32(
      (__m512i)rounded, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), (__m512i)u,
      _mm512_set1_epi32(1 << 22));
  return (U16)_mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#else
  const U32 high = (x.v == x.v ? rounded : u | (1 << 22)) >> 16;
#if defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)high, (__m256i)high);
  return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
#else
  return __builtin_convertvector(high, U16);
#endif
#endif
}
TORCH_EXT_HD Vec<float> widen(U16 raw, Half) {
#if defined(__AVX512F__)
  return (Vec<float>::Raw)_mm512_cvtph_ps((__m256i)raw);
#elif defined(__AVX2__)
  return (Vec<float>::Raw)_mm256_cvtph_ps((__m128i)raw);
#else
  // Exponent and mantissa moved into place, the exponent's bias mended. Denormals are integers times 2^-24: as floats in
  // between they would be flushed to zero.
  const U32 h = __builtin_convertvector(raw, U32), magnitude = (h & 0x7fff) << 13;
  const Vec<float>::Raw integer =
      __builtin_convertvector((Vec<float>::Int)(h & 0x3ff), Vec<float>::Raw);
  const U32 normal = (h & 0x7fff) >= 0x7c00 ? magnitude | 0x7f800000 : magnitude + (112 << 23);
  const U32 r = (h & 0x7c00) == 0 ? (U32)(integer * 5.9604644775390625e-8f) : normal;
  return (Vec<float>::Raw)(r | ((h & 0x8000) << 16));
#endif
}
TORCH_EXT_HD U16 narrow(Vec<float> x, Half) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (U16)_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const U32 u = (U32)x.v, sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  const U32 normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5 leaves the half's denormal, rounded to even, in the low bits.
  const U32 denormal = (U32)((Vec<float>::Raw)m + 0.5f) - 0x3f000000;
  U32 r = m < 0x38800000 ? denormal : normal;
  r = m >= 0x477ff000 ? U32{} + 0x7c00 : r;
  r = m > 0x7f800000 ? U32{} + 0x7e00 : r;
  return __builtin_convertvector(r | sign, U16);
#endif
}

// Stored<S>: how S lies in memory and which lane holds it.
template <class S>
struct Stored {
  using Lane = Vec<S>;
  static constexpr int kLanes = Lane::kLanes;
  TORCH_EXT_HD static Lane load(const S* p) {
    Lane x;
    memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  TORCH_EXT_HD static void store(S* p, Lane x) { memcpy(p, &x.v, sizeof x.v); }
  TORCH_EXT_HD static void stream(S* p, Lane x) { // around the cache; p is aligned
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)p, (__m512i)x.v);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)p, (__m256i)x.v);
#elif defined(__x86_64__)
    _mm_stream_si128((__m128i*)p, (__m128i)x.v);
#else
    store(p, x);
#endif
  }
};
template <class S>
struct Stored16 {
  using Lane = Vec<float>;
  static constexpr int kLanes = Lane::kLanes;
  TORCH_EXT_HD static Lane load(const S* p) {
    U16 raw;
    memcpy(&raw, p, sizeof raw);
    return widen(raw, S{});
  }
  TORCH_EXT_HD static void store(S* p, Lane x) {
    const U16 raw = narrow(x, S{});
    memcpy(p, &raw, sizeof raw);
  }
  TORCH_EXT_HD static void stream(S* p, Lane x) {
#if defined(__AVX512F__)
    _mm256_stream_si256((__m256i*)p, (__m256i)narrow(x, S{}));
#elif defined(__AVX2__)
    _mm_stream_si128((__m128i*)p, (__m128i)narrow(x, S{}));
#else
    store(p, x);
#endif
  }
};
template <>
struct Stored<BFloat16> : Stored16<BFloat16> {};
template <>
struct Stored<Half> : Stored16<Half> {};

// Complex numbers lie as re, im, re, im; their lanes are a vector of real and one of imaginary parts.
template <class R>
struct Stored<torch_ext::Complex<R>> {
  using S = torch_ext::Complex<R>;
  using Lane = torch_ext::Complex<Vec<R>>;
  static constexpr int kLanes = Vec<R>::kLanes;
  TORCH_EXT_HD static Lane load(const S* p) {
    Lane x;
    for (int i = 0; i < kLanes; ++i) x.re.v[i] = p[i].re, x.im.v[i] = p[i].im;
    return x;
  }
  TORCH_EXT_HD static void store(S* p, Lane x) {
    for (int i = 0; i < kLanes; ++i) p[i] = {x.re.v[i], x.im.v[i]};
  }
  TORCH_EXT_HD static void stream(S* p, Lane x) { store(p, x); }
};

// The first n lanes; the others are zero, and are not written.
template <class S>
TORCH_EXT_HD typename Stored<S>::Lane load_some(const S* p, int n) {
  alignas(kVectorBytes) S padded[Stored<S>::kLanes] = {};
  memcpy(padded, p, size_t(n) * sizeof(S));
  return Stored<S>::load(padded);
}
template <class S>
TORCH_EXT_HD void store_some(S* p, typename Stored<S>::Lane x, int n) {
  alignas(kVectorBytes) S padded[Stored<S>::kLanes];
  Stored<S>::store(padded, x);
  memcpy(p, padded, size_t(n) * sizeof(S));
}

// Denormal numbers are taken and given as zero while this lives: a decaying state sticks at the smallest one for ever,
// at a hundred cycles a step. The setting belongs to the thread, so every worker sets it.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    const uint64_t flushing = before | (uint64_t(1) << 24);
    __asm__ volatile("msr fpcr, %0" : : "r"(flushing));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

TORCH_EXT_HD void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

} // namespace torch_ext::cpu::TORCH_EXT_ISA
