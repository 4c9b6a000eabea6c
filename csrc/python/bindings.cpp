// torch_ext._C: what this build is, and hooks for tests. Nothing that computes goes through here: operators are called
// through torch's dispatcher, which torch.compile, TorchScript and C++ programs know as well.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = TORCH_EXT_VERSION;
  info["compiler"] = __VERSION__;
#ifdef TORCH_EXT_CUDA_VERSION
  info["cuda"] = TORCH_EXT_CUDA_VERSION;
  info["cuda_architectures"] = TORCH_EXT_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  return info;
}

py::list isas() {
  py::list names;
  for (const char* name : torch_ext::cpu::built_isas()) names.append(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and test hooks of torch_ext.";
  m.def("build_info", &build_info, "Version, compiler, CUDA version and architectures.");
  m.def("isas", &isas, "CPU instruction sets that were built.");
  m.def("isa", [] { return std::string(torch_ext::cpu::chosen_isa()); },
        "The CPU instruction set in use.");
  m.def("force_isa", [](const std::string& name) { return torch_ext::cpu::force_isa(name.c_str()); },
        py::arg("name"), "Use this instruction set from now on, '' = automatic. False: not possible.");
  m.def("num_threads", &at::get_num_threads, "Threads that the CPU kernels use: torch's own.");
}
