// Gradients of norm_modulate, from its inputs. With n = norm(r), g the gradient in y, and u = g·weight·(1 + scale):
//
//   dr += rstd·(u − n·mean(u·n) − mean(u))      dresidual = dr      dx = gate·dr
//   dshift = Σ g      dscale = Σ g·(n·weight + bias)      dbias = Σ g·(1 + scale)      dweight = Σ g·n·(1 + scale)      dgate = Σ dr·x
//
// Sums over the tokens that a row of modulation serves are kept in float rows until the next row's tokens come.
#pragma once

#include "norm_backward.h"
#include "norm_modulate.h"

namespace hhattn::HHATTN_ISA {

class ModulateBackward {
 public:
  ModulateBackward(const NormModulateBackward& a, int64_t piece, float* scratch)
      : a_(a), f_(a.forward), n_(f_.channels), m_(f_, scratch), turn_(a.turn, piece) {
    float* next = scratch + Modulated::scratch(n_);
    for (float** part : {&row_, &u_, &shift_, &scale_, &gate_, &weight_, &bias_}) {
      *part = next;
      next += n_;
    }
    begin_ = piece * a.piece;
    end_ = std_min(begin_ + a.piece, a.rows);
  }

  void run() {
    memset(shift_, 0, 5 * n_ * sizeof(float));
    with_dtype(f_.x.in.dtype, [&](auto x) {
      with_dtype(f_.residual.in.dtype, [&](auto r) { rows<decltype(x), decltype(r)>(); });
    });
    if (a_.dweight) turn_.add(weight_, n_, a_.dweight);
    if (a_.dbias) turn_.add(bias_, n_, a_.dbias);
    if (a_.turn) turn_.end();
    end_stream();
  }

 private:
  template <class X, class R>
  void rows() {
    const bool streamed = f_.stream && can_stream<X>(a_.dx.data, n_) && can_stream<R>(a_.dresidual.data, n_);
    for (int64_t index = begin_; index < end_; ++index) {
      const int64_t b = index / f_.tokens, s = index % f_.tokens;
      m_.move_to(b, s);
      const Stats stats = load_stats<X, false, F32>(f_, b, s, m_.gate(), false, row_);
      const float product = through_modulation<X>(b, s, stats);
      const NormGradient gradient = norm_gradient(stats.rstd, product, u_, n_, f_.layer);
      if (f_.residual.in.data) {
        to_residual<X, R>(index, b, s, gradient, streamed);
      } else {
        auto* dx = static_cast<typename X::Element*>(a_.dx.data) + index * n_;
        sweep(n_, [&, u = u_, n = row_](int64_t i, auto w) {
          constexpr int N = decltype(w)::value;
          put<X, N>(dx + i, gradient(F32::load<N>(u + i), F32::load<N>(n + i)), streamed);
        });
      }
      const bool last = index + 1 == end_;
      add(a_.dshift, b, s, last, shift_);
      add(a_.dscale, b, s, last, scale_);
      add(a_.dgate, b, s, last, gate_);
    }
  }

  // row = n, u, the sums with g; returns Σ u·n.
  template <class X>
  float through_modulation(int64_t b, int64_t s, Stats stats) {
    const auto* dy = static_cast<const typename X::Element*>(a_.dy.in.data) + b * a_.dy.batch + s * a_.dy.token;
    const float product = reduce(n_, [=, row = row_, multiply = m_.multiply(), weight = m_.weight(), bias = m_.bias(), u_row = u_,
                                      shift = shift_, scale = scale_](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> n = (F32::load<N>(row + i) - stats.mean) * stats.rstd, g = X::template load<N>(dy + i);
      const Vec<N> u = g * F32::load<N>(multiply + i), affine = n * F32::load<N>(weight + i) + F32::load<N>(bias + i);
      F32::store<N>(row + i, n);
      F32::store<N>(u_row + i, u);
      F32::store<N>(shift + i, F32::load<N>(shift + i) + g);
      F32::store<N>(scale + i, F32::load<N>(scale + i) + g * affine);
      return u * n;
    });
    if (a_.dweight || a_.dbias) {
      sweep(n_, [=, n = row_, factor = m_.factor(), weight = weight_, bias = bias_](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        const Vec<N> g = X::template load<N>(dy + i) * F32::load<N>(factor + i);
        F32::store<N>(bias + i, F32::load<N>(bias + i) + g);
        F32::store<N>(weight + i, F32::load<N>(weight + i) + g * F32::load<N>(n + i));
      });
    }
    return product;
  }

  template <class X, class R>
  void to_residual(int64_t index, int64_t b, int64_t s, NormGradient gradient, bool streamed) {
    using XElement = typename X::Element;
    using RElement = typename R::Element;
    const auto* x = static_cast<const XElement*>(f_.x.in.data) + b * f_.x.batch + s * f_.x.token;
    const auto* dr = a_.dr.in.data ? static_cast<const RElement*>(a_.dr.in.data) + b * a_.dr.batch + s * a_.dr.token : nullptr;
    auto* dx = static_cast<XElement*>(a_.dx.data) + index * n_;
    auto* dresidual = static_cast<RElement*>(a_.dresidual.data) + index * n_;
    sweep(n_, [=, u = u_, n = row_, gate = m_.gate(), sum = gate_](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      Vec<N> d = gradient(F32::load<N>(u + i), F32::load<N>(n + i));
      if (dr) d += R::template load<N>(dr + i);
      put<R, N>(dresidual + i, d, streamed);
      put<X, N>(dx + i, d * F32::load<N>(gate + i), streamed);
      F32::store<N>(sum + i, F32::load<N>(sum + i) + d * X::template load<N>(x + i));
    });
  }

  // The sum of a row's tokens is complete at the last of them, the piece's share of it at the end of the piece.
  void add(const ModulationGradient& m, int64_t b, int64_t s, bool last, float* sum) {
    if (!m.out.data || (!last && (s + 1) % m.tokens_per_row != 0)) return;
    const int64_t at = (b * m.batch + s / m.tokens_per_row) * n_;
    if (m.sums) {
      turn_.add(sum, n_, m.sums + at);
    } else {
      store_rows(m.out, at, 0, 1, n_, sum, 0);
    }
    memset(sum, 0, n_ * sizeof(float));
  }

  const NormModulateBackward& a_;
  const NormModulate& f_;
  int64_t n_, begin_, end_;
  Modulated m_;
  Turn turn_;
  float *row_, *u_, *shift_, *scale_, *gate_, *weight_, *bias_;
};

inline void norm_modulate_backward(const NormModulateBackward& a, int64_t piece, float* scratch) {
  ModulateBackward(a, piece, scratch).run();
}

}  // namespace hhattn::HHATTN_ISA
