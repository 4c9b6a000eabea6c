// How the kernels of csrc/cuda/gated.cu are launched for the widest head: see kernel_shapes.h.
#include "cuda/gated.cu"

#include "kernel_shapes.h"

namespace torch_ext::cuda {
namespace {

template <class Cell, class A>
void print(const char* cell) {
  using Driver = GatedDriver<Cell, A>;
  GatedProblem p;
  p.width = kGatedWidest;
  const auto line = [&](const char* direction, int shared) {
    printf(
        "{\"kernel\": \"gated_%s %s %s %d\", \"threads\": %d, \"dynamic_shared\": %d}\n", direction,
        cell, dtype_name<A>, kGatedHeld<A>, Driver::threads(p), shared);
  };
  line("forward", Driver::forward_bytes(p));
  line("backward", Driver::backward_bytes(p));
}
template <class Cell>
void print(const char* cell) {
  print<Cell, float>(cell), print<Cell, double>(cell);
}

} // namespace
} // namespace torch_ext::cuda

int main() {
  using namespace torch_ext;
  cuda::print<Lstm>("LstmCell<false>"), cuda::print<CoupledLstm>("LstmCell<true>");
  cuda::print<Gru>("Gru"), cuda::print<GruResetBefore>("GruResetBefore");
  cuda::print<Elman>("Elman"), cuda::print<IndRnn>("IndRnn"), cuda::print<Slstm>("Slstm");
}
