// The CPU driver of the selective scan: random problems on every instruction set and dtype, against a plain loop in double
// precision, and gradients against central differences of that loop.
#include <math.h>

#include <array>
#include <string>
#include <thread>
#include <vector>

#include "cells/dual.h"
#include "cells/selective_scan.h"
#include "cpu/dispatch.h"
#include "selective_scan_problems.h"
#include "settings.h"

namespace torch_ext::test {
namespace {

void run_on(int64_t threads, int64_t n, void (*fn)(int64_t, int64_t, void*), void* ctx) {
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t begin = n * i / threads, end = n * (i + 1) / threads;
    if (begin < end) pool.emplace_back([=] { fn(begin, end, ctx); });
  }
  for (std::thread& each : pool) each.join();
}
cpu::Parallel parallel(int threads) {
  if (threads == 2)
    return {2, [](int64_t n, int64_t, void (*fn)(int64_t, int64_t, void*), void* c) {
              run_on(2, n, fn, c);
            }};
  if (threads == 3)
    return {3, [](int64_t n, int64_t, void (*fn)(int64_t, int64_t, void*), void* c) {
              run_on(3, n, fn, c);
            }};
  return {1, nullptr};
}

Result3 run(const Problem3& problem, int threads, bool backward = true, bool few = false) {
  return run(
      problem,
      [&](DType dtype, const SelectiveScanForward& f) {
        EXPECT_TRUE(cpu::selective_scan_forward(dtype, f, parallel(threads)));
      },
      [&](DType dtype, const SelectiveScanBackward& b) {
        EXPECT_TRUE(cpu::selective_scan_backward(dtype, b, parallel(threads)));
      },
      backward, few);
}

std::vector<std::string> isas() {
  std::vector<std::string> usable;
  for (const std::string& isa : cpu::built_isas())
    if (cpu::force_isa(isa)) usable.push_back(isa);
  cpu::force_isa("");
  return usable;
}

class SelectiveScan : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override { ASSERT_TRUE(cpu::force_isa(GetParam().isa)); }
  void TearDown() override { cpu::force_isa(""); }
  DType dtype() const { return GetParam().dtype; }

  void check(const Problem3& p) {
    SCOPED_TRACE(p.text());
    Result3 got;
    ASSERT_NO_FATAL_FAILURE(check_problem(
        p, [](const Problem3& q) { return run(q, 1); }, got));
    for (int threads : {2, 3})
      ASSERT_TRUE(same(got, run(p, threads))) << "depends on the number of threads";
  }
};

TEST_P(SelectiveScan, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3, 5},
                             steps = {0, 1, 2, 3, 15, 16, 17, 33, 40},
                             widths = {1, 2, 3, 5, 8, 15, 16, 17, 32, 37, 64, 65},
                             states = {1, 2, 3, 4, 5, 7, 8, 16, 17}, groups = {1, 1, 1, 2, 3};
  for (int repeat = 0; repeat < 60; ++repeat) {
    const int64_t G = pick(random, groups);
    ASSERT_NO_FATAL_FAILURE(check(draw_problem(
        random, dtype(), pick(random, sequences), pick(random, steps), G * pick(random, widths),
        pick(random, states), G)));
  }
}

TEST_P(SelectiveScan, ManyStatesAndSteps) {
  Random random;
  for (const auto& [S, T, D, N] : std::vector<std::array<int64_t, 4>>{
           {1, 100, 20, 64}, {2, 300, 17, 17}, {1, 270, 3, 256}, {2, 100, 300, 16}})
    ASSERT_NO_FATAL_FAILURE(check(draw_problem(random, dtype(), S, T, D, N, 1)));
}

// Checkpoints beyond L2 are stored around the cache; several blocks of channels.
TEST_P(SelectiveScan, LargeProblem) {
  if (dtype() != DType::f32) GTEST_SKIP() << "the same for all";
  Random random;
  Problem3 p = draw_problem(random, dtype(), 2, 450, 560, 16, 1);
  p.order = kNatural;
  ASSERT_NO_FATAL_FAILURE(check(p));
}

TEST_P(SelectiveScan, UnwantedGradientsAreLeftOut) {
  Random random;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const Problem3 p = draw_problem(random, dtype(), 2, 40, 36, 5, 2);
    SCOPED_TRACE(p.text());
    const Result3 all = run(p, 1), few = run(p, 1, true, true);
    ASSERT_TRUE(same(all.grads[0], few.grads[0]) && same(all.grads[1], few.grads[1]));
  }
}

TEST_P(SelectiveScan, StatePool) {
  Random random;
  for (const int64_t T : {1, 3}) {
    for (const int64_t D : {3, 64, 150})
      ASSERT_NO_FATAL_FAILURE(
          check_pool(random, dtype(), T, D, 16, [](DType dtype, const SelectiveScanForward& f) {
            EXPECT_TRUE(cpu::selective_scan_forward(dtype, f, parallel(1)));
          }));
  }
}

// A sequence in pieces, the state handed on, is the sequence: bit by bit.
TEST_P(SelectiveScan, PiecesAreTheWhole) {
  Random random;
  for (int repeat = 0; repeat < 6; ++repeat) {
    Problem3 p = draw_problem(random, dtype(), 2, 50, 37, repeat % 2 ? 16 : 9, 1);
    p.cu_seqlens.clear();
    p = reshaped(random, p);
    p.reverse = false;
    SCOPED_TRACE(p.text());
    const Result3 whole = run(p, 1, false);
    Dense state = p.initial;
    int64_t begin = 0;
    for (const int64_t end : {1, 2, 18, 34, 50}) {
      Problem3 piece = p;
      piece.T = end - begin;
      piece.initial = state;
      for (Dense* x : {&piece.u, &piece.delta, &piece.z, &piece.B, &piece.C})
        if (x->size.size() > 2) *x = tokens_of(*x, begin, end);
      const Result3 part = run(piece, 1, false);
      ASSERT_TRUE(same(part.out, tokens_of(whole.out, begin, end))) << begin << " to " << end;
      state = part.final_state;
      begin = end;
    }
    ASSERT_TRUE(same(state, whole.final_state));
  }
}

// Gates far out: nothing becomes infinite or NaN that the formulas leave finite.
TEST_P(SelectiveScan, ExtremesStayFinite) {
  Random random;
  const std::vector<double> far = {-1e4, -300, -88, -20, 0, 20, 88, 300, 1e4};
  for (int repeat = 0; repeat < 4; ++repeat) {
    Problem3 p = draw_problem(random, dtype(), 1, 40, 20, 5, 1);
    p.softplus = true;
    const DType time = types_of(dtype()).time;
    p.delta = draw(random, time, p.delta.size, [&] { return pick(random, far); });
    p.z = draw(random, time, p.u.size, [&] { return pick(random, far); });
    p.A = draw(random, types_of(dtype()).state, p.A.size, [&] { return -fabs(pick(random, far)); });
    if (p.complex())
      for (Value& each : p.A.at) each = each.real();
    SCOPED_TRACE(p.text());
    const Result3 got = run(p, 1);
    const Answer want = formula(p);
    const bool half = time == DType::f16; // overflows, as it must
    for (size_t i = 0; i < want.out.at.size() && !half; ++i)
      ASSERT_LE(abs(got.out.at[i] - want.out.at[i]), 2e-2 * abs(want.out.at[i]) + 1e-2 * 1e4) << i;
    for (const Dense& each : got.grads)
      for (size_t i = 0; i < each.at.size() && !half; ++i)
        ASSERT_TRUE(isfinite(abs(each.at[i]))) << i;
  }
}

std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const std::string& isa : isas())
    for (const DTypeInfo& dtype : kDTypes) all.push_back({isa, dtype.dtype});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Sets, SelectiveScan, ::testing::ValuesIn(settings()), name_of);

// ---- the cell: its gradients against dual numbers, and where it is complex, differences ----

TEST(SelectiveScanCell, SlopesAreThoseOfDualNumbers) {
  using D1 = Dual<double, 1>;
  Random random;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const double x = repeat < 5 ? std::vector<double>{20, 19.999, 20.001, -700, 700}[size_t(repeat)]
                                : random.normal(8);
    const D1 seeded{x, {1}};
    const D1 step = time_step(seeded, true), gate = silu(seeded);
    EXPECT_NEAR(step.v, x > 20 ? x : log1p(::exp(x)), 1e-15 * (1 + fabs(x)));
    EXPECT_NEAR(step.d[0], time_step_slope(x, true), x == 20 ? 1e-8 : 1e-13);
    EXPECT_NEAR(gate.v, silu_with_slope(x).value, 1e-14 * (1 + fabs(x)));
    EXPECT_NEAR(gate.d[0], silu_with_slope(x).slope, 1e-13 * (1 + fabs(x)));
    EXPECT_EQ(time_step(x, false), x);
    EXPECT_EQ(time_step_slope(x, false), 1);
  }
}

TEST(SelectiveScanCell, GradientOfAStepIsThatOfDualNumbers) {
  using D6 = Dual<double, 6>;
  Random random;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    double v[6]; // time step, time step u, A, B, C, h before
    for (double& each : v) each = random.normal();
    const double grad_y = random.normal(), grad_after = random.normal();
    D6 x[6];
    for (int i = 0; i < 6; ++i) x[i] = D6::make(v[i], [&](int j) { return i == j ? 1. : 0.; });
    const D6 h = scan_step(x[0], x[1], x[2] * (1 / kOctave), x[3], x[5]).h;
    const D6 loss = h * grad_after + x[4] * h * grad_y;

    const double A = in_octaves(v[2]);
    const auto forward = scan_step(v[0], v[1], A, v[3], v[5]);
    EXPECT_NEAR(
        forward.h, ::exp(v[0] * v[2]) * v[5] + v[1] * v[3],
        1e-14 * (1 + fabs(forward.h)) * (1 + fabs(v[5])) * 10);
    double grad_h = grad_after, grad_A = 0, grad_B = 0, grad_C = 0;
    ScanSums<double, double> sums{0, 0};
    scan_step_vjp(
        v[0], v[1], A, v[3], v[4], forward.decay, v[5], forward.h, grad_y, grad_h, grad_A, grad_B,
        grad_C, sums);
    const double got[] = {out_of_octaves(sums.parts), sums.input, grad_A, grad_B, grad_C, grad_h};
    for (int i = 0; i < 6; ++i)
      EXPECT_NEAR(got[i], loss.d[i], 1e-12 * (1 + fabs(loss.d[i]))) << "input " << i;
  }
}

TEST(SelectiveScanCell, ComplexDecayIsTheExponential) {
  Random random;
  for (int repeat = 0; repeat < 3000; ++repeat) {
    const double step = random.uniform(0, 2), re = random.uniform(-3, 0),
                 im = random.normal(repeat % 2 ? 3 : 100);
    const Value want = std::exp(step * Value(re, im));
    const auto in_double = decay(step, in_octaves(torch_ext::Complex<double>{re, im}));
    EXPECT_NEAR(in_double.re, want.real(), 1e-15 * (4 + fabs(step * im)));
    EXPECT_NEAR(in_double.im, want.imag(), 1e-15 * (4 + fabs(step * im)));
    const float s = float(step), r = float(re), i = float(im);
    const Value rounded = std::exp(double(s) * Value(r, i));
    const auto in_float = decay(s, in_octaves(torch_ext::Complex<float>{r, i}));
    EXPECT_NEAR(in_float.re, rounded.real(), 2e-7 * (4 + fabs(step * im)));
    EXPECT_NEAR(in_float.im, rounded.imag(), 2e-7 * (4 + fabs(step * im)));
  }
}

} // namespace
} // namespace torch_ext::test
