// The causal convolution's kernels on every instruction set and dtype, forward and backward, against its formula in a plain
// double loop: random shapes, layouts and options.
#include "cpu/dispatch.h"

#include <unistd.h>

#include <thread>

#include "causal_conv1d_problems.h"
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

ConvResult run(const ConvProblem& p, cpu::Parallel parallel) {
  return run(
      p,
      [&](const CausalConv1dForward& f) {
        EXPECT_TRUE(cpu::causal_conv1d_forward(p.dtype, f, parallel));
      },
      [&](const CausalConv1dBackward& b) {
        EXPECT_TRUE(cpu::causal_conv1d_backward(p.dtype, b, parallel));
      });
}

class CausalConv1d : public OnEachSet {};

TEST_P(CausalConv1d, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3, 5},
                             steps = {0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 63, 64, 65, 67, 130, 200},
                             widths = {0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100, 257};
  for (int64_t window = 1; window <= 11; ++window) {
    for (int repeat = 0; repeat < 12; ++repeat) {
      const ConvProblem p = draw(
          random, dtype(), pick(random, sequences), pick(random, steps), pick(random, widths),
          window, true);
      SCOPED_TRACE(p.text());
      const ConvResult result = run(p, kAlone);
      ASSERT_NO_FATAL_FAILURE(check(p, result));
      ASSERT_TRUE(run(p, kThreaded).same_bytes(result))
          << "the result depends on the number of threads";
    }
  }
}

// Several blocks of channels and groups of rows; larger than the L2 cache, where stores go around it if y is aligned.
TEST_P(CausalConv1d, LargeProblems) {
  Random random;
  const int64_t l2 = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 20);
  for (const int64_t width : {2560, 2559}) {
    const int64_t steps = l2 * 5 / 8 / (width * info_of(dtype()).size);
    ConvProblem p = draw(random, dtype(), 2, steps, width, 4, false);
    for (const int64_t skew : {int64_t(0), info_of(dtype()).size}) {
      p.skew = skew;
      SCOPED_TRACE(p.text());
      const ConvResult result = run(p, kAlone);
      if (skew == 0) {
        ASSERT_NO_FATAL_FAILURE(check(p, result, 17));
      }
      ASSERT_TRUE(run(p, kThreaded).same_bytes(result))
          << "the result depends on the number of threads";
    }
  }
}

// The same numbers with channels or time side by side: the same bits.
TEST_P(CausalConv1d, LayoutsAgree) {
  Random random;
  for (const int64_t width : {1, 7, 37, 130}) {
    ConvProblem p = draw(random, dtype(), 2, 150, width, 4, false);
    const ConvResult result = run(p, kAlone);
    for (Sequence* each : {&p.x, &p.grad_y, &p.initial_state, &p.grad_final_state}) {
      const int64_t T = each->sequence / width;
      Sequence turned = *each;
      turned.time = 1, turned.width = T;
      turned.array = std::make_shared<Array>(dtype(), each->array->count(), false);
      for (int64_t s = 0; s < 2; ++s)
        for (int64_t t = 0; t < T; ++t)
          for (int64_t d = 0; d < width; ++d)
            turned.array->set(turned.at(s, t, d), each->get(s, t, d));
      *each = turned;
    }
    SCOPED_TRACE(p.text());
    ASSERT_TRUE(run(p, kAlone).same_bytes(result));
  }
}

TEST_P(CausalConv1d, StatePool) {
  Random random;
  check_state_pool(
      random, dtype(), [](const ConvProblem& p) { return run(p, kAlone); },
      [](DType dtype, const CausalConv1dForward& f) {
        ASSERT_TRUE(cpu::causal_conv1d_forward(dtype, f, kAlone));
      });
}

INSTANTIATE_TEST_SUITE_P(
    Sets, CausalConv1d, ::testing::ValuesIn(settings(/*with_complex=*/false)), name_of);

} // namespace
} // namespace torch_ext::test
