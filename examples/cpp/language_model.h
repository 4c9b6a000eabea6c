// A language model of characters that examples/char_lm.py saves as TorchScript, of any layer. Its methods:
//   init_state(batch_size) -> state
//   prefill(ids (B, T), state, lengths, padding, last_only) -> (logits (B, T, V), state)
//   step(ids (B,), state) -> (logits (B, V), state)
#pragma once
#include <torch/script.h>
#include <torch/utils.h>
#include <torch_ext/torch_ext.h> // keeps the operators linked that the model calls

#include <map>

#include "example.h"

// The characters of a text in UTF-8.
inline std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> characters;
  for (const char byte : text) {
    const bool goes_on = (static_cast<unsigned char>(byte) & 0xC0) == 0x80;
    if (!goes_on || characters.empty()) characters.emplace_back();
    characters.back() += byte;
  }
  return characters;
}

struct LanguageModel {
  torch::jit::Module module;
  std::vector<std::string> characters; // by their numbers
  std::map<std::string, int64_t> numbers;

  explicit LanguageModel(const std::string& path) {
    check_readable(path);
    torch::jit::ExtraFilesMap files = {{"characters.txt", ""}};
    module = torch::jit::load(path, torch::kCPU, files);
    module.eval();
    for (const char* method : {"init_state", "prefill", "step"}) {
      if (!module.find_method(method)) {
        throw UserError(path + " has no method " + method + ", so it cannot stream");
      }
    }
    characters = split(files["characters.txt"]);
    if (characters.empty()) throw UserError(path + " does not say what its characters are");
    for (const std::string& character : characters) {
      numbers.emplace(character, int64_t(numbers.size()));
    }
  }
  std::vector<int64_t> numbers_of(const std::string& prompt) const {
    std::vector<int64_t> ids;
    for (const std::string& character : split(prompt)) {
      if (!numbers.count(character)) {
        throw UserError(
            "the model does not know the character \"" + character + "\" of the prompt");
      }
      ids.push_back(numbers.at(character));
    }
    if (ids.empty()) throw UserError("PROMPT is empty, expected at least one character");
    return ids;
  }
};
