// What numerics_test.cpp asks of the lane type of each instruction set. lanes.cpp is compiled once per set, like the
// kernels, and holds nothing else: GoogleTest's inline functions must not be compiled with AVX-512 flags.
#pragma once
#include <stdint.h>

namespace torch_ext::test {

template <class S>
using Map = void (*)(const S* from, S* to, int64_t n); // n is a multiple of kMapStep
inline constexpr int64_t kMapStep = 16;

struct Lanes {
  const char* name;
  Map<float> exp, reciprocal, sigmoid;
  Map<double> exp_double, reciprocal_double, sigmoid_double;
  void (*from_bfloat16)(const uint16_t* from, float* to, int64_t n);
  void (*to_bfloat16)(const float* from, uint16_t* to, int64_t n);
  void (*from_half)(const uint16_t* from, float* to, int64_t n);
  void (*to_half)(const float* from, uint16_t* to, int64_t n);
  // Loads the first n floats and stores them to the other place, as kernels do at the edge of a width.
  void (*copy_some)(const float* from, float* to, int n);
  int lanes;
};

} // namespace torch_ext::test
