// Where isa.cpp finds the kernels of gated.cpp, which is compiled once per instruction set too, beside it.
#pragma once
#include "../cells/all.h"
#include "kernels.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class Cell, class A>
struct GatedOf {
  static void forward(const GatedForward&, const GatedPlan&, DType, int64_t, int64_t);
  static void backward(const GatedBackward&, const GatedPlan&, DType, int64_t, int64_t);
  static int64_t forward_scratch(const GatedForward&, const GatedPlan&);
  static int64_t backward_scratch(const GatedBackward&, const GatedPlan&);
};
template <class W>
struct GatedPackOf {
  static void pack(const GatedPanel&, const void*, int64_t, int64_t, bool, int64_t, int64_t);
};

template <class... Cell>
constexpr void list_gated(KernelTable& t, Cells<Cell...>) {
  static_assert(sizeof...(Cell) <= kMaxGatedCells);
  const auto add = [&]<class C, class A>(C*, A) {
    using Kernels = GatedOf<C, A>;
    t.gated[GatedCells::index<C>()][sizeof(A) == 8] = {
        &Kernels::forward, &Kernels::backward, &Kernels::forward_scratch,
        &Kernels::backward_scratch};
  };
  (add(static_cast<Cell*>(nullptr), float{}), ...);
  (add(static_cast<Cell*>(nullptr), double{}), ...);
  t.gated_pack[int(DType::f32)] = &GatedPackOf<float>::pack;
  t.gated_pack[int(DType::f64)] = &GatedPackOf<double>::pack;
  t.gated_pack[int(DType::bf16)] = &GatedPackOf<BFloat16>::pack;
}

} // namespace torch_ext::cpu::TORCH_EXT_ISA
