// The statistics of a row, shared by the ops that normalise.
#pragma once

#include "simd.h"

namespace hhattn::HHATTN_ISA {

// norm(row) = (row − mean)·rstd; mean is 0 for an rms norm. Squares are summed after centring, not E[x²] − E[x]²: a row far
// from zero loses nothing.
struct Stats {
  float mean = 0, rstd = 1;
};

inline Stats rms(float squares, int64_t n, float eps) { return {0, 1.0f / __builtin_sqrtf(squares / n + eps)}; }

inline Stats layer(float sum, const float* row, int64_t n, float eps) {
  const float mean = sum / n;
  const float squares = reduce(n, [&](int64_t i, auto w) {
    const auto v = F32::load<decltype(w)::value>(row + i) - mean;
    return v * v;
  });
  return {mean, 1.0f / __builtin_sqrtf(squares / n + eps)};
}

}  // namespace hhattn::HHATTN_ISA
