// The CUDA kernels of the diagonal family in the emulator, against the formulas run in a plain loop: every cell and dtype,
// forward and backward, few steps and many, both schedules of blocks, all layouts.
#include "cpp/diagonal_problems.h"

#include "cuda/diagonal.cu"

namespace torch_ext::cuda {
// What the drivers above leave to chance: so many blocks fill a GPU. 1: a block walks through all tiles; else one per tile.
void force_blocks(int64_t enough) { enough_blocks = enough; }
} // namespace torch_ext::cuda

namespace torch_ext::test {
namespace {

using emulator::Options;

template <class P>
void run_cuda(const Problem& problem, const P& p) {
  // Fresh memory, as the caching allocator gives it: of any content.
  const int64_t bytes = cuda::diagonal_workspace(problem.cell.index, problem.dtype, p);
  std::unique_ptr<char, void (*)(void*)> workspace(
      bytes ? static_cast<char*>(aligned_alloc(256, size_t(bytes))) : nullptr, free);
  if (bytes) memset(workspace.get(), 0xff, size_t(bytes));
  cuda::diagonal(problem.cell.index, problem.dtype, p, workspace.get(), nullptr);
}
Result run(const Problem& p) {
  return run(
      p, [&](const DiagonalForward& f) { run_cuda(p, f); },
      [&](const DiagonalBackward& b) { run_cuda(p, b); });
}

struct Setting {
  DType dtype;
  bool chained;
  Options::Order order;
};
void PrintTo(const Setting& setting, std::ostream* out) {
  *out << info_of(setting.dtype).name << (setting.chained ? " chained" : " walking");
}
std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const DTypeInfo& dtype : kDTypes) {
    for (const bool chained : {false, true}) {
      for (const auto order : {Options::forward, Options::reversed, Options::random})
        all.push_back({dtype.dtype, chained, order});
    }
  }
  return all;
}

class Diagonal : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    emulator::options() = {};
    emulator::options().order = GetParam().order;
    emulator::options().seed = seed();
    cuda::force_blocks(GetParam().chained ? int64_t(1) << 40 : 1);
  }
  void TearDown() override {
    emulator::options() = {};
    cuda::force_blocks(cuda::kEnoughBlocks);
  }
  DType dtype() const { return GetParam().dtype; }
  bool has(const CellCase& cell) const { return cell.complex || !info_of(dtype()).complex; }
};

TEST_P(Diagonal, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3},
                             steps = {0, 1, 2, 15, 16, 17, 24, 31, 64, 65, 130},
                             widths = {0, 1, 2, 3, 17, 31, 32, 33, 64, 65, 72};
  for (const CellCase& cell : cell_cases()) {
    if (!has(cell)) continue;
    for (int repeat = 0; repeat < 6; ++repeat) {
      const Problem p = draw_problem(
          random, cell, dtype(), pick(random, sequences), pick(random, steps), pick(random, widths),
          true);
      SCOPED_TRACE(p.text());
      const Result result = run(p);
      ASSERT_NO_FATAL_FAILURE(check(p, result));
      ASSERT_TRUE(run(p).same_bytes(result)) << "the result depends on the order of threads";
    }
  }
}

// More tiles than are folded at once.
TEST_P(Diagonal, LongSequences) {
  Random random;
  const std::vector<CellCase>& cells = cell_cases();
  const CellCase& cell = info_of(dtype()).complex ? cells[0] : pick(random, cells);
  const int64_t tile = 64, steps = (GetParam().chained ? cuda::kChain + 2 : 5) * tile;
  const Problem p = draw_problem(random, cell, dtype(), 2, steps + 3, 3, true);
  SCOPED_TRACE(p.text());
  const Result result = run(p);
  ASSERT_NO_FATAL_FAILURE(check(p, result));
  ASSERT_TRUE(run(p).same_bytes(result)) << "the result depends on the order of threads";
}

// A NaN stays in its sequence: sequences that lie end to end in a row share tiles, not states.
TEST_P(Diagonal, SequencesAreApart) {
  Random random;
  for (const CellCase& cell : cell_cases()) {
    if (!has(cell)) continue;
    Problem p = draw_problem(random, cell, dtype(), 5, 200, 3, false);
    p.cu_seqlens = {0, 40, 40, 90, 133, 200};
    for (Sequence& x : p.inputs)
      x = make(
          random, dtype(), 1, 200, 3, kContiguous, [](Random& r) { return r.uniform(-0.7, 0.7); });
    if (p.grad_h)
      p.grad_h =
          make(random, dtype(), 1, 200, 3, kContiguous, [](Random& r) { return r.normal(); });
    SCOPED_TRACE(p.text());
    const Result clean = run(p);
    ASSERT_NO_FATAL_FAILURE(check(p, clean));
    p.inputs[0].array->set(p.inputs[0].at(0, 60, 1), NAN);
    const Result spoilt = run(p);
    for (int64_t t = 0; t < 200; ++t) {
      for (int64_t d = 0; d < 3; ++d) {
        const bool touched = t >= 40 && t < 90 && d == 1;
        const Value h = spoilt.h.get(t * 3 + d), dx = spoilt.grad_inputs[0].get(t * 3 + d);
        if (touched) {
          EXPECT_EQ(std::isnan(h.real()), p.reverse ? t <= 60 : t >= 60) << "t=" << t;
        } else {
          EXPECT_EQ(h, clean.h.get(t * 3 + d)) << "t=" << t << " d=" << d;
          EXPECT_EQ(dx, clean.grad_inputs[0].get(t * 3 + d)) << "t=" << t << " d=" << d;
        }
      }
    }
  }
}

TEST_P(Diagonal, StatePool) {
  Random random;
  for (const CellCase& cell : cell_cases()) {
    if (!has(cell)) continue;
    ASSERT_NO_FATAL_FAILURE(check_state_pool(random, cell, dtype(), 37, run_cuda<DiagonalForward>));
  }
}

std::string name_of(const ::testing::TestParamInfo<Setting>& each) {
  const char* const orders[] = {"forward", "reversed", "random"};
  return std::string(info_of(each.param.dtype).name) +
         (each.param.chained ? "_chained_" : "_walking_") + orders[int(each.param.order)];
}
INSTANTIATE_TEST_SUITE_P(All, Diagonal, ::testing::ValuesIn(settings()), name_of);

} // namespace
} // namespace torch_ext::test
