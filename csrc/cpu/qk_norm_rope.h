// y = rotated(norm(x)·weight + bias) of one tensor [B, S, H, D]; called for q and for k. What shares a norm is read from memory
// into a float row in L1, and normed, rotated and written out from there, contiguous, in the order asked for.
#pragma once

#include "norm.h"
#include "stream.h"
#include "tiles.h"

namespace hhattn::HHATTN_ISA {

// (−, +, −, +, …): the sign that the other of a pair of neighbours comes with.
template <int N>
inline Vec<N> pair_signs() {
  Vec<N> signs;
  for (int i = 0; i < N; ++i) signs[i] = i % 2 == 0 ? -1.0f : 1.0f;
  return signs;
}

// The rotary angles of a token's head as floats. The sign that the formula has is in sin: −sin for the first of each pair.
class HeadAngles {
 public:
  HeadAngles(const NormRope& a, float* scratch) : a_(a), cos_(scratch), sin_(scratch + a.dim) {}
  static int64_t scratch(int64_t dim) { return 2 * dim; }

  bool by_head() const { return a_.cos.head != 0 || a_.sin.head != 0; }
  void load(int64_t b, int64_t video, int64_t h) {
    const int64_t half = a_.dim / 2;
    load_row(a_.cos.in, b * a_.cos.batch + video * a_.cos.token + h * a_.cos.head, a_.dim, 1.0f, cos_);
    load_row(a_.sin.in, b * a_.sin.batch + video * a_.sin.token + h * a_.sin.head, a_.dim, 0.0f, sin_);
    if (a_.interleaved) {
      sweep<2>(a_.dim, [&](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        F32::store<N>(sin_ + i, F32::load<N>(sin_ + i) * pair_signs<N>());
      });
    } else {
      sweep(half, [&](int64_t i, auto w) {
        constexpr int N = decltype(w)::value;
        F32::store<N>(sin_ + i, -F32::load<N>(sin_ + i));
      });
    }
  }
  const float* cos() const { return cos_; }
  const float* sin() const { return sin_; }

 private:
  const NormRope& a_;
  float *cos_, *sin_;
};

// row = the heads [first, first + count) of a token, and the sum over them of f(x).
template <class X, class F>
inline float load_heads(const NormRope& a, int64_t b, int64_t s, int64_t first, int64_t count, float* row, const F& f) {
  const auto* x = static_cast<const typename X::Element*>(a.x.data) + b * a.batch + s * a.token + first * a.head;
  const bool together = a.head == a.dim;
  const int64_t n = together ? count * a.dim : a.dim;
  float sum = 0;
  for (int64_t h = 0; h < (together ? 1 : count); ++h) {
    sum += reduce(n, [&](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> v = X::template load<N>(x + h * a.head + i);
      F32::store<N>(row + h * a.dim + i, v);
      return f(v);
    });
  }
  return sum;
}

template <class X>
inline Stats load_stats(const NormRope& a, int64_t b, int64_t s, int64_t first, int64_t count, float* row) {
  const int64_t n = count * a.dim;
  if (a.norm == Norm::rms) {
    return rms(load_heads<X>(a, b, s, first, count, row, [](auto v) { return v * v; }), n, a.eps);
  }
  const float sum = load_heads<X>(a, b, s, first, count, row, [](auto v) { return v; });
  return a.norm == Norm::layer ? layer(sum, row, n, a.eps) : Stats{};
}

// y = one head, n(i, Width) gives its normed elements; rotated unless there are no angles.
template <class X, class F>
inline void write_head(const NormRope& a, const HeadAngles* angles, typename X::Element* y, bool streamed, const F& n) {
  if (!angles) {
    return sweep(a.dim, [&](int64_t i, auto w) { put<X, decltype(w)::value>(y + i, n(i, w), streamed); });
  }
  const float *cos = angles->cos(), *sin = angles->sin();
  if (a.interleaved) {
    return sweep<2>(a.dim, [&](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      const Vec<N> v = n(i, w);
      put<X, N>(y + i, v * F32::load<N>(cos + i) + swap_pairs<N>(v) * F32::load<N>(sin + i), streamed);
    });
  }
  const int64_t half = a.dim / 2;
  sweep(half, [&](int64_t i, auto w) {
    constexpr int N = decltype(w)::value;
    const Vec<N> first = n(i, w), second = n(half + i, w);
    put<X, N>(y + i, first * F32::load<N>(cos + i) + second * F32::load<N>(sin + i), streamed);
    put<X, N>(y + half + i, second * F32::load<N>(cos + half + i) + first * F32::load<N>(sin + half + i), streamed);
  });
}

// Tokens of one tensor, a few heads at a time: the statistics of one wait for their sum, and the others' fill the wait.
template <class X>
class NormRopeForward {
 public:
  NormRopeForward(const NormRope& a, float* scratch)
      : a_(a), together_(a.across_heads ? a.heads : 1), width_(a.heads * a.dim), row_(scratch), rstd_(row_ + width_),
        mean_(rstd_ + a.heads), weight_(mean_ + a.heads), bias_(weight_ + together_ * a.dim), angles_(a, bias_ + together_ * a.dim) {
    load_row(a.weight, 0, together_ * a.dim, 1.0f, weight_);
    load_row(a.bias, 0, together_ * a.dim, 0.0f, bias_);
    streamed_ = a.stream && can_stream<X>(a.y.data, a.interleaved ? a.dim : a.dim / 2);
  }

  // Token `index` of B·S as they are written; `next` is asked for meanwhile.
  void token(int64_t index, int64_t next) {
    const int64_t b = index / a_.tokens, s = source(index), video = s - a_.start;
    const bool rotates = video >= 0 && video < a_.video;
    if (rotates && !angles_.by_head()) angles_.load(b, video, 0);
    const auto* ahead = static_cast<const Element*>(a_.x.data) + next / a_.tokens * a_.batch + source(next) * a_.token;
    const int64_t few = std_max(together_, kFew);
    for (int64_t begin = 0; begin < a_.heads; begin += few) {
      const int64_t end = std_min(begin + few, a_.heads);
      for (int64_t first = begin; first < end; first += together_) {
        const Stats stats = load_stats<X>(a_, b, s, first, together_, row_ + first * a_.dim);
        rstd_[first] = stats.rstd;
        mean_[first] = stats.mean;
      }
      for (int64_t h = begin; h < end; ++h) {
        if (rotates && angles_.by_head()) angles_.load(b, video, h);
        // Rows twice as long the hardware foresees by itself: asking for them too costs a quarter, measured.
        if (sizeof(Element) == 2) prefetch(ahead + h * a_.head, a_.dim * sizeof(Element));
        if (a_.bias.data || a_.norm == Norm::layer) {
          head<true>(index, h, rotates);
        } else {
          head<false>(index, h, rotates);
        }
      }
    }
  }

 private:
  using Element = typename X::Element;
  static constexpr int64_t kFew = 4;

  int64_t source(int64_t index) const { return a_.order ? a_.order[index % a_.tokens] : index % a_.tokens; }

  // Without a mean and a bias there are two loads and two operations less.
  template <bool shifted>
  void head(int64_t index, int64_t h, bool rotates) {
    const int64_t group = h % together_, first = h - group;
    auto* y = static_cast<Element*>(a_.y.data) + index * width_ + h * a_.dim;
    write_head<X>(a_, rotates ? &angles_ : nullptr, y, streamed_,
                  [row = row_ + h * a_.dim, weight = weight_ + group * a_.dim, bias = bias_ + group * a_.dim, rstd = rstd_[first],
                   mean = mean_[first]](int64_t i, auto w) {
                    constexpr int N = decltype(w)::value;
                    if constexpr (!shifted) return F32::load<N>(row + i) * rstd * F32::load<N>(weight + i);
                    const Vec<N> normed = (F32::load<N>(row + i) - mean) * rstd;
                    return normed * F32::load<N>(weight + i) + F32::load<N>(bias + i);
                  });
  }

  const NormRope& a_;
  int64_t together_, width_;
  float *row_, *rstd_, *mean_, *weight_, *bias_;
  HeadAngles angles_;
  bool streamed_;
};

inline void norm_rope(const NormRope& a, int64_t begin, int64_t end, float* scratch) {
  with_dtype(a.y.dtype, [&](auto type) {
    NormRopeForward<decltype(type)> forward(a, scratch);
    for (int64_t index = begin; index < end; ++index) forward.token(index, std_min(index + 1, end - 1));
  });
  end_stream();
}

}  // namespace hhattn::HHATTN_ISA
