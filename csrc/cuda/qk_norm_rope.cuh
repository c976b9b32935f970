// What qk_norm_rope's forward and backward share: heads in registers, their norm, and their rotation.
//
// A head belongs to `lanes` threads, 1 to 32 of a warp, each of which has two vectors of it: neighbours in memory where pairs are
// neighbours, one of each half where pairs are (i, i + D/2); so a pair is in one thread. A norm over heads has a block for each token
// and a thread group for each head; norms of single heads have a group for each token, which goes through its heads one by one and
// keeps the token's angles.
#pragma once
#include "qk_norm_rope.h"
#include "rows.cuh"

namespace hh {

// Most threads of a block: 8192 channels where a norm is over them all; elsewhere blocks have just so many.
inline constexpr int GROUP_THREADS = 128;
template <int VEC, bool ACROSS>
inline constexpr int THREADS = ACROSS ? 4096 / VEC : GROUP_THREADS;

// How threads share a head.
struct HeadShape {
  uint32_t dim, lanes;  // lanes: a power of two

  HeadShape(int vec, int64_t dim) : dim(uint32_t(dim)), lanes(1) {
    while (2 * lanes * vec < dim) lanes *= 2;
  }
};

// A thread's part of a head. VECTORS: whole vectors of VEC channels, aligned; else channel by channel, any number of them. HALVES:
// of pairs (i, i + D/2).
template <int VEC, bool VECTORS, bool HALVES>
struct HeadPart {
  float v[2][VEC];

  HH_DEVICE static uint32_t lane(const HeadShape& s) { return threadIdx.x % s.lanes; }
  HH_DEVICE static uint32_t channel(const HeadShape& s, int j) {
    return HALVES ? j * (s.dim / 2) + lane(s) * VEC : (j * s.lanes + lane(s)) * VEC;
  }
  HH_DEVICE static bool inside(const HeadShape& s, int j, int i) {
    return HALVES ? lane(s) * VEC + i < s.dim / 2 : channel(s, j) + i < s.dim;
  }

  HH_DEVICE void fill(float value) {
    each([&](float& x) { x = value; });
  }
  template <class F, class... Others>
  HH_DEVICE void each(const F& f, const Others&... others) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < VEC; ++i) f(v[j][i], others.v[j][i]...);
  }
  // f(ja, ia, jb, ib): where the two of each pair are.
  template <class F>
  HH_DEVICE static void pairs(const F& f) {
#pragma unroll
    for (int j = 0; j < (HALVES ? 1 : 2); ++j)
#pragma unroll
      for (int i = 0; i < VEC; i += HALVES ? 1 : 2) f(j, i, HALVES ? 1 : j, HALVES ? i : i + 1);
  }

  // The head at in.data + at; 0 beyond it, and everywhere unless `there`.
  template <bool ONCE = false>
  HH_DEVICE void load(const In& in, int64_t at, const HeadShape& s, bool there = true) {
    fill(0.0f);
    if (!there) return;
    switch (in.dtype) {
#ifdef HH_ONE_DTYPE
      default: return load_as<HH_ONE_DTYPE, ONCE>(in.data, at, s);
#else
      case DType::f32: return load_as<float, ONCE>(in.data, at, s);
      case DType::f16: return load_as<f16, ONCE>(in.data, at, s);
      default: return load_as<bf16, ONCE>(in.data, at, s);
#endif
    }
  }
  HH_DEVICE void store(const Out& out, int64_t at, const HeadShape& s) const {
    switch (out.dtype) {
#ifdef HH_ONE_DTYPE
      default: return store_as<HH_ONE_DTYPE>(out.data, at, s);
#else
      case DType::f32: return store_as<float>(out.data, at, s);
      case DType::f16: return store_as<f16>(out.data, at, s);
      default: return store_as<bf16>(out.data, at, s);
#endif
    }
  }

 private:
  template <class T, bool ONCE>
  HH_DEVICE void load_as(const void* data, int64_t at, const HeadShape& s) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const T* p = static_cast<const T*>(data) + at + channel(s, j);
      if constexpr (VECTORS) {
        if (inside(s, j, 0)) load_vector<T, VEC, ONCE>(p, v[j]);
      } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i)
          if (inside(s, j, i)) v[j][i] = ptx::to_float(p[i]);
      }
    }
  }
  template <class T>
  HH_DEVICE void store_as(void* data, int64_t at, const HeadShape& s) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      T* p = static_cast<T*>(data) + at + channel(s, j);
      if constexpr (VECTORS) {
        if (inside(s, j, 0)) store_vector<T, VEC>(p, v[j]);
      } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i)
          if (inside(s, j, i)) p[i] = ptx::from_float<T>(v[j][i]);
      }
    }
  }
};

// Sums over what shares a norm: the block, or the lanes of a head. All threads of the block come. `partial` is as for row_sums.
template <bool ACROSS, int N>
HH_DEVICE void norm_sums(float (&x)[N], uint32_t lanes, float* partial) {
  if constexpr (ACROSS) {
    row_sums(x, partial);
  } else {
    for (uint32_t by = lanes / 2; by; by /= 2)
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], int(by));
  }
}

// Takes the mean from x for a layer norm; what lies beyond a head stays 0.
template <bool ACROSS, int VEC, bool VECTORS, bool HALVES>
HH_DEVICE void centre(HeadPart<VEC, VECTORS, HALVES>& x, const NormRopeArgs& a, const HeadShape& s, float count, bool there,
                      float* partial) {
  if (a.norm != Norm::layer) return;
  float sum[1] = {0};
  x.each([&](float& v) { sum[0] += v; });
  norm_sums<ACROSS>(sum, s.lanes, partial);
  const float mean = sum[0] / count;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < VEC; ++i) x.v[j][i] = there && x.inside(s, j, i) ? x.v[j][i] - mean : 0.0f;
}

// A token: which one is read, and whether it is rotated by which row of the tables.
struct Token {
  uint32_t b, s, at;
  bool rotates;
};
HH_DEVICE Token token_of(const NormRopeArgs& a, const Divisor& by_tokens, uint32_t row) {
  const uint32_t b = by_tokens(row), out = row - b * uint32_t(a.tokens);
  const uint32_t s = a.order ? uint32_t(a.order[out]) : out, at = s - uint32_t(a.start);
  return {b, s, at, a.cos.in.data && s >= a.start && at < a.video};
}

// ---- on the host
// The widest vectors that tensors of heads allow: 8, 4, or 0 for channel by channel.
class HeadVectors {
 public:
  explicit HeadVectors(const NormRopeArgs& a) : vectors_(a.dim), halves_(!a.interleaved && a.cos.in.data), dim_(a.dim) {
    fit(a.x);
    for (const Table* t : {&a.cos, &a.sin}) vectors_.fit(t->in.data, t->in.dtype, {t->batch, t->token, t->head}, false);
    for (const In* p : {&a.weight, &a.bias}) vectors_.fit(p->data, p->dtype, {a.dim}, false);
  }
  void fit(const Heads& x) { vectors_.fit(x.in.data, x.in.dtype, {x.batch, x.token, x.head}, true); }
  void fit(const Out& y) { vectors_.fit(y.data, y.dtype, {dim_}, true); }
  bool halves() const { return halves_; }
  int widest() const {
    for (int vec : {8, 4})
      if (vectors_.widest() >= vec && dim_ % (halves_ ? 2 * vec : vec) == 0) return vec;
    return 0;
  }

 private:
  Vectors vectors_;
  bool halves_;
  int64_t dim_;
};

// f<VEC, VECTORS, HALVES, ACROSS>() for a call.
template <class F>
int with_heads(const HeadVectors& vectors, bool across, const F& f) {
  const auto choose = [&]<int VEC, bool VECTORS>() {
    if (vectors.halves() && across) return f.template operator()<VEC, VECTORS, true, true>();
    if (vectors.halves()) return f.template operator()<VEC, VECTORS, true, false>();
    return across ? f.template operator()<VEC, VECTORS, false, true>() : f.template operator()<VEC, VECTORS, false, false>();
  };
#ifdef HH_VEC  // one kind of kernel, for tests that compile it often
  return choose.template operator()<4, HH_VEC == 4>();
#else
  switch (vectors.widest()) {
    case 8: return choose.template operator()<8, true>();
    case 4: return choose.template operator()<4, true>();
    default: return choose.template operator()<4, false>();
  }
#endif
}

// The threads of a block and the tokens it works on at a time.
struct HeadBlock {
  unsigned threads, tokens;

  HeadBlock(const HeadShape& s, int64_t heads, bool across)
      : threads(across ? (unsigned(heads) * s.lanes + 31) / 32 * 32 : GROUP_THREADS), tokens(across ? 1 : GROUP_THREADS / s.lanes) {}
  size_t shared(int sums) const { return threads > 32 ? sums * 32 * sizeof(float) : 0; }
};

}  // namespace hh
