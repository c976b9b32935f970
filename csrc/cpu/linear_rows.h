// Rows of linear attention's tokens: read ahead, mapped, rotated, weighed and summed.
#pragma once

#include "feature_map.h"
#include "tiles.h"

namespace hhattn::HHATTN_ISA {

inline constexpr int64_t kTokens = 64;  // worked on at a time

// Asks for rows that are copied soon: one head's lie far apart, where the hardware doesn't look ahead.
inline void prefetch_rows(const Heads& x, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim) {
  const int64_t size = size_of(x.in.dtype);
  for (int64_t s = begin; s < end; ++s) {
    prefetch(static_cast<const char*>(x.in.data) + (b * x.batch + s * x.token + h * x.head) * size, dim * size);
  }
}

// Asks for `rows` rows of a head, evenly over `times` calls between the steps of a product: memory answers while there is
// something to do, and a few lines at a time don't wait for one another. They come into the second cache, since the first holds
// the factors.
class Ahead {
 public:
  Ahead(const Heads& x, int64_t b, int64_t token, int64_t h, int64_t rows, int64_t dim, int64_t times)
      : row_(static_cast<const char*>(x.in.data) + (b * x.batch + token * x.token + h * x.head) * size_of(x.in.dtype)),
        stride_(x.token * size_of(x.in.dtype)), bytes_(dim * size_of(x.in.dtype)), rows_(rows), left_(rows), times_(times) {}
  void operator()() {
    for (due_ += rows_; due_ >= times_ && left_ > 0; due_ -= times_) ask();
  }
  void rest() {
    while (left_ > 0) ask();
  }

 private:
  void ask() {
    for (int64_t at = 0; at < bytes_; at += 64) __builtin_prefetch(row_ + at, 0, 2);
    row_ += stride_;
    --left_;
  }
  const char* row_;
  int64_t stride_, bytes_, rows_, left_, times_, due_ = 0;
};

// The rotary tables' rows of `rows` tokens.
struct Angles {
  const float *cos, *sin;
  int64_t stride;
};

// Rows of one head as they are stored, or as floats in whole vectors, and the map that they still have to go through.
struct MappedRows {
  const void* data;
  DType dtype;
  int64_t stride;
  FeatureMap map;
};

// `spare` holds the rows where they can't be used as they are stored.
inline MappedRows rows_of(const Heads& x, int64_t b, int64_t token, int64_t h, int64_t rows, int64_t dim, FeatureMap map,
                          float* spare) {
  if (dim % kLanes == 0 && map != FeatureMap::softmax) {
    const int64_t at = b * x.batch + token * x.token + h * x.head;
    return {static_cast<const char*>(x.in.data) + at * size_of(x.in.dtype), x.in.dtype, x.token, map};
  }
  const int64_t width = round_up(dim, kLanes);
  copy_rows(x, b, token, h, rows, dim, spare);
  if (map != FeatureMap::softmax) return {spare, DType::f32, width, map};
  for (int64_t r = 0; r < rows; ++r) {
    softmax(spare + r * width, dim, spare + r * width);
    for (int64_t d = dim; d < width; ++d) spare[r * width + d] = 0;
  }
  return {spare, DType::f32, width, FeatureMap::identity};
}

// f(r, load) for each row, where load(d) gives mapped elements from d on.
template <class F>
inline void each_row(const MappedRows& x, int64_t rows, const F& f) {
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    with_map(x.map, [&](const auto& map) {
      const auto* row = static_cast<const typename T::Element*>(x.data);
      for (int64_t r = 0; r < rows; ++r, row += x.stride) f(r, [&](int64_t d) { return map(T::template load<kLanes>(row + d)); });
    });
  });
}

// psi = R map(x), rows of whole vectors.
inline void map_and_rotate(const MappedRows& x, const Angles& angles, int64_t rows, int64_t width, float* psi) {
  if (!angles.cos) {
    return each_row(x, rows, [=](int64_t r, const auto& load) {
      for (int64_t d = 0; d < width; d += kLanes) F32::store<kLanes>(psi + r * width + d, load(d));
    });
  }
  each_row(x, rows, [=](int64_t r, const auto& load) {
    const float *cos = angles.cos + r * angles.stride, *sin = angles.sin + r * angles.stride;
    for (int64_t d = 0; d < width; d += kLanes) F32::store<kLanes>(psi + r * width + d, rotated(load(d), cos + d, sin + d));
  });
}

// to += Σ map(x); few tokens are summed apart, since rounding grows with a sum.
inline void add_mapped(const MappedRows& x, int64_t rows, int64_t width, float* spare, float* to) {
  memset(spare, 0, width * sizeof(float));
  each_row(x, rows, [=](int64_t, const auto& load) {
    for (int64_t d = 0; d < width; d += kLanes) F32::store<kLanes>(spare + d, F32::load<kLanes>(spare + d) + load(d));
  });
  for (int64_t d = 0; d < width; d += kLanes) F32::store<kLanes>(to + d, F32::load<kLanes>(to + d) + F32::load<kLanes>(spare + d));
}

// to[r] = map(x_r)·weights + eps; the weights fill whole vectors.
inline void weigh(const MappedRows& x, int64_t rows, int64_t width, const float* weights, float eps, float* to) {
  each_row(x, rows, [=](int64_t r, const auto& load) {
    Vec<kLanes> even = {}, odd = {};
    int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
      even += load(d) * F32::load<kLanes>(weights + d);
      odd += load(d + kLanes) * F32::load<kLanes>(weights + d + kLanes);
    }
    if (d < width) even += load(d) * F32::load<kLanes>(weights + d);
    to[r] = sum<kLanes>(even + odd) + eps;
  });
}

inline float dot(const float* a, const float* b, int64_t n) {
  return reduce(n, [&](int64_t i, auto w) {
    constexpr int N = decltype(w)::value;
    return F32::load<N>(a + i) * F32::load<N>(b + i);
  });
}

inline void add_scaled(const float* x, float factor, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    F32::store<kLanes>(to + i, F32::load<kLanes>(to + i) + F32::load<kLanes>(x + i) * factor);
  }
}

inline void scale(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) F32::store<kLanes>(x + i, F32::load<kLanes>(x + i) * factor);
}

inline void add_up(const float* x, int64_t n, float* to) {
  sweep(n, [&](int64_t i, auto w) {
    constexpr int N = decltype(w)::value;
    F32::store<N>(to + i, F32::load<N>(to + i) + F32::load<N>(x + i));
  });
}

// x [rows, n] contiguous into rows of whole vectors, zeros behind.
inline void pad_rows(const float* x, int64_t rows, int64_t n, float* to) {
  const int64_t width = round_up(n, kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(to + r * width, x + r * n, n * sizeof(float));
    memset(to + r * width + n, 0, (width - n) * sizeof(float));
  }
}

inline Heads matrix_of(const float* x, int64_t columns) { return {{x, DType::f32}, 0, columns, 0}; }

}  // namespace hhattn::HHATTN_ISA
