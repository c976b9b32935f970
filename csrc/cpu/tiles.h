// Tiles of tokens: rows of [B, S, H, D] as float matrices, and the bits of a mask's tile.
#pragma once

#include "simd.h"

namespace hhattn::HHATTN_ISA {

inline constexpr float kLog2E = 1.44269504088896340736f;

inline int64_t std_min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t std_max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out a thread's scratch, each part from a cache line's edge on. Without a base it only counts.
class Layout {
 public:
  explicit Layout(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* taken = base_ ? base_ + taken_ : nullptr;
    taken_ += round_up(floats, 16);
    return taken;
  }
  int64_t taken() const { return taken_; }

 private:
  float* base_;
  int64_t taken_ = 0;
};

// What several threads add to one sum is added in the order of their ranks, so that it is the same bits every time. Nobody waits
// forever if work begins in that order too.
inline void wait_for_turn(const int32_t* turn, int32_t rank) {
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != rank) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}
inline void end_turn(int32_t* turn, int32_t rank) { __atomic_store_n(turn, rank + 1, __ATOMIC_RELEASE); }

// `rows` tokens of one head as floats, rows of D filled with zeros up to whole vectors.
inline void copy_rows(const Heads& x, int64_t b, int64_t token, int64_t h, int64_t rows, int64_t dim, float* to) {
  const int64_t at = b * x.batch + token * x.token + h * x.head, width = round_up(dim, kLanes);
  with_dtype(x.in.dtype, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const typename T::Element*>(x.in.data) + at;
    for (int64_t r = 0; r < rows; ++r, from += x.token, to += width) {
      sweep(dim, [&](int64_t d, auto w) {
        constexpr int N = decltype(w)::value;
        F32::store<N>(to + d, T::template load<N>(from + d));
      });
      for (int64_t d = dim; d < width; ++d) to[d] = 0;
    }
  });
}

// Lanes whose number has the bit `half` come from b, `half` lower; the others from a. With `high`, `half` higher.
template <int half, bool high, int... I>
inline Vec<kLanes> exchange(Vec<kLanes> a, Vec<kLanes> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & half) ? kLanes + I - (high ? 0 : half) : I + (high ? half : 0))...);
}

// Lane j of x[i] and lane i of x[j] change places: squares of half the size, then of a quarter, down to single lanes.
template <int half = kLanes / 2>
inline void transpose(Vec<kLanes> (&x)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & half) continue;
    const Vec<kLanes> a = x[i], b = x[i + half];
    x[i] = exchange<half, false>(a, b, lanes);
    x[i + half] = exchange<half, true>(a, b, lanes);
  }
  if constexpr (half > 1) transpose<half / 2>(x);
}

// `rows` tokens of one head, times `factor`, as columns: to [dim, columns], zeros beyond the rows; `columns` are whole vectors.
inline void load_columns(const Heads& x, int64_t b, int64_t token, int64_t h, int64_t rows, int64_t dim, float factor,
                         int64_t columns, float* to) {
  float some[kLanes * 256];
  const int64_t width = round_up(dim, kLanes);
  for (int64_t r = 0; r < columns; r += kLanes) {
    const int64_t n = std_max(0, std_min(kLanes, rows - r));
    copy_rows(x, b, token + r, h, n, dim, some);
    memset(some + n * width, 0, (kLanes - n) * width * sizeof(float));
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec<kLanes> square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = F32::load<kLanes>(some + i * width + d) * factor;
      transpose(square);
      for (int i = 0; i < kLanes && d + i < dim; ++i) F32::store<kLanes>(to + (d + i) * columns + r, square[i]);
    }
  }
}

// x [rows, width], whole vectors, into rows of n elements at `at`, `stride` apart.
inline void store_rows(const Out& out, int64_t at, int64_t stride, int64_t rows, int64_t n, const float* x, int64_t width) {
  with_dtype(out.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = 0; r < rows; ++r) {
      auto* to = static_cast<typename T::Element*>(out.data) + at + r * stride;
      sweep(n, [&](int64_t d, auto w) {
        constexpr int N = decltype(w)::value;
        T::template store<N>(to + d, F32::load<N>(x + r * width + d));
      });
    }
  });
}

// Row r of x [rows, width] times factors[r].
inline void scale_rows(const float* factors, int64_t rows, int64_t width, float* x) {
  for (int64_t r = 0; r < rows; ++r) {
    if (factors[r] == 1.0f) continue;
    for (int64_t d = 0; d < width; d += kLanes) {
      float* at = x + r * width + d;
      F32::store<kLanes>(at, F32::load<kLanes>(at) * factors[r]);
    }
  }
}

// Whether none of n floats, whole vectors, is an infinity or a NaN.
inline bool all_finite(const float* x, int64_t n) {
  Vec<kLanes> zeros = {};
  for (int64_t i = 0; i < n; i += kLanes) zeros += F32::load<kLanes>(x + i) * 0.0f;
  return sum<kLanes>(zeros) == 0;
}

// 0 for each of n floats, whole vectors, that is an infinity or a NaN.
inline void make_finite(int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<kLanes> v = F32::load<kLanes>(x + i);
    F32::store<kLanes>(x + i, bits<Vec<kLanes>>(bits<VecU<kLanes>>(v * 0.0f == 0.0f) & bits<VecU<kLanes>>(v)));
  }
}

// The bits of `keys` keys of a tile [bq, bk] from `first` on (a multiple of 8), by key: kept [keys up to 8, queries up to 8], bit i
// of a key's row for query i.
inline void transpose_bits(const uint8_t* tile, int64_t bq, int64_t bk, int64_t first, int64_t keys, int64_t queries,
                           uint8_t* kept) {
  const int64_t bytes = (bk + 7) / 8, out_bytes = round_up(queries, 8) / 8;
  for (int64_t i = 0; i < out_bytes; ++i) {
    for (int64_t j = 0; j < (keys + 7) / 8; ++j) {
      uint64_t x = 0;
      for (int64_t r = 0; r < 8 && i * 8 + r < bq; ++r) {
        x |= uint64_t{tile[(i * 8 + r) * bytes + first / 8 + j]} << 8 * r;
      }
      // transpose 8x8 bits: swap single bits, then pairs, then fours
      uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aaull;
      x ^= t ^ t << 7;
      t = (x ^ x >> 14) & 0x0000cccc0000ccccull;
      x ^= t ^ t << 14;
      t = (x ^ x >> 28) & 0x00000000f0f0f0f0ull;
      x ^= t ^ t << 28;
      for (int64_t r = 0; r < 8; ++r) kept[(j * 8 + r) * out_bytes + i] = static_cast<uint8_t>(x >> 8 * r);
    }
  }
}

template <int... I>
constexpr VecU<kLanes> weights_of(std::integer_sequence<int, I...>) {
  return VecU<kLanes>{(1u << I)...};
}
// Lane i's bit.
inline VecU<kLanes> lane_weights() { return weights_of(std::make_integer_sequence<int, kLanes>{}); }

// The kLanes bits from bit i on (a multiple of kLanes) in every lane.
inline VecU<kLanes> lane_bits(const uint8_t* row, int64_t i) {
  uint32_t word = row[i / 8];
  if constexpr (kLanes == 16) word |= uint32_t{row[i / 8 + 1]} << 8;
  if constexpr (kLanes == 4) word >>= i % 8;
  return VecU<kLanes>{} + word;
}

}  // namespace hhattn::HHATTN_ISA
