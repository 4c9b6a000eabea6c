#include <gtest/gtest.h>
#include <stdio.h>

#include "random.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  printf("TORCH_EXT_TEST_SEED=%llu\n", (unsigned long long)torch_ext::test::seed());
  return RUN_ALL_TESTS();
}
