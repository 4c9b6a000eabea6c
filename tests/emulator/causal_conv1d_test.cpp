// The CUDA kernels of the causal convolution in the emulator, against its formula in a plain double loop: every dtype,
// forward and backward, windows of every kind of kernel, all layouts, tiles one to a block and several.
#include "cpp/causal_conv1d_problems.h"

#include "cuda/causal_conv1d.cu"

namespace torch_ext::cuda {
// So many blocks fill a GPU. 1: as many tiles to a block as there may be; else one.
void force_conv_blocks(int64_t enough) { conv_enough_blocks = enough; }
} // namespace torch_ext::cuda

namespace torch_ext::test {
namespace {

using emulator::Options;

template <class P>
void run_cuda(DType dtype, const P& p) {
  // Fresh memory, as the caching allocator gives it: of any content.
  const int64_t bytes = cuda::causal_conv1d_workspace(dtype, p);
  std::unique_ptr<char, void (*)(void*)> workspace(
      bytes ? static_cast<char*>(aligned_alloc(256, size_t((bytes + 255) / 256 * 256))) : nullptr,
      free);
  if (bytes) memset(workspace.get(), 0xff, size_t(bytes));
  cuda::causal_conv1d(dtype, p, workspace.get(), nullptr);
}
ConvResult run(const ConvProblem& p) {
  return run(
      p, [&](const CausalConv1dForward& f) { run_cuda(p.dtype, f); },
      [&](const CausalConv1dBackward& b) { run_cuda(p.dtype, b); });
}

struct Setting {
  DType dtype;
  bool many; // tiles to a block
  Options::Order order;
};
void PrintTo(const Setting& setting, std::ostream* out) {
  *out << info_of(setting.dtype).name << (setting.many ? " many" : " one");
}
std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const DTypeInfo& dtype : kDTypes) {
    if (dtype.complex) continue;
    all.push_back({dtype.dtype, false, Options::forward});
    all.push_back({dtype.dtype, true, Options::reversed});
    all.push_back({dtype.dtype, true, Options::random});
  }
  return all;
}

class CausalConv1dCuda : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    emulator::options() = {};
    emulator::options().order = GetParam().order;
    emulator::options().seed = seed();
    cuda::force_conv_blocks(GetParam().many ? 1 : int64_t(1) << 40);
  }
  void TearDown() override {
    emulator::options() = {};
    cuda::force_conv_blocks(cuda::kConvEnoughBlocks);
  }
  DType dtype() const { return GetParam().dtype; }
};

TEST_P(CausalConv1dCuda, RandomProblems) {
  Random random;
  const std::vector<int64_t> sequences = {0, 1, 1, 2, 3, 5},
                             steps = {0, 1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 65, 67, 127, 130},
                             widths = {0, 1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 65, 72};
  for (int64_t window = 1; window <= 10; ++window) {
    for (int repeat = 0; repeat < 5; ++repeat) {
      const ConvProblem p = draw(
          random, dtype(), pick(random, sequences), pick(random, steps), pick(random, widths),
          window, true);
      SCOPED_TRACE(p.text());
      const ConvResult result = run(p);
      ASSERT_NO_FATAL_FAILURE(check(p, result));
      ASSERT_TRUE(run(p).same_bytes(result)) << "the result depends on the order of threads";
    }
  }
}

// Several tiles of several sequences to a block: dense, and packed with sequences that are empty, that begin just before a
// tile, and that are shorter than the window.
TEST_P(CausalConv1dCuda, ManyTiles) {
  Random random;
  for (const int64_t window : {2, 4, 6}) {
    for (const bool packed : {false, true}) {
      ConvProblem p = draw(random, dtype(), packed ? 9 : 2, 300, 9, window, false);
      if (packed) {
        p = draw(random, dtype(), 9, 300, 9, window, false);
        p.cu_seqlens = {0, 0, 1, 3, 62, 126, 129, 129, 254, 300};
        for (Sequence* each : {&p.x, &p.grad_y})
          *each = make(
              random, dtype(), 1, 300, 9, kTimeContiguous, [](Random& r) { return r.normal(); });
      }
      SCOPED_TRACE(p.text());
      const ConvResult result = run(p);
      ASSERT_NO_FATAL_FAILURE(check(p, result));
      ASSERT_TRUE(run(p).same_bytes(result)) << "the result depends on the order of threads";
    }
  }
}

// The same numbers with channels or time side by side, aligned or not: the same bits.
TEST_P(CausalConv1dCuda, LayoutsAgree) {
  Random random;
  const int64_t T = 80, D = 24;
  ConvProblem p = draw(random, dtype(), 2, T, D, 4, false);
  const ConvResult result = run(p);
  const auto turn = [&](Sequence& x, int64_t steps, int64_t offset, int64_t time, int64_t width) {
    Sequence turned = x;
    turned.offset = offset, turned.time = time, turned.width = width;
    turned.sequence = time > width ? steps * time : D * width;
    turned.array = std::make_shared<Array>(dtype(), turned.at(1, steps - 1, D - 1) + 1, false);
    for (int64_t s = 0; s < 2; ++s)
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t d = 0; d < D; ++d) turned.array->set(turned.at(s, t, d), x.get(s, t, d));
    x = turned;
  };
  for (const int64_t more : {0, 1}) {
    for (Sequence* each : {&p.x, &p.grad_y}) turn(*each, T, more, 1, T + more);
    for (Sequence* each : {&p.initial_state, &p.grad_final_state}) turn(*each, 3, more, 1, 3);
    SCOPED_TRACE(p.text());
    ASSERT_TRUE(run(p).same_bytes(result));
  }
  for (Sequence* each : {&p.x, &p.grad_y}) turn(*each, T, 1, 2 * D, 2);
  ASSERT_TRUE(run(p).same_bytes(result));
}

// What is not finite stays in its sequence and, in y, with the outputs that see it.
TEST_P(CausalConv1dCuda, SequencesAreApart) {
  Random random;
  const int64_t T = 200, D = 3;
  for (const int64_t window : {3, 7, 9}) {
    ConvProblem p = draw(random, dtype(), 5, T, D, window, false);
    p.cu_seqlens = {0, 40, 40, 90, 133, 200};
    for (Sequence* each : {&p.x, &p.grad_y})
      *each = make(random, dtype(), 1, T, D, kContiguous, [](Random& r) { return r.normal(); });
    SCOPED_TRACE(p.text());
    const ConvResult clean = run(p);
    ASSERT_NO_FATAL_FAILURE(check(p, clean));
    for (const double what : {NAN, INFINITY}) {
      p.x.array->set(p.x.at(0, 88, 1), what);
      const ConvResult spoilt = run(p);
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t d = 0; d < D; ++d) {
          const double y = spoilt.y.get(t * D + d).real();
          const bool sees = t >= 88 && t < 90 && d == 1;
          if (sees) {
            EXPECT_TRUE(!std::isfinite(y) || p.silu) << "t=" << t;
          } else {
            EXPECT_EQ(y, clean.y.get(t * D + d).real()) << "t=" << t << " d=" << d;
          }
          if (t < 88 - 2 * (window - 1) || t >= 90 || d != 1) {
            EXPECT_EQ(spoilt.grad_x.get(t * D + d), clean.grad_x.get(t * D + d))
                << "t=" << t << " d=" << d;
          }
        }
      }
    }
  }
}

TEST_P(CausalConv1dCuda, StatePool) {
  Random random;
  check_state_pool(
      random, dtype(), [](const ConvProblem& p) { return run(p); },
      [](DType dtype, const CausalConv1dForward& f) { run_cuda(dtype, f); });
}

// Rows of a pool for several steps, where the states are not written in place.
TEST_P(CausalConv1dCuda, StateRows) {
  Random random;
  const std::vector<int64_t> rows = {2, -1, 0};
  for (const int64_t window : {4, 9}) {
    const int64_t S = 3, T = 70, D = 10, n = window - 1;
    const ConvProblem p = draw(random, dtype(), S, T, D, window, false);
    ConvProblem turned = p; // the states where the rows say that they are
    turned.initial_state = make(random, dtype(), S, n, D, kContiguous, [](Random&) { return 0.; });
    for (int64_t s = 0; s < S; ++s)
      for (int64_t k = 0; k < n; ++k)
        for (int64_t d = 0; d < D && rows[size_t(s)] >= 0; ++d)
          turned.initial_state.array->set(
              turned.initial_state.at(rows[size_t(s)], k, d), p.initial_state.get(s, k, d));
    const ConvResult want = run(p);
    Array y(dtype(), S * T * D, true), states(dtype(), S * D * n, true);
    CausalConv1dForward f;
    turned.describe(f);
    f.state_rows = rows.data();
    f.y = y.data();
    f.final_state = states.data();
    run_cuda(dtype(), f);
    ASSERT_TRUE(y.guards_intact() && states.guards_intact());
    for (int64_t i = 0; i < S * T * D; ++i)
      ASSERT_EQ(y.get(i), rows[size_t(i / (T * D))] < 0 ? Value(0) : want.y.get(i));
    for (int64_t s = 0; s < S; ++s)
      for (int64_t i = 0; i < D * n; ++i)
        if (rows[size_t(s)] >= 0) {
          ASSERT_EQ(states.get(rows[size_t(s)] * D * n + i), want.final_state.get(s * D * n + i));
        }
    EXPECT_TRUE(std::isnan(states.get(D * n).real())) << "written for a sequence without a state";
  }
}

std::string name_of(const ::testing::TestParamInfo<Setting>& each) {
  const char* const orders[] = {"forward", "reversed", "random"};
  return std::string(info_of(each.param.dtype).name) + (each.param.many ? "_many_" : "_one_") +
         orders[int(each.param.order)];
}
INSTANTIATE_TEST_SUITE_P(All, CausalConv1dCuda, ::testing::ValuesIn(settings()), name_of);

} // namespace
} // namespace torch_ext::test
