// y = rotated(norm(x)·weight + bias) of one tensor [B, S, H, D]; called for q and for k. A token's heads are gathered into
// one float row in L1, normed and rotated there, and written out contiguous, in the order asked for.
#pragma once

#include "norm.h"
#include "simd.h"

namespace hhattn::HHATTN_ISA {

// row = (row − mean)·rstd·weight + bias; weight and bias are float rows of n.
inline void apply_norm(float* row, int64_t n, Stats stats, const float* weight, const float* bias) {
  sweep(n, [&](int64_t i, auto w) {
    constexpr int N = decltype(w)::value;
    const Vec<N> normed = (F32::load<N>(row + i) - stats.mean) * stats.rstd;
    F32::store<N>(row + i, normed * F32::load<N>(weight + i) + F32::load<N>(bias + i));
  });
}

// (a, b) → (a·cos_a − b·sin_a, b·cos_b + a·sin_b) for neighbours. The sign is in sin: even lanes hold −sin.
inline void rotate_interleaved(float* x, const float* cos, const float* signed_sin, int64_t dim) {
  sweep<2>(dim, [&](int64_t i, auto w) {
    constexpr int N = decltype(w)::value;
    const Vec<N> v = F32::load<N>(x + i);
    F32::store<N>(x + i, v * F32::load<N>(cos + i) + swap_pairs<N>(v) * F32::load<N>(signed_sin + i));
  });
}

// The same for pairs (i, i + D/2). The sign is in sin: the first half holds −sin.
inline void rotate_half(float* x, const float* cos, const float* signed_sin, int64_t dim) {
  const int64_t half = dim / 2;
  sweep(half, [&](int64_t i, auto w) {
    constexpr int N = decltype(w)::value;
    const Vec<N> a = F32::load<N>(x + i), b = F32::load<N>(x + half + i);
    F32::store<N>(x + i, a * F32::load<N>(cos + i) + b * F32::load<N>(signed_sin + i));
    F32::store<N>(x + half + i, b * F32::load<N>(cos + half + i) + a * F32::load<N>(signed_sin + half + i));
  });
}

inline void load_angles(const NormRope& a, int64_t b, int64_t s, int64_t h, float* cos, float* signed_sin) {
  load_row(a.cos.in, b * a.cos.batch + s * a.cos.token + h * a.cos.head, a.dim, 1.0f, cos);
  load_row(a.sin.in, b * a.sin.batch + s * a.sin.token + h * a.sin.head, a.dim, 0.0f, signed_sin);
  if (a.interleaved) {
    for (int64_t i = 0; i < a.dim; i += 2) signed_sin[i] = -signed_sin[i];
  } else {
    for (int64_t i = 0; i < a.dim / 2; ++i) signed_sin[i] = -signed_sin[i];
  }
}

inline void norm_rope(const NormRope& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = a.heads * a.dim, group = a.across_heads ? width : a.dim;
  float *row = scratch, *weight = row + width, *bias = weight + width, *cos = bias + width, *sin = cos + a.dim;
  load_row(a.weight, 0, group, 1.0f, weight);
  load_row(a.bias, 0, group, 0.0f, bias);
  const bool by_head = a.cos.head != 0 || a.sin.head != 0;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / a.tokens, out = index % a.tokens, s = a.order ? a.order[out] : out;
    for (int64_t h = 0; h < a.heads; ++h) {
      load_row(a.x, b * a.batch + s * a.token + h * a.head, a.dim, 0.0f, row + h * a.dim);
    }
    if (a.norm != Norm::none) {
      for (float* part = row; part < row + width; part += group) {
        apply_norm(part, group, statistics(part, group, a.norm == Norm::layer, a.eps), weight, bias);
      }
    }
    const int64_t at = s - a.start;
    if (at >= 0 && at < a.video) {
      for (int64_t h = 0; h < a.heads; ++h) {
        if (h == 0 || by_head) load_angles(a, b, at, h, cos, sin);
        (a.interleaved ? rotate_interleaved : rotate_half)(row + h * a.dim, cos, sin, a.dim);
      }
    }
    with_dtype(a.y.dtype, [&](auto type) {
      using T = decltype(type);
      auto* y = static_cast<typename T::Element*>(a.y.data) + index * width;
      sweep(width, [&](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        T::template store<N>(y + i, F32::load<N>(row + i));
      });
    });
  }
}

}  // namespace hhattn::HHATTN_ISA
