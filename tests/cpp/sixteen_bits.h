// bfloat16 (8 exponent bits) and float16 (5) by their definition: sign, exponent, mantissa.
#pragma once
#include <math.h>
#include <stdint.h>

namespace torch_ext::test {

inline float decode(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  double x;
  if (exponent == (1 << exponent_bits) - 1) {
    x = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    x = ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    x = ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  return float(bits & 0x8000 ? -x : x);
}

// The nearest number of the format, of two equally near the one with an even mantissa: searched for, not computed.
inline uint16_t encode(float x, int exponent_bits) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  const uint16_t infinity = uint16_t(((1 << exponent_bits) - 1) << (15 - exponent_bits));
  if (isnan(x)) return sign | infinity | 1;
  const double magnitude = fabs(double(x));
  const auto value = [&](uint16_t bits) { // infinity stands for the next power of two
    return bits == infinity ? ldexp(1, 1 << (exponent_bits - 1))
                            : double(decode(bits, exponent_bits));
  };
  if (magnitude >= value(infinity)) return sign | infinity;
  uint16_t low = 0, high = infinity; // value(low) <= magnitude < value(high)
  while (high - low > 1) {
    const uint16_t middle = uint16_t((low + high) / 2);
    (value(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - value(low), above = value(high) - magnitude;
  return sign | (above < below || (above == below && (low & 1)) ? high : low);
}

} // namespace torch_ext::test
