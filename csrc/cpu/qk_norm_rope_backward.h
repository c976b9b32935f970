// Gradients of norm and rotation of q and k, from their inputs. With n = norm(x), g the gradient in y turned back by the angles,
// and u = g·weight:
//
//   dx = rstd·(u − n·mean(u·n) − mean(u))      dbias = Σ g      dweight = Σ g·n
//
// and, with v = n·weight + bias, dcos = Σ dy·v, dsin = Σ dy·(−v_b, v_a): sums over heads, over q and k, and over the batch
// where it shares a table.
#pragma once

#include "norm_backward.h"
#include "qk_norm_rope.h"

namespace hhattn::HHATTN_ISA {

// One of q and k.
class RopeBackward {
 public:
  // Rows of scratch of heads·dim: n, u, weight, bias, Σ g, Σ g·n.
  RopeBackward(const NormRopeGradients& a, float* scratch) : a_(a), f_(a.forward), angles_(f_, scratch) {
    width_ = f_.heads * f_.dim;
    together_ = f_.across_heads ? f_.heads : 1;
    float* next = scratch + HeadAngles::scratch(f_.dim);
    for (float** part : {&n_, &u_, &weight_, &bias_, &g_, &gn_}) {
      *part = next;
      next += width_;
    }
    for (int64_t h = 0; h < f_.heads; h += together_) {
      load_row(f_.weight, 0, together_ * f_.dim, 1.0f, weight_ + h * f_.dim);
      load_row(f_.bias, 0, together_ * f_.dim, 0.0f, bias_ + h * f_.dim);
    }
    memset(g_, 0, 2 * width_ * sizeof(float));
  }

  // Token `out` of the result; dcos and dsin are added to, [1 or H, D], unless null.
  void token(int64_t b, int64_t out, float* dcos, float* dsin) {
    with_dtype(f_.x.dtype, [&](auto type) { row<decltype(type)>(b, out, dcos, dsin); });
  }

  void end(Turn& turn) {
    const int64_t group = together_ * f_.dim;
    for (int64_t at = group; at < width_; at += group) {
      for (int64_t i = 0; i < group; ++i) {
        g_[i] += g_[at + i];
        gn_[i] += gn_[at + i];
      }
    }
    if (a_.dbias) turn.add(g_, group, a_.dbias);
    if (a_.dweight) turn.add(gn_, group, a_.dweight);
  }

 private:
  template <class X>
  void row(int64_t b, int64_t out, float* dcos, float* dsin) {
    using Element = typename X::Element;
    const int64_t s = f_.order ? f_.order[out] : out, video = s - f_.start;
    const bool rotates = video >= 0 && video < f_.video, by_head = angles_.by_head();
    if (rotates && !by_head) angles_.load(b, video, 0);
    const auto* dy = static_cast<const Element*>(a_.dy.in.data) + b * a_.dy.batch + out * a_.dy.token;
    auto* dx = static_cast<Element*>(a_.dx.data) + (b * f_.tokens + s) * width_;
    const bool streamed = f_.stream && can_stream<X>(a_.dx.data, f_.dim);
    for (int64_t first = 0; first < f_.heads; first += together_) {
      const int64_t n = together_ * f_.dim, at = first * f_.dim;
      const Stats stats = load_stats<X>(f_, b, s, first, together_, n_ + at);
      float product = 0;
      for (int64_t h = first; h < first + together_; ++h) {
        normalize(h, stats);
        if (rotates && by_head) angles_.load(b, video, h);
        if (rotates && dcos) add_angles<X>(h, dy + h * a_.dy.head, dcos + h * a_.table_head, dsin + h * a_.table_head);
        turn_back<X>(h, dy + h * a_.dy.head, rotates);
        product += through_affine(h);
      }
      const NormGradient gradient = norm_gradient(stats.rstd, product, u_ + at, n, f_.norm == Norm::layer);
      sweep(n, [&, u_row = u_ + at, normed = n_ + at](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        const Vec<N> u = F32::load<N>(u_row + i);
        put<X, N>(dx + at + i, f_.norm == Norm::none ? u : gradient(u, F32::load<N>(normed + i)), streamed);
      });
    }
  }

  void normalize(int64_t h, Stats stats) {
    sweep(f_.dim, [=, n = n_ + h * f_.dim](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      F32::store<N>(n + i, (F32::load<N>(n + i) - stats.mean) * stats.rstd);
    });
  }

  // f(i, j, Width): element i belongs with element j, both vectors; neighbours come as one vector, i = j.
  template <class F>
  void each_pair(const F& f) const {
    if (f_.interleaved) return sweep<2>(f_.dim, [&](int64_t i, auto w) { f(i, i, w); });
    const int64_t half = f_.dim / 2;
    sweep(half, [&](int64_t i, auto w) {
      f(i, half + i, w);
      f(half + i, i, w);
    });
  }

  // The elements that a vector's elements are rotated with; `at` is where they begin, as each_pair gives it.
  template <int N>
  Vec<N> others(Vec<N> v) const {
    if constexpr (N > 1) {
      if (f_.interleaved) return swap_pairs<N>(v);
    }
    return v;
  }

  // u = g, the gradient before the rotation: dy_a·cos_a + dy_b·sin_b, with the sign that sin has.
  template <class X>
  void turn_back(int64_t h, const typename X::Element* dy, bool rotates) {
    float* u = u_ + h * f_.dim;
    if (!rotates) {
      return sweep(f_.dim, [&](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        F32::store<N>(u + i, X::template load<N>(dy + i));
      });
    }
    const float *cos = angles_.cos(), *sin = angles_.sin();
    each_pair([&](int64_t i, int64_t j, auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> other = others<N>(X::template load<N>(dy + j) * F32::load<N>(sin + j));
      F32::store<N>(u + i, X::template load<N>(dy + i) * F32::load<N>(cos + i) + other);
    });
  }

  template <class X>
  void add_angles(int64_t h, const typename X::Element* dy, float* dcos, float* dsin) {
    const float *n = n_ + h * f_.dim, *weight = weight_ + h * f_.dim, *bias = bias_ + h * f_.dim;
    const auto v = [&](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      return F32::load<N>(n + i) * F32::load<N>(weight + i) + F32::load<N>(bias + i);
    };
    each_pair([&](int64_t i, int64_t j, auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> g = X::template load<N>(dy + i), other = others<N>(v(j, w));
      F32::store<N>(dcos + i, F32::load<N>(dcos + i) + g * v(i, w));
      const Vec<N> signs = f_.interleaved ? pair_signs<N>() : Vec<N>{} + (i < j ? -1.0f : 1.0f);
      F32::store<N>(dsin + i, F32::load<N>(dsin + i) + g * other * signs);
    });
  }

  // u = g·weight and the sums with g; returns Σ u·n.
  float through_affine(int64_t h) {
    const int64_t at = h * f_.dim;
    return reduce(f_.dim, [=, u = u_ + at, n = n_ + at, weight = weight_ + at, g_sum = g_ + at, gn_sum = gn_ + at](int64_t i,
                                                                                                              auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> g = F32::load<N>(u + i), normed = F32::load<N>(n + i), out = g * F32::load<N>(weight + i);
      F32::store<N>(u + i, out);
      F32::store<N>(g_sum + i, F32::load<N>(g_sum + i) + g);
      F32::store<N>(gn_sum + i, F32::load<N>(gn_sum + i) + g * normed);
      return out * normed;
    });
  }

  const NormRopeGradients& a_;
  const NormRope& f_;
  HeadAngles angles_;
  int64_t width_, together_;
  float *n_, *u_, *weight_, *bias_, *g_, *gn_;
};

inline void norm_rope_backward(const NormRopeBackward& a, int64_t piece, float* scratch) {
  const int64_t begin = piece * a.piece, end = std_min(begin + a.piece, a.batches * a.q.forward.tokens);
  RopeBackward q(a.q, scratch), k(a.k, scratch + a.q.scratch());
  float* dcos = a.dcos.data ? scratch + a.q.scratch() + a.k.scratch() : nullptr;
  float* dsin = dcos ? dcos + a.table_width : nullptr;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t out = index / a.batches, b = index % a.batches;
    if (dcos && (b == 0 || a.table_batch)) memset(dcos, 0, 2 * a.table_width * sizeof(float));
    q.token(b, out, dcos, dsin);
    k.token(b, out, dcos, dsin);
    const int64_t video = (a.q.forward.order ? a.q.forward.order[out] : out) - a.q.forward.start;
    if (!dcos || video < 0 || video >= a.q.forward.video || (b + 1 < a.batches && !a.table_batch)) continue;
    const int64_t at = b * a.table_batch + video * a.table_width;
    store_rows(a.dcos, at, 0, 1, a.table_width, dcos, 0);
    store_rows(a.dsin, at, 0, 1, a.table_width, dsin, 0);
  }
  if (a.turn) {
    Turn turn(a.turn, piece);
    q.end(turn);
    k.end(turn);
    turn.end();
  }
  end_stream();
}

}  // namespace hhattn::HHATTN_ISA
