// The operators as a C++ program calls them (torch_ext/ops.h): values and gradients against the same recurrence written with
// torch's own operations, states, sequences end to end, steps, and what bad arguments say.
#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

#include "random.h"
#include "torch_ext/ops.h"

namespace torch_ext::test {
namespace {

using torch::Tensor;

// One operator: its inputs' number, itself, and its recurrence h = a h_before + b by torch's operations.
struct Operator {
  std::string name;
  size_t num_inputs;
  std::function<TensorPair(
      const std::vector<Tensor>&, const OptionalTensor& state, const OptionalTensor& cu_seqlens,
      bool reverse)>
      run;
  std::function<TensorPair(
      const std::vector<Tensor>&, const Tensor& state, const OptionalTensor& indices)>
      step;
  std::function<Tensor(const std::vector<Tensor>&, Tensor& state, const OptionalTensor& indices)>
      step_;
  std::function<std::pair<Tensor, Tensor>(const std::vector<Tensor>&)> coefficients;

  friend void PrintTo(const Operator& op, std::ostream* out) { *out << op.name; }
};

Tensor activate(const Tensor& x, const std::string& activation) {
  return activation == "g" ? torch::where(x >= 0, x + 0.5, torch::sigmoid(x)) : x;
}

using Tensors = std::vector<Tensor>;

Operator linear_scan_case() {
  return {
      "linear_scan",
      2,
      [](const Tensors& x, const OptionalTensor& s, const OptionalTensor& c, bool r) {
        return linear_scan(x[0], x[1], s, c, r);
      },
      [](const Tensors& x, const Tensor& s, const OptionalTensor& i) {
        return linear_scan_step(x[0], x[1], s, i);
      },
      [](const Tensors& x, Tensor& s, const OptionalTensor& i) {
        return linear_scan_step_(x[0], x[1], s, i);
      },
      [](const Tensors& x) { return std::pair(x[0], x[1]); }};
}
Operator min_gru_case(const std::string& activation) {
  return {
      "min_gru_" + activation,
      2,
      [=](const Tensors& x, const OptionalTensor& s, const OptionalTensor& c, bool r) {
        return min_gru(x[0], x[1], s, activation, c, r);
      },
      [=](const Tensors& x, const Tensor& s, const OptionalTensor& i) {
        return min_gru_step(x[0], x[1], s, i, activation);
      },
      [=](const Tensors& x, Tensor& s, const OptionalTensor& i) {
        return min_gru_step_(x[0], x[1], s, i, activation);
      },
      [=](const Tensors& x) {
        const Tensor z = torch::sigmoid(x[0]);
        return std::pair(1 - z, z * activate(x[1], activation));
      }};
}
Operator min_lstm_case(const std::string& activation, bool normalize) {
  return {
      "min_lstm_" + activation + (normalize ? "" : "_raw"),
      3,
      [=](const Tensors& x, const OptionalTensor& s, const OptionalTensor& c, bool r) {
        return min_lstm(x[0], x[1], x[2], s, activation, normalize, c, r);
      },
      [=](const Tensors& x, const Tensor& s, const OptionalTensor& i) {
        return min_lstm_step(x[0], x[1], x[2], s, i, activation, normalize);
      },
      [=](const Tensors& x, Tensor& s, const OptionalTensor& i) {
        return min_lstm_step_(x[0], x[1], x[2], s, i, activation, normalize);
      },
      [=](const Tensors& x) {
        Tensor f = torch::sigmoid(x[0]), i = torch::sigmoid(x[1]);
        if (normalize) {
          const Tensor sum = f + i;
          f = f / sum;
          i = i / sum;
        }
        return std::pair(f, i * activate(x[2], activation));
      }};
}

class Ops : public ::testing::TestWithParam<Operator> {
 protected:
  void SetUp() override { torch::manual_seed(seed()); }
  const Operator& op() const { return GetParam(); }
  Tensors inputs(torch::IntArrayRef shape, torch::ScalarType dtype = torch::kDouble) const {
    Tensors x;
    for (size_t i = 0; i < op().num_inputs; ++i) {
      x.push_back(torch::randn(shape, torch::TensorOptions().dtype(dtype)));
    }
    if (op().name == "linear_scan") x[0] = torch::tanh(x[0]);
    for (Tensor& each : x) each.requires_grad_();
    return x;
  }
  TensorPair loop(const Tensors& x, Tensor state, bool reverse) const {
    const auto [a, b] = op().coefficients(x);
    const int64_t T = a.size(1);
    Tensors h(size_t(T), state);
    for (int64_t n = 0; n < T; ++n) {
      const int64_t t = reverse ? T - 1 - n : n;
      state = a.select(1, t) * state + b.select(1, t);
      h[size_t(t)] = state;
    }
    return {torch::stack(h, 1), state};
  }
  Random random;
};

// The gradients of both outputs, weighed by fixed random numbers, with respect to `x`.
Tensors gradients(const TensorPair& outputs, const Tensors& x, bool create_graph = false) {
  Tensors weights;
  for (const Tensor& y : {std::get<0>(outputs), std::get<1>(outputs)}) {
    weights.push_back(torch::linspace(-1, 1, y.numel(), y.options()).cos().view(y.sizes()));
  }
  return torch::autograd::grad(
      {std::get<0>(outputs), std::get<1>(outputs)}, x, weights, true, create_graph);
}

void expect_close(const Tensor& got, const Tensor& want, double tolerance = 1e-10) {
  ASSERT_EQ(got.sizes(), want.sizes());
  EXPECT_TRUE(torch::allclose(got, want.to(got.scalar_type()), tolerance, tolerance))
      << "largest difference " << (got - want).abs().max().item<double>();
}

TEST_P(Ops, ValuesAndGradientsAreThoseOfALoop) {
  for (const bool reverse : {false, true}) {
    Tensors x = inputs({2, 7, 5});
    Tensor state = torch::randn({2, 5}, torch::kDouble).requires_grad_();
    const auto got = op().run(x, state, {}, reverse);
    const auto want = loop(x, state, reverse);
    expect_close(std::get<0>(got), std::get<0>(want));
    expect_close(std::get<1>(got), std::get<1>(want));
    Tensors leaves = x;
    leaves.push_back(state);
    const Tensors got_grad = gradients(got, leaves, true),
                  want_grad = gradients(want, leaves, true);
    for (size_t i = 0; i < leaves.size(); ++i) expect_close(got_grad[i], want_grad[i]);
    const auto second = [&](const Tensors& grad) {
      Tensor sum = torch::zeros({}, torch::kDouble);
      for (const Tensor& each : grad) sum = sum + (each * each).sum();
      return torch::autograd::grad({sum}, leaves);
    };
    const Tensors got_second = second(got_grad), want_second = second(want_grad);
    for (size_t i = 0; i < leaves.size(); ++i) expect_close(got_second[i], want_second[i], 1e-8);
  }
}

TEST_P(Ops, NoStateIsZeros) {
  const Tensors x = inputs({3, 4, 2}, torch::kFloat);
  const auto got = op().run(x, {}, {}, false);
  const auto want = op().run(x, torch::zeros({3, 2}), {}, false);
  EXPECT_TRUE(torch::equal(std::get<0>(got), std::get<0>(want)));
  EXPECT_TRUE(torch::equal(std::get<1>(got), std::get<1>(want)));
}

TEST_P(Ops, PackedSequencesAreEachAlone) {
  const Tensors x = inputs({1, 9, 3});
  const Tensor state = torch::randn({3, 3}, torch::kDouble);
  const auto cu_seqlens = torch::tensor({0, 4, 4, 9}, torch::kInt);
  for (const bool reverse : {false, true}) {
    const auto [h, final_state] = op().run(x, state, cu_seqlens, reverse);
    expect_close(final_state[1], state[1]);
    for (const auto& [s, begin, end] : {std::tuple(0, 0, 4), {2, 4, 9}}) {
      Tensors part;
      for (const Tensor& each : x) part.push_back(each.slice(1, begin, end));
      const auto want = op().run(part, state.slice(0, s, s + 1), {}, reverse);
      expect_close(h.slice(1, begin, end), std::get<0>(want));
      expect_close(final_state.slice(0, s, s + 1), std::get<1>(want));
    }
  }
}

TEST_P(Ops, StepsAreTheSequence) {
  const Tensors x = inputs({2, 6, 4}, torch::kFloat);
  const auto [h, final_state] = op().run(x, {}, {}, false);
  Tensor state = torch::zeros({2, 4}), pool = torch::randn({5, 4});
  const Tensor slots = torch::tensor({3, 1}), before = pool.clone();
  pool.index_fill_(0, slots, 0);
  for (int64_t t = 0; t < 6; ++t) {
    Tensors x_t, detached;
    for (const Tensor& each : x) {
      x_t.push_back(each.select(1, t));
      detached.push_back(each.detach().select(1, t));
    }
    Tensor y;
    std::tie(y, state) = op().step(x_t, state, {});
    expect_close(y, h.select(1, t), 1e-6);
    const Tensor in_place = op().step_(detached, pool, slots);
    expect_close(in_place, h.select(1, t), 1e-6);
  }
  expect_close(state, final_state, 1e-6);
  expect_close(pool.index({slots}), final_state, 1e-6);
  for (const int64_t untouched : {0, 2, 4}) {
    EXPECT_TRUE(torch::equal(pool[untouched], before[untouched])) << untouched;
  }
  const Tensors want = gradients({h, final_state}, x);
  const Tensor weights = torch::linspace(-1, 1, 8).cos().view({2, 4});
  const Tensors through_steps = torch::autograd::grad({state}, x, {weights});
  const Tensors through_all = torch::autograd::grad({final_state}, x, {weights});
  for (size_t i = 0; i < x.size(); ++i) expect_close(through_steps[i], through_all[i], 1e-5);
}

TEST_P(Ops, HalfPrecisionHasAFloatState) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    const Tensors x = inputs({2, 5, 3}, dtype);
    const auto [h, final_state] = op().run(x, {}, {}, false);
    EXPECT_EQ(h.scalar_type(), dtype);
    EXPECT_EQ(final_state.scalar_type(), torch::kFloat);
    EXPECT_EQ(gradients({h, final_state}, x)[0].scalar_type(), dtype);
  }
}

TEST_P(Ops, EmptyIsFine) {
  for (const auto& shape : std::vector<std::vector<int64_t>>{{0, 4, 3}, {2, 0, 3}, {2, 4, 0}}) {
    const Tensors x = inputs(shape, torch::kFloat);
    const Tensor state = torch::randn({shape[0], shape[2]}).requires_grad_();
    const auto [h, final_state] = op().run(x, state, {}, false);
    EXPECT_EQ(h.sizes(), torch::IntArrayRef(shape));
    if (shape[1] == 0) {
      EXPECT_TRUE(torch::equal(final_state, state));
    }
    (h.sum() + final_state.sum()).backward();
    EXPECT_EQ(x[0].grad().sizes(), torch::IntArrayRef(shape));
  }
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}
#define EXPECT_MESSAGE(call, text) \
  EXPECT_PRED_FORMAT2(::testing::IsSubstring, text, message_of([&] { call; }))

TEST(Message, NamesTheArgument) {
  const Tensor x = torch::randn({4, 8, 6});
  EXPECT_MESSAGE(min_gru(x, x.slice(2, 0, 3)), "min_gru: candidate has shape (4, 8, 3)");
  EXPECT_MESSAGE(min_gru(x, x.to(torch::kDouble)), "min_gru: candidate has dtype float64");
  EXPECT_MESSAGE(min_gru(x, x, torch::zeros({4, 5})), "min_gru: initial_state has shape (4, 5)");
  EXPECT_MESSAGE(min_gru(x, x, {}, "relu"), "min_gru: activation is 'relu'");
  EXPECT_MESSAGE(min_gru(x[0], x[0]), "min_gru: gate has shape (8, 6)");
  EXPECT_MESSAGE(min_lstm(x, x, x[0]), "min_lstm: candidate has shape (8, 6)");
  EXPECT_MESSAGE(
      min_gru_step(x.select(1, 0), x.select(1, 0), torch::zeros({5, 6})),
      "min_gru_step: state has shape (5, 6)");
  const Tensor row = x.slice(0, 0, 1);
  EXPECT_MESSAGE(linear_scan(row, row, {}, torch::tensor({0, 9})), "linear_scan: cu_seqlens");
  EXPECT_MESSAGE(
      linear_scan(x, x, {}, torch::tensor({0, 8})), "linear_scan: a has shape (4, 8, 6)");
}

INSTANTIATE_TEST_SUITE_P(
    All, Ops,
    ::testing::Values(
        linear_scan_case(), min_gru_case("identity"), min_gru_case("g"),
        min_lstm_case("identity", true), min_lstm_case("g", true), min_lstm_case("g", false)),
    [](const auto& each) { return each.param.name; });

TEST(Complex, GradientIsThatOfALoop) {
  torch::manual_seed(seed());
  const auto draw = [](torch::IntArrayRef shape) {
    return torch::randn(shape, torch::kComplexDouble) / 2;
  };
  const Tensor a = draw({2, 6, 3}).requires_grad_(), b = draw({2, 6, 3}).requires_grad_();
  const Tensor state = draw({2, 3}).requires_grad_();
  const auto [h, final_state] = linear_scan(a, b, state);
  Tensor want = state;
  Tensors all;
  for (int64_t t = 0; t < 6; ++t) {
    want = a.select(1, t) * want + b.select(1, t);
    all.push_back(want);
  }
  expect_close(torch::view_as_real(h), torch::view_as_real(torch::stack(all, 1)));
  const auto loss = [](const Tensor& y) { return torch::real(y * y + 3 * y).sum(); };
  const Tensors leaves = {a, b, state};
  const Tensors got_grad = torch::autograd::grad({loss(h) + loss(final_state)}, leaves);
  const Tensors want_grad =
      torch::autograd::grad({loss(torch::stack(all, 1)) + loss(want)}, leaves);
  for (size_t i = 0; i < leaves.size(); ++i) {
    expect_close(torch::view_as_real(got_grad[i]), torch::view_as_real(want_grad[i]));
  }
}

// torch's own convolution of the state and x, side by side.
TensorPair convolution(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& state, bool silu) {
  const Tensor seen = torch::cat({state, x.transpose(1, 2)}, -1);
  const Tensor y =
      torch::conv1d(seen, weight.unsqueeze(1), bias, 1, torch::IntArrayRef(0), 1, weight.size(0));
  return {
      (silu ? torch::silu(y) : y).transpose(1, 2), seen.narrow(2, x.size(1), weight.size(1) - 1)};
}

TEST(CausalConv1d, IsTorchsConvolution) {
  torch::manual_seed(seed());
  for (const int64_t window : {1, 2, 4, 9}) {
    for (const bool silu : {false, true}) {
      const auto draw = [](torch::IntArrayRef shape) {
        return torch::randn(shape, torch::kDouble).requires_grad_();
      };
      const Tensors leaves = {
          draw({2, 7, 5}), draw({5, window}), draw({5}), draw({2, 5, window - 1})};
      const std::optional<std::string_view> activation =
          silu ? std::optional<std::string_view>("silu") : std::nullopt;
      const auto got = causal_conv1d(leaves[0], leaves[1], leaves[2], leaves[3], activation);
      const auto want = convolution(leaves[0], leaves[1], leaves[2], leaves[3], silu);
      expect_close(std::get<0>(got), std::get<0>(want));
      expect_close(std::get<1>(got), std::get<1>(want));
      const Tensors first = gradients(got, leaves, true),
                    first_want = gradients(want, leaves, true);
      const auto second = [&](const Tensors& grad) {
        Tensor sum = torch::zeros({}, torch::kDouble);
        for (const Tensor& each : grad) sum = sum + (each * each).sum();
        return torch::autograd::grad({sum}, {leaves[0], leaves[1]});
      };
      for (size_t i = 0; i < leaves.size(); ++i) expect_close(first[i], first_want[i]);
      const Tensors twice = second(first), twice_want = second(first_want);
      for (size_t i = 0; i < 2; ++i) expect_close(twice[i], twice_want[i], 1e-8);
    }
  }
}

TEST(CausalConv1d, StepsAndPackedSequences) {
  torch::manual_seed(seed());
  const Tensor x = torch::randn({2, 6, 5}), weight = torch::randn({5, 4}), bias = torch::randn({5});
  const auto [y, final_state] = causal_conv1d(x, weight, bias);
  Tensor state = torch::zeros({2, 5, 3}), pool = torch::randn({4, 5, 3});
  const Tensor slots = torch::tensor({3, 1}), before = pool.clone();
  pool.index_fill_(0, slots, 0);
  for (int64_t t = 0; t < 6; ++t) {
    Tensor y_t;
    std::tie(y_t, state) = causal_conv1d_step(x.select(1, t), weight, bias, state);
    expect_close(y_t, y.select(1, t), 1e-6);
    expect_close(
        causal_conv1d_step_(x.select(1, t), weight, bias, pool, slots), y.select(1, t), 1e-6);
  }
  EXPECT_TRUE(torch::equal(state, final_state));
  EXPECT_TRUE(torch::equal(pool.index({slots}), final_state));
  EXPECT_TRUE(torch::equal(pool[0], before[0]) && torch::equal(pool[2], before[2]));
  const auto cu_seqlens = torch::tensor({0, 6, 6, 12}, torch::kInt);
  const auto [packed, finals] =
      causal_conv1d(x.reshape({1, 12, 5}), weight, bias, {}, {}, cu_seqlens);
  expect_close(packed.view({2, 6, 5}), y, 1e-6);
  EXPECT_TRUE(torch::equal(finals[0], final_state[0]) && torch::equal(finals[2], final_state[1]));
  EXPECT_TRUE(torch::equal(finals[1], torch::zeros({5, 3})));
}

TEST(CausalConv1d, MessagesNameTheArgument) {
  const Tensor x = torch::randn({4, 8, 6}), weight = torch::randn({6, 3});
  EXPECT_MESSAGE(causal_conv1d(x[0], weight), "causal_conv1d: x has shape (8, 6)");
  EXPECT_MESSAGE(causal_conv1d(x, weight.t()), "causal_conv1d: weight has shape (3, 6)");
  EXPECT_MESSAGE(causal_conv1d(x, weight, x[0]), "causal_conv1d: bias has shape (8, 6)");
  EXPECT_MESSAGE(
      causal_conv1d(x, weight, {}, torch::zeros({4, 6})),
      "causal_conv1d: initial_state has shape (4, 6)");
  EXPECT_MESSAGE(causal_conv1d(x, weight, {}, {}, "relu"), "causal_conv1d: activation is 'relu'");
  EXPECT_MESSAGE(
      causal_conv1d_step(x.select(1, 0), weight, {}, torch::zeros({5, 6, 2})),
      "causal_conv1d_step: state has shape (5, 6, 2)");
}

// ---- matrix memories ----

// One member of the family: what has a place in time, its states, itself, and its step by torch's operations.
struct Member {
  std::string name;
  std::vector<std::vector<int64_t>> inputs, states; // sizes behind (B, T) and (B)
  std::function<std::pair<Tensor, Tensors>(
      const Tensors&, const Tensors& state, const OptionalTensor& cu_seqlens, bool reverse)>
      run; // no states: none given
  std::function<std::pair<Tensor, Tensors>(
      const Tensors&, const Tensors& state, const OptionalTensor& indices)>
      step;
  std::function<Tensor(const Tensors&, Tensors& state, const OptionalTensor& indices)> step_;
  std::function<std::pair<Tensor, Tensors>(const Tensors&, const Tensors& state)> formula;

  friend void PrintTo(const Member& member, std::ostream* out) { *out << member.name; }
};

constexpr int64_t kHeads = 4, kGroups = 2, kKeys = 3, kValues = 5;

Tensor product(const Tensor& k, const Tensor& v) { return k.unsqueeze(-1) * v.unsqueeze(-2); }
Tensor read_out(const Tensor& C, const Tensor& q) { return (C * q.unsqueeze(-1)).sum(-2); }
Tensor per_head(const Tensor& x) { return x.repeat_interleave(kHeads / kGroups, -2); }

Member mlstm_case(bool exponential) {
  const std::string gate = exponential ? "exp" : "sigmoid";
  const auto as_state = [](const Tensors& s) { return MLSTMState(s[0], s[1], s[2]); };
  const auto as_list = [](const std::tuple<Tensor, MLSTMState>& out) {
    const auto& [h, state] = out;
    return std::pair(h, Tensors{std::get<0>(state), std::get<1>(state), std::get<2>(state)});
  };
  return {
      "mlstm_" + gate,
      {{kGroups, kKeys}, {kGroups, kKeys}, {kHeads, kValues}, {kHeads}, {kHeads}},
      {{kHeads, kKeys, kValues}, {kHeads, kKeys}, {kHeads}},
      [=](const Tensors& x, const Tensors& s, const OptionalTensor& c, bool r) {
        const auto initial = s.empty() ? std::nullopt : std::optional(as_state(s));
        return as_list(
            mlstm(x[0], x[1], x[2], x[3], x[4], initial, 0.7, 0.01, gate, exponential, true, c, r));
      },
      [=](const Tensors& x, const Tensors& s, const OptionalTensor& i) {
        return as_list(
            mlstm_step(x[0], x[1], x[2], x[3], x[4], as_state(s), i, 0.7, 0.01, gate, exponential));
      },
      [=](const Tensors& x, Tensors& s, const OptionalTensor& i) {
        MLSTMState state = as_state(s);
        return mlstm_step_(x[0], x[1], x[2], x[3], x[4], state, i, 0.7, 0.01, gate, exponential);
      },
      [=](const Tensors& x, const Tensors& s) {
        const Tensor q = 0.7 * per_head(x[0]), k = per_head(x[1]), log_f = torch::log_sigmoid(x[4]);
        const Tensor m = exponential ? torch::maximum(log_f + s[2], x[3]) : s[2];
        const Tensor f = exponential ? torch::exp(log_f + s[2] - m) : torch::exp(log_f),
                     i = exponential ? torch::exp(x[3] - m) : torch::sigmoid(x[3]);
        const Tensor C = f.unsqueeze(-1).unsqueeze(-1) * s[0] + product(i.unsqueeze(-1) * k, x[2]),
                     n = exponential ? f.unsqueeze(-1) * s[1] + i.unsqueeze(-1) * k : s[1];
        Tensor h = read_out(C, q);
        if (exponential)
          h = h / (torch::maximum((n * q).sum(-1).abs(), torch::exp(-m)) + 0.01).unsqueeze(-1);
        return std::pair(h, Tensors{C, n, m});
      }};
}
Member linear_attention_case(bool normalize) {
  const auto as_list = [](const std::tuple<Tensor, TensorPair>& out) {
    const auto& [h, state] = out;
    return std::pair(h, Tensors{std::get<0>(state), std::get<1>(state)});
  };
  const std::string features = normalize ? "elu" : "relu";
  return {
      "linear_attention_" + features,
      {{kGroups, kKeys}, {kGroups, kKeys}, {kHeads, kValues}},
      {{kHeads, kKeys, kValues}, {kHeads, kKeys}},
      [=](const Tensors& x, const Tensors& s, const OptionalTensor& c, bool r) {
        const auto initial = s.empty() ? std::nullopt : std::optional(TensorPair(s[0], s[1]));
        return as_list(
            linear_attention(x[0], x[1], x[2], initial, 0.5, features, normalize, 0.5, c, r));
      },
      [=](const Tensors& x, const Tensors& s, const OptionalTensor& i) {
        return as_list(linear_attention_step(
            x[0], x[1], x[2], {s[0], s[1]}, i, 0.5, features, normalize, 0.5));
      },
      [=](const Tensors& x, Tensors& s, const OptionalTensor& i) {
        TensorPair state(s[0], s[1]);
        return linear_attention_step_(x[0], x[1], x[2], state, i, 0.5, features, normalize, 0.5);
      },
      [=](const Tensors& x, const Tensors& s) {
        const auto map = [&](const Tensor& y) {
          return normalize ? torch::elu(y) + 1 : torch::relu(y);
        };
        const Tensor q = 0.5 * map(per_head(x[0])), k = map(per_head(x[1]));
        const Tensor S = s[0] + product(k, x[2]), z = normalize ? s[1] + k : s[1];
        Tensor h = read_out(S, q);
        if (normalize) h = h / ((z * q).sum(-1, true) + 0.5);
        return std::pair(h, Tensors{S, z});
      }};
}
Member retention_case() {
  const auto as_list = [](const TensorPair& out) {
    return std::pair(std::get<0>(out), Tensors{std::get<1>(out)});
  };
  return {
      "retention",
      {{kGroups, kKeys}, {kGroups, kKeys}, {kHeads, kValues}},
      {{kHeads, kKeys, kValues}},
      [=](const Tensors& x, const Tensors& s, const OptionalTensor& c, bool r) {
        const OptionalTensor initial = s.empty() ? OptionalTensor() : s[0];
        return as_list(retention(x[0], x[1], x[2], {}, initial, {}, c, r));
      },
      [=](const Tensors& x, const Tensors& s, const OptionalTensor& i) {
        return as_list(retention_step(x[0], x[1], x[2], {}, s[0], i));
      },
      [=](const Tensors& x, Tensors& s, const OptionalTensor& i) {
        return retention_step_(x[0], x[1], x[2], {}, s[0], i);
      },
      [=](const Tensors& x, const Tensors& s) {
        const Tensor decay = 1 - torch::pow(2., -5 - torch::arange(kHeads, s[0].options()));
        const Tensor S = decay.view({kHeads, 1, 1}) * s[0] + product(per_head(x[1]), x[2]);
        return std::pair(read_out(S, per_head(x[0]) / std::sqrt(double(kKeys))), Tensors{S});
      }};
}
Member ssd_case() {
  const auto as_list = [](const TensorPair& out) {
    return std::pair(std::get<0>(out), Tensors{std::get<1>(out)});
  };
  const auto like = [](const Tensor& x) { return x.options().requires_grad(false); };
  const auto A = [=](const Tensor& x) { return -torch::linspace(0.2, 2, kHeads, like(x)); };
  const auto D = [=](const Tensor& x) { return torch::linspace(-1, 1, kHeads, like(x)); };
  const auto bias = [=](const Tensor& x) { return torch::linspace(-2, 0, kHeads, like(x)); };
  return {
      "ssd",
      {{kHeads, kValues}, {kHeads}, {kGroups, kKeys}, {kGroups, kKeys}, {kHeads, kValues}},
      {{kHeads, kValues, kKeys}},
      [=](const Tensors& x, const Tensors& s, const OptionalTensor& c, bool r) {
        const OptionalTensor initial = s.empty() ? OptionalTensor() : s[0];
        return as_list(
            ssd(x[0], x[1], A(x[0]), x[2], x[3], D(x[0]), x[4], bias(x[0]), initial, true, c, r));
      },
      [=](const Tensors& x, const Tensors& s, const OptionalTensor& i) {
        return as_list(
            ssd_step(x[0], x[1], A(x[0]), x[2], x[3], D(x[0]), x[4], bias(x[0]), s[0], i, true));
      },
      [=](const Tensors& x, Tensors& s, const OptionalTensor& i) {
        return ssd_step_(x[0], x[1], A(x[0]), x[2], x[3], D(x[0]), x[4], bias(x[0]), s[0], i, true);
      },
      [=](const Tensors& x, const Tensors& s) {
        const Tensor dt = torch::softplus(x[1] + bias(x[0]));
        const Tensor S = torch::exp(dt * A(x[0])).unsqueeze(-1).unsqueeze(-1) * s[0] +
                         product(dt.unsqueeze(-1) * x[0], per_head(x[2]));
        const Tensor y = (S * per_head(x[3]).unsqueeze(-2)).sum(-1) + D(x[0]).unsqueeze(-1) * x[0];
        return std::pair(y * torch::silu(x[4]), Tensors{S});
      }};
}

class MatrixMemories : public ::testing::TestWithParam<Member> {
 protected:
  void SetUp() override { torch::manual_seed(seed()); }
  const Member& member() const { return GetParam(); }
  static Tensors draw(
      const std::vector<std::vector<int64_t>>& sizes, std::vector<int64_t> before,
      torch::ScalarType dtype) {
    Tensors all;
    for (const std::vector<int64_t>& size : sizes) {
      std::vector<int64_t> shape = before;
      shape.insert(shape.end(), size.begin(), size.end());
      all.push_back(torch::randn(shape, torch::dtype(dtype).requires_grad(true)));
    }
    return all;
  }
  Tensors inputs(int64_t B, int64_t T, torch::ScalarType dtype = torch::kDouble) const {
    return draw(member().inputs, {B, T}, dtype);
  }
  Tensors states(int64_t B, torch::ScalarType dtype = torch::kDouble) const {
    return draw(member().states, {B}, dtype);
  }
  static Tensors at(const Tensors& x, int64_t t) {
    Tensors all;
    for (const Tensor& each : x) all.push_back(each.select(1, t));
    return all;
  }
  static Tensors detached(Tensors x) {
    for (Tensor& each : x) each = each.detach();
    return x;
  }
  std::pair<Tensor, Tensors> loop(const Tensors& x, Tensors state, bool reverse) const {
    const int64_t T = x[0].size(1);
    Tensors h(static_cast<size_t>(T), Tensor());
    for (int64_t n = 0; n < T; ++n) {
      const int64_t t = reverse ? T - 1 - n : n;
      std::tie(h[size_t(t)], state) = member().formula(at(x, t), state);
    }
    return {torch::stack(h, 1), state};
  }
  Random random;
};

Tensor weighed(const std::pair<Tensor, Tensors>& out) {
  Tensor sum = torch::zeros({}, out.first.options());
  Tensors all = out.second;
  all.push_back(out.first);
  for (const Tensor& y : all)
    sum = sum + (y * torch::linspace(-1, 3, y.numel(), y.options()).cos().view(y.sizes())).sum();
  return sum;
}

TEST_P(MatrixMemories, ValuesAndGradientsAreThoseOfALoop) {
  for (const bool reverse : {false, true}) {
    const Tensors x = inputs(2, 7), state = states(2);
    const auto got = member().run(x, state, {}, reverse), want = loop(x, state, reverse);
    expect_close(got.first, want.first);
    for (size_t i = 0; i < state.size(); ++i) expect_close(got.second[i], want.second[i]);
    Tensors leaves = x;
    leaves.insert(leaves.end(), state.begin(), state.end());
    const auto gradients_of = [&](const std::pair<Tensor, Tensors>& out) {
      return torch::autograd::grad({weighed(out)}, leaves);
    };
    const Tensors got_grad = gradients_of(got), want_grad = gradients_of(want);
    for (size_t i = 0; i < leaves.size(); ++i) expect_close(got_grad[i], want_grad[i], 1e-9);
  }
}

TEST_P(MatrixMemories, NoStateIsZeros) {
  const Tensors x = inputs(2, 4, torch::kFloat);
  Tensors zeros = states(2, torch::kFloat);
  for (Tensor& each : zeros) each = torch::zeros_like(each);
  const auto got = member().run(x, {}, {}, false), want = member().run(x, zeros, {}, false);
  EXPECT_TRUE(torch::equal(got.first, want.first));
  for (size_t i = 0; i < zeros.size(); ++i)
    EXPECT_TRUE(torch::equal(got.second[i], want.second[i]));
}

TEST_P(MatrixMemories, PackedSequencesAreEachAlone) {
  const Tensors x = inputs(1, 9), state = states(3);
  const auto cu_seqlens = torch::tensor({0, 4, 4, 9}, torch::kInt);
  const auto got = member().run(x, state, cu_seqlens, false);
  for (const auto& [s, begin, end] : {std::tuple(0, 0, 4), {2, 4, 9}}) {
    Tensors part, own;
    for (const Tensor& each : x) part.push_back(each.slice(1, begin, end));
    for (const Tensor& each : state) own.push_back(each.slice(0, s, s + 1));
    const auto want = member().run(part, own, {}, false);
    expect_close(got.first.slice(1, begin, end), want.first);
    for (size_t i = 0; i < state.size(); ++i)
      expect_close(got.second[i].slice(0, s, s + 1), want.second[i]);
  }
  for (size_t i = 0; i < state.size(); ++i) expect_close(got.second[i][1], state[i][1]);
}

TEST_P(MatrixMemories, StepsAreTheSequence) {
  const Tensors x = inputs(2, 5, torch::kFloat);
  const auto [h, final_state] = member().run(x, {}, {}, false);
  Tensors state = detached(states(2, torch::kFloat)), pools = detached(states(4, torch::kFloat));
  const Tensor slots = torch::tensor({3, 1});
  Tensors before;
  for (size_t i = 0; i < state.size(); ++i) {
    before.push_back(pools[i].clone());
    state[i].zero_();
    pools[i].index_fill_(0, slots, 0);
  }
  for (int64_t t = 0; t < 5; ++t) {
    Tensor y;
    std::tie(y, state) = member().step(at(x, t), state, {});
    expect_close(y, h.select(1, t), 1e-4);
    expect_close(member().step_(at(detached(x), t), pools, slots), h.select(1, t), 1e-4);
  }
  for (size_t i = 0; i < state.size(); ++i) {
    expect_close(state[i], final_state[i], 1e-4);
    expect_close(pools[i].index({slots}), final_state[i], 1e-4);
    for (const int64_t untouched : {0, 2})
      EXPECT_TRUE(torch::equal(pools[i][untouched], before[i][untouched])) << untouched;
  }
  const Tensors through_steps = torch::autograd::grad({weighed({state[0], {}})}, {x[1], x[2]});
  const Tensors through_all = torch::autograd::grad({weighed({final_state[0], {}})}, {x[1], x[2]});
  for (size_t i = 0; i < 2; ++i) expect_close(through_steps[i], through_all[i], 1e-4);
}

TEST_P(MatrixMemories, HalfPrecisionHasAFloatState) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    const Tensors x = inputs(2, 5, dtype);
    const auto out = member().run(x, {}, {}, false);
    EXPECT_EQ(out.first.scalar_type(), dtype);
    EXPECT_EQ(out.second[0].scalar_type(), torch::kFloat);
    EXPECT_EQ(torch::autograd::grad({out.first.sum()}, {x[0]})[0].scalar_type(), dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, MatrixMemories,
    ::testing::Values(
        mlstm_case(true), mlstm_case(false), linear_attention_case(true),
        linear_attention_case(false), retention_case(), ssd_case()),
    [](const auto& each) { return each.param.name; });

TEST(MatrixMemoryMessages, NameTheArgument) {
  const Tensor q = torch::randn({2, 6, 1, 3}), v = torch::randn({2, 6, 4, 5}), i = v.select(3, 0);
  EXPECT_MESSAGE(mlstm(q, q[0], v, i, i), "mlstm: k has shape (6, 1, 3)");
  EXPECT_MESSAGE(mlstm(q, q, v, i, i, {}, {}, 0, "tanh"), "mlstm: input_gate is 'tanh'");
  EXPECT_MESSAGE(mlstm(q, q, v, i, i, MLSTMState(i, i, i)), "mlstm: C has shape (2, 6, 4)");
  EXPECT_MESSAGE(linear_attention(q, q, v, {}, 1, "cos"), "linear_attention: feature_map is 'cos'");
  EXPECT_MESSAGE(retention(q, q, v, i), "retention: decay has shape (2, 6, 4)");
  EXPECT_MESSAGE(ssd(v, i, i, q, q), "ssd: A has shape (2, 6, 4)");
}

TEST(Library, HasAVersion) { EXPECT_NE(std::string(version()), ""); }

} // namespace
} // namespace torch_ext::test
