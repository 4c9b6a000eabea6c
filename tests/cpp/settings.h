// Tests that run once per instruction set and dtype.
#pragma once
#include <gtest/gtest.h>

#include <ostream>

#include "cpu/dispatch.h"
#include "diagonal_problems.h"

namespace torch_ext::test {

struct Setting {
  std::string isa;
  DType dtype;
};
inline void PrintTo(const Setting& setting, std::ostream* out) {
  *out << setting.isa << " " << info_of(setting.dtype).name;
}
inline std::vector<Setting> settings(bool with_complex) {
  std::vector<Setting> all;
  for (const std::string& isa : cpu::built_isas())
    for (const DTypeInfo& dtype : kDTypes)
      if (with_complex || !dtype.complex) all.push_back({isa, dtype.dtype});
  return all;
}
inline std::string name_of(const ::testing::TestParamInfo<Setting>& each) {
  return each.param.isa + "_" + info_of(each.param.dtype).name;
}

class OnEachSet : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    if (!cpu::force_isa(GetParam().isa)) GTEST_SKIP() << "this CPU has no " << GetParam().isa;
    ASSERT_EQ(cpu::chosen_isa(), GetParam().isa);
  }
  void TearDown() override { cpu::force_isa(""); }
  DType dtype() const { return GetParam().dtype; }
};

} // namespace torch_ext::test
