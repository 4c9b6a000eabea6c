// Argument checks. Every message names the operator and the argument, what came, and what was expected and why. Shapes
// are symbolic, so the same checks serve kernels, fake tensors and export.
#pragma once
#include <ATen/core/Tensor.h>

#include <sstream>
#include <string>

namespace torch_ext {

inline bool equal(const c10::SymInt& x, const c10::SymInt& y) {
  return x.sym_eq(y).expect_true(__FILE__, __LINE__);
}

inline std::string shape_text(c10::SymIntArrayRef sizes) {
  std::ostringstream s;
  s << '(';
  for (size_t i = 0; i < sizes.size(); ++i) s << (i ? ", " : "") << sizes[i];
  s << (sizes.size() == 1 ? ",)" : ")");
  return s.str();
}

// torch's names: float32, bfloat16, complex64.
inline std::string dtype_text(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kShort:
      return "int16";
    case at::kChar:
      return "int8";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    case at::ScalarType::Undefined: // the dispatcher lets None through where a tensor is asked for
      return "None";
    default:
      return c10::toString(dtype);
  }
}

// Sizes as "(B=4, T=128, D=64)".
inline std::string named_text(std::initializer_list<const char*> names, c10::SymIntArrayRef sizes) {
  std::ostringstream s;
  s << '(';
  size_t i = 0;
  for (const char* name : names) {
    s << (i ? ", " : "") << name << '=' << sizes[i];
    ++i;
  }
  s << ')';
  return s.str();
}

inline void check_shape(
    const char* op, const char* name, const at::Tensor& x,
    std::initializer_list<const char*> letters, c10::SymIntArrayRef expected,
    const std::string& why) {
  const auto sizes = x.sym_sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = equal(sizes[i], expected[i]);
  TORCH_CHECK_VALUE(
      same, op, ": ", name, " has shape ", shape_text(sizes), ", expected ",
      named_text(letters, expected), ", ", why);
}

inline void check_dtype(
    const char* op, const char* name, const at::Tensor& x, at::ScalarType expected,
    const std::string& why) {
  TORCH_CHECK_TYPE(
      x.scalar_type() == expected, op, ": ", name, " has dtype ", dtype_text(x.scalar_type()),
      ", expected ", dtype_text(expected), ", ", why);
}

inline void check_device(
    const char* op, const char* name, const at::Tensor& x, at::Device expected,
    const std::string& why) {
  TORCH_CHECK(
      x.device() == expected, op, ": ", name, " is on ", x.device(), ", expected ", expected, ", ",
      why);
}

// The dtype in which a recurrence accumulates and hands its state on.
inline at::ScalarType state_dtype(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 ? at::kFloat : dtype;
}

} // namespace torch_ext
