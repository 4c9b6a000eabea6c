# The installed torch as the target TorchExt::torch, and what is known about it:
#   TORCH_EXT_TORCH_ROOT  TORCH_EXT_TORCH_VERSION (major.minor)  TORCH_EXT_TORCH_CUDA (ON: a CUDA torch)
#   TORCH_EXT_TORCH_LIBRARY_DIRS  TORCH_EXT_CUDART (the CUDA runtime that torch loads; empty: not found)
# find_package(Torch) is not used: with the CUDA torch that pip installs it stops on a machine without the CUDA
# toolkit, and it guesses architectures that the toolkit may not have.
include_guard(GLOBAL)

# First where the caller says, then beside an installed torch_ext (site-packages/torch), then where torch_ext was built.
find_path(TORCH_EXT_TORCH_CMAKE_DIR NAMES Torch/TorchConfig.cmake
  HINTS "${Torch_DIR}/.." PATH_SUFFIXES share/cmake . NO_CACHE)
if(NOT TORCH_EXT_TORCH_CMAKE_DIR)
  find_path(TORCH_EXT_TORCH_CMAKE_DIR NAMES Torch/TorchConfig.cmake NO_DEFAULT_PATH NO_CACHE
    PATHS "${CMAKE_CURRENT_LIST_DIR}/../../../../torch/share/cmake" "${TORCH_EXT_BUILT_FOR_ROOT}/share/cmake")
endif()
if(NOT TORCH_EXT_TORCH_CMAKE_DIR)
  message(FATAL_ERROR "torch was not found. Pass "
    "-DCMAKE_PREFIX_PATH=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')")
endif()
get_filename_component(TORCH_EXT_TORCH_ROOT "${TORCH_EXT_TORCH_CMAKE_DIR}/../.." REALPATH)

set(_header "${TORCH_EXT_TORCH_ROOT}/include/torch/headeronly/version.h")
if(NOT EXISTS "${_header}")
  message(FATAL_ERROR "torch_ext needs torch 2.11 or newer, and ${TORCH_EXT_TORCH_ROOT} is older: pip install -U torch")
endif()
file(READ "${_header}" _header)
string(REGEX REPLACE ".*TORCH_VERSION_MAJOR ([0-9]+).*TORCH_VERSION_MINOR ([0-9]+).*" "\\1.\\2"
  TORCH_EXT_TORCH_VERSION "${_header}")

add_library(TorchExt::torch INTERFACE IMPORTED)
target_include_directories(TorchExt::torch SYSTEM INTERFACE
  "${TORCH_EXT_TORCH_ROOT}/include" "${TORCH_EXT_TORCH_ROOT}/include/torch/csrc/api/include")
target_compile_features(TorchExt::torch INTERFACE cxx_std_20)
# no-as-needed: nothing names a symbol of libtorch_cuda, but CUDA tensors exist only where it is loaded; the same
# holds for libtorch_ext and its operators. allow-shlib-undefined: torch's own libraries refer to ones that only
# their loader finds (libnccl).
target_link_options(TorchExt::torch INTERFACE "LINKER:--no-as-needed" "LINKER:--allow-shlib-undefined")
set(TORCH_EXT_TORCH_CUDA OFF)
foreach(_name torch torch_cpu torch_cuda c10 c10_cuda)
  set(_library "${TORCH_EXT_TORCH_ROOT}/lib/lib${_name}.so")
  if(EXISTS "${_library}")
    target_link_libraries(TorchExt::torch INTERFACE "${_library}")
    if(_name STREQUAL torch_cuda)
      set(TORCH_EXT_TORCH_CUDA ON)
    endif()
  endif()
endforeach()

# pip puts CUDA's libraries into site-packages/nvidia/cu13, beside torch.
set(TORCH_EXT_TORCH_LIBRARY_DIRS "${TORCH_EXT_TORCH_ROOT}/lib")
set(TORCH_EXT_CUDART "")
file(GLOB _found "${TORCH_EXT_TORCH_ROOT}/../nvidia/*/lib/libcudart.so.*" "${TORCH_EXT_TORCH_ROOT}/lib/libcudart.so.*")
if(_found)
  list(GET _found 0 TORCH_EXT_CUDART)
  get_filename_component(TORCH_EXT_CUDART "${TORCH_EXT_CUDART}" REALPATH)
  get_filename_component(_directory "${TORCH_EXT_CUDART}" DIRECTORY)
  list(APPEND TORCH_EXT_TORCH_LIBRARY_DIRS "${_directory}")
endif()
