// The table of contents: every cell of the diagonal and of the gated family. Drivers are compiled for each of them.
#pragma once
#include <type_traits>

#include "elman.h"
#include "gru.h"
#include "linear_scan.h"
#include "lstm.h"
#include "min_gru.h"
#include "min_lstm.h"
#include "slstm.h"

namespace torch_ext {

template <class... Cell>
struct Cells {
  static constexpr int size = sizeof...(Cell);
  // The cell's place in the list.
  template <class C>
  static constexpr int index() {
    int i = 0, found = -1;
    ((found = std::is_same_v<C, Cell> ? i : found, ++i), ...);
    return found;
  }
};

using DiagonalCells = Cells<LinearScan, MinGru, MinLstm>;
using GatedCells = Cells<Lstm, CoupledLstm, Gru, GruResetBefore, Elman, IndRnn, Slstm>;

template <class List>
struct InputsOf;
template <class... Cell>
struct InputsOf<Cells<Cell...>> {
  static constexpr int counts[] = {num_inputs<Cell>...};
};
// How many inputs the cell at a place of DiagonalCells has.
inline constexpr const int* kDiagonalInputs = InputsOf<DiagonalCells>::counts;

struct GatedSizes {
  int gates, states, from_x, from_h, weights, two_products;
};
template <class List>
struct SizesOf;
template <class... Cell>
struct SizesOf<Cells<Cell...>> {
  static constexpr GatedSizes sizes[] = {
      {num_gates<Cell>, num_states<Cell>, num_from_x<Cell>, num_from_h<Cell>, num_weights<Cell>,
       Cell::two_products}...};
};
// Of the cell at a place of GatedCells.
inline constexpr const GatedSizes* kGatedSizes = SizesOf<GatedCells>::sizes;

} // namespace torch_ext
