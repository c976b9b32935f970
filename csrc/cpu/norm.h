// The statistics of a row, shared by the ops that normalise.
#pragma once

#include "simd.h"

namespace hhattn::HHATTN_ISA {

// 1 / sqrt(mean(row²) + eps), the row centred first for a layer norm.
inline float normalizer(float* row, int64_t n, bool layer, float eps) {
  if (layer) {
    const float mean = reduce(n, [&](int64_t i, auto w) { return F32::load<decltype(w)::value>(row + i); }) / n;
    sweep(n, [&](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      F32::store<N>(row + i, F32::load<N>(row + i) - mean);
    });
  }
  const float squares = reduce(n, [&](int64_t i, auto w) {
    const auto v = F32::load<decltype(w)::value>(row + i);
    return v * v;
  });
  return 1.0f / __builtin_sqrtf(squares / n + eps);
}

}  // namespace hhattn::HHATTN_ISA
