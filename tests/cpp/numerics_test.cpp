// The elementary functions of every lane type against long double, in units of the last place (ULP).
#include <math.h>
#include <string.h>

#include <bit>
#include <limits>
#include <ostream>
#include <vector>

#include "cells/numerics.h"
#include "cpu/dispatch.h"
#include "lanes.h"
#include "random.h"
#include "sixteen_bits.h"

namespace torch_ext::test {

extern const Lanes lanes_generic;
#if defined(__x86_64__)
extern const Lanes lanes_avx2, lanes_avx512;
#endif

void PrintTo(const Lanes* lanes, std::ostream* out) { *out << lanes->name; }

namespace {

// The spacing of S at `exact`.
template <class S>
long double ulp(long double exact) {
  const S x = S(fabsl(exact));
  return (long double)nextafter(x, std::numeric_limits<S>::infinity()) - x;
}

template <class S>
struct Worst {
  long double ulps = 0;
  S x = 0;
};

// The largest error of f over n points between low and high, spread evenly, with random ones between them.
template <class S, class Exact>
Worst<S> worst_error(Map<S> f, Exact exact, S low, S high, int64_t n) {
  Random random;
  std::vector<S> x(n), y(n);
  for (int64_t i = 0; i < n; ++i) {
    const double place = i % 2 ? random.uniform(0, 1) : double(i) / double(n);
    x[i] = S(low + (high - low) * place);
  }
  f(x.data(), y.data(), n);
  Worst<S> worst;
  for (int64_t i = 0; i < n; ++i) {
    const long double want = exact((long double)x[i]);
    const long double error = fabsl(y[i] - want) / ulp<S>(want);
    if (!(error <= worst.ulps)) worst = {error, x[i]};
  }
  return worst;
}

#define EXPECT_ULPS(f, exact, low, high, limit)                                                    \
  do {                                                                                             \
    const auto worst = worst_error(f, exact, low, high, 1 << 19);                                  \
    EXPECT_LE(worst.ulps, limit) << "at x = " << worst.x << " of [" << low << ", " << high << "]"; \
  } while (0)

long double exact_exp(long double x) { return expl(x); }
long double exact_reciprocal(long double x) { return 1 / x; }
long double exact_sigmoid(long double x) { return 1 / (1 + expl(-x)); }

template <class S, S f(S)>
void scalar_map(const S* from, S* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = f(from[i]);
}
const Lanes kScalar = {
    "scalar",
    scalar_map<float, torch_ext::exp>,
    scalar_map<float, torch_ext::reciprocal>,
    scalar_map<float, torch_ext::sigmoid<float>>,
    scalar_map<double, torch_ext::exp>,
    scalar_map<double, torch_ext::reciprocal>,
    scalar_map<double, torch_ext::sigmoid<double>>,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    1};

class Numerics : public ::testing::TestWithParam<const Lanes*> {
 protected:
  void SetUp() override {
    if (lanes().lanes > 1 && !cpu::force_isa(lanes().name)) {
      GTEST_SKIP() << "this CPU has no " << lanes().name;
    }
    cpu::force_isa("");
  }
  const Lanes& lanes() const { return *GetParam(); }
  float apply(Map<float> f, float x) const {
    float from[kMapStep], to[kMapStep];
    for (float& each : from) each = x;
    f(from, to, kMapStep);
    return to[0];
  }
  double apply(Map<double> f, double x) const {
    double from[kMapStep], to[kMapStep];
    for (double& each : from) each = x;
    f(from, to, kMapStep);
    return to[0];
  }
};

TEST_P(Numerics, Exp) {
  EXPECT_ULPS(lanes().exp, exact_exp, -20.f, 20.f, 3);
  EXPECT_ULPS(lanes().exp, exact_exp, -87.f, 80.f, 8);
  EXPECT_ULPS(lanes().exp_double, exact_exp, -20., 20., 2);
  EXPECT_ULPS(lanes().exp_double, exact_exp, -708., 700., 2);
}

TEST_P(Numerics, ExpAtTheEdges) {
  EXPECT_EQ(apply(lanes().exp, 0.f), 1.f);
  EXPECT_EQ(apply(lanes().exp_double, 0.), 1.);
  for (const double x : {90., 710., 1e4, 1e30, HUGE_VAL}) {
    EXPECT_LE(apply(lanes().exp, float(x)), 5.6e34f) << x; // e^80
    EXPECT_GE(apply(lanes().exp, float(x)), 5.5e34f) << x;
    EXPECT_TRUE(isfinite(apply(lanes().exp_double, x))) << x;
    EXPECT_GE(apply(lanes().exp, float(-x)), 0.f) << -x;
    EXPECT_LE(apply(lanes().exp, float(-x)), 1.7e-38f) << -x;
    EXPECT_GE(apply(lanes().exp_double, -x), 0.) << -x;
    EXPECT_LE(apply(lanes().exp_double, -x), 3.4e-39) << -x;
  }
  EXPECT_TRUE(isnan(apply(lanes().exp, NAN)));
  EXPECT_TRUE(isnan(apply(lanes().exp_double, NAN)));
}

TEST_P(Numerics, Reciprocal) {
  EXPECT_ULPS(lanes().reciprocal, exact_reciprocal, 0.5f, 4.f, 1);
  EXPECT_ULPS(lanes().reciprocal_double, exact_reciprocal, 0.5, 4., 1);
  EXPECT_EQ(apply(lanes().reciprocal, 1.f), 1.f);
  EXPECT_EQ(apply(lanes().reciprocal, 2.f), 0.5f);
  Random random;
  for (int i = 0; i < 10000; ++i) { // all sizes, both signs
    const float x =
        float(ldexp(random.uniform(1, 2), int(random.integer(-125, 125)))) * (i % 2 ? 1 : -1);
    const long double want = 1 / (long double)x;
    EXPECT_LE(fabsl(apply(lanes().reciprocal, x) - want), ulp<float>(want)) << x;
  }
}

TEST_P(Numerics, Sigmoid) {
  // 1 / (1 + e): half of e's error comes through at most, and then the quotient's.
  EXPECT_ULPS(lanes().sigmoid, exact_sigmoid, -20.f, 20.f, 5);
  EXPECT_ULPS(lanes().sigmoid, exact_sigmoid, -79.f, 90.f, 10);
  EXPECT_ULPS(lanes().sigmoid_double, exact_sigmoid, -690., 700., 4);
  for (const double x : {100., 1e4, HUGE_VAL}) {
    EXPECT_EQ(apply(lanes().sigmoid, float(x)), 1.f) << x;
    EXPECT_GE(apply(lanes().sigmoid, float(-x)), 0.f) << -x;
    EXPECT_LE(apply(lanes().sigmoid, float(-x)), 2e-35f) << -x;
    EXPECT_GE(apply(lanes().sigmoid_double, -x), 0.) << -x;
    EXPECT_LE(apply(lanes().sigmoid_double, -x), 4e-44) << -x;
  }
  EXPECT_EQ(apply(lanes().sigmoid, 0.f), 0.5f);
  EXPECT_TRUE(isnan(apply(lanes().sigmoid, NAN)));
}

struct Format {
  const char* name;
  int exponent_bits;
  void (*from)(const uint16_t*, float*, int64_t);
  void (*to)(const float*, uint16_t*, int64_t);
};

TEST_P(Numerics, SixteenBitNumbers) {
  if (lanes().lanes == 1) GTEST_SKIP() << "scalars convert nothing";
  for (const Format& f :
       {Format{"bfloat16", 8, lanes().from_bfloat16, lanes().to_bfloat16},
        Format{"float16", 5, lanes().from_half, lanes().to_half}}) {
    SCOPED_TRACE(f.name);
    std::vector<uint16_t> all(1 << 16), back(1 << 16);
    std::vector<float> wide(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) all[i] = uint16_t(i);
    f.from(all.data(), wide.data(), 1 << 16);
    f.to(wide.data(), back.data(), 1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const float want = decode(all[i], f.exponent_bits);
      if (isnan(want)) {
        EXPECT_TRUE(isnan(wide[i])) << i;
        EXPECT_TRUE(isnan(decode(back[i], f.exponent_bits))) << i;
      } else {
        EXPECT_EQ(wide[i], want) << i;
        EXPECT_EQ(signbit(wide[i]), signbit(want)) << i;
        // The machine's own conversion to bfloat16 takes denormal numbers as zero, as all arithmetic of kernels does.
        const bool zero =
            f.exponent_bits == 8 && fabs(want) < 0x1p-126f && back[i] == (all[i] & 0x8000);
        if (!zero) {
          EXPECT_EQ(back[i], all[i]) << i;
        }
      }
    }
    // Numbers that must be rounded: halfway between two, just beside it, and anything.
    Random random;
    std::vector<float> x;
    for (int i = 0; i < 1 << 15; i += 7) {
      const float low = decode(uint16_t(i), f.exponent_bits),
                  high = decode(uint16_t(i + 1), f.exponent_bits);
      if (!isfinite(low) || !isfinite(high)) continue;
      const float middle = float((double(low) + high) / 2);
      for (const float each : {middle, nextafterf(middle, 0.f), nextafterf(middle, INFINITY)}) {
        if (isnormal(each)) x.insert(x.end(), {each, -each});
      }
    }
    for (int i = 0; i < 100000; ++i) {
      const float each = std::bit_cast<float>(uint32_t(random.integer(0, 0xffffffff)));
      if (isnormal(each)) x.push_back(each);
    }
    x.insert(
        x.end(), {INFINITY, -INFINITY, 65504.f, 65519.996f, 65520.f, 3.3895314e38f, 3.4028235e38f,
                  0.f, -0.f});
    x.resize((x.size() + kMapStep - 1) / kMapStep * kMapStep);
    std::vector<uint16_t> y(x.size());
    f.to(x.data(), y.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(y[i], encode(x[i], f.exponent_bits)) << x[i];
  }
}

TEST_P(Numerics, SomeLanesLeaveTheOthersAlone) {
  if (lanes().lanes == 1) GTEST_SKIP() << "scalars have one lane";
  for (int n = 1; n <= lanes().lanes; ++n) {
    std::vector<float> from(n), to(n + 1, -1.f); // AddressSanitizer sees a read beyond `from`
    for (int i = 0; i < n; ++i) from[i] = float(i + 1);
    lanes().copy_some(from.data(), to.data(), n);
    for (int i = 0; i < n; ++i) EXPECT_EQ(to[i], float(i + 1));
    EXPECT_EQ(to[n], -1.f) << n;
  }
}

// What the GPU's exp is made of. Its 2^x is off by up to two ULP, this machine's by one.
TEST(ExpByExp2, IsAsAccurateAsTheLanes) {
  const Map<float> exp = [](const float* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = exp_by_exp2(from[i], [](float t) { return exp2f(t); });
  };
  EXPECT_ULPS(exp, exact_exp, -20.f, 20.f, 2);
  EXPECT_ULPS(exp, exact_exp, -87.f, 80.f, 6);
}

INSTANTIATE_TEST_SUITE_P(
    Lanes, Numerics,
    ::testing::Values(
        &kScalar, &lanes_generic
#if defined(__x86_64__)
        ,
        &lanes_avx2, &lanes_avx512
#endif
        ),
    [](const auto& each) { return each.param->name; });

} // namespace
} // namespace torch_ext::test
