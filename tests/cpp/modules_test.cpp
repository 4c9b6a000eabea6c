// The C++ modules (torch_ext/nn.h): torch::nn::GRU's contract, Mamba, streaming, padding, training, saving, loading. That
// they compute what the Python modules compute is checked by parity.py.
#include <ATen/autocast_mode.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/torch.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "random.h"
#include "torch_ext/nn.h"

namespace torch_ext::test {
namespace {

using torch::Tensor;
using Tensors = std::vector<Tensor>;
using namespace torch_ext::nn;

void expect_close(const Tensor& got, const Tensor& want, double tolerance = 1e-5) {
  ASSERT_EQ(got.sizes(), want.sizes());
  EXPECT_TRUE(torch::allclose(got, want, tolerance, tolerance))
      << "largest difference " << (got - want).abs().max().item<double>();
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

// A file that is gone afterwards.
class TemporaryFile {
 public:
  TemporaryFile()
      : path_((std::filesystem::temp_directory_path() /
               ("torch_ext_test_" + std::to_string(::getpid()) + "_" + std::to_string(count_++)))
                  .string()) {}
  ~TemporaryFile() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  static inline int count_ = 0;
  std::string path_;
};

// Both layers through the same tests.
template <class M>
struct OptionsOf;
template <>
struct OptionsOf<MinGRU> {
  using type = MinGRUOptions;
};
template <>
struct OptionsOf<MinLSTM> {
  using type = MinLSTMOptions;
};

template <class M>
class Layer : public ::testing::Test {
 protected:
  using Options = typename OptionsOf<M>::type;
  void SetUp() override { torch::manual_seed(seed()); }
};
using Layers = ::testing::Types<MinGRU, MinLSTM>;
TYPED_TEST_SUITE(Layer, Layers);

TYPED_TEST(Layer, HasTorchsShapes) {
  using Options = typename TestFixture::Options;
  const Tensor x = torch::randn({7, 3, 5}); // (T, B, input_size)
  TypeParam rnn(Options(5, 4).num_layers(2).bidirectional(true));
  const auto [y, state] = rnn->forward(x);
  EXPECT_EQ(y.sizes(), (torch::IntArrayRef{7, 3, 8}));
  EXPECT_EQ(state.sizes(), (torch::IntArrayRef{4, 3, 4}));
  EXPECT_EQ(rnn->init_state(3).sizes(), state.sizes());

  rnn->options.batch_first(true);
  const auto [y_first, state_first] = rnn->forward(x.transpose(0, 1));
  expect_close(y_first.transpose(0, 1), y);
  expect_close(state_first, state);

  const auto [y_alone, state_alone] = rnn->forward(x.select(1, 1));
  expect_close(y_alone, y.select(1, 1));
  expect_close(state_alone, state.select(1, 1));
  const auto [y_given, state_given] = rnn->forward(x.select(1, 1), torch::zeros({4, 4}));
  expect_close(y_given, y_alone);
}

TYPED_TEST(Layer, HasPythonsParameters) {
  using Options = typename TestFixture::Options;
  constexpr int64_t gates = std::is_same_v<TypeParam, MinGRU> ? 2 : 3;
  TypeParam rnn(Options(5, 4).num_layers(2).bidirectional(true));
  const auto parameters = rnn->named_parameters();
  const std::vector<std::string> names = {
      "weight_ih_l0", "bias_ih_l0", "weight_ih_l0_reverse", "bias_ih_l0_reverse",
      "weight_ih_l1", "bias_ih_l1", "weight_ih_l1_reverse", "bias_ih_l1_reverse"};
  EXPECT_EQ(parameters.keys(), names);
  EXPECT_EQ(parameters["weight_ih_l0"].sizes(), (torch::IntArrayRef{gates * 4, 5}));
  EXPECT_EQ(parameters["weight_ih_l1_reverse"].sizes(), (torch::IntArrayRef{gates * 4, 8}));
  EXPECT_EQ(parameters["bias_ih_l1"].sizes(), (torch::IntArrayRef{gates * 4}));
  for (const auto& each : parameters)
    EXPECT_LE(each.value().abs().max().template item<float>(), 0.5f);
  EXPECT_EQ(TypeParam(Options(5, 4).bias(false))->named_parameters().size(), 1u);
}

TYPED_TEST(Layer, ChunksAndStepsAreTheSequence) {
  using Options = typename TestFixture::Options;
  TypeParam rnn(Options(5, 4).num_layers(3).batch_first(true).activation("g"));
  const Tensor x = torch::randn({2, 9, 5}), start = torch::rand({3, 2, 4});
  const auto [y, last] = rnn->forward(x, start);

  const auto [first, between] = rnn->forward(x.slice(1, 0, 4), start);
  const auto [second, end] = rnn->forward(x.slice(1, 4), between);
  expect_close(torch::cat({first, second}, 1), y);
  expect_close(end, last);

  Tensor state = start, y_t;
  for (int64_t t = 0; t < 9; ++t) {
    std::tie(y_t, state) = rnn->step(x.select(1, t), state);
    expect_close(y_t, y.select(1, t));
  }
  expect_close(state, last);
}

TYPED_TEST(Layer, PaddingDoesNotCount) {
  using Options = typename TestFixture::Options;
  TypeParam rnn(Options(5, 4).num_layers(2).batch_first(true).bidirectional(true));
  Tensor x = torch::randn({4, 6, 5});
  const std::vector<int64_t> lengths = {6, 2, 0, 5};
  for (int64_t row = 0; row < 4; ++row) {
    x[row].slice(0, lengths[size_t(row)]).fill_(std::numeric_limits<float>::quiet_NaN());
  }
  x.requires_grad_();
  const Tensor start = torch::randn({4, 4, 4});
  const auto [y, state] = rnn->forward(x, start, torch::tensor(lengths));
  for (int64_t row = 0; row < 4; ++row) {
    const int64_t length = lengths[size_t(row)];
    const auto [want, want_state] =
        rnn->forward(x.slice(0, row, row + 1).slice(1, 0, length), start.slice(1, row, row + 1));
    expect_close(y.slice(0, row, row + 1).slice(1, 0, length), want);
    expect_close(state.slice(1, row, row + 1), want_state);
    EXPECT_EQ(y[row].slice(0, length).abs().sum().template item<float>(), 0);
  }
  (y.sum() + state.sum()).backward();
  for (const Tensor& each : rnn->parameters()) {
    EXPECT_TRUE(each.grad().isfinite().all().template item<bool>());
  }
}

TYPED_TEST(Layer, Learns) {
  using Options = typename TestFixture::Options;
  // The running mean of the first channel over the last ten steps.
  TypeParam rnn(Options(3, 16).num_layers(2).batch_first(true));
  torch::nn::Linear head(16, 1);
  auto parameters = rnn->parameters();
  for (const Tensor& each : head->parameters()) parameters.push_back(each);
  torch::optim::Adam adam(parameters, torch::optim::AdamOptions(1e-2));
  double first = 0, last = 0;
  for (int i = 0; i < 150; ++i) {
    const Tensor x = torch::randn({16, 40, 3});
    const Tensor sum = x.select(2, 0).cumsum(1);
    const Tensor target = (sum - torch::constant_pad_nd(sum, {10, 0}).slice(1, 0, 40)) / 10;
    adam.zero_grad();
    const Tensor loss =
        torch::mse_loss(head->forward(std::get<0>(rnn->forward(x))).squeeze(-1), target);
    loss.backward();
    adam.step();
    if (i == 0) first = loss.item<double>();
    last = loss.item<double>();
  }
  EXPECT_LT(last, 0.4 * first);
}

TYPED_TEST(Layer, IsSavedClonedMovedAndPrinted) {
  using Options = typename TestFixture::Options;
  const auto options = Options(5, 4).num_layers(2).batch_first(true);
  TypeParam rnn(options), loaded(options), read(options);
  const Tensor x = torch::randn({2, 6, 5});
  const Tensor y = std::get<0>(rnn->forward(x));
  const TemporaryFile file;
  torch::save(rnn, file.path());
  torch::load(loaded, file.path());
  EXPECT_TRUE(torch::equal(std::get<0>(loaded->forward(x)), y));
  load_state_dict(read, file.path());
  EXPECT_TRUE(torch::equal(std::get<0>(read->forward(x)), y));

  auto copy = std::dynamic_pointer_cast<typename TypeParam::ContainedType>(rnn->clone());
  ASSERT_TRUE(copy);
  EXPECT_TRUE(torch::equal(std::get<0>(copy->forward(x)), y));
  {
    const torch::NoGradGuard no_grad;
    for (Tensor& each : copy->parameters()) each.zero_();
  }
  EXPECT_TRUE(torch::equal(std::get<0>(rnn->forward(x)), y)) << "the copy shares parameters";

  rnn->to(torch::kDouble);
  const auto [in_double, state] = rnn->forward(x.to(torch::kDouble));
  EXPECT_EQ(in_double.scalar_type(), torch::kDouble);
  EXPECT_EQ(state.scalar_type(), torch::kDouble);
  expect_close(in_double.to(torch::kFloat), y);
  rnn->to(torch::kBFloat16);
  const auto [in_half, half_state] = rnn->forward(x.to(torch::kBFloat16));
  EXPECT_EQ(in_half.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(half_state.scalar_type(), torch::kFloat);

  EXPECT_NE(c10::str(rnn).find("hidden_size=4, num_layers=2"), std::string::npos);
  torch::nn::AnyModule any(rnn);
  const auto [y_any, state_any] = any.forward<std::tuple<Tensor, Tensor>>(x.to(torch::kBFloat16));
  EXPECT_TRUE(torch::equal(y_any, in_half));
}

TYPED_TEST(Layer, DropsOutOnlyInTrainingAndBetweenLayers) {
  using Options = typename TestFixture::Options;
  TypeParam rnn(Options(5, 32).num_layers(2).dropout(0.5));
  const Tensor x = torch::randn({6, 2, 5});
  EXPECT_FALSE(torch::equal(std::get<0>(rnn->forward(x)), std::get<0>(rnn->forward(x))));
  EXPECT_GT(std::get<0>(rnn->forward(x)).abs().min().template item<float>(), 0);
  rnn->eval();
  EXPECT_TRUE(torch::equal(std::get<0>(rnn->forward(x)), std::get<0>(rnn->forward(x))));
}

TYPED_TEST(Layer, RunsUnderAutocastWithAFloatState) {
  using Options = typename TestFixture::Options;
  TypeParam rnn(Options(5, 4));
  const Tensor x = torch::randn({6, 2, 5});
  const Tensor want = std::get<0>(rnn->forward(x));
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const auto [y, state] = rnn->forward(x);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(state.scalar_type(), torch::kFloat);
  expect_close(y.to(torch::kFloat), want, 0.03);
}

TYPED_TEST(Layer, GateBiasInitIsLongMemory) {
  using Options = typename TestFixture::Options;
  constexpr bool gru = std::is_same_v<TypeParam, MinGRU>;
  TypeParam fixed(Options(5, 4).gate_bias_init(3.0));
  const Tensor bias = fixed->named_parameters()["bias_ih_l0"];
  EXPECT_TRUE((bias.slice(0, 0, 4) == 3).all().template item<bool>());
  if (!gru) {
    EXPECT_TRUE((bias.slice(0, 4, 8) == -3).all().template item<bool>());
  }
  TypeParam spread(Options(5, 400).gate_bias_init(GateBiasInit(10, 100)));
  Tensor logit = spread->named_parameters()["bias_ih_l0"].slice(0, 0, 400);
  if (gru) logit = -logit;
  const Tensor steps = 1 / (1 - torch::sigmoid(logit));
  EXPECT_GE(steps.min().template item<float>(), 9.99);
  EXPECT_LE(steps.max().template item<float>(), 100.1);
  EXPECT_NEAR(steps.mean().template item<float>(), 55, 6);
}

TYPED_TEST(Layer, SaysWhatIsWrong) {
  using Options = typename TestFixture::Options;
  const std::string name = std::is_same_v<TypeParam, MinGRU> ? "MinGRU" : "MinLSTM";
  TypeParam rnn(Options(5, 4).num_layers(2).batch_first(true));
  const Tensor x = torch::randn({2, 6, 5});
  EXPECT_MESSAGE(rnn->forward(x.slice(2, 0, 4)), name + ": x has shape (2, 6, 4)");
  EXPECT_MESSAGE(rnn->forward(x.unsqueeze(0)), name + ": x has shape (1, 2, 6, 5)");
  EXPECT_MESSAGE(rnn->forward(Tensor()), name + ": x is undefined");
  EXPECT_MESSAGE(rnn->forward(x.to(torch::kDouble)), name + ": x has dtype float64");
  EXPECT_MESSAGE(rnn->forward(x, torch::zeros({2, 3, 4})), name + ": state has shape (2, 3, 4)");
  EXPECT_MESSAGE(rnn->forward(x[0], torch::zeros({2, 1, 4})), name + ": state has shape (2, 1, 4)");
  EXPECT_MESSAGE(
      rnn->forward(x, {}, torch::tensor({1, 7})), name + ": lengths has values from 1 to 7");
  EXPECT_MESSAGE(rnn->forward(x, {}, torch::tensor({1, 2, 3})), name + ": lengths has shape (3,)");
  EXPECT_MESSAGE(rnn->forward(x, {}, torch::tensor({1., 2.})), name + ": lengths has dtype");
  EXPECT_MESSAGE(rnn->forward(x[0], {}, torch::tensor({1})), name + ": lengths is given");
  EXPECT_MESSAGE(rnn->step(x, rnn->init_state(2)), name + ".step: x has shape (2, 6, 5)");
  EXPECT_MESSAGE(rnn->step(x.select(1, 0), Tensor()), name + ": state has shape none");
  EXPECT_MESSAGE(TypeParam(Options(0, 4)), name + ": input_size is 0");
  EXPECT_MESSAGE(TypeParam(Options(5, 4).num_layers(0)), name + ": num_layers is 0");
  EXPECT_MESSAGE(TypeParam(Options(5, 4).dropout(1.5)), name + ": dropout is 1.5");
  EXPECT_MESSAGE(TypeParam(Options(5, 4).activation("relu")), name + ": activation is 'relu'");
  EXPECT_MESSAGE(
      TypeParam(Options(5, 4).bias(false).gate_bias_init(1.0)), name + ": gate_bias_init is given");
  EXPECT_MESSAGE(
      TypeParam(Options(5, 4).gate_bias_init(GateBiasInit(5, 2))),
      name + ": gate_bias_init is (5, 2)");
  TypeParam both(Options(5, 4).bidirectional(true));
  EXPECT_MESSAGE(
      both->step(x.select(1, 0), both->init_state(2)), name + ".step: bidirectional is true");
}

// ---- mLSTM: a state of three tensors ----

Tensors of(const MLSTMState& state) {
  return {std::get<0>(state), std::get<1>(state), std::get<2>(state)};
}

class MLSTMLayer : public ::testing::TestWithParam<MLSTMOptions> {
 protected:
  void SetUp() override { torch::manual_seed(seed()); }
};

TEST_P(MLSTMLayer, HasTorchsContract) {
  auto options = GetParam();
  MLSTM rnn(options.num_layers(2).bidirectional(true));
  const Tensor x = torch::randn({7, 3, 5}); // (T, B, input_size)
  const auto [y, state] = rnn->forward(x);
  EXPECT_EQ(y.sizes(), (torch::IntArrayRef{7, 3, 16}));
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(of(rnn->init_state(3))[i].sizes(), of(state)[i].sizes());
  const int64_t heads = options.num_heads(), keys = options.qk_size().value_or(8) / heads;
  EXPECT_EQ(std::get<0>(state).sizes(), (torch::IntArrayRef{4, 3, heads, keys, 8 / heads}));
  EXPECT_EQ(std::get<1>(state).sizes(), (torch::IntArrayRef{4, 3, heads, keys}));
  EXPECT_EQ(std::get<2>(state).sizes(), (torch::IntArrayRef{4, 3, heads}));

  const auto [y_alone, alone] = rnn->forward(x.select(1, 1));
  expect_close(y_alone, y.select(1, 1));
  for (size_t i = 0; i < 3; ++i) expect_close(of(alone)[i], of(state)[i].select(1, 1));
  const auto again = std::get<0>(rnn->forward(x.select(1, 1), alone));
  EXPECT_FALSE(torch::allclose(again, y_alone)) << "a state given is not taken";
  rnn->options.batch_first(true);
  expect_close(std::get<0>(rnn->forward(x.transpose(0, 1))).transpose(0, 1), y);
}

TEST_P(MLSTMLayer, ChunksAndStepsAreTheSequence) {
  auto options = GetParam();
  MLSTM rnn(options.num_layers(2).batch_first(true));
  const Tensor x = torch::randn({2, 9, 5});
  const auto [y, last] = rnn->forward(x);
  const auto [first, between] = rnn->forward(x.slice(1, 0, 4));
  const auto [second, end] = rnn->forward(x.slice(1, 4), between);
  expect_close(torch::cat({first, second}, 1), y);
  MLSTMState state = rnn->init_state(2);
  Tensor y_t;
  for (int64_t t = 0; t < 9; ++t) {
    std::tie(y_t, state) = rnn->step(x.select(1, t), state);
    expect_close(y_t, y.select(1, t));
  }
  for (size_t i = 0; i < 3; ++i) {
    expect_close(of(end)[i], of(last)[i]);
    expect_close(of(state)[i], of(last)[i]);
  }
}

TEST_P(MLSTMLayer, PaddingDoesNotCount) {
  auto options = GetParam();
  MLSTM rnn(options.batch_first(true).bidirectional(true));
  Tensor x = torch::randn({4, 6, 5});
  const std::vector<int64_t> lengths = {6, 2, 0, 5};
  for (int64_t row = 0; row < 4; ++row)
    x[row].slice(0, lengths[size_t(row)]).fill_(std::numeric_limits<float>::quiet_NaN());
  const MLSTMState start = std::get<1>(rnn->forward(torch::randn({4, 3, 5})));
  const auto part = [](const MLSTMState& s, int64_t row) {
    return MLSTMState(
        std::get<0>(s).slice(1, row, row + 1), std::get<1>(s).slice(1, row, row + 1),
        std::get<2>(s).slice(1, row, row + 1));
  };
  const auto [y, state] = rnn->forward(x, start, torch::tensor(lengths));
  for (int64_t row = 0; row < 4; ++row) {
    const int64_t length = lengths[size_t(row)];
    const auto [want, want_state] =
        rnn->forward(x.slice(0, row, row + 1).slice(1, 0, length), part(start, row));
    expect_close(y.slice(0, row, row + 1).slice(1, 0, length), want);
    for (size_t i = 0; i < 3; ++i) expect_close(of(part(state, row))[i], of(want_state)[i]);
    EXPECT_EQ(y[row].slice(0, length).abs().sum().item<float>(), 0);
  }
  y.sum().backward();
  for (const Tensor& each : rnn->parameters())
    EXPECT_TRUE(each.grad().isfinite().all().item<bool>());
}

TEST_P(MLSTMLayer, IsSavedClonedMovedAndPrinted) {
  MLSTM rnn(GetParam()), read(GetParam());
  const Tensor x = torch::randn({6, 2, 5});
  const Tensor y = std::get<0>(rnn->forward(x));
  const TemporaryFile file;
  torch::save(rnn, file.path());
  load_state_dict(read, file.path());
  EXPECT_TRUE(torch::equal(std::get<0>(read->forward(x)), y));
  auto copy = std::dynamic_pointer_cast<MLSTMImpl>(rnn->clone());
  ASSERT_TRUE(copy);
  EXPECT_TRUE(torch::equal(std::get<0>(copy->forward(x)), y));
  {
    const torch::NoGradGuard no_grad;
    for (Tensor& each : copy->parameters()) each.zero_();
  }
  EXPECT_TRUE(torch::equal(std::get<0>(rnn->forward(x)), y)) << "the copy shares parameters";
  rnn->to(torch::kBFloat16);
  const auto [in_half, state] = rnn->forward(x.to(torch::kBFloat16));
  EXPECT_EQ(in_half.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(std::get<0>(state).scalar_type(), torch::kFloat);
  EXPECT_NE(c10::str(rnn).find("num_heads="), std::string::npos);
  torch::nn::AnyModule any(rnn);
  const auto [y_any, state_any] =
      any.forward<std::tuple<Tensor, MLSTMState>>(x.to(torch::kBFloat16));
  EXPECT_TRUE(torch::equal(y_any, in_half));
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, MLSTMLayer,
    ::testing::Values(
        MLSTMOptions(5, 8), MLSTMOptions(5, 8).num_heads(2).qk_size(6).eps(0.01),
        MLSTMOptions(5, 8).num_heads(4).input_gate("sigmoid").bias(false),
        MLSTMOptions(5, 8).input_gate("sigmoid").normalize(false)));

TEST(MLSTMParameters, AreThoseOfPython) {
  torch::manual_seed(seed());
  MLSTM rnn(MLSTMOptions(5, 8).num_heads(2).qk_size(4));
  const auto parameters = rnn->named_parameters();
  EXPECT_EQ(parameters.keys(), (std::vector<std::string>{"weight_ih_l0", "bias_ih_l0"}));
  EXPECT_EQ(parameters["weight_ih_l0"].sizes(), (torch::IntArrayRef{28, 5}));
  const Tensor bias = parameters["bias_ih_l0"];
  EXPECT_EQ(parameters["weight_ih_l0"].slice(0, 16, 20).abs().max().item<float>(), 0);
  EXPECT_TRUE(torch::equal(bias.slice(0, 16, 20), torch::tensor({0.f, 0.f, 3.f, 6.f})));
  MLSTM fixed(MLSTMOptions(5, 8).gate_bias_init(2.0).input_gate_bias_init(-10));
  EXPECT_TRUE(torch::equal(
      fixed->named_parameters()["bias_ih_l0"].slice(0, 24, 26), torch::tensor({-10.f, 2.f})));
}

TEST(MLSTMMessages, SayWhatIsWrong) {
  MLSTM rnn(MLSTMOptions(5, 8).num_heads(2).batch_first(true));
  const Tensor x = torch::randn({2, 6, 5});
  const auto [C, n, m] = rnn->init_state(2);
  EXPECT_MESSAGE(
      rnn->forward(x, MLSTMState(C, n, C)),
      "MLSTM: state has shape (1, 2, 2, 4, 4), expected (num_layers * num_directions=1, B=2, "
      "num_heads=2)");
  EXPECT_MESSAGE(
      rnn->forward(x[0], MLSTMState(C, n, m)),
      "expected (num_layers * num_directions, num_heads, K, V)");
  EXPECT_MESSAGE(
      rnn->step(x.select(1, 0), MLSTMState(C, Tensor(), m)), "MLSTM: state has shape none");
  EXPECT_MESSAGE(
      MLSTM(MLSTMOptions(5, 8).num_heads(3)),
      "MLSTM: hidden_size is 8, expected a multiple of num_heads=3");
  EXPECT_MESSAGE(MLSTM(MLSTMOptions(5, 8).num_heads(2).qk_size(3)), "MLSTM: qk_size is 3");
  EXPECT_MESSAGE(MLSTM(MLSTMOptions(5, 8).num_heads(0)), "MLSTM: num_heads is 0");
  EXPECT_MESSAGE(MLSTM(MLSTMOptions(5, 8).input_gate("tanh")), "MLSTM: input_gate is 'tanh'");
  EXPECT_MESSAGE(MLSTM(MLSTMOptions(5, 8).normalize(false)), "MLSTM: normalize is false");
}

// ---- the block and the language model ----

class Block : public ::testing::TestWithParam<MinRNNBlockOptions> {
 protected:
  void SetUp() override { torch::manual_seed(seed()); }
};

TEST_P(Block, ChunksAndStepsAreTheSequence) {
  MinRNNBlock block(GetParam());
  const Tensor x = torch::randn({2, 9, 6});
  const auto [y, last] = block->forward(x);
  EXPECT_EQ(y.sizes(), x.sizes());
  std::optional<MinRNNState> state;
  std::vector<Tensor> parts;
  for (const auto& [begin, end] : {std::pair(0, 2), {2, 2}, {2, 3}, {3, 9}}) {
    auto [part, new_state] = block->forward(x.slice(1, begin, end), state);
    parts.push_back(part);
    state = new_state;
  }
  expect_close(torch::cat(parts, 1), y);
  expect_close(std::get<0>(*state), std::get<0>(last));
  expect_close(std::get<1>(*state), std::get<1>(last));
  MinRNNState stepped = block->init_state(2);
  for (int64_t t = 0; t < 9; ++t) {
    auto [y_t, new_state] = block->step(x.select(1, t), stepped);
    expect_close(y_t, y.select(1, t));
    stepped = new_state;
  }
  auto copy = std::dynamic_pointer_cast<MinRNNBlockImpl>(block->clone());
  expect_close(std::get<0>(copy->forward(x)), y, 0);
  const TemporaryFile file;
  torch::save(block, file.path());
  MinRNNBlock loaded(GetParam());
  load_state_dict(loaded, file.path());
  expect_close(std::get<0>(loaded->forward(x)), y, 0);
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, Block,
    ::testing::Values(
        MinRNNBlockOptions(6), MinRNNBlockOptions(6).layer("min_lstm").norm("rms_norm"),
        MinRNNBlockOptions(6).conv_width(1).expansion(1.5).mlp_ratio(1).activation("g")));

TEST(BlockMessages, SayWhatIsWrong) {
  EXPECT_MESSAGE(MinRNNBlock(MinRNNBlockOptions(0)), "MinRNNBlock: dim is 0");
  EXPECT_MESSAGE(MinRNNBlock(MinRNNBlockOptions(4).layer("gru")), "MinRNNBlock: layer is 'gru'");
  EXPECT_MESSAGE(MinRNNBlock(MinRNNBlockOptions(4).norm("none")), "MinRNNBlock: norm is 'none'");
  EXPECT_MESSAGE(MinRNNBlock(MinRNNBlockOptions(4).conv_width(0)), "MinRNNBlock: conv_width is 0");
  EXPECT_MESSAGE(
      MinRNNBlock(MinRNNBlockOptions(4).expansion(0.1)), "MinRNNBlock: expansion is 0.1");
  MinRNNBlock block(MinRNNBlockOptions(4));
  EXPECT_MESSAGE(block->forward(torch::zeros({1, 2, 5})), "MinRNNBlock: x has shape (1, 2, 5)");
  EXPECT_MESSAGE(
      block->forward(torch::zeros({1, 2, 4}), block->init_state(2)),
      "MinRNNBlock: the first tensor of state has shape (2, 4, 3)");
}

TEST(LanguageModel, LearnsAndContinues) {
  torch::manual_seed(seed());
  MinRNNLM model(MinRNNLMOptions(8, 16, 2));
  torch::optim::Adam adam(model->parameters(), torch::optim::AdamOptions(1e-2));
  const Tensor text = (torch::arange(64) * 3 % 8).view({1, 64}); // 0 3 6 1 4 7 2 5
  double first = 0, last = 0;
  for (int i = 0; i < 60; ++i) {
    adam.zero_grad();
    const Tensor logits = model->forward(text.slice(1, 0, 63));
    const Tensor loss =
        torch::nn::functional::cross_entropy(logits.transpose(1, 2), text.slice(1, 1));
    loss.backward();
    adam.step();
    if (i == 0) first = loss.item<double>();
    last = loss.item<double>();
  }
  EXPECT_LT(last, 0.1 * first);
  model->eval();
  EXPECT_TRUE(torch::equal(model->generate(text.slice(1, 0, 5), 20, 0.0), text.slice(1, 0, 25)));
  EXPECT_EQ(model->generate(text.slice(1, 0, 5), 4, 1.0, 2).sizes(), (torch::IntArrayRef{1, 9}));
  EXPECT_EQ(model->generate(text.slice(1, 0, 5), 0).sizes(), (torch::IntArrayRef{1, 5}));
  const auto [logits, state] = model->prefill(text.slice(1, 0, 5));
  const auto [next, next_state] = model->step(text.select(1, 5), state);
  expect_close(next, model->forward(text.slice(1, 0, 6)).select(1, 5), 1e-4);
  EXPECT_MESSAGE(
      model->generate(text.slice(1, 0, 0), 2), "MinRNNLM.generate: ids has shape (1, 0)");
  EXPECT_MESSAGE(model->forward(text[0]), "MinRNNLM: ids has shape (64,)");
}

// ---- Mamba ----

TEST(MambaLayer, HasPythonsParametersAndBeginsLikeThem) {
  torch::manual_seed(seed());
  Mamba layer(MambaOptions(40).d_state(5).d_conv(3).expand(3).bidirectional(true));
  const auto parameters = layer->named_parameters();
  const std::vector<std::pair<std::string, std::vector<int64_t>>> both = {
      {"conv1d%.weight", {120, 1, 3}},
      {"conv1d%.bias", {120}},
      {"x_proj%.weight", {13, 120}},
      {"dt_proj%.weight", {120, 3}},
      {"dt_proj%.bias", {120}},
      {"A%_log", {120, 5}},
      {"D%", {120}}};
  EXPECT_EQ(parameters.size(), 2 * both.size() + 2);
  EXPECT_EQ(parameters["in_proj.weight"].sizes(), (torch::IntArrayRef{240, 40}));
  EXPECT_EQ(parameters["out_proj.weight"].sizes(), (torch::IntArrayRef{40, 120}));
  for (const std::string tail : {"", "_b"}) {
    const auto find = [&](std::string name) {
      return parameters[name.replace(name.find('%'), 1, tail)];
    };
    for (const auto& [name, shape] : both) EXPECT_EQ(find(name).sizes(), shape) << name;
    expect_close(find("A%_log")[7].exp(), torch::arange(1, 6, torch::kFloat));
    EXPECT_TRUE((find("D%") == 1).all().item<bool>());
    const Tensor dt = torch::softplus(find("dt_proj%.bias"));
    EXPECT_GT(dt.min().item<float>(), 0.0009);
    EXPECT_LT(dt.min().item<float>(), 0.01);
    EXPECT_GT(dt.max().item<float>(), 0.01);
    EXPECT_LT(dt.max().item<float>(), 0.1001);
    const double bound = 1 / std::sqrt(3.0),
                 largest = find("dt_proj%.weight").abs().max().item<float>();
    EXPECT_GT(largest, 0.9 * bound);
    EXPECT_LE(largest, bound);
  }
  Mamba constant(
      MambaOptions(16).dt_rank(4).dt_init("constant").dt_scale(2).bias(true).conv_bias(false));
  EXPECT_TRUE((constant->ahead.dt_proj->weight == 1).all().item<bool>());
  EXPECT_TRUE(constant->in_proj->bias.defined() && constant->out_proj->bias.defined());
  EXPECT_FALSE(constant->ahead.conv1d->bias.defined());
  Mamba floored(MambaOptions(16).dt_min(1e-5).dt_max(1e-5).dt_init_floor(0.01));
  const Tensor dt = torch::softplus(floored->ahead.dt_proj->bias);
  expect_close(dt, torch::full_like(dt, 0.01), 1e-4);
}

// Of layers with a state of Mamba's form.
template <class M>
void expect_chunks_and_steps_to_be_the_sequence(M layer) {
  const Tensor x = torch::randn({2, 9, 6});
  const auto [y, last] = layer->prefill(x);
  expect_close(layer->forward(x), y, 0);
  std::optional<MambaState> state;
  std::vector<Tensor> parts;
  for (const auto& [begin, end] : {std::pair(0, 2), {2, 2}, {2, 3}, {3, 9}}) {
    auto [part, new_state] = layer->prefill(x.slice(1, begin, end), state);
    parts.push_back(part);
    state = new_state;
  }
  expect_close(torch::cat(parts, 1), y);
  expect_close(std::get<0>(*state), std::get<0>(last));
  expect_close(std::get<1>(*state), std::get<1>(last));
  MambaState stepped = layer->init_state(2);
  for (int64_t t = 0; t < 9; ++t) {
    auto [y_t, new_state] = layer->step(x.select(1, t), stepped);
    expect_close(y_t, y.select(1, t));
    stepped = new_state;
  }
  expect_close(std::get<0>(stepped), std::get<0>(last));
  expect_close(std::get<1>(stepped), std::get<1>(last));
}

template <class M>
void expect_padding_not_to_count(M layer, bool has_states) {
  const std::vector<int64_t> lengths = {6, 1, 0, 5};
  layer->to(torch::kDouble);
  for (const std::string padding : {"right", "left"}) {
    const bool left = padding == "left";
    Tensor x = torch::full({4, 6, 6}, std::numeric_limits<double>::quiet_NaN(), torch::kDouble);
    std::vector<Tensor> rows, wants;
    for (int64_t row = 0; row < 4; ++row) {
      const int64_t length = lengths[size_t(row)];
      rows.push_back(x.slice(0, row, row + 1).slice(1, left ? 6 - length : 0, left ? 6 : length));
      rows.back().normal_();
    }
    const Tensor y = layer->forward(x, torch::tensor(lengths, torch::kInt), padding);
    Tensor want_loss = torch::zeros({}, torch::kDouble);
    for (int64_t row = 0; row < 4; ++row) {
      const int64_t length = lengths[size_t(row)];
      wants.push_back(layer->forward(rows[size_t(row)]));
      want_loss = want_loss + wants.back().square().sum();
      expect_close(
          y.slice(0, row, row + 1).slice(1, left ? 6 - length : 0, left ? 6 : length),
          wants.back());
      const Tensor rest = y[row].slice(0, left ? 0 : length, left ? 6 - length : 6);
      EXPECT_EQ(rest.abs().sum().item<double>(), 0);
    }
    const auto parameters = layer->parameters();
    const auto got = torch::autograd::grad({y.square().sum()}, parameters);
    const auto want = torch::autograd::grad({want_loss}, parameters);
    for (size_t i = 0; i < parameters.size(); ++i) expect_close(got[i], want[i]);
    if (!has_states) continue;
    const auto [padded, state] = layer->prefill(x, {}, torch::tensor(lengths), padding);
    expect_close(padded, y, 0);
    for (int64_t row = 0; row < 4; ++row) {
      const auto [alone, one] = layer->prefill(rows[size_t(row)]);
      expect_close(std::get<0>(state).slice(0, row, row + 1), std::get<0>(one));
      expect_close(std::get<1>(state).slice(0, row, row + 1), std::get<1>(one));
    }
  }
}

TEST(MambaLayer, ChunksAndStepsAreTheSequence) {
  torch::manual_seed(seed());
  for (const int64_t d_conv : {1, 4})
    expect_chunks_and_steps_to_be_the_sequence(Mamba(MambaOptions(6).d_state(3).d_conv(d_conv)));
}

TEST(MambaLayer, PaddingDoesNotCount) {
  torch::manual_seed(seed());
  for (const bool both : {false, true})
    expect_padding_not_to_count(
        Mamba(MambaOptions(6).d_state(3).bias(true).bidirectional(both)), !both);
}

TEST(MambaLayer, BothDirectionsAreAdded) {
  torch::manual_seed(seed());
  Mamba both(MambaOptions(6).d_state(3).bidirectional(true)), one(MambaOptions(6).d_state(3));
  both->to(torch::kDouble);
  one->to(torch::kDouble);
  const Tensor x = torch::randn({2, 7, 6}, torch::kDouble);
  const auto theirs = both->named_parameters();
  Tensor sum = torch::zeros_like(x);
  for (const bool back : {false, true}) {
    StateDict weights;
    for (const auto& each : one->named_parameters()) {
      std::string name = each.key();
      if (back && !name.starts_with("in_proj") && !name.starts_with("out_proj")) {
        const size_t end = std::min({name.find('.'), name.find("_log"), name.size()});
        name.insert(end, "_b");
      }
      weights.insert(each.key(), theirs[name]);
    }
    load_state_dict(one, weights);
    const torch::NoGradGuard no_grad;
    sum += back ? one->forward(x.flip(1)).flip(1) : one->forward(x);
  }
  expect_close(both->forward(x), sum);
}

TEST(MambaLayer, Learns) {
  torch::manual_seed(seed());
  // The running mean of the first channel over the last ten steps.
  Mamba layer(MambaOptions(8).d_state(8));
  torch::nn::Linear in(3, 8), head(8, 1);
  std::vector<Tensor> parameters = layer->parameters();
  for (const auto& part : {in, head})
    for (const Tensor& each : part->parameters()) parameters.push_back(each);
  torch::optim::Adam adam(parameters, torch::optim::AdamOptions(1e-2));
  double first = 0, last = 0;
  for (int i = 0; i < 100; ++i) {
    const Tensor x = torch::randn({16, 40, 3});
    const Tensor sum = x.select(2, 0).cumsum(1);
    const Tensor target = (sum - torch::constant_pad_nd(sum, {10, 0}).slice(1, 0, 40)) / 10;
    adam.zero_grad();
    const Tensor y = head->forward(layer->forward(in->forward(x))).squeeze(-1);
    const Tensor loss = torch::mse_loss(y, target);
    loss.backward();
    adam.step();
    if (i == 0) {
      first = loss.item<double>();
      for (const auto& each : layer->named_parameters()) {
        EXPECT_GT(each.value().grad().abs().sum().item<float>(), 0) << each.key();
      }
    }
    last = loss.item<double>();
  }
  EXPECT_LT(last, 0.4 * first);
}

TEST(MambaLayer, IsSavedClonedMovedAndPrinted) {
  torch::manual_seed(seed());
  for (const auto& options :
       {MambaOptions(6).d_state(3), MambaOptions(6).conv_bias(false).bidirectional(true)}) {
    Mamba layer(options), loaded(options), read(options);
    const Tensor x = torch::randn({2, 7, 6});
    const Tensor y = layer->forward(x);
    const TemporaryFile file;
    torch::save(layer, file.path());
    torch::load(loaded, file.path());
    EXPECT_TRUE(torch::equal(loaded->forward(x), y));
    load_state_dict(read, file.path());
    EXPECT_TRUE(torch::equal(read->forward(x), y));

    auto copy = std::dynamic_pointer_cast<MambaImpl>(layer->clone());
    ASSERT_TRUE(copy);
    EXPECT_TRUE(torch::equal(copy->forward(x), y));
    {
      const torch::NoGradGuard no_grad;
      for (Tensor& each : copy->parameters()) each.zero_();
    }
    EXPECT_TRUE(torch::equal(layer->forward(x), y)) << "the copy shares parameters";

    layer->to(torch::kDouble);
    const Tensor in_double = layer->forward(x.to(torch::kDouble));
    EXPECT_EQ(in_double.scalar_type(), torch::kDouble);
    EXPECT_EQ(std::get<1>(layer->init_state(2)).scalar_type(), torch::kDouble);
    expect_close(in_double.to(torch::kFloat), y);
    layer->to(torch::kBFloat16);
    const Tensor in_half = layer->forward(x.to(torch::kBFloat16));
    EXPECT_EQ(in_half.scalar_type(), torch::kBFloat16);
    EXPECT_EQ(std::get<0>(layer->init_state(2)).scalar_type(), torch::kFloat);
    EXPECT_EQ(std::get<1>(layer->init_state(2)).scalar_type(), torch::kFloat);
    expect_close(in_half.to(torch::kFloat), y, 0.05);
    torch::nn::AnyModule any(layer);
    EXPECT_TRUE(torch::equal(any.forward<Tensor>(x.to(torch::kBFloat16)), in_half));
  }
  EXPECT_NE(
      c10::str(Mamba(MambaOptions(40).d_state(3)))
          .find("d_model=40, d_state=3, d_conv=4, expand=2, dt_rank=3"),
      std::string::npos);
}

TEST(MambaLayer, RunsUnderAutocastWithFloatStates) {
  torch::manual_seed(seed());
  Mamba layer(MambaOptions(6).d_state(3));
  const Tensor x = torch::randn({2, 7, 6});
  const auto [want, want_state] = layer->prefill(x);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const auto [y, state] = layer->prefill(x);
  const Tensor step = std::get<0>(layer->step(x.select(1, 0), layer->init_state(2)));
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(std::get<0>(state).scalar_type(), torch::kFloat);
  EXPECT_EQ(std::get<1>(state).scalar_type(), torch::kFloat);
  expect_close(y.to(torch::kFloat), want, 0.03);
  expect_close(step.to(torch::kFloat), want.select(1, 0), 0.03);
  expect_close(std::get<1>(state), std::get<1>(want_state), 0.03);
}

TEST(MambaLayer, SaysWhatIsWrong) {
  Mamba layer(MambaOptions(8).d_state(3)), both(MambaOptions(8).bidirectional(true));
  const Tensor x = torch::randn({3, 11, 8});
  const MambaState state = layer->init_state(3);
  const Tensor lengths = torch::tensor({1, 2, 3});
  EXPECT_MESSAGE(layer->forward(x[0]), "Mamba: x has shape (11, 8), expected (B, T, d_model=8)");
  EXPECT_MESSAGE(layer->forward(Tensor()), "Mamba: x has shape none (it is undefined)");
  EXPECT_MESSAGE(
      layer->step(x, state), "Mamba.step: x has shape (3, 11, 8), expected (B, d_model=8)");
  EXPECT_MESSAGE(
      layer->step(x.slice(0, 0, 2).select(1, 0), state),
      "first tensor of state has shape (3, 16, 3)");
  EXPECT_MESSAGE(
      layer->prefill(x, MambaState(std::get<0>(state), Tensor())),
      "second tensor of state has shape none");
  EXPECT_MESSAGE(
      layer->forward(x, torch::tensor({1, 2})), "Mamba: lengths has shape (2,), expected (B=3)");
  EXPECT_MESSAGE(
      layer->forward(x, torch::tensor({1, 2, 12})), "Mamba: lengths has values from 1 to 12");
  EXPECT_MESSAGE(layer->forward(x, torch::ones({3})), "Mamba: lengths has dtype float32");
  EXPECT_MESSAGE(layer->forward(x, lengths, "top"), "Mamba: padding is 'top'");
  EXPECT_MESSAGE(layer->prefill(x, state, lengths, "left"), "Mamba.prefill: state is given");
  EXPECT_MESSAGE(both->prefill(x), "Mamba.prefill: the layer is bidirectional");
  EXPECT_MESSAGE(both->step(x.select(1, 0), state), "Mamba.step: the layer is bidirectional");
  EXPECT_MESSAGE(Mamba(MambaOptions(0)), "Mamba: d_model is 0");
  EXPECT_MESSAGE(Mamba(MambaOptions(8).d_conv(0)), "Mamba: d_conv is 0");
  EXPECT_MESSAGE(Mamba(MambaOptions(8).dt_rank(0)), "Mamba: dt_rank is 0");
  EXPECT_MESSAGE(Mamba(MambaOptions(8).dt_init("zero")), "Mamba: dt_init is 'zero'");
  EXPECT_MESSAGE(Mamba(MambaOptions(8).dt_min(1).dt_max(0.1)), "Mamba: dt_min is 1 and dt_max 0.1");
  EXPECT_MESSAGE(Mamba(MambaOptions(8).expand(0)), "Mamba: expand is 0");
}

std::vector<Mamba2Options> mamba2_options() {
  return {
      Mamba2Options(6).d_state(3).headdim(4),
      Mamba2Options(6).d_state(3).headdim(2).d_conv(1).ngroups(2).rmsnorm(false).bias(true),
      Mamba2Options(6).d_state(4).headdim(2).d_ssm(8).ngroups(2).D_has_hdim(true).norm_before_gate(
          true),
      Mamba2Options(6).d_state(3).headdim(3).conv_bias(false).dt_limit({0.02, 0.08})};
}

TEST(Mamba2Layer, HasPythonsParameters) {
  torch::manual_seed(seed());
  Mamba2 layer(Mamba2Options(16).d_state(5).headdim(4).ngroups(2).D_has_hdim(true));
  const auto parameters = layer->named_parameters();
  const std::vector<std::pair<std::string, std::vector<int64_t>>> shapes = {
      {"in_proj.weight", {2 * 32 + 2 * 2 * 5 + 8, 16}},
      {"conv1d.weight", {32 + 2 * 2 * 5, 1, 4}},
      {"conv1d.bias", {32 + 2 * 2 * 5}},
      {"dt_bias", {8}},
      {"A_log", {8}},
      {"D", {32}},
      {"norm.weight", {32}},
      {"out_proj.weight", {16, 32}}};
  EXPECT_EQ(parameters.size(), shapes.size());
  for (const auto& [name, shape] : shapes) EXPECT_EQ(parameters[name].sizes(), shape) << name;
  const Tensor A = layer->A_log.exp(), dt = torch::softplus(layer->dt_bias);
  EXPECT_GE(A.min().item<float>(), 0.999);
  EXPECT_LE(A.max().item<float>(), 16.01);
  EXPECT_GE(dt.min().item<float>(), 0.00099);
  EXPECT_LE(dt.max().item<float>(), 0.1001);
  EXPECT_TRUE((layer->D == 1).all().item<bool>() && (layer->norm->weight == 1).all().item<bool>());
  Mamba2 beside(Mamba2Options(16).headdim(4).d_ssm(16).rmsnorm(false).conv_init(0.01));
  EXPECT_EQ(beside->in_proj->weight.size(0), 2 * 16 + 2 * 16 + 2 * 128 + 4);
  EXPECT_LE(beside->conv1d->weight.abs().max().item<float>(), 0.01f);
  EXPECT_FALSE(beside->norm);
}

TEST(Mamba2Layer, ChunksAndStepsAreTheSequence) {
  torch::manual_seed(seed());
  for (const auto& options : mamba2_options())
    expect_chunks_and_steps_to_be_the_sequence(Mamba2(options));
}

TEST(Mamba2Layer, PaddingDoesNotCount) {
  torch::manual_seed(seed());
  for (const auto& options : mamba2_options()) expect_padding_not_to_count(Mamba2(options), true);
}

TEST(Mamba2Layer, IsSavedClonedMovedAndPrinted) {
  torch::manual_seed(seed());
  const Tensor x = torch::randn({2, 7, 6});
  for (const auto& options : mamba2_options()) {
    Mamba2 layer(options), read(options);
    const Tensor y = layer->forward(x);
    const TemporaryFile file;
    torch::save(layer, file.path());
    load_state_dict(read, file.path());
    EXPECT_TRUE(torch::equal(read->forward(x), y));
    auto copy = std::dynamic_pointer_cast<Mamba2Impl>(layer->clone());
    ASSERT_TRUE(copy);
    EXPECT_TRUE(torch::equal(copy->forward(x), y));
    {
      const torch::NoGradGuard no_grad;
      for (Tensor& each : copy->parameters()) each.zero_();
    }
    EXPECT_TRUE(torch::equal(layer->forward(x), y)) << "the copy shares parameters";
    layer->to(torch::kBFloat16);
    const Tensor in_half = layer->forward(x.to(torch::kBFloat16));
    EXPECT_EQ(in_half.scalar_type(), torch::kBFloat16);
    EXPECT_EQ(std::get<1>(layer->init_state(2)).scalar_type(), torch::kFloat);
    torch::nn::AnyModule any(layer);
    EXPECT_TRUE(torch::equal(any.forward<Tensor>(x.to(torch::kBFloat16)), in_half));
  }
  EXPECT_NE(
      c10::str(Mamba2(Mamba2Options(64)))
          .find("d_model=64, d_state=128, d_conv=4, expand=2, headdim=64"),
      std::string::npos);
}

TEST(Mamba2Layer, SaysWhatIsWrong) {
  Mamba2 layer(Mamba2Options(8).d_state(3).headdim(4));
  const Tensor x = torch::randn({3, 11, 8});
  const MambaState state = layer->init_state(3);
  EXPECT_MESSAGE(layer->forward(x[0]), "Mamba2: x has shape (11, 8), expected (B, T, d_model=8)");
  EXPECT_MESSAGE(layer->step(x, state), "Mamba2.step: x has shape (3, 11, 8)");
  EXPECT_MESSAGE(
      layer->step(x.slice(0, 0, 2).select(1, 0), state),
      "Mamba2: the first tensor of state has shape (3, 22, 3)");
  EXPECT_MESSAGE(
      layer->prefill(x, MambaState(std::get<0>(state), x)),
      "Mamba2: the second tensor of state has shape (3, 11, 8)");
  EXPECT_MESSAGE(layer->forward(x, torch::tensor({1, 2})), "Mamba2: lengths has shape (2,)");
  EXPECT_MESSAGE(
      layer->prefill(x, state, torch::tensor({1, 2, 3}), "left"), "Mamba2.prefill: state is given");
  EXPECT_MESSAGE(Mamba2(Mamba2Options(8).d_state(0)), "Mamba2: d_state is 0");
  EXPECT_MESSAGE(
      Mamba2(Mamba2Options(8)), "Mamba2: headdim is 64, expected a number that divides d_inner=16");
  EXPECT_MESSAGE(Mamba2(Mamba2Options(8).headdim(4).ngroups(3)), "Mamba2: ngroups is 3");
  EXPECT_MESSAGE(Mamba2(Mamba2Options(8).headdim(4).d_ssm(20)), "Mamba2: d_ssm is 20");
  EXPECT_MESSAGE(
      Mamba2(Mamba2Options(8).headdim(4).dt_limit({2, 1})), "Mamba2: dt_limit is (2, 1)");
}

TEST(Mamba2Layer, IsALanguageModelsMixer) {
  torch::manual_seed(seed());
  const auto options = MambaLMOptions(11, Mamba2Options(8).d_state(3).headdim(4), 2);
  MambaLM model(options), read(options);
  const Tensor ids = torch::randint(11, {2, 7});
  const Tensor y = model->forward(ids);
  const auto [logits, state] = model->prefill(ids.slice(1, 0, 6), {}, {}, "right", true);
  expect_close(std::get<0>(model->step(ids.select(1, 6), state)), y.select(1, 6));
  EXPECT_EQ(model->generate(ids, 3, 0.0).sizes(), (torch::IntArrayRef{2, 10}));
  EXPECT_TRUE(model->named_parameters().contains("backbone.layers.1.mixer.dt_bias"));
  const TemporaryFile file;
  torch::save(model, file.path());
  load_state_dict(read, file.path());
  EXPECT_TRUE(torch::equal(read->forward(ids), y));
  auto copy = std::dynamic_pointer_cast<MambaLMImpl>(model->clone());
  EXPECT_TRUE(torch::equal(copy->forward(ids), y));
  copy->reset_parameters();
  EXPECT_FALSE(torch::equal(copy->forward(ids), y));
}

TEST(MambaLanguageModel, LearnsAndContinues) {
  torch::manual_seed(seed());
  MambaLM model(MambaLMOptions(8, 16, 2));
  EXPECT_EQ(model->parameters().size(), 2u * 10 + 2) << "the tied weight counts once";
  torch::optim::Adam adam(model->parameters(), torch::optim::AdamOptions(1e-2));
  const Tensor text = (torch::arange(64) * 3 % 8).view({1, 64}); // 0 3 6 1 4 7 2 5
  double first = 0, last = 0;
  for (int i = 0; i < 60; ++i) {
    adam.zero_grad();
    const Tensor logits = model->forward(text.slice(1, 0, 63));
    const Tensor loss =
        torch::nn::functional::cross_entropy(logits.transpose(1, 2), text.slice(1, 1));
    loss.backward();
    adam.step();
    if (i == 0) first = loss.item<double>();
    last = loss.item<double>();
  }
  EXPECT_LT(last, 0.1 * first);
  EXPECT_TRUE(torch::equal(model->generate(text.slice(1, 0, 5), 20, 0.0), text.slice(1, 0, 25)));
  EXPECT_EQ(
      model->generate(text.slice(1, 0, 5), 4, 1.0, 2, 0.9).sizes(), (torch::IntArrayRef{1, 9}));
  // The smallest share of all is the most likely token.
  EXPECT_TRUE(
      torch::equal(model->generate(text.slice(1, 0, 5), 20, 1.0, {}, 1e-6), text.slice(1, 0, 25)));
  // Rows of different lengths go on as they would alone.
  Tensor rows = torch::zeros({2, 7}, torch::kLong);
  rows[0].slice(0, 2).copy_(text[0].slice(0, 0, 5));
  rows[1].copy_(text[0].slice(0, 1, 8));
  const Tensor more = model->generate(rows, 9, 0.0, {}, {}, torch::tensor({5, 7}), "left");
  EXPECT_TRUE(torch::equal(more[0].slice(0, 7), text[0].slice(0, 5, 14)));
  EXPECT_TRUE(torch::equal(more[1].slice(0, 7), text[0].slice(0, 8, 17)));
  const auto [logits, state] = model->prefill(text.slice(1, 0, 5), {}, {}, "right", true);
  const auto [next, next_state] = model->step(text.select(1, 5), state);
  expect_close(next, model->forward(text.slice(1, 0, 6)).select(1, 5), 1e-4);

  EXPECT_MESSAGE(model->generate(text.slice(1, 0, 0), 2), "MambaLM.generate: ids has shape (1, 0)");
  EXPECT_MESSAGE(model->generate(text, 2, 1.0, {}, 1.5), "MambaLM.generate: top_p is 1.5");
  EXPECT_MESSAGE(model->forward(text[0]), "MambaLM: ids has shape (64,)");
  EXPECT_MESSAGE(model->forward(text + 3), "MambaLM: ids has values from 3 to 10, expected 0 to 7");
  EXPECT_MESSAGE(model->forward(text.to(torch::kFloat)), "MambaLM: ids has dtype float32");
  EXPECT_MESSAGE(
      model->step(text.select(1, 5), {}), "MambaLM: state has 0 entries, expected n_layer=2");
  EXPECT_MESSAGE(MambaLM(MambaLMOptions(0, 16, 2)), "MambaLM: vocab_size is 0");
  EXPECT_MESSAGE(MambaLM(MambaLMOptions(8, MambaOptions(16).d_state(0), 2)), "Mamba: d_state is 0");
  EXPECT_MESSAGE(MambaBlock(16)->forward(text), "MambaBlock: x has shape (1, 64)");
}

TEST(MambaLanguageModel, IsSavedAndCloned) {
  torch::manual_seed(seed());
  const Tensor ids = torch::randint(11, {2, 7});
  for (const bool tied : {true, false}) {
    const auto options = MambaLMOptions(11, 8, 2).tie_embeddings(tied);
    MambaLM model(options), loaded(options), read(options);
    const Tensor y = model->forward(ids);
    EXPECT_EQ(y.size(2), 16);
    const TemporaryFile file;
    torch::save(model, file.path());
    torch::load(loaded, file.path());
    EXPECT_TRUE(torch::equal(loaded->forward(ids), y));
    load_state_dict(read, file.path());
    EXPECT_TRUE(torch::equal(read->forward(ids), y));
    auto copy = std::dynamic_pointer_cast<MambaLMImpl>(model->clone());
    EXPECT_TRUE(torch::equal(copy->forward(ids), y));
    EXPECT_EQ(copy->parameters().size(), model->parameters().size());
    {
      const torch::NoGradGuard no_grad;
      for (Tensor& each : copy->parameters()) each.zero_();
    }
    EXPECT_TRUE(torch::equal(model->forward(ids), y)) << "the copy shares parameters";
    EXPECT_EQ(copy->forward(ids).abs().sum().item<float>(), 0) << "the copy has others";

    model->to(torch::kBFloat16);
    const Tensor half = model->forward(ids);
    EXPECT_EQ(half.scalar_type(), torch::kBFloat16);
    expect_close(half.to(torch::kFloat), y, 0.05);
    torch::nn::AnyModule any(model);
    EXPECT_TRUE(torch::equal(any.forward<Tensor>(ids), half));

    copy->reset_parameters(); // after zeros everywhere
    for (const auto& each : copy->named_parameters()) {
      EXPECT_GT(each.value().abs().sum().item<float>(), 0) << each.key();
    }
    EXPECT_TRUE(copy->forward(ids).isfinite().all().item<bool>());
  }
}

// ---- weights ----

TEST(StateDict, ASecondNameOfATensorNeedNotBeKnown) {
  MambaLM model(MambaLMOptions(8, 4, 1));
  StateDict dict;
  for (const auto& each : model->named_parameters()) {
    dict.insert(each.key(), torch::randn_like(each.value()));
  }
  const Tensor embedding = dict["backbone.embedding.weight"];
  StateDict tied = dict, other = dict;
  tied.insert("lm_head.weight", embedding.view_as(embedding));
  load_state_dict(model, tied);
  EXPECT_TRUE(torch::equal(model->backbone->embedding->weight, embedding));
  other.insert("lm_head.weight", embedding.clone());
  EXPECT_MESSAGE(load_state_dict(model, other), "unexpected: lm_head.weight");
}

TEST(StateDict, OfAFileThatPythonCouldHaveWritten) {
  MinGRU rnn(3, 2), other(3, 2);
  c10::Dict<std::string, Tensor> dict;
  for (const auto& each : rnn->named_parameters()) {
    dict.insert("encoder.rnn." + each.key(), each.value().detach().to(torch::kDouble));
  }
  dict.insert("head.weight", torch::zeros({1}));
  const TemporaryFile file;
  const auto bytes = torch::jit::pickle_save(dict);
  std::ofstream(file.path(), std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));

  EXPECT_EQ(read_state_dict(file.path()).size(), 3u);
  load_state_dict(other, file.path(), "encoder.rnn");
  EXPECT_EQ(other->parameters()[0].scalar_type(), torch::kFloat);
  for (size_t i = 0; i < 2; ++i)
    EXPECT_TRUE(torch::equal(other->parameters()[i], rnn->parameters()[i]));
  EXPECT_MESSAGE(load_state_dict(other, file.path(), "decoder"), "starts with \"decoder.\"");
}

TEST(StateDict, NamesEveryProblemAndChangesNothing) {
  MinGRU rnn(3, 2);
  const Tensor before = rnn->parameters()[0].detach().clone();
  StateDict dict;
  dict.insert("weight_ih_l0", torch::zeros({4, 3}));
  dict.insert("bias_hh_l0", torch::zeros({4}));
  EXPECT_MESSAGE(load_state_dict(rnn, dict), "missing: bias_ih_l0; unexpected: bias_hh_l0");
  StateDict wrong_shape;
  wrong_shape.insert("weight_ih_l0", torch::zeros({4, 3}));
  wrong_shape.insert("bias_ih_l0", torch::zeros({6}));
  EXPECT_MESSAGE(
      load_state_dict(rnn, wrong_shape),
      "of another shape: bias_ih_l0 has shape [6], expected [4]");
  EXPECT_TRUE(torch::equal(rnn->parameters()[0], before));
}

TEST(StateDict, SaysWhatAFileIsNot) {
  MinGRU rnn(3, 2);
  EXPECT_MESSAGE(load_state_dict(rnn, "/no/such/file.pt"), "cannot open /no/such/file.pt");
  const TemporaryFile text;
  std::ofstream(text.path()) << "not a zip archive";
  EXPECT_MESSAGE(load_state_dict(rnn, text.path()), "is damaged or not a file that torch saved");
  const TemporaryFile tensor;
  const auto bytes = torch::jit::pickle_save(torch::zeros({2}));
  std::ofstream(tensor.path(), std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
  EXPECT_MESSAGE(load_state_dict(rnn, tensor.path()), "holds a Tensor, expected a dictionary");
}

} // namespace
} // namespace torch_ext::test
