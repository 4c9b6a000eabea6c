// tanh over any lane type: numbers here, vectors in cpu/simd.h, tensors in core/tensor_lane.h.
#pragma once
#include "dual.h"

namespace torch_ext {

TORCH_EXT_HD float tanh(float x) { return ::tanhf(x); }
TORCH_EXT_HD double tanh(double x) { return ::tanh(x); }
template <class T, int N>
TORCH_EXT_HD Dual<T, N> tanh(Dual<T, N> x) {
  const T y = tanh(x.v), slope = fused(-y, y, y * 0 + 1);
  return Dual<T, N>::make(y, [&](int i) { return slope * x.d[i]; });
}

} // namespace torch_ext
