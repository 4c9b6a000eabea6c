#include "torch_ext/torch_ext.h"

namespace torch_ext {

const char* version() { return TORCH_EXT_VERSION; }
bool init() { return true; }

} // namespace torch_ext
