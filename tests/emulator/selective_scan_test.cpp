// The CUDA kernels of the selective scan in the emulator, against the formulas run in a plain loop and central differences
// of it: every dtype, forward, backward and steps, whole rows and rows cut into segments, all options and layouts.
#include <array>

#include "cpp/selective_scan_problems.h"

#include "cuda/selective_scan.cu"

namespace torch_ext::cuda {
// What the drivers above leave to chance: so many blocks fill a GPU, and so many steps a segment has at least.
void force_segments(bool many) {
  scan_enough_blocks = many ? 1000 : 1, scan_least_steps = many ? 1 : kScanLeastSteps;
  scan_enough_wide_blocks = 1;
}
void leave_segments() {
  scan_enough_blocks = kScanEnoughBlocks, scan_least_steps = kScanLeastSteps;
  scan_enough_wide_blocks = kScanEnoughBlocks;
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
    all.push_back({dtype.dtype, false, Options::reversed});
    all.push_back({dtype.dtype, true, Options::random});
  }
  for (const bool segments : {false, true}) all.push_back({DType::f32, segments, Options::forward});
  all.push_back({DType::f32, false, Options::random});
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
    ASSERT_NO_FATAL_FAILURE(check_problem(
        p, [](const Problem3& q) { return run(q); }, got));
  }
};

TEST_P(ScanKernels, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3}, steps = {0, 1, 2, 8, 9, 16, 17, 33, 40},
                             widths = {1, 2, 3, 5, 17, 33}, states = {1, 3, 4, 16, 16, 17},
                             groups = {1, 1, 1, 2, 3};
  for (int repeat = 0; repeat < (dtype() == DType::f32 ? 2 : 1); ++repeat) {
    const int64_t G = pick(random, groups);
    ASSERT_NO_FATAL_FAILURE(check(draw_problem(
        random, dtype(), pick(random, sequences), pick(random, steps), G * pick(random, widths),
        pick(random, states), G)));
  }
}

// Every option at once, and B and C per token: what nearly all calls are. Sequences that begin and end anywhere in a row.
TEST_P(ScanKernels, Packed) {
  Random random;
  Problem3 p = draw_problem(random, dtype(), 5, 50, 3, 16, 1);
  p.cu_seqlens = {0, 3, 3, 20, 37, 50};
  const Types types = types_of(dtype());
  const auto normal = [&] { return random.normal(); };
  for (Dense* x : {&p.u, &p.delta, &p.z, &p.grad_out})
    *x = draw(random, types.time, {1, 50, 3}, normal);
  p.softplus = true;
  p.B = draw(random, types.per_token, {1, 50, 1, 16}, normal);
  p.C = draw(random, types.per_token, {1, 50, 1, 16}, normal);
  ASSERT_NO_FATAL_FAILURE(check(p));
  // A NaN stays in its sequence.
  const Result3 clean = run(p);
  p.u(0, 10, 1) = NAN;
  const Result3 spoilt = run(p);
  for (int64_t t = 0; t < 50; ++t) {
    for (int64_t d = 0; d < 3; ++d) {
      if (t >= 3 && t < 20 && d == 1) continue;
      EXPECT_EQ(spoilt.out(0, t, d), clean.out(0, t, d)) << t << " " << d;
      EXPECT_EQ(spoilt.grads[1](0, t, d), clean.grads[1](0, t, d)) << t << " " << d;
    }
  }
}

TEST_P(ScanKernels, StatePool) {
  Random random;
  ASSERT_NO_FATAL_FAILURE(check_pool(
      random, dtype(), random.integer(1, 3), random.integer(1, 40),
      pick(random, std::vector<int64_t>{3, 16}), run_cuda<SelectiveScanForward>));
}

// As many channels as a block has, and whole tiles of them.
TEST_P(ScanKernels, WholeTiles) {
  if (dtype() != DType::f32 && dtype() != DType::bf16) GTEST_SKIP() << "the same for all";
  Random random;
  Problem3 p = draw_problem(random, dtype(), 1, 40, GetParam().segments ? 64 : 128, 16, 1);
  p.cu_seqlens.clear();
  ASSERT_NO_FATAL_FAILURE(check(reshaped(random, p)));
}

// What nearly all calls are: 16 states, B and C per token, softplus, a gate; in either layout.
TEST_P(ScanKernels, Usual) {
  if (types_of(dtype()).state != DType::f32) GTEST_SKIP() << "no kernels of their own";
  Random random;
  const Types types = types_of(dtype());
  Problem3 p = draw_problem(random, dtype(), 1, 24, 128, 16, 1);
  p.cu_seqlens.clear();
  const auto normal = [&] { return random.normal(); };
  p.z = draw(random, types.time, {1, 24, 128}, normal);
  p = reshaped(random, p);
  for (Dense* x : {&p.B, &p.C}) *x = draw(random, types.per_token, {1, 24, 1, 16}, normal);
  p.softplus = true;
  p.order = kNatural;
  ASSERT_NO_FATAL_FAILURE(check(p));
  if (GetParam().order != Options::reversed) return;
  p.order = kTimeInside, p.reverse = false;
  for (int64_t d = 0; d < 128; d += 2) p.A(d, d % 16) = 0.01; // a state that grows
  ASSERT_NO_FATAL_FAILURE(check(p));
}

// More states than a channel's lanes hold at a time, and tiles between kept states.
TEST_P(ScanKernels, ManyStates) {
  Random random;
  const std::vector<std::array<int64_t, 3>> sizes = {{18, 2, 130}, {50, 1, 64}, {17, 1, 256}};
  const auto [T, D, N] = pick(random, sizes);
  ASSERT_NO_FATAL_FAILURE(check(draw_problem(random, dtype(), 1, T, D, N, 1)));
}

// The same bits, whatever the order of threads; unwanted gradients are left out.
TEST_P(ScanKernels, SameBits) {
  if (GetParam().order != Options::random) GTEST_SKIP() << "one order is compared with another";
  Random random;
  for (const int64_t N : {5, 16}) {
    Problem3 p = draw_problem(random, dtype(), 2, 20, 6, N, 2);
    if (N == 16) {
      p.cu_seqlens.clear();
      p = reshaped(random, p);
      for (Dense* x : {&p.B, &p.C})
        *x = draw(
            random, types_of(dtype()).per_token, {2, 20, 2, N}, [&] { return random.normal(); });
    }
    SCOPED_TRACE(p.text());
    emulator::options().order = Options::random;
    const Result3 all = run(p), few = run(p, true, true);
    ASSERT_TRUE(same(all.grads[0], few.grads[0]) && same(all.grads[1], few.grads[1]));
    emulator::options().order = Options::forward;
    ASSERT_TRUE(same(all, run(p))) << "the result depends on the order of threads";
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
