// Where isa.cpp finds the kernels of selective_scan.cpp, which is compiled once per instruction set too, beside it.
#pragma once
#include "kernels.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S, bool kComplex>
struct SelectiveScanOf {
  static void forward(const SelectiveScanForward&, const SelectiveScanPlan&, int64_t, int64_t);
  static void backward(const SelectiveScanBackward&, const SelectiveScanPlan&, int64_t, int64_t);
  static void reduce_channels(
      const SelectiveScanBackward&, const SelectiveScanPlan&, int64_t, int64_t);
  static void reduce_tokens(
      const SelectiveScanBackward&, const SelectiveScanPlan&, int64_t, int64_t);
};

constexpr void list_selective_scan(KernelTable& t) {
  const auto add = [&]<class Kernel>(DType dtype, Kernel) {
    t.selective_scan[int(dtype)] = {
        &Kernel::forward, &Kernel::backward, &Kernel::reduce_channels, &Kernel::reduce_tokens};
  };
  add(DType::f32, SelectiveScanOf<float, false>{});
  add(DType::f64, SelectiveScanOf<double, false>{});
  add(DType::bf16, SelectiveScanOf<BFloat16, false>{});
  add(DType::f16, SelectiveScanOf<Half, false>{});
  add(DType::c64, SelectiveScanOf<float, true>{});
  add(DType::c128, SelectiveScanOf<double, true>{});
}

} // namespace torch_ext::cpu::TORCH_EXT_ISA
