// Every cell of the gated family: its hand-written gradients against dual numbers, in double.
#include <math.h>

#include <string>

#include "cells/all.h"
#include "random.h"

namespace torch_ext::test {
namespace {

template <class C, unsigned options>
struct Case {
  using Cell = C;
  static constexpr unsigned flags = options;
};
using Cases = ::testing::Types<
    Case<Lstm, 0>, Case<Lstm, Lstm::kPeephole>, Case<CoupledLstm, 0>,
    Case<CoupledLstm, CoupledLstm::kPeephole>, Case<Gru, 0>, Case<GruResetBefore, 0>,
    Case<Elman, 0>, Case<Elman, Elman::kRelu>, Case<IndRnn, 0>, Case<IndRnn, IndRnn::kRelu>,
    Case<Slstm, 0>, Case<Slstm, Slstm::kExpForget>, Case<Slstm, Slstm::kAtLeastOne>,
    Case<Slstm, Slstm::kExpForget | Slstm::kAtLeastOne>>;

struct CaseName {
  template <class C>
  static std::string GetName(int) {
    return std::string(C::Cell::name) + "_flags" + std::to_string(C::flags);
  }
};

template <class C>
class GatedCell : public ::testing::Test {
 protected:
  using Cell = typename C::Cell;
  static constexpr int G = num_gates<Cell>, S = num_states<Cell>, W = num_weights<Cell>;
  static constexpr int N = G + S + W + S + 1; // gates, state before, weights, state after, seen
  static constexpr int kBefore = G, kWeights = G + S, kAfter = G + S + W, kSeen = N - 1;
  static constexpr bool kExponential = std::is_same_v<Cell, Slstm>;
  using Number = Dual<double, N>;
  template <class T>
  using Gates = typename Cell::template Gates<T>;
  template <class T>
  using State = typename Cell::template State<T>;
  template <class T>
  using Weights = typename Cell::template Weights<T>;

  const Cell cell{C::flags};
  Random random;
  double x[N], d[S]; // inputs; gradients of the state after

  void draw(double scale) {
    for (double& each : x) each = random.normal();
    for (double& each : d) each = random.normal();
    for (int i = 0; i < G; ++i) x[i] *= scale;
    if constexpr (kExponential) {
      // Below -20 log sigmoid(f) is taken to be f, whose slope is off by 2e-9.
      x[1] = fmax(x[1], -20);
      draw_positive(x + kBefore);
      draw_positive(x + kAfter);
      if (random.integer(0, 4) == 0) {
        x[kBefore + 1] = x[kBefore + 2] = 0;
        if (random.integer(0, 1)) x[kBefore + 3] = -HUGE_VAL;
      }
    }
  }
  void draw_positive(double* state) { // |c| <= n, but where it has stopped at 1
    state[2] = exp(state[2]);
    state[1] *= state[2];
  }

  // The inputs, each with itself as a variable.
  template <class T>
  struct Inputs {
    Gates<T> gates;
    State<T> before, after;
    Weights<T> weights;
    T seen;
  };
  Inputs<double> plain() const { return inputs<double>(x); }
  Inputs<Number> variables() const {
    Number v[N];
    for (int i = 0; i < N; ++i) {
      v[i] = Number{x[i], {}};
      v[i].d[i] = 1;
    }
    return inputs<Number>(v);
  }
  template <class T>
  static Inputs<T> inputs(const T* v) {
    return {
        to_fields<Cell::template Gates, T>(v), to_fields<Cell::template State, T>(v + kBefore),
        to_fields<Cell::template State, T>(v + kAfter),
        to_fields<Cell::template Weights, T>(v + kWeights), v[kSeen]};
  }
  State<double> gradient() const { return to_fields<Cell::template State, double>(d); }

  template <template <class> class Fields>
  void expect(const Fields<double>& got, const Number& want, int first, const char* what) const {
    double v[num_fields<Fields> + 1];
    to_array<Fields, double>(got, v);
    for (int i = 0; i < num_fields<Fields>; ++i) expect_one(v[i], want.d[first + i], what, i);
  }
  void expect_one(double got, double want, const char* what, int i = 0) const {
    EXPECT_NEAR(got, want, 1e-12 * (1 + fabs(want))) << what << " " << i;
  }
};
TYPED_TEST_SUITE(GatedCell, Cases, CaseName);

TYPED_TEST(GatedCell, FieldsAreNumbersInOrder) {
  using Cell = typename TypeParam::Cell;
  this->draw(1);
  double v[this->N];
  const auto in = this->plain();
  to_array<Cell::template Gates, double>(in.gates, v);
  to_array<Cell::template State, double>(in.before, v + this->kBefore);
  to_array<Cell::template Weights, double>(in.weights, v + this->kWeights);
  for (int i = 0; i < this->kAfter; ++i) EXPECT_EQ(v[i], this->x[i]) << i;
}

TYPED_TEST(GatedCell, OutputGradientIsThatOfDualNumbers) {
  using Cell = typename TypeParam::Cell;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    this->draw(repeat % 2 ? 2 : 15);
    const auto in = this->plain();
    const auto v = this->variables();
    const double dh = this->d[0];
    const auto got = this->cell.output_vjp(in.gates, in.before, in.after, in.seen, in.weights, dh);
    const auto want = this->cell.output(v.gates, v.before, v.after, v.seen, v.weights) * dh;
    this->template expect<Cell::template Gates>(got.gates, want, 0, "gate");
    this->template expect<Cell::template State>(got.before, want, this->kBefore, "state before");
    this->template expect<Cell::template Weights>(got.weights, want, this->kWeights, "weight");
    this->expect_one(got.seen, want.d[this->kSeen], "seen");
    double after[this->S];
    to_array<Cell::template State, double>(got.after, after);
    for (int i = 1; i < this->S; ++i)
      this->expect_one(after[i], want.d[this->kAfter + i], "state after", i);
  }
}

TYPED_TEST(GatedCell, UpdateGradientIsThatOfDualNumbers) {
  using Cell = typename TypeParam::Cell;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    this->draw(repeat % 2 ? 2 : 15);
    const auto in = this->plain();
    const auto v = this->variables();
    const auto after = this->cell.update(in.gates, in.before, in.weights);
    typename TestFixture::Number each[this->S], want = this->variables().seen * 0;
    to_array<Cell::template State, typename TestFixture::Number>(
        this->cell.update(v.gates, v.before, v.weights), each);
    for (int i = 1; i < this->S; ++i) want = want + each[i] * this->d[i];
    auto d = this->gradient();
    if constexpr (requires { Cell::enter(after, d); }) d = Cell::enter(after, d);
    auto got = this->cell.update_vjp(in.gates, in.before, after, in.weights, d);
    if (this->x[this->kBefore + this->S - 1] == -HUGE_VAL) // nothing there to have a gradient
      want.d[this->kBefore + this->S - 1] = 0;
    if constexpr (requires { Cell::leave(after, d); })
      got.before = Cell::leave(in.before, got.before);
    this->template expect<Cell::template Gates>(got.gates, want, 0, "gate");
    double before[this->S];
    to_array<Cell::template State, double>(got.before, before);
    for (int i = 1; i < this->S; ++i)
      this->expect_one(before[i], want.d[this->kBefore + i], "state before", i);
    if constexpr (!this->kExponential) {
      EXPECT_EQ(got.before.h, 0);
    }
    this->template expect<Cell::template Weights>(got.weights, want, this->kWeights, "weight");
  }
}

// A step: what output and update leave to the state after, added up. sLSTM's gradient of m goes through `enter` and `leave`.
TYPED_TEST(GatedCell, StepGradientIsThatOfDualNumbers) {
  using Cell = typename TypeParam::Cell;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    this->draw(repeat % 2 ? 2 : 15);
    const auto in = this->plain();
    const auto v = this->variables();
    using Number = typename TestFixture::Number;
    const auto seen_of = [](const auto& after, const auto& seen) {
      if constexpr (requires { after.c; })
        return after.c;
      else
        return seen; // IndRnn's own weight sees h before, through a mask
    };
    const auto after = this->cell.update(in.gates, in.before, in.weights);
    const auto dual = this->cell.update(v.gates, v.before, v.weights);
    Number each[this->S];
    to_array<Cell::template State, Number>(dual, each);
    Number want =
        this->cell.output(v.gates, v.before, dual, seen_of(dual, v.seen), v.weights) * this->d[0];
    for (int i = 1; i < this->S; ++i) want = want + each[i] * this->d[i];

    auto d = this->gradient();
    if constexpr (requires { Cell::enter(after, d); }) d = Cell::enter(after, d);
    const auto o = this->cell.output_vjp(
        in.gates, in.before, after, seen_of(after, in.seen), in.weights, this->d[0]);
    double of_after[this->S], sum[this->S];
    to_array<Cell::template State, double>(o.after, of_after);
    to_array<Cell::template State, double>(d, sum);
    for (int i = 1; i < this->S; ++i) sum[i] += of_after[i] + (i == 1 ? o.seen : 0);
    auto u = this->cell.update_vjp(
        in.gates, in.before, after, in.weights, to_fields<Cell::template State, double>(sum));
    if constexpr (requires { Cell::leave(after, d); }) u.before = Cell::leave(in.before, u.before);

    constexpr int G = this->G, S = this->S, W = this->W;
    double a[G + S + W], b[G + S + W];
    to_array<Cell::template Gates, double>(o.gates, a);
    to_array<Cell::template Gates, double>(u.gates, b);
    to_array<Cell::template State, double>(o.before, a + G);
    to_array<Cell::template State, double>(u.before, b + G);
    to_array<Cell::template Weights, double>(o.weights, a + G + S);
    to_array<Cell::template Weights, double>(u.weights, b + G + S);
    for (int i = 0; i < G + S + W; ++i)
      if (isfinite(this->x[i])) this->expect_one(a[i] + b[i], want.d[i], "input", i);
  }
}

TEST(GatedCellsOperand, GradientIsThatOfDualNumbers) {
  using Number = Dual<double, 4>;
  Random random;
  const GruResetBefore cell(0);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    double x[4];
    Number v[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = random.normal(i < 3 ? 5 : 1);
      v[i] = Number{x[i], {}};
      v[i].d[i] = 1;
    }
    const double d = random.normal();
    const auto got = cell.operand_vjp(GruResetBefore::Gates<double>{x[0], x[1], x[2]}, x[3], d);
    const Number want = cell.operand(GruResetBefore::Gates<Number>{v[0], v[1], v[2]}, v[3]) * d;
    EXPECT_NEAR(got.r, want.d[0], 1e-14 * (1 + fabs(want.d[0])));
    EXPECT_NEAR(got.h, want.d[3], 1e-14 * (1 + fabs(want.d[3])));
    EXPECT_EQ(want.d[1], 0); // the driver asks for no other gate's
    EXPECT_EQ(want.d[2], 0);
  }
}

// Ties of m go to i, and where relu's input is 0 its slope is 0, as torch has it.
TEST(GatedCellsAtKinks, SlopesAreTorchs) {
  const Elman relu(Elman::kRelu);
  EXPECT_EQ(relu.output_vjp({0.}, {0.}, {0.}, 0., {}, 1.).gates.a, 0);
  EXPECT_EQ(relu.output_vjp({1e-300}, {0.}, {0.}, 0., {}, 1.).gates.a, 1);
  const Slstm cell(Slstm::kExpForget);
  const Slstm::Gates<double> x{1.5, 0.5, 0.3, 0.2};
  const Slstm::State<double> before{0, 0.5, 1, 1}, after = cell.update(x, before, {});
  EXPECT_EQ(after.m, 1.5);
  const auto g = cell.update_vjp(x, before, after, {}, {0, 0, 0, 1}); // of m at fixed C and N
  EXPECT_EQ(g.gates.i, 1);
  EXPECT_EQ(g.gates.f, 0);
  EXPECT_EQ(g.before.m, 0);
}

} // namespace
} // namespace torch_ext::test
