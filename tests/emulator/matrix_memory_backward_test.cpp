// The CUDA backward of matrix memories in the emulator, against the gradient of the recurrence taken step by step in double
// precision: every dtype, float32 in every number of parts, all normalisers, options and layouts.
#include "cpp/matrix_memory_problems.h"

#include "cuda/matrix_memory_backward.cu"

namespace torch_ext::cuda {
// What the driver leaves to chance: how many blocks the heads that share queries and keys are spread over.
void force_sets(bool many) { grad_enough_blocks = many ? 1000 : 1; }
void leave_sets() { grad_enough_blocks = kGradEnoughBlocks; }
} // namespace torch_ext::cuda

namespace torch_ext::test {
namespace {

using emulator::Options;
using In = MatrixCase;

void backward(DType dtype, MatrixMemoryBackward p, int parts) {
  p.checkpoints = nullptr; // not used
  // Fresh memory, as the caching allocator gives it: of any content.
  const int64_t bytes = cuda::matrix_memory_workspace(dtype, p, parts);
  std::unique_ptr<char, void (*)(void*)> workspace(
      bytes ? static_cast<char*>(aligned_alloc(256, size_t(bytes))) : nullptr, free);
  if (bytes) memset(workspace.get(), 0xff, size_t(bytes));
  cuda::matrix_memory(dtype, p, parts, workspace.get(), nullptr);
}

struct Setting {
  DType dtype;
  int parts;
  Options::Order order;
};
std::string text_of(const Setting& setting) {
  return info_of(setting.dtype).name +
         (setting.dtype == DType::f32 ? "_in_" + std::to_string(setting.parts) : std::string());
}
void PrintTo(const Setting& setting, std::ostream* out) { *out << text_of(setting); }
const Setting kSettings[] = {
    {DType::bf16, 1, Options::reversed},
    {DType::f16, 1, Options::random},
    {DType::f32, 1, Options::random},
    {DType::f32, 2, Options::forward},
    {DType::f32, 3, Options::reversed}};

const std::vector<Normalizer> kNormalizers = {
    Normalizer::none, Normalizer::sum, Normalizer::at_least_one, Normalizer::stabilized};

class MatrixBackwardKernels : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    emulator::options() = {};
    emulator::options().order = GetParam().order;
    emulator::options().seed = seed();
  }
  void TearDown() override {
    emulator::options() = {};
    cuda::leave_sets();
  }
  DType dtype() const { return GetParam().dtype; }
  MatrixCase draw_case(Random& random, const MatrixShape& shape, Normalizer normalizer) {
    return draw_matrix_case(random, dtype(), shape, normalizer);
  }
  MatrixResult run(const MatrixCase& p, bool few = false) {
    MatrixResult result = test::run(
        p, [](DType, const MatrixMemoryForward&) {},
        [](DType dtype, const MatrixMemoryBackward& b) { backward(dtype, b, GetParam().parts); },
        {.few = few});
    for (Dense& each : result.out) each = {}; // of the forward
    return result;
  }
  // An operand's relative error: of 8, 16 or 24 bits.
  Accuracy accuracy(const MatrixCase& p) {
    const bool two = dtype() == DType::f16 || (dtype() == DType::bf16 && (p.wide_keys || p.wide_h));
    const int parts = dtype() == DType::f32 ? GetParam().parts : two ? 2 : 1;
    Accuracy y{(32 + double(p.T) / 8) * info_of(dtype()).state_epsilon};
    y.arithmetic += parts == 1 ? 0x1p-7 : parts == 2 ? 0x1p-15 : 0x1p-22;
    return y;
  }
  void check_case(const MatrixCase& p) {
    SCOPED_TRACE(p.text());
    ASSERT_NO_FATAL_FAILURE(check(p, run(p), formula(p), accuracy(p)));
  }
};

TEST_P(MatrixBackwardKernels, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3}, steps = {0, 1, 2, 15, 17, 40, 63, 65},
                             heads = {0, 1, 1, 1, 2, 2}, groups = {1, 1, 2},
                             sizes = {1, 2, 3, 5, 8, 15, 16, 17, 24, 33};
  for (const Normalizer normalizer : kNormalizers) {
    const int64_t G = pick(random, groups);
    const MatrixShape shape{pick(random, sequences), pick(random, steps),
                            G * pick(random, heads), G,
                            pick(random, sizes),     pick(random, sizes)};
    ASSERT_NO_FATAL_FAILURE(check_case(draw_case(random, shape, normalizer)));
  }
}

// Several chunks; more keys and values than a block has at a time: two of them.
TEST_P(MatrixBackwardKernels, LargeProblems) {
  Random random;
  const std::vector<MatrixShape> shapes = {
      {1, random.integer(129, 140), 1, 1, 7, 20},
      {1, 66, 1, 1, 70, 5},
      {1, 40, 1, 1, 133, 17},
      {1, 20, 1, 1, 16, 130}};
  const size_t first =
      size_t(random.integer(0, 3)) + size_t(GetParam().dtype) + size_t(GetParam().parts);
  for (size_t i = 0; i < 2; ++i)
    ASSERT_NO_FATAL_FAILURE(check_case(
        draw_case(random, shapes[(first + i) % shapes.size()], pick(random, kNormalizers))));
}

// Layouts of which rows come whole.
TEST_P(MatrixBackwardKernels, Aligned) {
  Random random;
  MatrixCase p = draw_case(random, {1, 72, 2, 2, 16, 24}, Normalizer::stabilized);
  p.order = kNatural, p.repeated = {};
  ASSERT_NO_FATAL_FAILURE(check_case(p));
}

// Several heads of a block, and several blocks for the heads that share queries and keys.
TEST_P(MatrixBackwardKernels, Groups) {
  Random random;
  for (const bool many : {false, true}) {
    cuda::force_sets(many);
    ASSERT_NO_FATAL_FAILURE(
        check_case(draw_case(random, {1, 18, 3, 1, 9, 5}, pick(random, kNormalizers))));
  }
  cuda::force_sets(false);
  MatrixCase p = draw_case(random, {1, 3, 2, 1, 130, 3}, Normalizer::sum);
  ASSERT_NO_FATAL_FAILURE(check_case(p));
  p.in[In::C] = p.in[In::n] = {}; // keys in turns, and nothing at the start
  ASSERT_NO_FATAL_FAILURE(check_case(p));
}

// Gates far out, where weights vanish beside each other: all else stays exact.
TEST_P(MatrixBackwardKernels, GatesFarOut) {
  Random random;
  const std::vector<double> far = {-1e4, -300, -88, -20, -1, 0, 1, 20, 88, 300, 1e4};
  for (int repeat = 0; repeat < 2; ++repeat) {
    MatrixCase p = draw_case(
        random, {1, 70, 1, 1, 6, 9}, repeat ? Normalizer::stabilized : pick(random, kNormalizers));
    p.in[In::log_decay] = draw(random, p.wide(), p.size_of(In::log_decay), [&] {
      return random.integer(0, 5) ? -fabs(random.normal()) : -fabs(pick(random, far));
    });
    p.repeated[In::log_decay] = 0;
    if (p.stabilizes())
      p.in[In::log_input] = draw(random, p.wide(), p.size_of(In::log_input), [&] {
        return pick(random, far) + random.normal();
      });
    settle(random, p);
    ASSERT_NO_FATAL_FAILURE(check_case(p));
  }
}

// The same bits, whatever the order of threads; unwanted gradients are left out.
TEST_P(MatrixBackwardKernels, SameBits) {
  if (dtype() != DType::f32 || GetParam().order != Options::random)
    GTEST_SKIP() << "one order is compared with another, of the kernels of one part";
  Random random;
  const MatrixCase p = draw_case(random, {1, 67, 2, 1, 9, 17}, pick(random, kNormalizers));
  SCOPED_TRACE(p.text());
  emulator::options().order = Options::random;
  const MatrixResult all = run(p), few = run(p, true);
  for (size_t i = 0; i <= In::v; ++i) ASSERT_TRUE(same(all.grads[i], few.grads[i])) << In::name(i);
  emulator::options().order = Options::forward;
  ASSERT_TRUE(same(all, run(p))) << "the result depends on the order of threads";
}

INSTANTIATE_TEST_SUITE_P(
    All, MatrixBackwardKernels, ::testing::ValuesIn(kSettings),
    [](const auto& each) { return text_of(each.param); });

} // namespace
} // namespace torch_ext::test
