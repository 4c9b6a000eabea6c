#include <algorithm>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string_view>
#include <vector>

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/storage_context.h>
#include <torch/csrc/jit/serialization/unpickler.h>

#include "torch_ext/nn.h"

namespace torch_ext::nn {
namespace {

using caffe2::serialize::PyTorchStreamReader;

constexpr std::string_view kHowToSave =
    "save it in Python with torch.save(model.state_dict(), path) or torch.jit.save, or in C++ with "
    "torch::save(module, path)";

// torch.save(model.state_dict()) pickles an OrderedDict and an attribute of it, `_metadata`:
//   PROTO GLOBAL"collections OrderedDict" BINPUT EMPTY_TUPLE REDUCE  ... tensors ...
//   EMPTY_DICT BINPUT-or-LONG_BINPUT BINUNICODE"_metadata" ... SETITEM BUILD STOP
// torch's C++ unpickler makes None of an OrderedDict (elsewhere they are hooks, which it ignores).
// So the stream is rewritten to an ordinary dict: EMPTY_DICT in place of EMPTY_TUPLE REDUCE, which
// leaves the class on the stack below it, hence a pair of both at the end; and no _metadata, which
// nothing here reads. False where the stream is something else, which then stays as it is.
bool unwrap_ordered_dict(std::string& pickle) {
  using namespace std::string_view_literals;
  constexpr auto kBegin =
      "\x80\x02"
      "ccollections\nOrderedDict\nq\0"sv;
  constexpr auto kMetadata = "X\x09\0\0\0_metadata"sv;
  constexpr std::string_view kNewEmpty = ")R", kPair = "\x86.";
  if (!pickle.starts_with(kBegin) || pickle.compare(kBegin.size(), 2, kNewEmpty) != 0) return false;
  size_t end = pickle.size() - 1; // of STOP
  if (pickle.ends_with("b.")) {
    const size_t name = pickle.rfind(kMetadata);
    if (name == std::string::npos || name < 6) return false;
    if (pickle.compare(name - 3, 2, "}q") == 0) { // and a byte
      end = name - 3;
    } else if (pickle.compare(name - 6, 2, "}r") == 0) { // and four
      end = name - 6;
    } else {
      return false;
    }
  }
  pickle.replace(end, std::string::npos, kPair);
  pickle.replace(kBegin.size(), kNewEmpty.size(), "}");
  return true;
}

// A parameter with attributes, such as the one that keeps weight decay off, is pickled by a function that torch's C++
// unpickler does not know: _rebuild_parameter_with_state. Its first arguments are those of _rebuild_parameter, which it
// does know and which ignores the others.
void drop_attributes(std::string& pickle) {
  constexpr std::string_view kGlobal = "ctorch._utils\n_rebuild_parameter_with_state\n";
  constexpr std::string_view kTail = "_with_state";
  for (size_t at = 0; (at = pickle.find(kGlobal, at)) != std::string::npos;) {
    pickle.erase(at + kGlobal.size() - 1 - kTail.size(), kTail.size());
  }
}

std::string record_text(PyTorchStreamReader& archive, const std::string& name) {
  auto [data, size] = archive.getRecord(name);
  return {static_cast<const char*>(data.get()), size};
}

StateDict read_pickle(PyTorchStreamReader& archive, const std::string& path) {
  std::string pickle = record_text(archive, "data.pkl");
  const bool unwrapped = unwrap_ordered_dict(pickle);
  drop_attributes(pickle);
  size_t position = 0;
  const auto read = [&](char* buffer, size_t size) {
    size = std::min(size, pickle.size() - position);
    std::copy_n(pickle.data() + position, size, buffer);
    position += size;
    return size;
  };
  const auto read_storage = [&](const std::string& name) {
    return std::get<0>(archive.getRecord("data/" + name));
  };
  c10::IValue value;
  try {
    using torch::jit::Unpickler, torch::jit::DeserializationStorageContext;
    // With a context tensors that shared their memory, such as tied weights, share it again.
    Unpickler unpickler(
        read, nullptr, nullptr, read_storage, torch::kCPU, /*use_storage_device=*/false,
        Unpickler::defaultTypeParser, std::make_shared<DeserializationStorageContext>());
    value = unpickler.parse_ivalue();
    if (unwrapped) value = value.toTuple()->elements()[1];
  } catch (const c10::Error& error) {
    TORCH_CHECK(
        false, "load_state_dict: ", path,
        " holds something other than a dictionary of names and tensors (a pickled module, or a "
        "checkpoint with more in it than model.state_dict()?); ",
        kHowToSave, ". torch says: ", error.what_without_backtrace());
  }
  TORCH_CHECK(
      value.isGenericDict(), "load_state_dict: ", path, " holds a ", value.tagKind(),
      ", expected a dictionary of names and tensors; ", kHowToSave);
  StateDict result;
  for (const auto& entry : value.toGenericDict()) {
    TORCH_CHECK(
        entry.key().isString() && entry.value().isTensor(), "load_state_dict: entry ", entry.key(),
        " of ", path, " is not a tensor (", entry.value().tagKind(), "); ", kHowToSave);
    result.insert(entry.key().toStringRef(), entry.value().toTensor());
  }
  return result;
}

// Both torch.jit.save and torch::save write a TorchScript module.
StateDict read_script(const std::string& path) {
  const torch::jit::Module module = torch::jit::load(path, torch::kCPU);
  StateDict result;
  for (const auto& parameter : module.named_parameters()) {
    result.insert(parameter.name, parameter.value);
  }
  for (const auto& buffer : module.named_buffers()) {
    result.insert(buffer.name, buffer.value);
  }
  return result;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) {
    text += (text.empty() ? "" : ", ") + name;
  }
  return text;
}

} // namespace

StateDict read_state_dict(const std::string& path) {
  TORCH_CHECK(
      std::ifstream(path, std::ios::binary).good(), "load_state_dict: cannot open ", path,
      " for reading");
  std::unique_ptr<PyTorchStreamReader> archive;
  try {
    archive = std::make_unique<PyTorchStreamReader>(path);
  } catch (const c10::Error&) {
    TORCH_CHECK(
        false, "load_state_dict: ", path,
        " is damaged or not a file that torch saved in its zip format; ", kHowToSave);
  }
  TORCH_CHECK(
      archive->hasRecord("data.pkl"), "load_state_dict: ", path, " holds no weights that can be ",
      "read by name (an AOTInductor or torch.export package?); ", kHowToSave);
  return archive->hasRecord("constants.pkl") ? read_script(path) : read_pickle(*archive, path);
}

void load_state_dict(torch::nn::Module& module, const StateDict& state_dict) {
  const auto parameters = module.named_parameters();
  const auto buffers = module.named_buffers();
  std::vector<std::string> missing, unexpected, mismatched;
  std::vector<std::pair<torch::Tensor, torch::Tensor>> copies;
  for (const auto* targets : {&parameters, &buffers}) {
    for (const auto& target : *targets) {
      const torch::Tensor* source = state_dict.find(target.key());
      if (source == nullptr) {
        missing.push_back(target.key());
      } else if (source->sizes() != target.value().sizes()) {
        mismatched.push_back(c10::str(
            target.key(), " has shape ", source->sizes(), ", expected ", target.value().sizes()));
      } else {
        copies.emplace_back(target.value(), *source);
      }
    }
  }
  const auto expected = [&](const std::string& name) {
    return parameters.contains(name) || buffers.contains(name);
  };
  const auto is_of_an_expected_one = [&](const torch::Tensor& tensor) {
    return std::any_of(state_dict.begin(), state_dict.end(), [&](const auto& other) {
      return expected(other.key()) && tensor.is_alias_of(other.value()) &&
             tensor.data_ptr() == other.value().data_ptr() &&
             tensor.sizes() == other.value().sizes() && tensor.strides() == other.value().strides();
    });
  };
  for (const auto& source : state_dict) {
    if (!expected(source.key()) && !is_of_an_expected_one(source.value())) {
      unexpected.push_back(source.key());
    }
  }
  std::string problems;
  for (const auto& [what, names] :
       {std::pair("missing: ", &missing), std::pair("unexpected: ", &unexpected),
        std::pair("of another shape: ", &mismatched)}) {
    if (!names->empty()) {
      problems += (problems.empty() ? "" : "; ") + (what + join(*names));
    }
  }
  // Nothing is copied unless everything fits, so that a failure leaves the module as it was.
  TORCH_CHECK(
      problems.empty(), "load_state_dict: the weights do not fit ", module.name(), ": ", problems);
  const torch::NoGradGuard no_grad;
  for (auto& [target, source] : copies) {
    target.copy_(source);
  }
}

void load_state_dict(
    torch::nn::Module& module, const std::string& path, const std::string& prefix) {
  StateDict state_dict = read_state_dict(path);
  if (!prefix.empty()) {
    StateDict part;
    for (const auto& entry : state_dict) {
      if (entry.key().starts_with(prefix + ".")) {
        part.insert(entry.key().substr(prefix.size() + 1), entry.value());
      }
    }
    TORCH_CHECK(
        !part.is_empty(), "load_state_dict: no name in ", path, " starts with \"", prefix,
        ".\"; there are ", join(state_dict.keys()));
    state_dict = std::move(part);
  }
  load_state_dict(module, state_dict);
}

} // namespace torch_ext::nn
