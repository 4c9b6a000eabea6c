// The CPU side's entrance: picks the instruction set, cuts a call into items, and runs them on the caller's threads.
// No tensor library; thread-safe.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace torch_ext::cpu {

// Runs fn(ctx, begin, end) over pieces of 0 .. n, each of at least `grain`, on up to `threads` threads.
struct Parallel {
  int threads = 1;
  void (*run)(
      int64_t n, int64_t grain, void (*fn)(int64_t begin, int64_t end, void* ctx),
      void* ctx) = nullptr; // null: here
};

// cell: its place in cells/all.h's DiagonalCells. False when the cell has no kernel for the dtype.
bool diagonal_forward(int cell, DType dtype, const DiagonalForward& problem, Parallel parallel);
bool diagonal_backward(int cell, DType dtype, const DiagonalBackward& problem, Parallel parallel);

// False when there is no kernel for the dtype.
bool causal_conv1d_forward(DType dtype, const CausalConv1dForward& problem, Parallel parallel);
bool causal_conv1d_backward(DType dtype, const CausalConv1dBackward& problem, Parallel parallel);

// dtype: see core/selective_scan_problem.h.
bool selective_scan_forward(DType dtype, const SelectiveScanForward& problem, Parallel parallel);
bool selective_scan_backward(DType dtype, const SelectiveScanBackward& problem, Parallel parallel);

// dtype: that of the arrays over time.
bool matrix_memory_forward(DType dtype, const MatrixMemoryForward& problem, Parallel parallel);
bool matrix_memory_backward(DType dtype, const MatrixMemoryBackward& problem, Parallel parallel);

// For a few rows of x, as long as W is larger than what they make of it. False when there is no kernel for the dtype.
bool project(DType dtype, const Projection& problem, Parallel parallel);

// Instruction sets: those compiled in, the one in use ("generic", "avx2", "avx512"). ATEN_CPU_CAPABILITY (default, avx2,
// avx512) limits the choice as it does torch's. force_isa("") goes back to the automatic choice; false when the set was
// not built or this machine lacks it.
std::vector<std::string> built_isas();
std::string chosen_isa();
bool force_isa(const std::string& name);

// The machine's limits, by the kernels' own instructions. kind: "copy" and "triad" (GB/s, counting the bytes a program
// asks for), "exp" (1e9 results/s on data in L1), "fma" (1e9 lane operations/s). Repeats for `seconds`, takes the best.
// `elements` is the length of each array, all threads together. Negative: no such kind.
double calibrate(
    const std::string& kind, int64_t elements, bool stream, int threads, double seconds);

} // namespace torch_ext::cpu
