// Random problems for the drivers of the causal convolution, and their answers: its formula in a plain double loop. Outputs
// are poisoned and lie between guards (diagonal_problems.h).
#pragma once
#include "core/causal_conv1d_problem.h"

#include <ostream>

#include "diagonal_problems.h"

namespace torch_ext::test {

// Values of a state lie as a Sequence does: (row, tap, channel).
inline ConvState state_of(const Sequence& x) {
  const Strided s = x.strided();
  return {s.data, s.sequence, s.width, s.time};
}

struct ConvProblem {
  DType dtype;
  int64_t S, T, D, W;
  bool silu;
  std::vector<int64_t> cu_seqlens; // empty: not packed
  Sequence x, weight, bias; // weight (0, channel, tap), bias (0, 0, channel); bias may be absent
  Sequence initial_state, grad_y, grad_final_state; // may be absent
  int64_t skew;                                     // of outputs, in bytes

  DType wide() const { return info_of(dtype).state; }
  bool packed() const { return !cu_seqlens.empty(); }
  int64_t rows() const { return packed() ? 1 : S; }
  int64_t begin(int64_t s) const { return packed() ? cu_seqlens[size_t(s)] : 0; }
  int64_t count(int64_t s) const { return packed() ? cu_seqlens[size_t(s) + 1] - begin(s) : T; }
  int64_t row(int64_t s, int64_t t) const { return packed() ? begin(s) + t : s * T + t; }
  double w(int64_t d, int64_t k) const { return weight.get(0, d, k).real(); }
  // Input t of sequence s; those before the first are the state's.
  double input(int64_t s, int64_t t, int64_t d) const {
    if (t >= 0) return x.get(packed() ? 0 : s, begin(s) + t, d).real();
    return initial_state ? initial_state.get(s, W - 1 + t, d).real() : 0;
  }
  double gradient(int64_t s, int64_t t, int64_t d) const {
    return grad_y ? grad_y.get(packed() ? 0 : s, begin(s) + t, d).real() : 0;
  }
  void describe(CausalConv1dProblem& p) const {
    p.num_sequences = S, p.num_steps = T, p.width = D, p.window = W;
    p.cu_seqlens = packed() ? cu_seqlens.data() : nullptr;
    p.silu = silu;
    p.x = x.strided();
    p.weight = weight.array->data();
    p.bias = bias ? bias.array->data() : nullptr;
    p.initial_state = state_of(initial_state);
  }
  std::string text() const {
    return std::string(info_of(dtype).name) + " S=" + std::to_string(S) +
           " T=" + std::to_string(T) + " D=" + std::to_string(D) + " W=" + std::to_string(W) +
           (silu ? " silu" : "") + (packed() ? " packed" : "") + (bias ? " with bias" : "") +
           (initial_state ? " with initial state" : "") + (grad_y ? "" : " without grad_y") +
           " skew=" + std::to_string(skew) + " x [" + std::to_string(x.sequence) + " " +
           std::to_string(x.time) + " " + std::to_string(x.width) + "]";
  }
};

inline ConvProblem draw(
    Random& random, DType dtype, int64_t S, int64_t T, int64_t D, int64_t W, bool any_layout) {
  ConvProblem p{dtype, S, T, D, W, random.integer(0, 1) == 1, {}, {}, {}, {}, {}, {}, {}, 0};
  if (any_layout && random.integer(0, 2) == 0 && (S > 0 || T == 0)) { // no sequences, no tokens
    p.cu_seqlens = {0};
    for (int64_t s = 1; s < S; ++s) p.cu_seqlens.push_back(random.integer(0, T));
    std::sort(p.cu_seqlens.begin(), p.cu_seqlens.end());
    if (S > 0) p.cu_seqlens.push_back(T);
  }
  const auto layout = [&] {
    return any_layout && random.integer(0, 1) ? Layout(random.integer(0, kLayouts - 1))
                                              : kContiguous;
  };
  const auto plain = [](Random& r) { return r.normal(); };
  const auto large = [](Random& r) { return r.integer(0, 30) ? r.normal() : r.normal(300); };
  const auto some = [&] { return !any_layout || random.integer(0, 3) > 0; };
  p.x = make(random, dtype, p.rows(), T, D, layout(), large);
  p.weight = make(random, p.wide(), 1, D, W, kContiguous, plain);
  if (some()) p.bias = make(random, p.wide(), 1, 1, D, kContiguous, plain);
  if (some()) p.initial_state = make(random, dtype, S, W - 1, D, layout(), plain);
  if (some()) p.grad_y = make(random, dtype, p.rows(), T, D, layout(), plain);
  if (some()) p.grad_final_state = make(random, dtype, S, W - 1, D, layout(), plain);
  p.skew = any_layout && random.integer(0, 1) ? info_of(dtype).size : 0;
  return p;
}

struct ConvResult {
  Array y, final_state, grad_x, grad_weight, grad_bias, grad_initial_state;
  std::vector<const Array*> all() const {
    return {&y, &final_state, &grad_x, &grad_weight, &grad_bias, &grad_initial_state};
  }
  bool same_bytes(const ConvResult& other) const {
    for (size_t i = 0; i < all().size(); ++i)
      if (!all()[i]->same_bytes(*other.all()[i])) return false;
    return true;
  }
};

// Forward(CausalConv1dForward), then backward(CausalConv1dBackward).
template <class Forward, class Backward>
ConvResult run(const ConvProblem& p, Forward forward, Backward backward) {
  const int64_t count = p.rows() * p.T * p.D, states = p.S * p.D * (p.W - 1);
  ConvResult r{Array(p.dtype, count, true, p.skew), Array(p.dtype, states, true, p.skew),
               Array(p.dtype, count, true, p.skew), Array(p.wide(), p.D * p.W, true),
               Array(p.wide(), p.D, true),          Array(p.dtype, states, true, p.skew)};
  CausalConv1dForward f;
  p.describe(f);
  f.y = r.y.data();
  f.final_state = r.final_state.data();
  forward(f);
  CausalConv1dBackward b;
  p.describe(b);
  b.grad_y = p.grad_y.strided();
  b.grad_final_state = state_of(p.grad_final_state);
  b.grad_x = r.grad_x.data();
  b.grad_weight = r.grad_weight.data();
  b.grad_bias = r.grad_bias.data();
  b.grad_initial_state = r.grad_initial_state.data();
  backward(b);
  for (const Array* each : r.all()) EXPECT_TRUE(each->guards_intact()) << "writes out of bounds";
  return r;
}

// Compares with the formulas, and follows how large rounding errors can have become. `every`: looks at every n-th channel
// and the last ones only.
inline void check(const ConvProblem& p, const ConvResult& r, int64_t every = 1) {
  const DTypeInfo& dtype = info_of(p.dtype);
  const double epsilon = 16 * dtype.state_epsilon,
               tiny = dtype.state_epsilon > 1e-10 ? 1e-32 : 1e-300;
  const int64_t n = p.W - 1;
  const auto stored = [&](double error, double x) {
    return error + dtype.epsilon * (fabs(x) + error) + (p.dtype == DType::f16 ? 3e-8 : 0);
  };
  for (int64_t d = 0; d < p.D; d += d + 4 < p.D - every ? every : 1) {
    std::vector<double> grad_w(size_t(p.W + 1), 0), size_w(size_t(p.W + 1), 0);
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t T = p.count(s);
      // Gradients of the inputs -n .. T - 1, and what they are the sum of.
      std::vector<double> grad(size_t(T + n), 0), size(size_t(T + n), 0);
      for (int64_t t = 0; t < T; ++t) {
        double pre = p.bias ? p.bias.get(0, 0, d).real() : 0, scale = fabs(pre);
        for (int64_t k = 0; k < p.W; ++k) {
          const double term = p.w(d, k) * p.input(s, t - n + k, d);
          pre += term;
          scale += fabs(term);
        }
        double error = epsilon * scale + tiny, y = pre, slope = 1, slope_error = 0;
        if (p.silu) {
          const double sigma = plain_sigmoid(pre);
          y = pre * sigma;
          slope = sigma * (1 + pre * plain_sigmoid(-pre));
          slope_error = error + epsilon;
          error = 1.2 * error + epsilon * fabs(y);
        }
        ASSERT_TRUE(close(r.y.get(p.row(s, t) * p.D + d), y, stored(error, y)))
            << "y, s=" << s << " t=" << t << " d=" << d;
        const double g = p.gradient(s, t, d) * slope;
        const double g_size = fabs(p.gradient(s, t, d)) * (fabs(slope) + slope_error / epsilon);
        for (int64_t k = 0; k < p.W; ++k) {
          grad[size_t(t + k)] += p.w(d, k) * g;
          size[size_t(t + k)] += fabs(p.w(d, k)) * g_size;
          const double v = p.input(s, t - n + k, d);
          grad_w[size_t(k)] += g * v;
          size_w[size_t(k)] += g_size * fabs(v);
        }
        grad_w[size_t(p.W)] += g;
        size_w[size_t(p.W)] += g_size;
      }
      for (int64_t k = 0; k < n; ++k) {
        ASSERT_EQ(r.final_state.get((s * p.D + d) * n + k).real(), p.input(s, T - n + k, d))
            << "final_state, s=" << s << " d=" << d << " k=" << k;
        const double last = p.grad_final_state ? p.grad_final_state.get(s, k, d).real() : 0;
        grad[size_t(T + k)] += last;
        size[size_t(T + k)] += fabs(last);
      }
      for (int64_t i = 0; i < T + n; ++i) {
        const double error = stored(epsilon * size[size_t(i)] + tiny, grad[size_t(i)]);
        const Value got = i < n ? r.grad_initial_state.get((s * p.D + d) * n + i)
                                : r.grad_x.get(p.row(s, i - n) * p.D + d);
        ASSERT_TRUE(close(got, grad[size_t(i)], error))
            << "gradient of input " << i - n << ", s=" << s << " d=" << d;
      }
    }
    // As many roundings as rows, which may all be alike and go the same way; `epsilon` allows for sixteen.
    const double terms = 1 + double(p.rows() * p.T) / 16;
    for (int64_t k = 0; k <= p.W; ++k) {
      const Value got = k < p.W ? r.grad_weight.get(d * p.W + k) : r.grad_bias.get(d);
      ASSERT_TRUE(close(got, grad_w[size_t(k)], epsilon * terms * size_w[size_t(k)] + tiny))
          << "gradient of " << (k < p.W ? "tap " : "bias ") << k << ", d=" << d;
    }
  }
}

// One step on a pool of states: rows in any order, some skipped, written in place. run_alone(problem) and forward(dtype,
// CausalConv1dForward) are the driver.
template <class Run, class Forward>
void check_state_pool(Random& random, DType dtype, Run run_alone, Forward forward) {
  const int64_t slots = 7;
  const std::vector<int64_t> rows = {5, -1, 0, 6, -3};
  for (const int64_t window : {1, 2, 3, 4, 9}) {
    for (const int64_t width : {1, 16, 37, 130}) {
      const int64_t S = int64_t(rows.size()), n = window - 1;
      ConvProblem p = draw(random, dtype, S, 1, width, window, false);
      SCOPED_TRACE(p.text());
      Array pool(dtype, slots * width * n, true), y(dtype, S * width, true);
      for (int64_t i = 0; i < pool.count(); ++i) pool.set(i, random.normal());
      const Array before = pool;
      // The same step, on states gathered by hand.
      p.initial_state = make(random, dtype, S, n, width, kContiguous, [](Random&) { return 0.; });
      for (int64_t s = 0; s < S; ++s)
        for (int64_t k = 0; k < n; ++k)
          for (int64_t d = 0; d < width; ++d)
            if (rows[size_t(s)] >= 0)
              p.initial_state.array->set(
                  p.initial_state.at(s, k, d), before.get((rows[size_t(s)] * width + d) * n + k));
      const ConvResult want = run_alone(p);
      CausalConv1dForward f;
      p.describe(f);
      f.state_rows = rows.data();
      f.initial_state = {pool.data(), width * n, n, 1};
      f.y = y.data();
      f.final_state = pool.data();
      forward(dtype, f);
      ASSERT_TRUE(y.guards_intact() && pool.guards_intact());
      Array expected = before;
      for (int64_t s = 0; s < S; ++s) {
        const int64_t row = rows[size_t(s)];
        for (int64_t d = 0; d < width; ++d) {
          ASSERT_EQ(y.get(s * width + d), row < 0 ? Value(0) : want.y.get(s * width + d));
          for (int64_t k = 0; row >= 0 && k < n; ++k)
            expected.set((row * width + d) * n + k, want.final_state.get((s * width + d) * n + k));
        }
      }
      ASSERT_TRUE(expected.same_bytes(pool));
    }
  }
}

} // namespace torch_ext::test
