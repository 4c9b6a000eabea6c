// Random inputs whose seed is printed with every failure. TORCH_EXT_TEST_SEED=n repeats a run.
#pragma once
#include <gtest/gtest.h>
#include <stdint.h>
#include <stdlib.h>

#include <random>
#include <string>

namespace torch_ext::test {

inline uint64_t seed() {
  static const uint64_t value = [] {
    const char* given = getenv("TORCH_EXT_TEST_SEED");
    return given ? strtoull(given, nullptr, 10) : std::random_device()();
  }();
  return value;
}

// Each test makes its own, so that a test fails alike when it is run alone.
class Random {
 public:
  Random() : engine_(seed()) {}
  double normal(double scale = 1) { return scale * std::normal_distribution<double>()(engine_); }
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(engine_);
  }
  int64_t integer(int64_t low, int64_t high) { // both included
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }

 private:
  std::mt19937_64 engine_;
  ::testing::ScopedTrace trace_{
      __FILE__, __LINE__, "TORCH_EXT_TEST_SEED=" + std::to_string(seed())};
};

} // namespace torch_ext::test
