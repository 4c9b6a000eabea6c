// How the kernels of csrc/cuda/selective_scan.cu are launched, for Mamba's 16 states: see kernel_shapes.h.
#include "cuda/selective_scan.cu"

#include "kernel_shapes.h"

namespace torch_ext::cuda {
namespace {

template <class Driver>
void print_all(Driver, const char* dtype) {
  using Types = typename Driver::Types;
  const auto print = [&](const char* kernel, const char* more, int shared) {
    printf(
        "{\"kernel\": \"selective_scan_%s %s%s\", \"threads\": %d, \"dynamic_shared\": %d}\n",
        kernel, dtype, more, kScanThreads, shared);
  };
  SelectiveScanForward f;
  SelectiveScanBackward b;
  for (SelectiveScanProblem* p :
       {static_cast<SelectiveScanProblem*>(&f), static_cast<SelectiveScanProblem*>(&b)})
    p->num_sequences = 8, p->num_steps = 2048, p->width = 5120, p->num_states = 16;
  const ScanPlan forward = Driver::plan(f), backward = Driver::plan(b);
  print("walk", " forward", scan_walk_shared<Types, ScanWalk::forward>(forward, false, false));
  print(
      "walk", " forward_effect",
      scan_walk_shared<Types, ScanWalk::forward_effect>(forward, false, false));
  print(
      "walk", " backward_effect",
      scan_walk_shared<Types, ScanWalk::backward_effect>(
          Driver::effect_plan(backward, b), false, false));
  const int shared = scan_backward_shared<Types>(backward, false, false).bytes;
  print("backward", " false", shared);
  if (Driver::kHasPlain) print("backward", " true", shared);
  if constexpr (Driver::kHasPlain) {
    // A pass of the main loop is a tile. Elements are states here: (step, channel, state).
    using Wide = ScanWide<Types, 1>;
    const int per_thread = kScanTile * Wide::kChannels * Wide::kStates / kScanThreads;
    const auto print_wide = [&](const char* kernel, int shared, int passes, int fills, int ends,
                                const char* states) {
      printf(
          "{\"kernel\": \"selective_scan_%s %s\", \"threads\": %d, \"dynamic_shared\": %d, "
          "\"elements_per_pass\": %d, \"states\": %d, \"channels\": %d, \"steps_per_tile\": %d, "
          "\"itemsize\": %d, \"enough_blocks\": %d, \"least_steps\": %d, \"outer_passes\": %d, "
          "\"fill_passes\": %d, \"finish_passes\": %d, \"state_passes\": %s}\n",
          kernel, dtype, kScanThreads, shared, per_thread, Wide::kStates, Wide::kChannels,
          kScanTile, int(sizeof(typename Types::S)), int(kScanEnoughBlocks), int(kScanLeastSteps),
          passes, fills, ends, states);
    };
    const int passes = Wide::kVectors / Wide::kAhead;
    // Of the loop over steps, as it is passed in a tile: exponentials of one pass, and how often. Backward, half of the
    // steps are walked through once more before.
    print_wide("wide", scan_wide_shared<Types>(), 1, passes, passes, "[[64, 4]]");
    print_wide(
        "wide_backward", ScanWideBackward<Types>::kBytes, kScanTile / kScanHalf, passes,
        Wide::kVectors, "[[64, 4], [32, 4]]");
  }
  print("fold", " false forward", 0), print("fold", " true backward", 0);
  print("empty", " forward", 0), print("empty", " backward", 0);
  print("tokens", "", 0), print("channels", "", 0);
}

} // namespace
} // namespace torch_ext::cuda

int main() {
  using namespace torch_ext::cuda;
  print_all(ScanDriver<float, false>{}, "float32");
  print_all(ScanDriver<double, false>{}, "float64");
  print_all(ScanDriver<torch_ext::BFloat16, false>{}, "bfloat16");
  print_all(ScanDriver<torch_ext::Half, false>{}, "float16");
  print_all(ScanDriver<float, true>{}, "complex64");
  print_all(ScanDriver<double, true>{}, "complex128");
}
