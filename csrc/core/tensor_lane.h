// A cell's lane type that is a tensor: the cell's mathematics as plain differentiable tensor code. Second derivatives and
// forward mode are made of it, so no formula stands in C++ twice.
#pragma once
#include <ATen/ATen.h>

namespace torch_ext {

struct TensorLane {
  at::Tensor v;

  friend TensorLane operator+(const TensorLane& x, const TensorLane& y) { return {x.v + y.v}; }
  friend TensorLane operator-(const TensorLane& x, const TensorLane& y) { return {x.v - y.v}; }
  friend TensorLane operator*(const TensorLane& x, const TensorLane& y) { return {x.v * y.v}; }
  friend TensorLane operator-(const TensorLane& x) { return {-x.v}; }
  friend TensorLane operator+(const TensorLane& x, double c) { return {x.v + c}; }
  friend TensorLane operator+(double c, const TensorLane& x) { return {x.v + c}; }
  friend TensorLane operator-(const TensorLane& x, double c) { return {x.v - c}; }
  friend TensorLane operator-(double c, const TensorLane& x) { return {at::rsub(x.v, c)}; }
  friend TensorLane operator*(const TensorLane& x, double c) { return {x.v * c}; }
  friend TensorLane operator*(double c, const TensorLane& x) { return {x.v * c}; }

  friend TensorLane exp(const TensorLane& x) { return {at::exp(at::clamp_max(x.v, 80))}; }
  friend TensorLane sigmoid(const TensorLane& x) { return {at::sigmoid(x.v)}; }
  friend TensorLane fused(const TensorLane& x, const TensorLane& y, const TensorLane& z) {
    return {x.v * y.v + z.v};
  }
  friend TensorLane reciprocal(const TensorLane& x) { return {at::reciprocal(x.v)}; }
  friend TensorLane at_least(const TensorLane& x, double c) { return {at::where(x.v < c, c, x.v)}; }
  friend TensorLane at_most(const TensorLane& x, double c) { return {at::where(x.v >= c, c, x.v)}; }
  friend TensorLane maximum(const TensorLane& x, const TensorLane& y) {
    return {at::where(x.v < y.v, y.v, x.v)};
  }
  friend TensorLane nonnegative(const TensorLane& x) { return {(x.v >= 0).to(x.v.dtype())}; }
  friend TensorLane conj(const TensorLane& x) { return {at::conj(x.v)}; }
};

} // namespace torch_ext
