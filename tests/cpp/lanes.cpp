#include "lanes.h"

#include "cpu/simd.h"

#define TORCH_EXT_JOIN_(x, y) x##y
#define TORCH_EXT_JOIN(x, y) TORCH_EXT_JOIN_(x, y)
#define TORCH_EXT_STRING_(x) #x
#define TORCH_EXT_STRING(x) TORCH_EXT_STRING_(x)

namespace torch_ext {
namespace {

template <class T>
TORCH_EXT_HD T sigmoid_of_cells(T x) { // which finds what a cell finds
  return sigmoid(x);
}

} // namespace
} // namespace torch_ext

namespace torch_ext::cpu::TORCH_EXT_ISA {
namespace {

template <class S, class F>
void map(const S* from, S* to, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += Stored<S>::kLanes) {
    Stored<S>::store(to + i, f(Stored<S>::load(from + i)));
  }
}
template <class S>
void map_exp(const S* from, S* to, int64_t n) {
  map(from, to, n, [](Vec<S> x) { return exp(x); });
}
template <class S>
void map_reciprocal(const S* from, S* to, int64_t n) {
  map(from, to, n, [](Vec<S> x) { return reciprocal(x); });
}
template <class S>
void map_sigmoid(const S* from, S* to, int64_t n) {
  map(from, to, n, [](Vec<S> x) { return sigmoid_of_cells(x); });
}
template <class S>
void from_16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += Stored<float>::kLanes) {
    Stored<float>::store(to + i, Stored<S>::load(reinterpret_cast<const S*>(from + i)));
  }
}
template <class S>
void to_16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += Stored<float>::kLanes) {
    Stored<S>::store(reinterpret_cast<S*>(to + i), Stored<float>::load(from + i));
  }
}
void copy_some(const float* from, float* to, int n) { store_some(to, load_some(from, n), n); }

} // namespace
} // namespace torch_ext::cpu::TORCH_EXT_ISA

namespace torch_ext::test {

using namespace torch_ext::cpu::TORCH_EXT_ISA;
extern const Lanes TORCH_EXT_JOIN(lanes_, TORCH_EXT_ISA) = {
    TORCH_EXT_STRING(TORCH_EXT_ISA),
    map_exp<float>,
    map_reciprocal<float>,
    map_sigmoid<float>,
    map_exp<double>,
    map_reciprocal<double>,
    map_sigmoid<double>,
    from_16<BFloat16>,
    to_16<BFloat16>,
    from_16<Half>,
    to_16<Half>,
    copy_some,
    Vec<float>::kLanes};

} // namespace torch_ext::test
