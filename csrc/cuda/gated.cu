// Which kernel of gated.cuh runs how, decided from shapes alone.
#include "gated.h"

#include "gated.cuh"

namespace torch_ext::cuda {
namespace {

static_assert(kGatedWidest == kGatedUnits);

// Weights per gate that a thread keeps: with four gates half of its registers.
template <class A>
inline constexpr int kGatedHeld = sizeof(A) == 4 ? 32 : 0;

template <class Cell, class A>
struct GatedDriver {
  using Block = GatedBlock<Cell, A, kGatedHeld<A>>;
  static GatedKept layout(const GatedProblem& p) {
    return gated_kept(p, Block::kGates, Block::kStates, Block::kFromH);
  }
  static int64_t blocks(const GatedProblem& p) {
    const int64_t tiles = Block::kFromH ? 1 : (p.width + kGatedUnits - 1) / kGatedUnits;
    return (p.num_sequences + kGatedRows - 1) / kGatedRows * p.num_heads * tiles;
  }
  // Whole warps of the units that there are.
  static int threads(const GatedProblem& p) {
    const int64_t units = Block::padded_of(p.width), wanted = (units * kGatedRows + 31) / 32 * 32;
    return int(wanted < kGatedThreads ? wanted : kGatedThreads);
  }
  static int shared_bytes(const GatedProblem& p, int vectors) {
    return vectors * kGatedRows * Block::padded_of(p.width) * int(sizeof(A));
  }
  static int forward_bytes(const GatedProblem& p) {
    return Block::kFromH ? shared_bytes(p, 2 + Cell::two_products) : 0;
  }
  static int backward_bytes(const GatedProblem& p) { return shared_bytes(p, 2 * Block::kFromH); }

  static void run(DType dtype, const GatedForward& p, cudaStream_t stream) {
    launch(
        gated_forward_kernel<Cell, A, kGatedHeld<A>>, dim3(unsigned(blocks(p))), threads(p),
        forward_bytes(p), stream, p, dtype, layout(p));
  }
  static void run(DType dtype, const GatedBackward& p, cudaStream_t stream) {
    launch(
        gated_backward_kernel<Cell, A, kGatedHeld<A>>, dim3(unsigned(blocks(p))), threads(p),
        backward_bytes(p), stream, p, dtype, layout(p));
  }
};

// f(Cell()) of a place in GatedCells.
template <class F, class... Cell>
void with_gated_cell(int cell, const F& f, Cells<Cell...>) {
  ((GatedCells::index<Cell>() == cell ? f(static_cast<Cell*>(nullptr)) : void()), ...);
}
template <class Problem>
void run_gated(DType dtype, const Problem& p, void* stream) {
  if (p.num_sequences == 0 || p.num_heads == 0 || p.width == 0) return;
  with_gated_cell(
      p.cell,
      [&]<class Cell>(Cell*) {
        const auto s = static_cast<cudaStream_t>(stream);
        if (dtype == DType::f64)
          GatedDriver<Cell, double>::run(dtype, p, s);
        else
          GatedDriver<Cell, float>::run(dtype, p, s);
      },
      GatedCells());
}

} // namespace

bool gated_supported(const GatedProblem& p) {
  return !p.norm_weight && !p.cell_norm_weight && !p.projection &&
         (p.width <= kGatedWidest || kGatedSizes[p.cell].from_h == 0);
}
void gated(DType dtype, const GatedForward& p, void* stream) { run_gated(dtype, p, stream); }
void gated(DType dtype, const GatedBackward& p, void* stream) { run_gated(dtype, p, stream); }

} // namespace torch_ext::cuda
