// The CUDA kernels of matrix memories in the emulator, against the recurrence run in a plain loop: every dtype, float32
// in every number of parts, all normalisers, options and layouts.
#include "cpp/matrix_memory_problems.h"

#include "cuda/matrix_memory.cu"

namespace torch_ext::cuda {
// One order of sums for all layouts, where bits are compared?
void force_order_of_sums(bool one) { matrix_keys_inside = !one; }
} // namespace torch_ext::cuda

namespace torch_ext::test {
namespace {

using emulator::Options;
using In = MatrixCase;

void forward(DType dtype, const MatrixMemoryForward& p, int parts) {
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
const Setting kSettings[] = {{DType::bf16, 1, Options::reversed}, {DType::f16, 1, Options::random},
                             {DType::f32, 1, Options::random},    {DType::f32, 2, Options::forward},
                             {DType::f32, 3, Options::reversed},  {DType::f64, 1, Options::random}};

const std::vector<Normalizer> kNormalizers = {
    Normalizer::none, Normalizer::sum, Normalizer::at_least_one, Normalizer::stabilized};

// The same options for sequences that lie end to end.
MatrixCase draw_packed(Random& random, MatrixCase p, const std::vector<int64_t>& offsets) {
  p.cu_seqlens = offsets;
  for (size_t i = In::q; i < In::C; ++i)
    if (p.in[i])
      p.in[i] = draw(random, p.dtype_of(i), p.size_of(i), [&] {
        return i < In::log_decay ? random.normal() : random.uniform(-2, 0);
      });
  p.repeated = {};
  return p;
}

class MatrixKernels : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    emulator::options() = {};
    emulator::options().order = GetParam().order;
    emulator::options().seed = seed();
  }
  void TearDown() override {
    emulator::options() = {};
    cuda::force_order_of_sums(false);
  }
  DType dtype() const { return GetParam().dtype; }
  MatrixCase draw_case(Random& random, const MatrixShape& shape, Normalizer normalizer) {
    return draw_matrix_case(random, dtype(), shape, normalizer);
  }
  MatrixResult run(const MatrixCase& p, bool in_place = false) {
    return test::run(
        p, [](DType dtype, const MatrixMemoryForward& f) { forward(dtype, f, GetParam().parts); },
        [](DType, const MatrixMemoryBackward&) {}, {.backward = false, .in_place = in_place});
  }
  // Sums have another order where keys lie side by side, and in place the state written lies as the one that is read.
  bool same_in_place(const MatrixCase& p) {
    cuda::force_order_of_sums(true);
    const bool equal = same(run(p), run(p, /*in_place=*/true));
    cuda::force_order_of_sums(false);
    return equal;
  }
  // An operand's relative error: of 8, 16 or 24 bits.
  Accuracy accuracy(const MatrixCase& p) {
    const bool two = dtype() == DType::f16 || (dtype() == DType::bf16 && p.wide_keys);
    const int parts = dtype() == DType::f32 ? GetParam().parts : two ? 2 : 1;
    Accuracy y{(32 + double(p.T) / 8) * info_of(dtype()).state_epsilon};
    y.tiny = dtype() == DType::f64 ? 1e-290 : 1e-30;
    if (dtype() != DType::f64) y.arithmetic += parts == 1 ? 0x1p-8 : parts == 2 ? 0x1p-15 : 0x1p-22;
    return y;
  }
  bool fewer_parts() const { return dtype() == DType::f32 && GetParam().parts < 3; }
  void check_case(const MatrixCase& p) {
    SCOPED_TRACE(p.text());
    ASSERT_NO_FATAL_FAILURE(check(p, run(p), formula(p, false), accuracy(p)));
  }
};

TEST_P(MatrixKernels, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2}, steps = {0, 1, 2, 15, 17, 63, 65, 100},
                             heads = {1, 1, 2}, groups = {1, 1, 2},
                             sizes = {1, 2, 3, 5, 8, 15, 16, 17, 24, 33, 65};
  for (const Normalizer normalizer : kNormalizers) {
    const int64_t G = pick(random, groups);
    const MatrixShape shape{pick(random, sequences), pick(random, steps),
                            G * pick(random, heads), G,
                            pick(random, sizes),     pick(random, sizes)};
    ASSERT_NO_FATAL_FAILURE(check_case(draw_case(random, shape, normalizer)));
  }
}

// More than a chunk, and more keys and values than a block has; whole pieces of 16 bytes.
TEST_P(MatrixKernels, ManyBlocks) {
  Random random;
  const std::vector<MatrixShape> shapes = {
      {1, 257, 1, 1, 16, 24}, {1, 129, 1, 1, 136, 64}, {2, 70, 1, 1, 72, 136}};
  const size_t first = size_t(random.integer(0, 3));
  for (size_t i = 0; i < 2; ++i) { // by turns: every run has some
    MatrixShape shape = shapes[(first + i) % 3];
    if (dtype() == DType::f64) shape.T = 10; // goes step by step
    MatrixCase p = draw_case(random, shape, kNormalizers[(first + i) % 4]);
    p.order = kNatural;
    ASSERT_NO_FATAL_FAILURE(check_case(p));
  }
}

// Sequences that begin and end anywhere in a row, some of them empty, in more slots than chunks.
TEST_P(MatrixKernels, Packed) {
  if (fewer_parts() || dtype() == DType::f16) GTEST_SKIP() << "the same as others";
  Random random;
  for (const bool reverse : {false, true}) {
    const MatrixShape shape{5, 160, 1, 1, 9, 20};
    MatrixCase p = draw_case(random, shape, pick(random, kNormalizers));
    while (p.packed() || p.normalizer == Normalizer::sum)
      p = draw_case(random, shape, pick(random, kNormalizers));
    p = draw_packed(random, p, {0, 3, 3, 7, 140, 160});
    p.reverse = reverse;
    settle(random, p);
    ASSERT_NO_FATAL_FAILURE(check_case(p));
  }
}

TEST_P(MatrixKernels, StatePool) {
  if (fewer_parts()) GTEST_SKIP() << "the same as others";
  cuda::force_order_of_sums(true);
  Random random;
  for (const Normalizer normalizer : kNormalizers)
    for (const MatrixShape& shape : std::vector<MatrixShape>{
             {0, 1, 3, 1, 16, 33}, {0, 1, 2, 2, 64, 260}, {0, 1, 1, 1, 260, 12}})
      ASSERT_NO_FATAL_FAILURE(check_matrix_pool(
          random, dtype(), shape, normalizer,
          [](DType dtype, const MatrixMemoryForward& f) { forward(dtype, f, GetParam().parts); }));
}

TEST_P(MatrixKernels, Steps) {
  if (fewer_parts()) GTEST_SKIP() << "the same as others";
  Random random;
  for (const Normalizer normalizer : kNormalizers)
    for (const MatrixShape& shape : std::vector<MatrixShape>{
             {2, 1, 2, 1, random.integer(1, 40), random.integer(1, 40)},
             {1, 1, 1, 1, random.integer(60, 70), 4 * random.integer(60, 70)},
             {1, 1, 2, 1, random.integer(255, 258), random.integer(1, 9)}}) {
      const MatrixCase p = draw_case(random, shape, normalizer);
      ASSERT_NO_FATAL_FAILURE(check_case(p));
      ASSERT_TRUE(p.packed() || same_in_place(p)) << p.text();
    }
}

// States in registers and in memory, and by turns; whole and in place.
TEST_P(MatrixKernels, StepByStep) {
  if (dtype() != DType::f64) GTEST_SKIP() << "others come by chunks";
  Random random;
  for (const Normalizer normalizer : kNormalizers)
    for (const MatrixShape& shape : std::vector<MatrixShape>{
             {2, 6, 2, 1, 100, 33}, {1, 3, 1, 1, 300, 9}, {1, 2, 1, 1, 2100, 5}}) {
      const MatrixCase p = draw_case(random, shape, normalizer);
      ASSERT_NO_FATAL_FAILURE(check_case(p));
      ASSERT_TRUE(same_in_place(p)) << p.text();
    }
}

// What is not finite reaches the steps after it, of its own head alone.
TEST_P(MatrixKernels, NaNStaysWhereItBelongs) {
  if (fewer_parts() || dtype() == DType::f16) GTEST_SKIP() << "the same as others";
  Random random;
  const std::vector<size_t> places = {In::q,         In::k,         In::v,
                                      In::log_decay, In::log_input, In::input_scale};
  const int64_t start = random.integer(0, 5);
  for (int repeat = 0; repeat < (dtype() == DType::f32 ? 3 : 6); ++repeat) {
    MatrixCase p = draw_case(
        random, {2, dtype() == DType::f64 ? 9 : 75, 2, 1, 8, 9},
        pick(random, std::vector<Normalizer>{Normalizer::none, Normalizer::stabilized}));
    const size_t where = places[size_t((start + repeat) % 6)];
    if (!p.in[where]) continue;
    p.repeated = {};
    SCOPED_TRACE(p.text());
    const int64_t s = random.integer(0, 1);
    const auto tokens = p.tokens(s);
    if (tokens.empty()) continue;
    const MatrixResult clean = run(p);
    const size_t step = size_t(random.integer(0, int64_t(tokens.size()) - 1));
    const int64_t heads = p.in[where].size[2], of = random.integer(0, heads - 1);
    const auto [row, token] = tokens[step];
    p.in[where](row, token, of) = random.integer(0, 1) ? NAN : INFINITY;
    SCOPED_TRACE(std::string(In::name(where)) + " of step " + std::to_string(step));
    const MatrixResult got = run(p);
    for (int64_t sequence = 0; sequence < p.S; ++sequence) {
      const auto all = p.tokens(sequence);
      for (int64_t head = 0; head < p.H; ++head) {
        const bool meets = sequence == s && head / (p.H / heads) == of;
        for (size_t t = 0; t < (meets ? step : all.size()); ++t)
          for (int64_t b = 0; b < p.V; ++b)
            ASSERT_EQ(
                got.out[In::h](all[t].first, all[t].second, head, b),
                clean.out[In::h](all[t].first, all[t].second, head, b))
                << sequence << " " << head << " " << t;
        bool reached = false;
        for (int64_t b = 0; b < p.V && meets; ++b)
          reached = reached || !isfinite(got.out[In::h](row, token, head, b).real());
        ASSERT_TRUE(reached || !meets || where >= In::log_decay) << "it is lost";
      }
    }
  }
}

// Gates far out, where weights vanish beside each other: all else stays exact.
TEST_P(MatrixKernels, GatesFarOut) {
  if (fewer_parts() || dtype() == DType::f16) GTEST_SKIP() << "the same as others";
  Random random;
  const std::vector<double> far = {-1e4, -300, -88, -20, -1, 0, 1, 20, 88, 300, 1e4};
  for (int repeat = 0; repeat < 4; ++repeat) {
    MatrixCase p = draw_case(
        random, {1, 150, 1, 1, 6, 17},
        repeat % 2 ? Normalizer::stabilized : kNormalizers[size_t(repeat)]);
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

// The same bits, whatever the order of threads.
TEST_P(MatrixKernels, SameBits) {
  if (fewer_parts() || dtype() == DType::f16) GTEST_SKIP() << "the same as others";
  Random random;
  const MatrixCase p = draw_case(random, {1, 140, 1, 1, 24, 40}, Normalizer::stabilized);
  SCOPED_TRACE(p.text());
  const MatrixResult first = run(p);
  emulator::options().order = Options::random;
  emulator::options().seed = seed() + 1;
  ASSERT_TRUE(same(first, run(p))) << "the result depends on the order of threads";
}

INSTANTIATE_TEST_SUITE_P(All, MatrixKernels, ::testing::ValuesIn(kSettings), [](const auto& each) {
  return text_of(each.param);
});

} // namespace
} // namespace torch_ext::test
