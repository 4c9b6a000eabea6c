// torch_ext for C++ programs: version, and what keeps the library loaded. ops.h has the operators, nn.h the modules.
#pragma once

#define TORCH_EXT_API __attribute__((visibility("default")))

namespace torch_ext {

// The library's version, as in "0.1.0".
TORCH_EXT_API const char* version();

// Does nothing but keep libtorch_ext linked: a linker drops a library from which a program uses no symbol, and with it
// the operators that a TorchScript file or an AOTInductor package looks up. Including this header is enough.
TORCH_EXT_API bool init();

namespace detail {
inline const bool keep_linked = init();
}

} // namespace torch_ext
