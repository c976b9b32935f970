// y = (norm(r)·weight + bias)·(1 + scale) + shift, r = residual + gate·x. A row is read from memory once; what is needed
// again stays in a float row in L1.
#pragma once

#include "norm.h"
#include "stream.h"

namespace hhattn::HHATTN_ISA {

inline int64_t row_offset(const Modulation& m, int64_t b, int64_t s) {
  return b * m.batch + s / m.tokens_per_row * m.row;
}

// Rows of modulation as floats, converted when they change: once a frame rather than once a token, where they are a frame's.
class Modulated {
 public:
  Modulated(const NormModulate& a, float* scratch) : a_(a), n_(a.channels), scratch_(scratch) {
    load_row(a.weight, 0, n_, 1.0f, weight());
    load_row(a.bias, 0, n_, 0.0f, bias());
  }
  static int64_t scratch(int64_t channels) { return 6 * channels; }

  void move_to(int64_t b, int64_t s) {
    const int64_t scale = row_offset(a_.scale, b, s), shift = row_offset(a_.shift, b, s), gate = row_offset(a_.gate, b, s);
    if (scale != scale_ || shift != shift_) fold(scale, shift);
    if (gate != gate_) load_row(a_.gate.in, gate, n_, 1.0f, this->gate());
    scale_ = scale;
    shift_ = shift;
    gate_ = gate;
  }

  // y = n·multiply + add for a normalised row n, and r = residual + gate·x.
  float* multiply() const { return scratch_; }
  float* add() const { return scratch_ + n_; }
  float* gate() const { return scratch_ + 2 * n_; }
  float* weight() const { return scratch_ + 3 * n_; }
  float* bias() const { return scratch_ + 4 * n_; }
  float* factor() const { return scratch_ + 5 * n_; }  // 1 + scale

 private:
  void fold(int64_t scale, int64_t shift) {
    load_row(a_.scale.in, scale, n_, 0.0f, factor());
    load_row(a_.shift.in, shift, n_, 0.0f, add());
    sweep(n_, [&](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> factor = F32::load<N>(this->factor() + i) + 1.0f;
      F32::store<N>(this->factor() + i, factor);
      F32::store<N>(multiply() + i, F32::load<N>(weight() + i) * factor);
      F32::store<N>(add() + i, F32::load<N>(bias() + i) * factor + F32::load<N>(add() + i));
    });
  }

  const NormModulate& a_;
  int64_t n_, scale_ = -1, shift_ = -1, gate_ = -1;
  float* scratch_;
};

// row = r, which is also written out with `write`, and the sum over it of f(r).
template <class X, bool write, class F>
inline float load_sum(const NormModulate& a, int64_t b, int64_t s, const float* gate, bool streamed, float* row, const F& f) {
  const auto* x = static_cast<const typename X::Element*>(a.x.in.data) + b * a.x.batch + s * a.x.token;
  if (!a.residual.in.data) {
    return reduce(a.channels, [&](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> r = X::template load<N>(x + i);
      F32::store<N>(row + i, r);
      return f(r);
    });
  }
  float sum = 0;
  with_dtype(a.residual.in.dtype, [&](auto type) {
    using R = decltype(type);
    using Element = typename R::Element;
    const auto* residual = static_cast<const Element*>(a.residual.in.data) + b * a.residual.batch + s * a.residual.token;
    auto* out = static_cast<Element*>(a.r.data) + (b * a.tokens + s) * a.channels;
    sum = reduce(a.channels, [&](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> r = R::template load<N>(residual + i) + X::template load<N>(x + i) * F32::load<N>(gate + i);
      F32::store<N>(row + i, r);
      if constexpr (write) put<R, N>(out + i, r, streamed);
      return f(r);
    });
  });
  return sum;
}

// row = r, and its statistics.
template <class X, bool write>
inline Stats load_stats(const NormModulate& a, int64_t b, int64_t s, const float* gate, bool streamed, float* row) {
  if (!a.layer) return rms(load_sum<X, write>(a, b, s, gate, streamed, row, [](auto r) { return r * r; }), a.channels, a.eps);
  return layer(load_sum<X, write>(a, b, s, gate, streamed, row, [](auto r) { return r; }), row, a.channels, a.eps);
}

inline void norm_modulate(const NormModulate& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = a.channels;
  Modulated m(a, scratch);
  float* row = scratch + Modulated::scratch(n);
  with_dtype(a.x.in.dtype, [&](auto type) {
    using X = decltype(type);
    const bool streamed = a.stream && can_stream<X>(a.y.data, n);
    bool streamed_r = false;
    with_dtype(a.r.dtype, [&](auto r) { streamed_r = a.stream && can_stream<decltype(r)>(a.r.data, n); });
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / a.tokens, s = index % a.tokens;
      m.move_to(b, s);
      const Stats stats = load_stats<X, true>(a, b, s, m.gate(), streamed_r, row);
      auto* y = static_cast<typename X::Element*>(a.y.data) + index * n;
      const float *multiply = m.multiply(), *add = m.add();
      sweep(n, [&](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        const Vec<N> normed = (F32::load<N>(row + i) - stats.mean) * stats.rstd;
        put<X, N>(y + i, normed * F32::load<N>(multiply + i) + F32::load<N>(add + i), streamed);
      });
    }
  });
  end_stream();
}

}  // namespace hhattn::HHATTN_ISA
