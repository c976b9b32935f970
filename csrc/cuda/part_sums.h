// A gradient that is a sum over tokens; see part_sums.cuh.
#pragma once
#include "args.h"

namespace hh {

// out [entries / summed, rows, channels], row f of which belongs to tokens f * each ... f * each + each - 1; `summed` batch entries
// share it: 1 or all. Blocks work on pieces of `run` tokens, `pieces` a batch entry.
struct PartSums {
  Out out;
  float* whole = nullptr;  // [entries, rows, channels]: sums of rows that lie within a piece; null where they are out's
  float* parts = nullptr;  // [entries * pieces, slots, channels]: the rest, a piece's first row and its last; null if there is none
  int64_t entries = 1, summed = 1, rows = 1, each = 1, channels = 0, run = 1, pieces = 1;
  int32_t slots = 1;
  bool always = false;  // no row is taken for one within a piece
};

}  // namespace hh
