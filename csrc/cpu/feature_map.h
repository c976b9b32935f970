// Feature maps of linear attention on rows of floats, and rotations by rotary tables. Rows are padded to whole vectors; what a
// map makes of the padding means nothing.
#pragma once

#include "exp2.h"
#include "tiles.h"

namespace hhattn::HHATTN_ISA {

inline Vec<kLanes> relu(Vec<kLanes> x) { return bits<Vec<kLanes>>(bits<VecU<kLanes>>(x) & ~bits<VecU<kLanes>>(x <= 0.0f)); }

// e^x for x <= 0.
inline Vec<kLanes> exp_of_negative(Vec<kLanes> x) { return exp2(x * kLog2E); }

// f(vector) for every vector of a row.
template <class F>
inline void each_vector(int64_t n, const float* x, float* to, const F& f) {
  for (int64_t d = 0; d < n; d += kLanes) F32::store<kLanes>(to + d, f(F32::load<kLanes>(x + d)));
}

// x /= by, n numbers: a product, unless the reciprocal would overflow.
inline void divide(float* x, float by, int64_t n) {
  const float once = 1 / by;
  if (__builtin_isinf(once)) return each_vector(n, x, x, [&](Vec<kLanes> v) { return v / by; });
  each_vector(n, x, x, [&](Vec<kLanes> v) { return v * once; });
}

inline void softmax(const float* x, int64_t n, float* to) {
  // a NaN isn't the largest, but becomes its own exponential and so the total
  Vec<kLanes> tops = Vec<kLanes>{} - __builtin_inff();
  int64_t whole = 0;
  for (; whole + kLanes <= n; whole += kLanes) tops = larger(F32::load<kLanes>(x + whole), tops);
  float top = -__builtin_inff();
  for (int lane = 0; lane < kLanes; ++lane) top = tops[lane] > top ? tops[lane] : top;
  for (int64_t d = whole; d < n; ++d) top = x[d] > top ? x[d] : top;
  each_vector(round_up(n, kLanes), x, to, [&](Vec<kLanes> v) { return exp_of_negative(v - top); });
  const float total = reduce(n, [&](int64_t d, auto w) {
    constexpr int N = decltype(w)::value;
    return F32::load<N>(to + d);
  });
  each_vector(round_up(n, kLanes), to, to, [&](Vec<kLanes> v) { return v / total; });
}

// f(function of a vector) with the map, so that the loop inside is compiled for it; any but softmax.
template <class F>
inline void with_map(FeatureMap map, const F& f) {
  using V = Vec<kLanes>;
  switch (map) {
    case FeatureMap::relu: return f([](V v) { return relu(v); });
    case FeatureMap::elu1: return f([](V v) { return v > 0.0f ? v + 1.0f : exp_of_negative(v); });
    case FeatureMap::relu2: return f([](V v) { return relu(v) * relu(v); });
    default: return f([](V v) { return v; });
  }
}

// to = map(x), n numbers.
inline void apply_map(FeatureMap map, const float* x, int64_t n, float* to) {
  if (map == FeatureMap::softmax) return softmax(x, n, to);
  with_map(map, [&](const auto& function) { each_vector(round_up(n, kLanes), x, to, function); });
}

// dx += the gradient of map at x for the upstream gradient g. `spare` holds a row.
inline void add_map_gradient(FeatureMap map, const float* x, const float* g, int64_t n, float* spare, float* dx) {
  using V = Vec<kLanes>;
  const auto add = [&](const float* at, const auto& slope) {
    for (int64_t d = 0; d < n; d += kLanes) {
      const V upstream = F32::load<kLanes>(g + d);
      F32::store<kLanes>(dx + d, F32::load<kLanes>(dx + d) + slope(F32::load<kLanes>(at + d), upstream));
    }
  };
  switch (map) {
    case FeatureMap::relu: return add(x, [](V v, V u) { return v > 0.0f ? u : V{}; });
    case FeatureMap::identity: return add(x, [](V, V u) { return u; });
    case FeatureMap::elu1: return add(x, [](V v, V u) { return v > 0.0f ? u : u * exp_of_negative(v); });
    case FeatureMap::relu2: return add(x, [](V v, V u) { return u * (2.0f * relu(v)); });
    case FeatureMap::softmax: {
      softmax(x, n, spare);
      const float mean = reduce(n, [&](int64_t d, auto w) {
        constexpr int N = decltype(w)::value;
        return F32::load<N>(spare + d) * F32::load<N>(g + d);
      });
      return add(spare, [&](V p, V u) { return p * (u - mean); });
    }
  }
}

// x turned by the angles of cos and sin, pair by pair.
inline Vec<kLanes> rotated(Vec<kLanes> x, const float* cos, const float* sin) {
  Vec<kLanes> signs;
  for (int i = 0; i < kLanes; ++i) signs[i] = i % 2 == 0 ? -1.0f : 1.0f;
  return x * F32::load<kLanes>(cos) + swap_pairs<kLanes>(x) * (F32::load<kLanes>(sin) * signs);
}

// Turns the pairs (x_0, x_1), (x_2, x_3), … of a row by the angles of cos and sin, each standing twice; or back.
template <bool back = false>
inline void rotate(float* x, const float* cos, const float* sin, int64_t n) {
  sweep<2>(n, [&](int64_t d, auto w) {
    constexpr int N = decltype(w)::value;
    Vec<N> signs;
    for (int i = 0; i < N; ++i) signs[i] = (i % 2 == 0) != back ? -1.0f : 1.0f;
    const Vec<N> v = F32::load<N>(x + d);
    F32::store<N>(x + d, v * F32::load<N>(cos + d) + swap_pairs<N>(v) * (F32::load<N>(sin + d) * signs));
  });
}

}  // namespace hhattn::HHATTN_ISA
