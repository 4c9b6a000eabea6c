// The CUDA kernels of the selective scan in the emulator, against the formulas run in a plain loop and central differences
// of it: every dtype, forward, backward and steps, whole rows and rows cut into segments, all options and layouts.
#include <array>

#include "cpp/selective_scan_problems.h"

#include "cuda/selective_scan.cu"

namespace torch_ext::cuda {
// What the drivers above leave to chance: so many blocks fill a GPU, and so many steps a segment has at least.
void force_segments(bool many) {
  scan_enough_blocks = many ? 1000 : 1, scan_least_steps = many ? 1 : kScanLeastSteps;
}
void leave_segments() {
  scan_enough_blocks = kScanEnoughBlocks, scan_least_steps = kScanLeastSteps;
}
} // namespace torch_ext::cuda

namespace torch_ext::test {
namespace {

using emulator::Options;

template <class P>
void run_cuda(DType dtype, const P& p) {
  // Fresh memory, as the caching allocator gives it: of any content.
  const int64_t bytes = cuda::selective_scan_workspace(dtype, p);
  std::unique_ptr<char, void (*)(void*)> workspace(
      bytes ? static_cast<char*>(aligned_alloc(256, size_t(bytes))) : nullptr, free);
  if (bytes) memset(workspace.get(), 0xff, size_t(bytes));
  cuda::selective_scan(dtype, p, workspace.get(), nullptr);
}
Result3 run(const Problem3& p, bool backward = true, bool few = false) {
  return run(p, run_cuda<SelectiveScanForward>, run_cuda<SelectiveScanBackward>, backward, few);
}

struct Setting {
  DType dtype;
  bool segments;
  Options::Order order;
};
void PrintTo(const Setting& setting, std::ostream* out) {
  *out << info_of(setting.dtype).name << (setting.segments ? " segments" : " whole");
}
std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const DTypeInfo& dtype : kDTypes) {
    for (const bool segments : {false, true}) {
      for (const auto order : {Options::forward, Options::reversed, Options::random})
        all.push_back({dtype.dtype, segments, order});
    }
  }
  return all;
}

class ScanKernels : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    emulator::options() = {};
    emulator::options().order = GetParam().order;
    emulator::options().seed = seed();
    cuda::force_segments(GetParam().segments);
  }
  void TearDown() override {
    emulator::options() = {};
    cuda::leave_segments();
  }
  DType dtype() const { return GetParam().dtype; }
  void check(const Problem3& p) {
    SCOPED_TRACE(p.text());
    Result3 got;
    ASSERT_NO_FATAL_FAILURE(check_problem(p, [](const Problem3& q) { return run(q); }, got));
  }
};

TEST_P(ScanKernels, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3}, steps = {0, 1, 2, 8, 9, 16, 17, 40, 50},
                             widths = {1, 2, 3, 5, 17, 33}, states = {1, 3, 4, 7, 16, 16, 17},
                             groups = {1, 1, 1, 2, 3};
  for (int repeat = 0; repeat < 3; ++repeat) {
    const int64_t G = pick(random, groups);
    ASSERT_NO_FATAL_FAILURE(check(draw_problem(
        random, dtype(), pick(random, sequences), pick(random, steps), G * pick(random, widths),
        pick(random, states), G)));
  }
}

std::string name_of(const ::testing::TestParamInfo<Setting>& each) {
  const char* const orders[] = {"forward", "reversed", "random"};
  return std::string(info_of(each.param.dtype).name) +
         (each.param.segments ? "_segments_" : "_whole_") + orders[int(each.param.order)];
}
INSTANTIATE_TEST_SUITE_P(All, ScanKernels, ::testing::ValuesIn(settings()), name_of);

} // namespace
} // namespace torch_ext::test
