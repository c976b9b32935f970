// What the backward passes of the norms share.
#pragma once

#include "norm.h"
#include "stream.h"
#include "tiles.h"

namespace hhattn::HHATTN_ISA {

// The gradient u in a normalised row n is, in what was normalised, rstd·(u − n·along − mean); mean is 0 for an rms norm.
struct NormGradient {
  float rstd, along = 0, mean = 0;
  template <class V>
  V operator()(V u, V n) const {
    return rstd * (u - n * along - mean);
  }
};

// `product` is Σ u·n.
inline NormGradient norm_gradient(float rstd, float product, const float* u, int64_t n, bool layer) {
  NormGradient out{rstd, product / n};
  if (layer) out.mean = reduce(n, [&](int64_t i, auto w) { return F32::load<decltype(w)::value>(u + i); }) / n;
  return out;
}

// A piece's sums are added to those of all pieces in the order of the pieces, so that they are the same bits on any number of
// threads. They are doubles: the pieces of a minute of video are thousands.
class Turn {
 public:
  Turn(int32_t* turn, int64_t piece) : turn_(turn), piece_(static_cast<int32_t>(piece)) {}
  void add(const float* values, int64_t n, double* sums) {
    wait();
    for (int64_t i = 0; i < n; ++i) sums[i] += values[i];
  }
  // To be called once, last.
  void end() {
    wait();
    end_turn(turn_, piece_);
  }

 private:
  void wait() {
    if (!mine_) wait_for_turn(turn_, piece_);
    mine_ = true;
  }
  int32_t *turn_, piece_;
  bool mine_ = false;
};

inline void store_sums(const double* sums, int64_t n, const Out& out) {
  with_dtype(out.dtype, [&](auto type) {
    using T = decltype(type);
    auto* to = static_cast<typename T::Element*>(out.data);
    for (int64_t i = 0; i < n; ++i) T::template store<1>(to + i, Vec<1>{static_cast<float>(sums[i])});
  });
}

}  // namespace hhattn::HHATTN_ISA
