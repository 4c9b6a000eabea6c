// The CPU driver: every cell on every instruction set and dtype, forward and backward, against the formulas run in a plain
// loop.
#include "cpu/dispatch.h"

#include <unistd.h>

#include <thread>

#include "diagonal_problems.h"
#include "settings.h"

namespace torch_ext::test {
namespace {

void run_on_threads(int64_t n, int64_t /*grain*/, void (*fn)(int64_t, int64_t, void*), void* ctx) {
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([=] {
      const int64_t begin = n * i / kThreads, end = n * (i + 1) / kThreads;
      if (begin < end) fn(begin, end, ctx);
    });
  }
  for (std::thread& each : threads) each.join();
}
const cpu::Parallel kAlone{1, nullptr}, kThreaded{3, run_on_threads};

Result run(const Problem& p, cpu::Parallel parallel) {
  return run(
      p,
      [&](const DiagonalForward& f) {
        EXPECT_TRUE(cpu::diagonal_forward(p.cell.index, p.dtype, f, parallel));
      },
      [&](const DiagonalBackward& b) {
        EXPECT_TRUE(cpu::diagonal_backward(p.cell.index, p.dtype, b, parallel));
      });
}

class Driver : public OnEachSet {
 protected:
  bool has(const CellCase& cell) const { return cell.complex || !info_of(dtype()).complex; }
};

TEST_P(Driver, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3, 5},
                             steps = {0, 1, 2, 3, 7, 8, 9, 31, 64, 65, 130},
                             widths = {0,  1,  2,  3,  5,  8,   15,  16, 17,
                                       31, 33, 63, 64, 65, 100, 129, 257};
  for (const CellCase& cell : cell_cases()) {
    if (!has(cell)) continue;
    for (int repeat = 0; repeat < 25; ++repeat) {
      const Problem p = draw_problem(
          random, cell, dtype(), pick(random, sequences), pick(random, steps), pick(random, widths),
          true);
      SCOPED_TRACE(p.text());
      const Result result = run(p, kAlone);
      ASSERT_NO_FATAL_FAILURE(check(p, result));
      ASSERT_TRUE(run(p, kThreaded).same_bytes(result))
          << "the result depends on the number of threads";
    }
  }
}

// Larger than the L2 cache: short tiles, and stores around the cache where the outputs are aligned.
TEST_P(Driver, LargeProblems) {
  Random random;
  const std::vector<CellCase>& cells = cell_cases();
  const CellCase& cell = info_of(dtype()).complex ? cells[0] : pick(random, cells);
  const int64_t l2 = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 20);
  for (const int64_t width : {512, 507}) {
    const int64_t steps = l2 * 5 / 8 / (2 * width * info_of(dtype()).size);
    Problem p = draw_problem(random, cell, dtype(), 2, steps, width, false);
    for (const int64_t skew : {int64_t(0), info_of(dtype()).size}) {
      p.skew = skew;
      SCOPED_TRACE(p.text());
      const Result result = run(p, kAlone);
      if (skew == 0) {
        ASSERT_NO_FATAL_FAILURE(check(p, result, 9));
      }
      ASSERT_TRUE(run(p, kThreaded).same_bytes(result))
          << "the result depends on the number of threads";
    }
  }
}

TEST_P(Driver, StatePool) {
  Random random;
  for (const CellCase& cell : cell_cases()) {
    if (!has(cell)) continue;
    for (const int64_t width : {1, 16, 37, 130}) {
      ASSERT_NO_FATAL_FAILURE(check_state_pool(
          random, cell, dtype(), width, [&](const Problem&, const DiagonalForward& f) {
            ASSERT_TRUE(cpu::diagonal_forward(cell.index, dtype(), f, kAlone));
          }));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sets, Driver, ::testing::ValuesIn(settings(/*with_complex=*/true)), name_of);

TEST(Dispatch, RefusesWhatIsNotBuilt) {
  EXPECT_FALSE(cpu::force_isa("no such set"));
  EXPECT_TRUE(cpu::force_isa("generic"));
  EXPECT_EQ(cpu::chosen_isa(), "generic");
  EXPECT_TRUE(cpu::force_isa(""));
  const DiagonalForward nothing;
  EXPECT_FALSE(cpu::diagonal_forward(DiagonalCells::index<MinGru>(), DType::c64, nothing, kAlone));
}

} // namespace
} // namespace torch_ext::test
