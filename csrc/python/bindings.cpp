// torch_ext._C: what this build is, and hooks for tests and benchmarks. Nothing that computes for a
// user goes through here: operators are called by torch's dispatcher, which torch.compile,
// TorchScript and C++ programs know as well.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = TORCH_EXT_VERSION;
  info["compiler"] = TORCH_EXT_COMPILER;
#ifdef TORCH_EXT_CUDA_VERSION
  info["cuda"] = TORCH_EXT_CUDA_VERSION;
  info["cuda_architectures"] = TORCH_EXT_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  return info;
}

py::dict calibrate(
    const std::string& kind, int64_t elements_per_array, bool nontemporal, int threads,
    double seconds) {
  double rate = -1;
  {
    py::gil_scoped_release other_threads_go_on;
    rate = torch_ext::cpu::calibrate(kind, elements_per_array, nontemporal, threads, seconds);
  }
  if (rate < 0) {
    throw std::invalid_argument(
        "calibrate: kind is '" + kind +
        "', expected copy, triad, exp or fma, with at least one element and one thread");
  }
  py::dict result;
  result["rate"] = rate;
  result["unit"] = kind == "copy" || kind == "triad" ? "GB/s" : "G/s";
  return result;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, test hooks and machine calibration of torch_ext.";
  m.def("build_info", &build_info, "Version, compiler, CUDA version and architectures.");
  m.def("isas", &torch_ext::cpu::built_isas, "CPU instruction sets that were built, best last.");
  m.def("isa", &torch_ext::cpu::chosen_isa, "The CPU instruction set in use.");
  m.def(
      "force_isa", &torch_ext::cpu::force_isa, py::arg("name"),
      "Use this instruction set from now on; '' = automatic. False: not built, or not on this "
      "machine.");
  m.def("num_threads", &at::get_num_threads, "Threads that the CPU kernels use: torch's own.");
  m.def(
      "calibrate", &calibrate, py::arg("kind"), py::arg("elements_per_array"),
      py::arg("nontemporal") = false, py::arg("threads") = 1, py::arg("seconds") = 0.5,
      "The machine's limit with the kernels' own instructions. kind: copy and triad (GB/s, bytes "
      "that a program asks for), "
      "exp (1e9 results/s), fma (1e9 lane operations/s).");
}
