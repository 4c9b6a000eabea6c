// The dtypes of kernels. No tensor library: tensors arrive as untyped pointers and one of these.
#pragma once
#include <stdint.h>

namespace torch_ext {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class DType : int { f32, f64, bf16, f16, c64, c128, count };

} // namespace torch_ext
