// y = (norm(r)·weight + bias)·(1 + scale) + shift, r = residual + gate·x. A row is read from memory once; what is needed
// again stays in a float row in L1. Modulation that serves several tokens is converted once into float rows as well; where every
// token has its own, that would be more traffic through L1 than the work itself, and it is used as it is read.
#pragma once

#include "norm.h"
#include "stream.h"
#include "tiles.h"

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

// row = r, which is also written out with `write`, and the sum over it of f(r). The gate is of type G.
template <class X, bool write, class G, class F>
inline float load_sum(const NormModulate& a, int64_t b, int64_t s, const typename G::Element* gate, bool streamed, float* row,
                      const F& f) {
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
      const Vec<N> r = R::template load<N>(residual + i) + X::template load<N>(x + i) * G::template load<N>(gate + i);
      F32::store<N>(row + i, r);
      if constexpr (write) put<R, N>(out + i, r, streamed);
      return f(r);
    });
  });
  return sum;
}

// row = r, and its statistics.
template <class X, bool write, class G>
inline Stats load_stats(const NormModulate& a, int64_t b, int64_t s, const typename G::Element* gate, bool streamed, float* row) {
  if (!a.layer) return rms(load_sum<X, write, G>(a, b, s, gate, streamed, row, [](auto r) { return r * r; }), a.channels, a.eps);
  return layer(load_sum<X, write, G>(a, b, s, gate, streamed, row, [](auto r) { return r; }), row, a.channels, a.eps);
}

// Every modulation is there, of x's dtype, and each token has its own.
inline bool one_a_token(const NormModulate& a) {
  for (const Modulation* m : {&a.scale, &a.shift, &a.gate}) {
    if (m == &a.gate && !a.residual.in.data) continue;
    if (!m->in.data || m->in.dtype != a.x.in.dtype || m->tokens_per_row != 1) return false;
  }
  return true;
}

class ModulateForward {
 public:
  ModulateForward(const NormModulate& a, float* scratch)
      : a_(a), n_(a.channels), m_(a, scratch), row_(scratch + Modulated::scratch(n_)) {}

  void run(int64_t begin, int64_t end) {
    const bool direct = one_a_token(a_);
    with_dtype(a_.x.in.dtype, [&](auto type) {
      using X = decltype(type);
      streamed_ = a_.stream && can_stream<X>(a_.y.data, n_);
      with_dtype(a_.r.dtype, [&](auto r) { streamed_r_ = a_.stream && can_stream<decltype(r)>(a_.r.data, n_); });
      for (int64_t index = begin; index < end; ++index) {
        const int64_t next = std_min(index + 1, end - 1);
        if (direct) {
          token<X>(index, next);
        } else {
          token_of_many<X>(index, next);
        }
      }
    });
    end_stream();
  }

 private:
  // Where the rows of token `index` begin; the residual's is x's where there is none.
  struct Sources {
    const char *x, *residual;
    int64_t size, residual_size;
    // While a row is written nothing is read: what the next one needs is asked for meanwhile.
    void prefetch(int64_t i) const {
      __builtin_prefetch(x + i * size);
      __builtin_prefetch(residual + i * residual_size);
    }
  };
  Sources sources(int64_t index) const {
    const auto row = [&](const Rows& rows) {
      const int64_t at = index / a_.tokens * rows.batch + index % a_.tokens * rows.token;
      return static_cast<const char*>(rows.in.data) + at * size_of(rows.in.dtype);
    };
    const Rows& residual = a_.residual.in.data ? a_.residual : a_.x;
    return {row(a_.x), row(residual), size_of(a_.x.in.dtype), size_of(residual.in.dtype)};
  }

  template <class X>
  void token_of_many(int64_t index, int64_t next) {
    const int64_t b = index / a_.tokens, s = index % a_.tokens;
    m_.move_to(b, s);
    const Stats stats = load_stats<X, true, F32>(a_, b, s, m_.gate(), streamed_r_, row_);
    auto* y = static_cast<typename X::Element*>(a_.y.data) + index * n_;
    sweep(n_, [=, row = row_, multiply = m_.multiply(), add = m_.add(), streamed = streamed_,
               ahead = sources(next)](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      ahead.prefetch(i);
      const Vec<N> normed = (F32::load<N>(row + i) - stats.mean) * stats.rstd;
      put<X, N>(y + i, normed * F32::load<N>(multiply + i) + F32::load<N>(add + i), streamed);
    });
  }

  template <class X>
  void token(int64_t index, int64_t next) {
    using Element = typename X::Element;
    const int64_t b = index / a_.tokens, s = index % a_.tokens;
    const auto own = [&](const Modulation& m) { return static_cast<const Element*>(m.in.data) + row_offset(m, b, s); };
    const Stats stats = load_stats<X, true, X>(a_, b, s, a_.residual.in.data ? own(a_.gate) : nullptr, streamed_r_, row_);
    auto* y = static_cast<Element*>(a_.y.data) + index * n_;
    sweep(n_, [=, row = row_, scale = own(a_.scale), shift = own(a_.shift), weight = m_.weight(), bias = m_.bias(),
               affine = a_.weight.data || a_.bias.data, streamed = streamed_, ahead = sources(next)](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      ahead.prefetch(i);
      Vec<N> normed = (F32::load<N>(row + i) - stats.mean) * stats.rstd;
      if (affine) normed = normed * F32::load<N>(weight + i) + F32::load<N>(bias + i);
      put<X, N>(y + i, normed * (X::template load<N>(scale + i) + 1.0f) + X::template load<N>(shift + i), streamed);
    });
  }

  const NormModulate& a_;
  int64_t n_;
  Modulated m_;
  float* row_;
  bool streamed_ = false, streamed_r_ = false;
};

inline void norm_modulate(const NormModulate& a, int64_t begin, int64_t end, float* scratch) {
  ModulateForward(a, scratch).run(begin, end);
}

}  // namespace hhattn::HHATTN_ISA
