// How the kernels of csrc/cuda/matrix_memory.cu are launched: see kernel_shapes.h.
#include "cuda/matrix_memory.cu"

#include "kernel_shapes.h"

namespace torch_ext::cuda {
namespace {

void print(const char* kernel, const std::string& arguments, int threads, int shared) {
  printf(
      "{\"kernel\": \"matrix_memory_%s %s\", \"threads\": %d, \"dynamic_shared\": %d}\n", kernel,
      arguments.c_str(), threads, shared);
}
std::string text(std::initializer_list<int> numbers) {
  std::string all;
  for (const int each : numbers) all += (all.empty() ? "" : " ") + std::to_string(each);
  return all;
}
template <int kParts, int kKeys, int kValues>
void print_states() {
  print(
      "states", text({kParts, kKeys, kValues}), kMatrixThreads,
      MatrixStatesShared<kParts, kKeys, kValues>::kBytes);
}
template <int kParts, int kValues>
void print_outputs() {
  print(
      "outputs", text({kParts, kValues}), kMatrixThreads,
      MatrixOutputsShared<kParts, kValues>::kBytes);
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
