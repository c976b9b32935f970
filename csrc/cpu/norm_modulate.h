// y = (norm(r)·weight + bias)·(1 + scale) + shift, r = residual + gate·x. A row is read from memory once; what is needed
// again stays in a float row in L1.
#pragma once

#include "norm.h"
#include "simd.h"

namespace hhattn::HHATTN_ISA {

struct NormModulateScratch {
  float *row, *gate, *multiply, *add;
};

inline int64_t row_offset(const Modulation& m, int64_t b, int64_t s) {
  return b * m.batch + s / m.tokens_per_row * m.row;
}

// The affine part and the modulation folded into one multiply and one add for each channel.
inline void fold_modulation(const NormModulate& a, int64_t scale_at, int64_t shift_at, const NormModulateScratch& t) {
  const int64_t n = a.channels;
  load_row(a.scale.in, scale_at, n, 0.0f, t.multiply);
  load_row(a.shift.in, shift_at, n, 0.0f, t.add);
  for (int64_t i = 0; i < n; ++i) t.multiply[i] += 1.0f;
  if (a.bias.data) {
    load_row(a.bias, 0, n, 0.0f, t.row);
    for (int64_t i = 0; i < n; ++i) t.add[i] += t.row[i] * t.multiply[i];
  }
  if (a.weight.data) {
    load_row(a.weight, 0, n, 1.0f, t.row);
    for (int64_t i = 0; i < n; ++i) t.multiply[i] *= t.row[i];
  }
}

// row = r; r is also written out when there is a residual.
inline void sum_residual(const NormModulate& a, int64_t b, int64_t s, const NormModulateScratch& t) {
  const int64_t x_at = b * a.x.batch + s * a.x.token;
  if (!a.residual.in.data) return load_row(a.x.in, x_at, a.channels, 0.0f, t.row);
  const int64_t residual_at = b * a.residual.batch + s * a.residual.token;
  const int64_t out_at = (b * a.tokens + s) * a.channels;
  with_dtype(a.x.in.dtype, [&](auto x_type) {
    with_dtype(a.residual.in.dtype, [&](auto residual_type) {
      using X = decltype(x_type);
      using R = decltype(residual_type);
      const auto* x = static_cast<const typename X::Element*>(a.x.in.data) + x_at;
      const auto* residual = static_cast<const typename R::Element*>(a.residual.in.data) + residual_at;
      auto* out = static_cast<typename R::Element*>(a.r.data) + out_at;
      sweep(a.channels, [&](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        const Vec<N> gated = X::template load<N>(x + i) * F32::load<N>(t.gate + i);
        const Vec<N> r = R::template load<N>(residual + i) + gated;
        F32::store<N>(t.row + i, r);
        R::template store<N>(out + i, r);
      });
    });
  });
}

inline void norm_modulate(const NormModulate& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = a.channels;
  const NormModulateScratch t{scratch, scratch + n, scratch + 2 * n, scratch + 3 * n};
  int64_t scale_at = -1, shift_at = -1, gate_at = -1;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / a.tokens, s = index % a.tokens;
    const int64_t scale_now = row_offset(a.scale, b, s), shift_now = row_offset(a.shift, b, s);
    if (scale_now != scale_at || shift_now != shift_at) fold_modulation(a, scale_now, shift_now, t);
    if (const int64_t now = row_offset(a.gate, b, s); now != gate_at) {
      load_row(a.gate.in, now, n, 1.0f, t.gate);
      gate_at = now;
    }
    scale_at = scale_now;
    shift_at = shift_now;
    sum_residual(a, b, s, t);
    const Stats stats = statistics(t.row, n, a.layer, a.eps);
    with_dtype(a.y.dtype, [&](auto type) {
      using T = decltype(type);
      auto* y = static_cast<typename T::Element*>(a.y.data) + index * n;
      sweep(n, [&](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        const Vec<N> normed = (F32::load<N>(t.row + i) - stats.mean) * stats.rstd;
        T::template store<N>(y + i, normed * F32::load<N>(t.multiply + i) + F32::load<N>(t.add + i));
      });
    });
  }
}

}  // namespace hhattn::HHATTN_ISA
