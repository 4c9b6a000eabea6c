// Products with a few rows, on every instruction set and dtype, against plain double loops: odd sizes, strided rows, outputs
// poisoned and between guards.
#include "cpu/dispatch.h"

#include "settings.h"

namespace torch_ext::test {
namespace {

class Projection : public OnEachSet {};

TEST_P(Projection, IsTheSumOfProducts) {
  const DType dtype = this->dtype();
  // Of what a result is rounded to, and of what is added up.
  const double rounding = dtype == DType::f64    ? 1e-16
                          : dtype == DType::f32  ? 1e-7
                          : dtype == DType::bf16 ? 4e-3
                                                 : 5e-4;
  const double smallest =
      dtype == DType::f16 ? 3e-8 : 0; // half a step between its denormal numbers
  const double summing = dtype == DType::f64 ? 1e-15 : 1e-6;
  Random random;
  for (const int64_t rows : {1, 2, 3, 4, 5, 8}) {
    for (const int64_t inputs : {1, 7, 16, 48, 65, 131}) {
      for (const int64_t outputs : {1, 5, 16, 50}) {
        const int64_t more_x = random.integer(0, 3), more_w = random.integer(0, 3);
        const bool with_bias = random.integer(0, 1);
        cpu::Projection p;
        p.rows = rows, p.inputs = inputs, p.outputs = outputs;
        p.x_row = inputs + more_x, p.weight_row = inputs + more_w;
        const auto fill = [&](int64_t count) {
          Array a(dtype, count, /*guarded=*/false);
          for (int64_t i = 0; i < count; ++i) a.set(i, random.normal());
          return a;
        };
        Array x = fill((rows - 1) * p.x_row + inputs),
              weight = fill((outputs - 1) * p.weight_row + inputs), bias = fill(outputs);
        Array y(dtype, rows * outputs, /*guarded=*/true);
        p.x = x.data(), p.weight = weight.data(), p.bias = with_bias ? bias.data() : nullptr;
        p.y = y.data();
        ASSERT_TRUE(cpu::project(dtype, p, {}));
        ASSERT_TRUE(y.guards_intact());
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t o = 0; o < outputs; ++o) {
            double sum = with_bias ? bias.get(o).real() : 0, size = std::abs(sum);
            for (int64_t k = 0; k < inputs; ++k) {
              const double product =
                  x.get(r * p.x_row + k).real() * weight.get(o * p.weight_row + k).real();
              sum += product, size += std::abs(product);
            }
            ASSERT_NEAR(
                y.get(r * outputs + o).real(), sum,
                rounding * std::abs(sum) + summing * size + smallest)
                << "rows " << rows << " inputs " << inputs << " outputs " << outputs << " at " << r
                << " " << o;
          }
        }
      }
    }
  }
}

TEST_P(Projection, WithoutInputsIsTheBias) {
  const DType dtype = this->dtype();
  Array bias(dtype, 3, false), y(dtype, 3, true);
  for (int64_t i = 0; i < 3; ++i) bias.set(i, double(i));
  cpu::Projection p;
  p.rows = 1, p.outputs = 3, p.bias = bias.data(), p.y = y.data();
  p.x = p.weight = bias.data();
  ASSERT_TRUE(cpu::project(dtype, p, {}));
  for (int64_t i = 0; i < 3; ++i) ASSERT_EQ(y.get(i).real(), double(i));
}

INSTANTIATE_TEST_SUITE_P(
    Sets, Projection, ::testing::ValuesIn(settings(/*with_complex=*/false)), name_of);

} // namespace
} // namespace torch_ext::test
