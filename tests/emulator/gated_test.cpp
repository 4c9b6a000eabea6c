// The CUDA kernels of gated recurrences in the emulator, against a plain loop in double whose gradients come from a tape:
// every cell and dtype, heads and rows that fill a block and such that do not, all options that the kernels have.
#include "cpp/gated_problems.h"

#include "cuda/gated.cu"

namespace torch_ext::test {
namespace {

using emulator::Options;

struct Setting {
  DType dtype;
  Options::Order order;
};
void PrintTo(const Setting& setting, std::ostream* out) { *out << info_of(setting.dtype).name; }
std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const DTypeInfo& dtype : kDTypes) {
    if (dtype.complex) continue;
    all.push_back({dtype.dtype, Options::forward});
    all.push_back({dtype.dtype, Options::reversed});
    all.push_back({dtype.dtype, Options::random});
  }
  return all;
}

GatedResult run(const GatedCase& p, GatedWanted wanted = {}) {
  return run(
      p,
      GatedCalls{
          [](DType dtype, const GatedForward& f) { cuda::gated(dtype, f, nullptr); },
          [](DType dtype, const GatedBackward& b) { cuda::gated(dtype, b, nullptr); }},
      wanted);
}

class GatedCuda : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    emulator::options() = {};
    emulator::options().order = GetParam().order;
    emulator::options().seed = seed();
  }
  void TearDown() override { emulator::options() = {}; }
  DType dtype() const { return GetParam().dtype; }
  // Draws until the kernels have all its options, and no number is so near to a kink that rounding decides on which side of
  // it.
  std::pair<GatedCase, GatedResult> draw(Random& random, int cell, const GatedShape& shape) {
    for (;;) {
      GatedCase p = draw_gated_case(random, dtype(), cell, shape);
      GatedForward f;
      fill_problem(p, f);
      if (!cuda::gated_supported(f)) continue;
      GatedAnswer answer = plain_gated(p);
      if (answer.margin > (dtype() == DType::f64 ? 1e-12 : 3e-6))
        return {std::move(p), std::move(answer.result)};
    }
  }
};

TEST_P(GatedCuda, RandomProblems) {
  Random random;
  const std::vector<int64_t> widths = {1, 3, 8, 9, 16, 31, 33};
  for (int cell = 0; cell < GatedCells::size; ++cell)
    for (int repeat = 0; repeat < 6; ++repeat) {
      const auto [p, want] = draw(
          random, cell,
          {random.integer(1, 5), pick(random, std::vector<int64_t>{0, 1, 2, 3, 6}),
           random.integer(1, 3), pick(random, widths), 7});
      SCOPED_TRACE(p.text());
      const GatedResult got = run(p);
      ASSERT_NO_FATAL_FAILURE(check(p, got, want));
      ASSERT_TRUE(same(got, run(p))) << "depends on the order of threads";
    }
}

// More weights than a thread keeps, and the widest head; channels in several blocks.
TEST_P(GatedCuda, WideHeads) {
  Random random;
  for (int cell = 0; cell < GatedCells::size; ++cell)
    for (const int64_t width : {70, 128}) {
      const auto [p, want] =
          draw(random, cell, {2, 2, 1, cell == kIndRnn ? width + 200 : width, 7});
      SCOPED_TRACE(p.text());
      ASSERT_NO_FATAL_FAILURE(check(p, run(p), want));
    }
}

TEST_P(GatedCuda, UnwantedOutputsAreLeftOut) {
  Random random;
  for (int cell = 0; cell < GatedCells::size; ++cell) {
    const GatedCase p = draw(random, cell, {3, 4, 2, 9, 7}).first;
    SCOPED_TRACE(p.text());
    const GatedResult all = run(p), few = run(p, {.few = true}),
                      forward = run(p, {.backward = false}),
                      in_place = run(p, {.backward = false, .in_place = true});
    const GatedResult begin(all.begin(), all.begin() + int64_t(forward.size())),
        most(all.begin(), all.begin() + int64_t(few.size()));
    EXPECT_TRUE(same(begin, forward)) << "depends on whether there is a backward";
    EXPECT_TRUE(same(forward, in_place)) << "depends on where states are";
    EXPECT_TRUE(same(most, few)) << "depends on what is wanted";
  }
}

// What is not finite in one sequence stays there, though another one's row is in the same block.
TEST_P(GatedCuda, SequencesAreApart) {
  Random random;
  for (int cell = 0; cell < GatedCells::size; ++cell) {
    GatedCase p = draw(random, cell, {2, 4, 1, 9, 7}).first;
    while (p.packed() || p.T != 4) p = draw(random, cell, {2, 4, 1, 9, 7}).first;
    SCOPED_TRACE(p.text());
    const GatedResult clean = run(p);
    for (int64_t k = 0; k < p.K; ++k) p.x.array->set(p.x.at({1, 1, 0, 0, k}), NAN);
    const GatedResult spoilt = run(p);
    for (size_t i = 0; i < clean.size(); ++i) {
      const size_t half = clean[i].at.size() / 2;
      for (size_t k = 0; k < half; ++k)
        ASSERT_EQ(clean[i].at[k], spoilt[i].at[k]) << clean[i].name << " at " << k;
    }
  }
}

std::string name_of(const ::testing::TestParamInfo<Setting>& each) {
  const char* const orders[] = {"forward", "reversed", "random"};
  return std::string(info_of(each.param.dtype).name) + "_" + orders[int(each.param.order)];
}
INSTANTIATE_TEST_SUITE_P(All, GatedCuda, ::testing::ValuesIn(settings()), name_of);

} // namespace
} // namespace torch_ext::test
