// The CPU driver of matrix memories: random problems on every instruction set and dtype, against a plain loop in double
// precision, whose gradients are held against central differences.
#include <math.h>

#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "matrix_memory_problems.h"
#include "settings.h"

namespace torch_ext::test {
namespace {

using In = MatrixCase;

// More than two are two that drivers take for more.
cpu::Parallel parallel(int threads) {
  if (threads == 1) return {1, nullptr};
  return {threads, [](int64_t n, int64_t, void (*fn)(int64_t, int64_t, void*), void* ctx) {
            std::thread other([=] { fn(0, n / 2, ctx); });
            fn(n / 2, n, ctx);
            other.join();
          }};
}
void forward(DType dtype, const MatrixMemoryForward& f, int threads = 1) {
  EXPECT_TRUE(cpu::matrix_memory_forward(dtype, f, parallel(threads)));
}
MatrixResult run(const MatrixCase& p, int threads = 1, Wanted wanted = {}) {
  return run(
      p, [&](DType dtype, const MatrixMemoryForward& f) { forward(dtype, f, threads); },
      [&](DType dtype, const MatrixMemoryBackward& b) {
        EXPECT_TRUE(cpu::matrix_memory_backward(dtype, b, parallel(threads)));
      },
      wanted);
}

const std::vector<Normalizer> kNormalizers = {
    Normalizer::none, Normalizer::sum, Normalizer::at_least_one, Normalizer::stabilized};

class MatrixMemory : public OnEachSet {
 protected:
  MatrixCase draw_case(Random& random, const MatrixShape& shape, Normalizer normalizer) {
    return draw_matrix_case(random, dtype(), shape, normalizer);
  }
  void check_case(const MatrixCase& p, double sums = 1.2e-16) {
    SCOPED_TRACE(p.text());
    const MatrixResult got = run(p);
    Accuracy accuracy = accuracy_of(p);
    // Machines that multiply bfloat16 are given weights and states that are rounded to it.
    if (GetParam().isa == "avx512" && dtype() == DType::bf16 && !p.wide_keys)
      accuracy.arithmetic = info_of(DType::bf16).epsilon;
    ASSERT_NO_FATAL_FAILURE(check(p, got, formula(p, true, sums), accuracy));
    ASSERT_TRUE(same(got, run(p, 2))) << "depends on the number of threads";
  }
};

TEST_P(MatrixMemory, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3, 5},
                             steps = {0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 40},
                             heads = {1, 1, 2, 3, 9}, groups = {1, 1, 2, 3},
                             sizes = {1, 2, 3, 5, 8, 15, 16, 17, 24, 33};
  for (int repeat = 0; repeat < 80; ++repeat) {
    const int64_t G = pick(random, groups);
    const MatrixShape shape{pick(random, sequences), pick(random, steps),
                            G * pick(random, heads), G,
                            pick(random, sizes),     pick(random, sizes)};
    ASSERT_NO_FATAL_FAILURE(check_case(draw_case(random, shape, kNormalizers[size_t(repeat % 4)])));
  }
}

// Around the ends of chunks, of 32 and of 64 steps.
TEST_P(MatrixMemory, ManyChunks) {
  Random random;
  for (const Normalizer normalizer : kNormalizers)
    for (const MatrixShape& shape : std::vector<MatrixShape>{
             {1, random.integer(95, 97), 2, 1, 7, 20},
             {1, random.integer(127, 129), 1, 1, 70, 65},
             {1, random.integer(191, 193), 1, 1, 64, 66}})
      ASSERT_NO_FATAL_FAILURE(check_case(draw_case(random, shape, normalizer)));
}

// Fewer heads than threads: forward and backward go over all chunks in passes.
TEST_P(MatrixMemory, FewHeads) {
  Random random;
  for (const Normalizer normalizer : kNormalizers)
    for (const MatrixShape& shape : std::vector<MatrixShape>{
             {1, random.integer(255, 258), 1, 1, 66, 70},
             {1, random.integer(225, 290), 3, 1, 33, 40},
             {2, random.integer(225, 290), 10, 2, 17, 16}}) {
      MatrixCase p = draw_case(random, shape, normalizer);
      while (p.packed()) p = draw_case(random, shape, normalizer);
      ASSERT_NO_FATAL_FAILURE(check_case(p));
      const MatrixResult all = run(p), few = run(p, 64, {.few = true});
      ASSERT_TRUE(same(all, run(p, 64))) << p.text();
      for (size_t i = 0; i <= In::v; ++i)
        ASSERT_TRUE(same(all.grads[i], few.grads[i])) << In::name(i) << ": " << p.text();
    }
}

TEST_P(MatrixMemory, LongSequence) {
  if (dtype() != DType::f32) GTEST_SKIP() << "the same for all";
  Random random;
  for (const Normalizer normalizer : kNormalizers)
    ASSERT_NO_FATAL_FAILURE(
        check_case(draw_case(random, {1, random.integer(1000, 1200), 1, 1, 5, 6}, normalizer)));
  ASSERT_NO_FATAL_FAILURE(
      check_case(draw_case(random, {1, 5000, 1, 1, 6, 9}, Normalizer::stabilized)));
  // More chunks than a backward in passes goes over at a time.
  MatrixCase p = draw_case(random, {1, 4000, 1, 1, 17, 16}, Normalizer::stabilized);
  while (p.packed()) p = draw_case(random, {1, 4000, 1, 1, 17, 16}, Normalizer::stabilized);
  ASSERT_NO_FATAL_FAILURE(check_case(p));
}

TEST_P(MatrixMemory, UnwantedOutputsAreLeftOut) {
  Random random;
  for (const Normalizer normalizer : kNormalizers) {
    const MatrixCase p = draw_case(random, {2, 70, 4, 2, 9, 17}, normalizer);
    SCOPED_TRACE(p.text());
    const MatrixResult all = run(p), few = run(p, 1, {.few = true});
    ASSERT_TRUE(same(all.out[In::h], few.out[In::h]));
    for (size_t i = 0; i <= In::v; ++i)
      ASSERT_TRUE(same(all.grads[i], few.grads[i])) << In::name(i);
  }
}

TEST_P(MatrixMemory, StatePool) {
  Random random;
  for (const Normalizer normalizer : kNormalizers)
    for (const MatrixShape& shape :
         std::vector<MatrixShape>{{0, 1, 3, 1, 16, 33}, {0, 1, 2, 2, 64, 64}, {0, 40, 2, 1, 5, 16}})
      ASSERT_NO_FATAL_FAILURE(check_matrix_pool(
          random, dtype(), shape, normalizer,
          [](DType dtype, const MatrixMemoryForward& f) { forward(dtype, f); }));
}

TEST_P(MatrixMemory, StatesInPlace) {
  Random random;
  for (int repeat = 0; repeat < 3; ++repeat)
    for (const Normalizer normalizer : kNormalizers) {
      const MatrixCase p = draw_case(
          random, {3, pick(random, std::vector<int64_t>{0, 1, 50, 65}), 2, 1, 17, 9}, normalizer);
      SCOPED_TRACE(p.text());
      ASSERT_TRUE(
          same(run(p, 1, {.backward = false}), run(p, 2, {.backward = false, .in_place = true})));
    }
}

// The tokens of one sequence that come before `end`, alone or not, are what its outputs there depend on.
TEST_P(MatrixMemory, NaNStaysWhereItBelongs) {
  Random random;
  const std::vector<size_t> places = {In::q,         In::k,         In::v,
                                      In::log_decay, In::log_input, In::input_scale};
  for (int repeat = 0; repeat < 24; ++repeat) {
    const Normalizer normalizer = kNormalizers[size_t(repeat / 6)];
    MatrixCase p = draw_case(random, {2, 75, 4, 2, 8, 17}, normalizer);
    const size_t where = places[size_t(repeat % 6)];
    if (!p.in[where]) continue;
    p.repeated = {};
    SCOPED_TRACE(p.text());
    SizedArray want = formula(p, false).out[In::h];
    const int64_t s = random.integer(0, 1);
    const auto tokens = p.tokens(s);
    if (tokens.empty()) continue;
    const size_t step = size_t(random.integer(0, int64_t(tokens.size()) - 1));
    const int64_t heads = p.in[where].size[2], of = random.integer(0, heads - 1);
    const auto [row, token] = tokens[step];
    p.in[where](row, token, of) = random.integer(0, 1) ? NAN : INFINITY;
    SCOPED_TRACE(std::string(In::name(where)) + " of step " + std::to_string(step));
    const MatrixResult got = run(p, 1, {.backward = false});
    for (int64_t sequence = 0; sequence < p.S; ++sequence) {
      const auto all = p.tokens(sequence);
      for (int64_t head = 0; head < p.H; ++head) {
        const bool meets = sequence == s && head / (p.H / heads) == of;
        for (size_t t = 0; t < (meets ? step : all.size()); ++t)
          for (int64_t b = 0; b < p.V; ++b) {
            const double x = got.out[In::h](all[t].first, all[t].second, head, b).real();
            const Sized y = want(all[t].first, all[t].second, head, b);
            ASSERT_LE(fabs(x - y.value), 0.01 * y.size + 1e-6)
                << sequence << " " << head << " " << t;
          }
      }
    }
  }
}

// Gates far out, where weights vanish beside each other: all else stays exact.
TEST_P(MatrixMemory, GatesFarOut) {
  Random random;
  const std::vector<double> far = {-1e4, -300, -88, -20, -1, 0, 1, 20, 88, 300, 1e4};
  for (int repeat = 0; repeat < 12; ++repeat) {
    MatrixCase p = draw_case(
        random, {2, 100, 2, 1, 6, 17},
        repeat % 3 ? Normalizer::stabilized : kNormalizers[size_t(repeat / 3 % 3)]);
    p.in[In::log_decay] = draw(random, p.wide(), p.size_of(In::log_decay), [&] {
      return random.integer(0, 5) ? -fabs(random.normal()) : -fabs(pick(random, far));
    });
    p.repeated[In::log_decay] = 0;
    if (p.stabilizes())
      p.in[In::log_input] = draw(random, p.wide(), p.size_of(In::log_input), [&] {
        return pick(random, far) + random.normal();
      });
    settle(random, p);
    // Each step of a chunk rounds a sum that one of them has made large.
    ASSERT_NO_FATAL_FAILURE(check_case(p, 64 * 1.2e-16));
  }
}

INSTANTIATE_TEST_SUITE_P(Sets, MatrixMemory, ::testing::ValuesIn(settings(false)), name_of);

// The plain loop's own gradients.
TEST(MatrixMemoryFormula, GradientsAreThoseOfDifferences) {
  Random random;
  for (int repeat = 0; repeat < 60; ++repeat) {
    MatrixCase p = draw_matrix_case(
        random, DType::f64, {2, random.integer(0, 6), 4, 2, 3, 2},
        kNormalizers[size_t(repeat % 4)]);
    p.exact = true;
    p.repeated = {};
    if (p.normalizer == Normalizer::sum)
      p.eps = 0.5; // else what divides may be so small that differences are curved
    SCOPED_TRACE(p.text());
    for (size_t i = 0; i < In::kInputs; ++i) // those that stand for what is not there
      if (!p.in[i] && !p.size_of(i).empty() && (i != In::log_input || p.stabilizes())) {
        p.in[i] = zeros(p.size_of(i));
        for (Value& each : p.in[i].at) each = i == In::input_scale ? 1 : 0;
      }
    settle(random, p);
    const MatrixAnswer answer = formula(p);
    for (size_t i = 0; i < In::kInputs; ++i)
      for (size_t at = 0; at < p.in[i].at.size(); ++at) {
        constexpr double kEpsilon = 1e-6;
        const Value before = p.in[i].at[at];
        p.in[i].at[at] = before + kEpsilon;
        const double high = loss(p);
        p.in[i].at[at] = before - kEpsilon;
        const double low = loss(p);
        p.in[i].at[at] = before;
        const Sized got = answer.grads[i].at[at];
        ASSERT_NEAR(got.value, (high - low) / (2 * kEpsilon), 1e-6 * (1 + got.size + fabs(high)))
            << "gradient of " << In::name(i) << " at " << at;
      }
  }
}

} // namespace
} // namespace torch_ext::test
