// Sums of subsets: y = M x for a matrix M of zeros and ones and vectors x_i of kSlice floats.
//
// A product with M would multiply by ones. Instead columns are taken in fours and each four's 15 sums are made once (11 additions,
// the others are there); then a row needs one addition a four, where a product needs four multiplications: many rows share the
// sums. What M leaves out takes part in nothing, so it may be infinite or NaN; a product with its zero would be NaN.
#pragma once

#include "simd.h"

namespace hhattn::HHATTN_ISA {

inline constexpr int64_t kLine = kSlice;  // floats of a vector: lines of the cache that are next to one another
inline constexpr int64_t kSums = 16 * kFours * kLine;  // floats of the sums that stay in the nearest cache

struct Line {
  Vec<kLanes> parts[kLine / kLanes];
  static Line load(const float* p) {
    Line x;
#pragma GCC unroll 8
    for (int i = 0; i < kLine / kLanes; ++i) x.parts[i] = read<Vec<kLanes>>(p + i * kLanes);
    return x;
  }
  void store(float* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < kLine / kLanes; ++i) F32::store<kLanes>(p + i * kLanes, parts[i]);
  }
  void add(const float* p) {
#pragma GCC unroll 8
    for (int i = 0; i < kLine / kLanes; ++i) parts[i] += read<Vec<kLanes>>(p + i * kLanes);
  }
};

// The sums of n vectors' fours: of a four's vectors whose bits are set, at 16 times its number plus the bits.
inline void sums_of_fours(const float* x, int64_t n, float* sums) {
  for (int64_t first = 0; first < n; first += 4, sums += 16 * kLine) {
    for (int64_t bit = 0; bit < 4; ++bit) {
      float* with = sums + (kLine << bit);
      const int64_t at = first + bit;
      if (at < n) Line::load(x + at * kLine).store(with); else memset(with, 0, kLine * sizeof(float));
      for (int64_t rest = 1; rest < int64_t{1} << bit; ++rest) {
        Line sum = Line::load(sums + rest * kLine);
        sum.add(with);
        sum.store(with + rest * kLine);
      }
    }
  }
}

// y [rows, kLine] (+)= M x, x [n, kLine]; `sums` has room for kSums floats.
inline void subset_sums(const Subsets& m, const float* x, bool add, float* y, float* sums) {
  const uint8_t *counts = m.counts, *entries = m.entries;
  for (int64_t first = 0; first < m.n; first += 4 * kFours, add = true) {
    sums_of_fours(x + first * kLine, m.n - first < 4 * kFours ? m.n - first : 4 * kFours, sums);
    for (int64_t r = 0; r < m.rows; ++r) {
      float* to = y + r * kLine;
      const int64_t count = *counts++;
      Line even = {}, odd = {};  // two, since each addition waits for the one before
      if (add) even = Line::load(to);
      int64_t e = 0;
      for (; e + 2 <= count; e += 2) {
        even.add(sums + entries[e] * kLine);
        odd.add(sums + entries[e + 1] * kLine);
      }
      if (e < count) even.add(sums + entries[e] * kLine);
#pragma GCC unroll 8
      for (int i = 0; i < kLine / kLanes; ++i) even.parts[i] += odd.parts[i];
      even.store(to);
      entries += count;
    }
  }
}

}  // namespace hhattn::HHATTN_ISA
