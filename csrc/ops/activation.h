// The option `activation` of minGRU and minLSTM.
#pragma once
#include <c10/util/Exception.h>

#include <string_view>

namespace torch_ext {

// Whether it is "g"; ValueError for what is neither "g" nor "identity".
inline bool is_g(const char* op, std::string_view activation) {
  TORCH_CHECK_VALUE(
      activation == "identity" || activation == "g", op, ": activation is '", activation,
      "', expected 'identity' or 'g'");
  return activation == "g";
}

} // namespace torch_ext
