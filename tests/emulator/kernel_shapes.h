// For the programs NAME_shapes.cpp, one for each csrc/cuda/NAME.cu: they print how its kernels are launched, a line of JSON
// per kernel: "kernel" as benchmarks/kernel_budget.py calls it, "threads", bytes of "dynamic_shared" memory, and what a
// thread works on. kernel_budget.py compiles and runs them beside the compiler's own figures, so that these stay where they
// are defined. Needs no CUDA: the kernels are instantiated for the emulator and not run.
#pragma once
#include <stdio.h>

#include "cells/numerics.h"
#include "core/types.h"

namespace torch_ext::cuda {

template <class S>
inline constexpr const char* dtype_name = nullptr;
template <>
inline constexpr const char* dtype_name<float> = "float32";
template <>
inline constexpr const char* dtype_name<double> = "float64";
template <>
inline constexpr const char* dtype_name<BFloat16> = "bfloat16";
template <>
inline constexpr const char* dtype_name<Half> = "float16";
template <>
inline constexpr const char* dtype_name<Complex<float>> = "complex64";
template <>
inline constexpr const char* dtype_name<Complex<double>> = "complex128";

} // namespace torch_ext::cuda
