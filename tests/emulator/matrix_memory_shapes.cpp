// How the kernels of csrc/cuda/matrix_memory.cu are launched: see kernel_shapes.h.
#include "cuda/matrix_memory.cu"

#include "kernel_shapes.h"

namespace torch_ext::cuda {
namespace {

void print(
    const char* kernel, const std::string& arguments, int threads, int shared,
    const std::string& more = "") {
  printf(
      "{\"kernel\": \"matrix_memory_%s %s\", \"threads\": %d, \"dynamic_shared\": %d%s}\n", kernel,
      arguments.c_str(), threads, shared, more.c_str());
}
std::string text(std::initializer_list<int> numbers) {
  std::string all;
  for (const int each : numbers) all += (all.empty() ? "" : " ") + std::to_string(each);
  return all;
}
// A pass of the main loop is a tile: what a block's tiles have, and how often the loops inside are passed. Numbers that
// are not copied are converted four at a time, and that loop is unrolled four times.
std::string tiles(int parts, int keys, int values) {
  const int wider = keys > values ? keys : values,
            fills = parts == 1 ? 1 : kMatrixRows * (wider / 4) / kMatrixThreads / 4;
  const auto number = [](const char* name, int x) {
    return std::string(", \"") + name + "\": " + std::to_string(x);
  };
  return number("parts", parts) + number("keys", keys) + number("values", values) +
         number("rows", kMatrixRows) + number("chunk", kMatrixChunk) + number("fill_passes", fills);
}
template <int kParts, int kKeys, int kValues>
void print_states() {
  print(
      "states", text({kParts, kKeys, kValues}), kMatrixThreads,
      MatrixStatesShared<kParts, kKeys, kValues>::kBytes,
      tiles(kParts, kKeys, kValues) + ", \"product_passes\": [" + text({kMatrixRows / 16}) + "]");
}
template <int kParts, int kValues>
void print_outputs() {
  using Memory = MatrixOutputsShared<kParts, kValues>;
  // Scores with the state, then values. Below the diagonal a warp has an exponential for each row and 16 columns.
  print(
      "outputs", text({kParts, kValues}), kMatrixThreads, Memory::kBytes,
      tiles(kParts, Memory::kKeys, kValues) + ", \"product_passes\": [" +
          std::to_string(Memory::kKeys / 16) + ", " + std::to_string(kMatrixRows / 16) +
          "], \"exponentials\": " + std::to_string(2 * 2 * (kMatrixRows / 2 / 16)));
}
template <class R>
void print_recurrent() {
  for (const char* keys_inside : {" false", " true"})
    print(
        "recurrent", std::string(dtype_name<R>) + keys_inside, kRecurrentThreads,
        matrix_recurrent_shared<R>);
}

} // namespace
} // namespace torch_ext::cuda

int main() {
  using namespace torch_ext::cuda;
  print_states<1, 64, 64>(), print_states<1, 128, 64>();
  print_states<2, 64, 64>(), print_states<3, 64, 64>();
  print_outputs<1, 64>(), print_outputs<1, 128>();
  print_outputs<2, 64>(), print_outputs<3, 64>();
  print_recurrent<float>(), print_recurrent<double>();
}
