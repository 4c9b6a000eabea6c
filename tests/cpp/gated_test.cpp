// The CPU driver of gated recurrences: random problems of every cell on every instruction set and dtype, against a plain
// loop in double; and that results are the same bits whoever runs the pieces of the work, and when.
#include <math.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/team.h"
#include "gated_problems.h"
#include "settings.h"

namespace torch_ext::test {
namespace {

// ---- ways to run pieces of work ----

using Piece = void (*)(int64_t begin, int64_t end, void* ctx);
int64_t pieces_of(int64_t n, int64_t grain, int64_t threads) {
  return std::min(threads, (n + grain - 1) / grain);
}
template <int kThreads, int kLate>
void on_threads(int64_t n, int64_t grain, Piece fn, void* ctx) {
  const int64_t pieces = pieces_of(n, grain, kThreads);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < pieces; ++i)
    threads.emplace_back([=] {
      std::this_thread::sleep_for(std::chrono::milliseconds(kLate * i));
      fn(n * i / pieces, n * (i + 1) / pieces, ctx);
    });
  for (std::thread& each : threads) each.join();
}
void in_one_piece(int64_t n, int64_t, Piece fn, void* ctx) { fn(0, n, ctx); }
void from_the_last(int64_t n, int64_t grain, Piece fn, void* ctx) {
  const int64_t pieces = pieces_of(n, grain, n);
  for (int64_t i = pieces; i-- > 0;) fn(n * i / pieces, n * (i + 1) / pieces, ctx);
}
void on_two_by_turns(int64_t n, int64_t grain, Piece fn, void* ctx) {
  const int64_t pieces = pieces_of(n, grain, n);
  const auto part = [=](int64_t first) {
    for (int64_t i = first; i < pieces; i += 2) fn(n * i / pieces, n * (i + 1) / pieces, ctx);
  };
  std::thread other(part, 1);
  part(0);
  other.join();
}
struct Way {
  const char* name;
  cpu::Parallel parallel;
};
const Way kAlone{"alone", {1, nullptr}};
const std::vector<Way> kWays = {
    {"two threads", {2, on_threads<2, 0>}},
    {"three threads", {3, on_threads<3, 0>}},
    {"five threads", {5, on_threads<5, 0>}},
    {"five threads, one after the other", {5, on_threads<5, 2>}},
    {"one piece for three", {3, in_one_piece}},
    {"one thread for three, from the last piece", {3, from_the_last}},
    {"two threads for five", {5, on_two_by_turns}},
    {"one thread told to be one of two", {2, in_one_piece}}};

GatedResult run(const GatedCase& p, const Way& way = kAlone, GatedWanted wanted = {}) {
  return run(
      p,
      GatedCalls{
          [&](DType dtype, const GatedForward& f) {
            EXPECT_TRUE(cpu::gated_forward(dtype, f, way.parallel));
          },
          [&](DType dtype, const GatedBackward& b) {
            EXPECT_TRUE(cpu::gated_backward(dtype, b, way.parallel));
          }},
      wanted);
}

// ---- against the plain loop ----

class Gated : public OnEachSet {
 protected:
  // Draws until no number is so near to a kink that rounding decides on which side of it.
  std::pair<GatedCase, GatedResult> draw(
      Random& random, int cell, const GatedShape& shape, int64_t of = 2) {
    for (;;) {
      GatedCase p = draw_gated_case(random, dtype(), cell, shape, of);
      GatedAnswer answer = plain_gated(p);
      if (answer.margin > (dtype() == DType::f64 ? 1e-12 : 3e-6))
        return {std::move(p), std::move(answer.result)};
    }
  }
};

TEST_P(Gated, RandomProblems) {
  Random random;
  const std::vector<int64_t> widths = {1, 5, 16, 17, 70}, h_widths = {1, 3, 16, 33, 80};
  const bool half = dtype() == DType::bf16 || dtype() == DType::f16;
  for (int cell = 0; cell < GatedCells::size; ++cell)
    for (int repeat = 0; repeat < (half ? 5 : 16); ++repeat) {
      const auto [p, want] = draw(
          random, cell,
          {random.integer(1, 9), pick(random, std::vector<int64_t>{0, 1, 2, 3, 6}),
           random.integer(1, 3), pick(random, widths), pick(random, h_widths)});
      SCOPED_TRACE(p.text());
      const GatedResult got = run(p);
      ASSERT_NO_FATAL_FAILURE(check(p, got, want));
      const Way& way = pick(random, kWays);
      ASSERT_TRUE(same(got, run(p, way))) << "depends on threads: " << way.name;
    }
}

// Large enough that threads are asked to help: each with heads or rows of its own, or all sharing the units of a head.
TEST_P(Gated, ResultsDependOnNoThread) {
  if (dtype() == DType::bf16 || dtype() == DType::f16) GTEST_SKIP() << "the same as float32";
  Random random;
  for (int cell = 0; cell < GatedCells::size; ++cell)
    for (const GatedShape& shape : std::vector<GatedShape>{
             {random.integer(1, 3), 25, 1, random.integer(65, 100), random.integer(40, 90)},
             {9, 16, random.integer(1, 2), 37, 33}}) {
      const auto [p, want] = draw(random, cell, shape, 3);
      SCOPED_TRACE(p.text());
      const GatedResult alone = run(p);
      ASSERT_NO_FATAL_FAILURE(check(p, alone, want));
      for (const Way& way : kWays) ASSERT_TRUE(same(alone, run(p, way))) << way.name;
    }
}

TEST_P(Gated, UnwantedOutputsAreLeftOut) {
  Random random;
  for (int cell = 0; cell < GatedCells::size; ++cell) {
    const GatedCase p = draw_gated_case(random, dtype(), cell, {3, 5, 2, 17, 9}, 2);
    SCOPED_TRACE(p.text());
    const GatedResult all = run(p), few = run(p, kAlone, {.few = true}),
                      forward = run(p, kAlone, {.backward = false}),
                      in_place = run(p, kAlone, {.backward = false, .in_place = true});
    const GatedResult begin(all.begin(), all.begin() + int64_t(forward.size())),
        most(all.begin(), all.begin() + int64_t(few.size()));
    EXPECT_TRUE(same(begin, forward)) << "depends on whether there is a backward";
    EXPECT_TRUE(same(forward, in_place)) << "depends on where states are";
    EXPECT_TRUE(same(most, few)) << "depends on what is wanted";
  }
}

// One state per row of a pool, some sequences without one, whose outputs are left as they are.
TEST_P(Gated, StatePool) {
  Random random;
  for (int cell = 0; cell < GatedCells::size; ++cell)
    for (int repeat = 0; repeat < 3; ++repeat) {
      GatedCase p = draw_gated_case(
          random, dtype(), cell, {4, random.integer(1, 2), 2, repeat == 1 ? 70 : 17, 9}, 2);
      p.cu.clear();
      if (!p.state[0] || p.rows() != p.S || p.x.size[0] != p.S) { // drawn as packed, or without
        --repeat;
        continue;
      }
      SCOPED_TRACE(p.text());
      const GatedResult want = run(p, kAlone, {.backward = false});
      const std::vector<int64_t> rows = {5, -1, 0, 3};
      GatedForward f;
      fill_problem(p, f);
      const Grid h = grid(p.dtype, {p.S, p.T, 1, p.H, p.P}, true);
      h.each([&](int64_t at) { h.array->set(at, 7); });
      f.h = over_units<void*>(h);
      f.state_rows = rows.data();
      std::vector<Grid> pool;
      for (int i = 0; i < p.sizes().states; ++i) {
        const Grid g = grid(p.wide(), {6, p.H, i == 0 ? p.P : p.K}, true, &random);
        g.each([&](int64_t at) { g.array->set(at, 9); });
        for (int64_t s = 0; s < p.S; ++s)
          for (int64_t head = 0; rows[size_t(s)] >= 0 && head < p.H; ++head)
            for (int64_t k = 0; k < g.size[2]; ++k)
              g.array->set(g.at({rows[size_t(s)], head, k}), p.state[i].get({s, head, k}));
        f.initial_state[i] = unit_state<const void*>(g);
        f.final_state[i] = unit_state<void*>(g);
        pool.push_back(g);
      }
      ASSERT_TRUE(cpu::gated_forward(p.dtype, f, pick(random, kWays).parallel));
      const int64_t of_sequence = p.T * p.H * p.P;
      const std::vector<double> got = h.values();
      for (int64_t at = 0; at < h.count(); ++at)
        ASSERT_EQ(got[size_t(at)], rows[size_t(at / of_sequence)] < 0 ? 7 : want[0].at[size_t(at)])
            << at;
      for (size_t i = 0; i < pool.size(); ++i) {
        ASSERT_TRUE(pool[i].array->guards_intact());
        std::vector<double> after(size_t(pool[i].count()), 9.);
        const size_t of_row = size_t(pool[i].count()) / 6;
        for (size_t s = 0; s < rows.size(); ++s)
          for (size_t k = 0; rows[s] >= 0 && k < of_row; ++k)
            after[size_t(rows[s]) * of_row + k] = want[1 + i].at[s * of_row + k];
        ASSERT_EQ(pool[i].values(), after) << "state " << i;
      }
    }
}

INSTANTIATE_TEST_SUITE_P(Sets, Gated, ::testing::ValuesIn(settings(false)), name_of);

// The tape's own gradients: those of central differences of the plain loop.
TEST(GatedFormula, GradientsAreThoseOfDifferences) {
  Random random;
  for (int cell = 0; cell < GatedCells::size; ++cell)
    for (int repeat = 0; repeat < 6; ++repeat) {
      GatedCase p = draw_gated_case(random, DType::f64, cell, {2, 4, 2, 3, 2});
      p.clip = {}; // is no gradient, by intent
      if (plain_gated(p).margin < 1e-3) continue;
      SCOPED_TRACE(p.text());
      const GatedResult answer = plain_gated(p).result;
      const auto of = [&](const char* name) -> const std::vector<double>* {
        for (const GatedPart& each : answer)
          if (each.name == name) return &each.at;
        return nullptr;
      };
      const auto loss = [&] {
        const GatedResult y = plain_gated(p).result;
        double sum = 0;
        const std::vector<double> weight = p.grad_h.values();
        for (size_t k = 0; k < weight.size(); ++k) sum += weight[k] * y[0].at[k];
        for (int i = 0; i < p.sizes().states; ++i) {
          if (!p.grad_state[i]) continue;
          const std::vector<double> w = p.grad_state[i].values();
          for (size_t k = 0; k < w.size(); ++k)
            if (isfinite(y[size_t(1 + i)].at[k])) sum += w[k] * y[size_t(1 + i)].at[k];
        }
        return sum;
      };
      const auto compare = [&](const Grid& g, const char* name, bool shared) {
        if (!g) return;
        const std::vector<double>* got = of(name);
        ASSERT_NE(got, nullptr) << name;
        size_t k = 0;
        g.each([&](int64_t at) {
          double want = 0;
          for (size_t s = k++; s < got->size(); s += shared ? size_t(g.count()) : got->size())
            want += (*got)[s];
          const double x = g.array->get(at).real(), e = 1e-6;
          if (!isfinite(x)) return;
          if (cell == kSlstm && x == 0 && !shared) return; // an empty state is no other's neighbour
          g.array->set(at, x + e);
          const double high = loss();
          g.array->set(at, x - e);
          const double low = loss();
          g.array->set(at, x);
          EXPECT_NEAR((high - low) / (2 * e), want, 1e-6 * (1 + fabs(want) + fabs(high)))
              << name << " " << k - 1;
        });
      };
      ASSERT_NO_FATAL_FAILURE(compare(p.x, "gradient of x", false));
      compare(p.bias, "gradient of bias", true);
      compare(p.weights, "gradient of weights", true);
      compare(p.norm_weight, "gradient of norm_weight", true);
      compare(p.cell_norm_weight, "gradient of cell_norm_weight", true);
      compare(p.cell_norm_bias, "gradient of cell_norm_bias", true);
      const char* const names[] = {
          "gradient of initial h", "gradient of initial c", "gradient of initial n",
          "gradient of initial m"};
      for (int i = 0; i < p.sizes().states; ++i) compare(p.state[i], names[i], false);
    }
}

// ---- the team ----

TEST(Team, MembersMeet) {
  for (const int size : {1, 2, 3, 5}) {
    cpu::Team team(size);
    constexpr int kRounds = 200;
    std::vector<int64_t> at(size_t(size), 0), wrong(size_t(size), 0);
    std::vector<std::thread> threads;
    std::vector<int> place(size_t(size), -2);
    for (int i = 0; i < size; ++i)
      threads.emplace_back([&, i] {
        const int me = team.join(1);
        place[size_t(i)] = me;
        if (me < 0) return;
        for (int64_t round = 1; round <= kRounds; ++round) {
          at[size_t(me)] = round;
          team.meet();
          for (int k = 0; k < team.size(); ++k) wrong[size_t(i)] += at[size_t(k)] != round;
          team.meet();
        }
      });
    for (std::thread& each : threads) each.join();
    std::sort(place.begin(), place.end());
    const int members = team.size(), late = size - members;
    ASSERT_GE(members, 1);
    for (int i = 0; i < size; ++i) {
      EXPECT_EQ(place[size_t(i)], i < late ? -1 : i - late);
      EXPECT_EQ(wrong[size_t(i)], 0);
    }
  }
}

TEST(Team, WaitsForNobodyWhoDoesNotCome) {
  cpu::Team alone(3);
  EXPECT_EQ(alone.join(1), 0);
  EXPECT_EQ(alone.size(), 1);
  alone.meet();
  EXPECT_EQ(alone.join(1), -1);
  EXPECT_EQ(alone.join(1), -1);
  EXPECT_EQ(alone.size(), 1);
  cpu::Team all(3);
  EXPECT_EQ(all.join(3), 0);
  EXPECT_EQ(all.size(), 1);
}

} // namespace
} // namespace torch_ext::test
