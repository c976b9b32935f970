// Gradients that are sums over tokens, and their scratch; see part_sums.h.
#pragma once

#include <algorithm>

#include "../part_sums.h"
#include "tensor.h"

namespace hh {

// Tokens of a piece: by the shape alone, for sums are in its order. Few enough pieces that the second step costs little, enough that
// they fill the largest GPU several times.
inline int64_t run_of(int64_t rows) { return std::max<int64_t>((rows + 4095) / 4096 + 15, 16) / 16 * 16; }

// A gradient, and what it is summed from; empty where there is no such argument.
struct Gradient {
  Tensor out;
  OptTensor whole, parts;
  PartSums sums;

  // Of a parameter that `rows` tokens share, in pieces of `run`.
  static Gradient of_parameter(Call& call, const OptTensor& p, const Tensor& x, int64_t rows, int64_t run, const char* name) {
    Gradient g{nothing(x)};
    if (!p) return g;
    g.out = call.empty(*p);
    g.sums.each = rows;
    g.sums.always = true;
    g.start(call, p->numel(), run, x, name);
    return g;
  }

  // Of rows of modulation [1 or B, F, C] for x [B, S, C], in pieces of `run` tokens of a batch entry.
  static Gradient of_modulation(Call& call, const OptTensor& m, const Tensor& x, int64_t run, const char* name) {
    Gradient g{nothing(x)};
    if (!m) return g;
    PartSums& s = g.sums;
    g.out = call.empty(*m);
    s.entries = x.size(0);
    s.summed = m->size(0) != x.size(0) ? x.size(0) : 1;
    s.rows = m->size(1);
    s.each = x.size(1) / std::max<int64_t>(s.rows, 1);
    if (s.summed > 1 && x.numel() > 0) {
      g.whole = call.empty(x, {s.entries, s.rows, x.size(2)}, ScalarType::Float);
      s.whole = static_cast<float*>(call.write(*g.whole, name));
    }
    g.start(call, x.size(2), run, x, name);
    return g;
  }

 private:
  void start(Call& call, int64_t channels, int64_t run, const Tensor& x, const char* name) {
    sums.channels = channels;
    sums.run = run;
    sums.pieces = (sums.rows * sums.each + run - 1) / run;
    if (x.numel() == 0) return;
    sums.out = call.output(out, name);
    if (!sums.always && run % sums.each == 0) return;  // every row lies within a piece
    sums.slots = sums.always || sums.each % run == 0 ? 1 : 2;
    parts = call.empty(x, {sums.entries * sums.pieces, sums.slots, channels}, ScalarType::Float);
    sums.parts = static_cast<float*>(call.write(*parts, name));
  }
};

}  // namespace hh
