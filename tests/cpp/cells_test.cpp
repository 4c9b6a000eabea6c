// Every cell: its step against the paper's formula, and its hand-written gradient against dual numbers and against central
// differences, in double.
#include <math.h>

#include <string>

#include "cells/all.h"
#include "formulas.h"
#include "random.h"

namespace torch_ext::test {
namespace {

template <class C, unsigned options>
struct Case {
  using Cell = C;
  static constexpr unsigned flags = options;
};
using Cases = ::testing::Types<
    Case<LinearScan, 0>, Case<MinGru, 0>, Case<MinGru, MinGru::kG>, Case<MinLstm, 0>,
    Case<MinLstm, MinLstm::kG>, Case<MinLstm, MinLstm::kNormalize>,
    Case<MinLstm, MinLstm::kNormalize | MinLstm::kG>>;

struct CaseName {
  template <class C>
  static std::string GetName(int) {
    return std::string(C::Cell::name) + "_flags" + std::to_string(C::flags);
  }
};

Step<double> formula(const LinearScan*, const std::vector<double>& x, unsigned flags) {
  return linear_scan_step<double>(x, flags);
}
Step<double> formula(const MinGru*, const std::vector<double>& x, unsigned flags) {
  return min_gru_step(x, flags);
}
Step<double> formula(const MinLstm*, const std::vector<double>& x, unsigned flags) {
  return min_lstm_step(x, flags);
}

template <class C>
class Cells : public ::testing::Test {
 protected:
  using Cell = typename C::Cell;
  static constexpr int N = num_inputs<Cell>;
  const Cell cell{C::flags};
  Random random;
  double x[N], h, dh; // the inputs, the state before, the gradient of the state after

  void draw(double scale) {
    for (double& each : x) each = random.normal(scale);
    h = random.normal();
    dh = random.normal();
  }
  double step(const double* v) const {
    const auto s = cell.affine(pack<Cell, double>(v));
    return s.a * h + s.b;
  }
  Step<double> want() const {
    return formula(static_cast<const Cell*>(nullptr), std::vector<double>(x, x + N), C::flags);
  }
};
TYPED_TEST_SUITE(Cells, Cases, CaseName);

TYPED_TEST(Cells, StepIsThePapers) {
  for (int repeat = 0; repeat < 2000; ++repeat) {
    this->draw(repeat % 2 ? 2 : 20);
    const auto got = this->cell.affine(pack<typename TypeParam::Cell, double>(this->x));
    const auto want = this->want();
    EXPECT_NEAR(got.a, want.a, 1e-14 * (1 + fabs(want.a)));
    EXPECT_NEAR(got.b, want.b, 1e-14 * (1 + fabs(want.b)));
    const auto input = pack<typename TypeParam::Cell, double>(this->x);
    EXPECT_NEAR(
        torch_ext::step(this->cell, input, this->h), want.a * this->h + want.b,
        1e-14 * (1 + fabs(want.a)) * (1 + fabs(this->h)) * (1 + fabs(want.b)));
  }
}

TYPED_TEST(Cells, GradientIsThatOfDualNumbers) {
  using Cell = typename TypeParam::Cell;
  constexpr int N = num_inputs<Cell>;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    this->draw(repeat % 2 ? 2 : 20);
    const auto input = pack<Cell, double>(this->x);
    const auto own = step_vjp(this->cell, input, this->h, this->dh);
    const auto dual = dual_vjp(this->cell, input, this->h, this->dh);
    double own_dx[N], dual_dx[N];
    unpack<Cell, double>(own.dx, own_dx);
    unpack<Cell, double>(dual.dx, dual_dx);
    const auto want = this->want();
    const double carry = want.a * this->dh;
    EXPECT_NEAR(own.dh_before, carry, 1e-14 * (1 + fabs(this->dh)) * (1 + fabs(want.a)));
    EXPECT_NEAR(dual.dh_before, carry, 1e-14 * (1 + fabs(this->dh)) * (1 + fabs(want.a)));
    for (int i = 0; i < N; ++i) {
      const double exact = this->dh * (this->h * want.da[i] + want.db[i]);
      const double tolerance =
          1e-13 * (1 + fabs(this->dh) * (fabs(this->h) + fabs(this->x[N - 1])));
      EXPECT_NEAR(own_dx[i], exact, tolerance) << "input " << i;
      EXPECT_NEAR(dual_dx[i], exact, tolerance) << "input " << i;
    }
  }
}

TYPED_TEST(Cells, GradientIsThatOfDifferences) {
  using Cell = typename TypeParam::Cell;
  constexpr int N = num_inputs<Cell>;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    this->draw(2);
    constexpr double kEpsilon = 1e-5;
    if (fabs(this->x[N - 1]) < 2 * kEpsilon) continue; // g's derivative jumps at 0
    double dx[N];
    unpack<Cell, double>(
        step_vjp(this->cell, pack<Cell, double>(this->x), this->h, this->dh).dx, dx);
    for (int i = 0; i < N; ++i) {
      double low[N], high[N];
      for (int k = 0; k < N; ++k) low[k] = high[k] = this->x[k];
      low[i] -= kEpsilon;
      high[i] += kEpsilon;
      const double want = this->dh * (this->step(high) - this->step(low)) / (2 * kEpsilon);
      EXPECT_NEAR(dx[i], want, 1e-8 * (1 + fabs(want))) << "input " << i;
    }
  }
}

TYPED_TEST(Cells, ExtremeGatesStayFiniteAndRight) {
  using Cell = typename TypeParam::Cell;
  constexpr int N = num_inputs<Cell>;
  if (std::is_same_v<Cell, LinearScan>) GTEST_SKIP() << "has no gates";
  const double extremes[] = {-1e4, -703, -700, -100, -95, -83, -78, -30, 0, 30, 100, 700, 1e4};
  for (const double first : extremes) {
    for (const double second : extremes) {
      this->draw(1);
      this->x[0] = first;
      if (N == 3) this->x[1] = second;
      const auto want = this->want();
      const auto in_double = this->cell.affine(pack<Cell, double>(this->x));
      EXPECT_NEAR(in_double.a, want.a, 1e-14) << first << " " << second;
      EXPECT_NEAR(in_double.b, want.b, 1e-13) << first << " " << second;
      float x[N], dx[N];
      for (int i = 0; i < N; ++i) x[i] = float(this->x[i]);
      const auto in_float = this->cell.affine(pack<Cell, float>(x));
      EXPECT_NEAR(in_float.a, want.a, 2e-6) << first << " " << second;
      EXPECT_NEAR(in_float.b, want.b, 2e-5) << first << " " << second;
      const auto g = step_vjp(this->cell, pack<Cell, float>(x), float(this->h), float(this->dh));
      unpack<Cell, float>(g.dx, dx);
      for (int i = 0; i < N; ++i) {
        EXPECT_NEAR(dx[i], this->dh * (this->h * want.da[i] + want.db[i]), 2e-5)
            << first << " " << second << " input " << i;
      }
    }
  }
}

// Drivers do not load what the gradient does not read.
TYPED_TEST(Cells, GradientReadsNoOtherInputs) {
  using Cell = typename TypeParam::Cell;
  constexpr int N = num_inputs<Cell>;
  this->draw(2);
  double poisoned[N];
  for (int i = 0; i < N; ++i) poisoned[i] = gradient_reads<Cell>(i) ? this->x[i] : NAN;
  const auto input = pack<Cell, double>(this->x), other = pack<Cell, double>(poisoned);
  const auto want = step_vjp(this->cell, input, this->h, this->dh);
  const auto got = step_vjp(this->cell, other, this->h, this->dh);
  double want_dx[N], got_dx[N];
  unpack<Cell, double>(want.dx, want_dx);
  unpack<Cell, double>(got.dx, got_dx);
  for (int i = 0; i < N; ++i) EXPECT_EQ(got_dx[i], want_dx[i]) << "input " << i;
  EXPECT_EQ(got.dh_before, want.dh_before);
  EXPECT_EQ(this->cell.affine(other).a, this->cell.affine(input).a);
}

TYPED_TEST(Cells, NanComesThrough) {
  using Cell = typename TypeParam::Cell;
  for (int i = 0; i < num_inputs<Cell>; ++i) {
    this->draw(1);
    this->x[i] = NAN;
    EXPECT_TRUE(isnan(this->step(this->x))) << "input " << i;
  }
}

// The convention of torch for a real loss L of complex numbers: the gradient of x is dL/dRe(x) + i dL/dIm(x).
TEST(ComplexLinearScan, GradientIsThatOfDifferences) {
  using C = torch_ext::Complex<double>;
  Random random;
  const LinearScan cell;
  const auto draw = [&] { return C{random.normal(), random.normal()}; };
  for (int repeat = 0; repeat < 500; ++repeat) {
    const C a = draw(), b = draw(), h = draw(), dh = draw();
    const auto loss = [&](C a, C b) {
      const auto s = cell.affine(LinearScan::Input<C>{a, b});
      const C after = s.a * h + s.b;
      return dh.re * after.re + dh.im * after.im;
    };
    const auto g = cell.vjp(LinearScan::Input<C>{a, b}, h, dh);
    constexpr double e = 1e-5;
    const auto slope = [&](C da, C db) {
      return (loss(a + da, b + db) - loss(a + C{-da.re, -da.im}, b + C{-db.re, -db.im})) / (2 * e);
    };
    EXPECT_NEAR(g.dx.a.re, slope({e, 0}, {0, 0}), 1e-8);
    EXPECT_NEAR(g.dx.a.im, slope({0, e}, {0, 0}), 1e-8);
    EXPECT_NEAR(g.dx.b.re, slope({0, 0}, {e, 0}), 1e-8);
    EXPECT_NEAR(g.dx.b.im, slope({0, 0}, {0, e}), 1e-8);
    EXPECT_NEAR(
        g.dh_before.re, a.re * dh.re + a.im * dh.im,
        1e-14 * (1 + fabs(dh.re) + fabs(dh.im)) * (1 + fabs(a.re) + fabs(a.im)));
    EXPECT_NEAR(
        g.dh_before.im, a.re * dh.im - a.im * dh.re,
        1e-14 * (1 + fabs(dh.re) + fabs(dh.im)) * (1 + fabs(a.re) + fabs(a.im)));
  }
}

} // namespace
} // namespace torch_ext::test
