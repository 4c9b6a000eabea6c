// The table of contents: every cell of the diagonal family. Drivers are compiled for each of them.
#pragma once
#include <type_traits>

#include "linear_scan.h"
#include "min_gru.h"
#include "min_lstm.h"

namespace torch_ext {

template <class... Cell>
struct Cells {
  static constexpr int size = sizeof...(Cell);
  static constexpr int inputs[] = {num_inputs<Cell>...};
  // The cell's place in the list.
  template <class C>
  static constexpr int index() {
    int i = 0, found = -1;
    ((found = std::is_same_v<C, Cell> ? i : found, ++i), ...);
    return found;
  }
};

using DiagonalCells = Cells<LinearScan, MinGru, MinLstm>;

} // namespace torch_ext
