// Linear attention in two halves, with a prefix over the chunks between them that is made elsewhere:
//
//   sums of a chunk     KV = Σ_j g_j · R_j ψ(k_j) v_jᵀ      K = Σ_j φ(k_j)
//   outputs of a chunk  out_p = (R_p ψ(q_p))ᵀ KV / (φ(q_p)ᵀ K + eps)
//
// and the gradients of both. kTokens tokens of a head are mapped and rotated at a time, in the nearest caches; what is made of
// them goes into one matrix product and is never written out.
#pragma once

#include "feature_map.h"
#include "gemm.h"
#include "tiles.h"

namespace hhattn::HHATTN_ISA {

inline constexpr int64_t kTokens = 64;

// Scratch: matrices of kTokens rows, of D and Dv up to whole vectors, rows, and two D x Dv matrices.
struct LinearScratch {
  float *raw, *psi, *keyed, *valued, *gradient, *cos, *sin, *phi, *spare, *weights, *factors, *matrix, *transposed, *sum;
};

inline int64_t lay_out(const LinearMaps& m, float* base, LinearScratch& t) {
  const int64_t width = round_up(m.dim, kLanes), v_width = round_up(m.v_dim, kLanes);
  Layout layout(base);
  t.raw = layout.take(kTokens * width);
  t.psi = layout.take(kTokens * width);
  t.keyed = layout.take(kTokens * width);
  t.valued = layout.take(kTokens * v_width);
  t.gradient = layout.take(kTokens * v_width);
  t.cos = layout.take(kTokens * width);
  t.sin = layout.take(kTokens * width);
  t.phi = layout.take(width);
  t.spare = layout.take(width);
  t.weights = layout.take(width);
  t.factors = layout.take(kTokens);
  t.matrix = layout.take(m.dim * v_width);
  t.transposed = layout.take(m.v_dim * width);
  t.sum = layout.take(width);
  return layout.taken();
}

inline int64_t block_linear_scratch(const LinearMaps& m) {
  LinearScratch t;
  return lay_out(m, nullptr, t);
}

// Asks for rows that are copied soon: one head's lie far apart, where the hardware doesn't look ahead.
inline void prefetch_rows(const Heads& x, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim) {
  const int64_t size = size_of(x.in.dtype);
  for (int64_t s = begin; s < end; ++s) {
    prefetch(static_cast<const char*>(x.in.data) + (b * x.batch + s * x.token + h * x.head) * size, dim * size);
  }
}

// The rotary tables' rows of `rows` tokens.
struct Angles {
  const float *cos, *sin;
  int64_t stride;
};

inline Angles load_angles(const LinearMaps& m, int64_t token, int64_t rows, const LinearScratch& t) {
  if (!m.cos.in.data) return {};
  const bool floats = m.cos.in.dtype == DType::f32 && m.sin.in.dtype == DType::f32 && m.cos.token == m.sin.token;
  if (floats) {
    const int64_t at = token * m.cos.token;
    return {static_cast<const float*>(m.cos.in.data) + at, static_cast<const float*>(m.sin.in.data) + at, m.cos.token};
  }
  copy_rows(m.cos, 0, token, 0, rows, m.dim, t.cos);
  copy_rows(m.sin, 0, token, 0, rows, m.dim, t.sin);
  return {t.cos, t.sin, round_up(m.dim, kLanes)};
}

// R ψ of one row.
inline void map_and_rotate(const LinearMaps& m, const float* raw, const Angles& angles, int64_t r, float* psi) {
  apply_map(m.psi, raw, m.dim, psi);
  if (angles.cos) rotate(psi, angles.cos + r * angles.stride, angles.sin + r * angles.stride, m.dim);
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

// Adds t.matrix and t.sum to kv [D, Dv] and k_sum [D] when it is this piece's turn; the first writes them.
inline void add_to_sums(const LinearMaps& m, const LinearPiece& p, const LinearScratch& t, float* kv, float* k_sum) {
  const int64_t v_width = round_up(m.v_dim, kLanes);
  wait_for_turn(p.turn, p.rank);
  if (p.rank == 0) {
    store_rows({kv, DType::f32}, 0, m.v_dim, m.dim, m.v_dim, t.matrix, v_width);
    memcpy(k_sum, t.sum, m.dim * sizeof(float));
  } else {
    for (int64_t d = 0; d < m.dim; ++d) add_up(t.matrix + d * v_width, m.v_dim, kv + d * m.v_dim);
    add_up(t.sum, m.dim, k_sum);
  }
  end_turn(p.turn, p.rank);
}

// Sums over a piece's tokens, into kv [D, Dv] and k_sum [D] of its chunk.
inline void block_linear_sums(const LinearSums& a, const LinearPiece& p, float* kv, float* k_sum, float* scratch) {
  const auto [b, h, begin, end, rank, turn] = p;
  const LinearMaps& m = a.maps;
  LinearScratch t;
  lay_out(m, scratch, t);
  const int64_t width = round_up(m.dim, kLanes), v_width = round_up(m.v_dim, kLanes);
  memset(t.matrix, 0, m.dim * v_width * sizeof(float));
  memset(t.sum, 0, width * sizeof(float));
  for (int64_t at = begin; at < end; at += kTokens) {
    const int64_t rows = std_min(kTokens, end - at);
    const Angles angles = load_angles(m, at, rows, t);
    copy_rows(a.k, b, at, h, rows, m.dim, t.raw);
    copy_rows(a.v, b, at, h, rows, m.v_dim, t.valued);
    memset(t.spare, 0, width * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      apply_map(m.phi, t.raw + r * width, m.dim, t.phi);
      add_scaled(t.phi, 1, width, t.spare);
      map_and_rotate(m, t.raw + r * width, angles, r, t.psi + r * width);
      if (a.gate) scale(t.psi + r * width, a.gate[(b * a.tokens + at + r) * a.heads + h], width);
    }
    add_scaled(t.spare, 1, width, t.sum);
    prefetch_rows(a.k, b, h, at + rows, std_min(at + rows + kTokens, end), m.dim);
    prefetch_rows(a.v, b, h, at + rows, std_min(at + rows + kTokens, end), m.v_dim);
    multiply<A::by_columns, true>(m.dim, v_width, rows, t.psi, width, t.valued, v_width, t.matrix, v_width);
  }
  add_to_sums(m, p, t, kv, k_sum);
}

// Gradients of the above: of k and v (contiguous [B, S, H, D]), and of the gate [B, S, H].
inline void block_linear_sums_backward(const LinearSumsBackward& g, const LinearPiece& p, const float* dkv,
                                       const float* dk_sum, float* scratch) {
  const auto [b, h, begin, end, rank, turn] = p;
  const LinearSums& a = g.forward;
  const LinearMaps& m = a.maps;
  LinearScratch t;
  lay_out(m, scratch, t);
  const int64_t width = round_up(m.dim, kLanes), v_width = round_up(m.v_dim, kLanes);
  pad_rows(dkv, m.dim, m.v_dim, t.matrix);
  load_columns(matrix_of(dkv, m.v_dim), 0, 0, 0, m.dim, m.v_dim, 1, width, t.transposed);
  pad_rows(dk_sum, 1, m.dim, t.weights);
  for (int64_t at = begin; at < end; at += kTokens) {
    const int64_t rows = std_min(kTokens, end - at), place = (b * a.tokens + at) * a.heads + h;
    const Angles angles = load_angles(m, at, rows, t);
    copy_rows(a.k, b, at, h, rows, m.dim, t.raw);
    copy_rows(a.v, b, at, h, rows, m.v_dim, t.valued);
    prefetch_rows(a.k, b, h, at + rows, std_min(at + rows + kTokens, end), m.dim);
    prefetch_rows(a.v, b, h, at + rows, std_min(at + rows + kTokens, end), m.v_dim);
    multiply<A::by_rows, false>(rows, width, m.v_dim, t.valued, v_width, t.transposed, width, t.keyed, width);
    for (int64_t r = 0; r < rows; ++r) {
      float *psi = t.psi + r * width, *dpsi = t.keyed + r * width;
      map_and_rotate(m, t.raw + r * width, angles, r, psi);
      if (a.gate) {
        const float gate = a.gate[place + r * a.heads];
        g.dgate[place + r * a.heads] = dot(psi, dpsi, m.dim);
        scale(psi, gate, width);
        scale(dpsi, gate, width);
      }
      if (angles.cos) rotate<true>(dpsi, angles.cos + r * angles.stride, angles.sin + r * angles.stride, m.dim);
      memset(t.phi, 0, width * sizeof(float));
      add_map_gradient(m.psi, t.raw + r * width, dpsi, m.dim, t.spare, t.phi);
      add_map_gradient(m.phi, t.raw + r * width, t.weights, m.dim, t.spare, t.phi);
      memcpy(dpsi, t.phi, width * sizeof(float));
    }
    multiply<A::by_rows, false>(rows, v_width, m.dim, t.psi, width, t.matrix, v_width, t.gradient, v_width);
    store_rows(g.dk, place * m.dim, a.heads * m.dim, rows, m.dim, t.keyed, width);
    store_rows(g.dv, place * m.v_dim, a.heads * m.v_dim, rows, m.v_dim, t.gradient, v_width);
  }
}

// Outputs of a piece's tokens, out contiguous [B, S, H, Dv], from kv [D, Dv] and k_sum [D] of its chunk.
inline void block_linear_outputs(const LinearOutputs& a, const LinearPiece& p, const float* kv, const float* k_sum,
                                 float* scratch) {
  const auto [b, h, begin, end, rank, turn] = p;
  const LinearMaps& m = a.maps;
  LinearScratch t;
  lay_out(m, scratch, t);
  const int64_t width = round_up(m.dim, kLanes), v_width = round_up(m.v_dim, kLanes);
  pad_rows(kv, m.dim, m.v_dim, t.matrix);
  for (int64_t at = begin; at < end; at += kTokens) {
    const int64_t rows = std_min(kTokens, end - at);
    const Angles angles = load_angles(m, at, rows, t);
    copy_rows(a.q, b, at, h, rows, m.dim, t.raw);
    for (int64_t r = 0; r < rows; ++r) {
      if (a.normalize) {
        apply_map(m.phi, t.raw + r * width, m.dim, t.phi);
        t.factors[r] = dot(t.phi, k_sum, m.dim) + a.eps;
      }
      map_and_rotate(m, t.raw + r * width, angles, r, t.psi + r * width);
    }
    prefetch_rows(a.q, b, h, at + rows, std_min(at + rows + kTokens, end), m.dim);
    multiply<A::by_rows, false>(rows, v_width, m.dim, t.psi, width, t.matrix, v_width, t.gradient, v_width);
    for (int64_t r = 0; a.normalize && r < rows; ++r) divide(t.gradient + r * v_width, t.factors[r], v_width);
    const int64_t place = (b * a.tokens + at) * a.heads + h;
    store_rows(a.out, place * m.v_dim, a.heads * m.v_dim, rows, m.v_dim, t.gradient, v_width);
  }
}

// Gradients of the above: of q (contiguous [B, S, H, D]), and of kv and k_sum, summed like the sums.
//
// With u = dout / den and e = −(dout·out) / den:  dψ = R⁻¹ KV u,  dφ = e K,  dKV = Σ R ψ(q) uᵀ,  dK = Σ e φ(q).
inline void block_linear_outputs_backward(const LinearOutputsBackward& g, const LinearPiece& p, const float* kv,
                                          const float* k_sum, float* dkv, float* dk_sum, float* scratch) {
  const auto [b, h, begin, end, rank, turn] = p;
  const LinearOutputs& a = g.forward;
  const LinearMaps& m = a.maps;
  LinearScratch t;
  lay_out(m, scratch, t);
  const int64_t width = round_up(m.dim, kLanes), v_width = round_up(m.v_dim, kLanes);
  const Heads out{{a.out.data, a.out.dtype}, a.tokens * a.heads * m.v_dim, a.heads * m.v_dim, m.v_dim};
  memset(t.matrix, 0, m.dim * v_width * sizeof(float));
  memset(t.sum, 0, width * sizeof(float));
  load_columns(matrix_of(kv, m.v_dim), 0, 0, 0, m.dim, m.v_dim, 1, width, t.transposed);
  pad_rows(k_sum, 1, m.dim, t.weights);
  for (int64_t at = begin; at < end; at += kTokens) {
    const int64_t rows = std_min(kTokens, end - at);
    const Angles angles = load_angles(m, at, rows, t);
    copy_rows(a.q, b, at, h, rows, m.dim, t.raw);
    copy_rows(g.dout, b, at, h, rows, m.v_dim, t.gradient);
    if (a.normalize) copy_rows(out, b, at, h, rows, m.v_dim, t.valued);
    memset(t.spare, 0, width * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      if (a.normalize) {
        float* u = t.gradient + r * v_width;
        apply_map(m.phi, t.raw + r * width, m.dim, t.phi);
        const float den = dot(t.phi, t.weights, m.dim) + a.eps;
        t.factors[r] = -dot(u, t.valued + r * v_width, m.v_dim) / den;
        divide(u, den, v_width);
        add_scaled(t.phi, t.factors[r], width, t.spare);
      }
      map_and_rotate(m, t.raw + r * width, angles, r, t.psi + r * width);
    }
    add_scaled(t.spare, 1, width, t.sum);
    prefetch_rows(a.q, b, h, at + rows, std_min(at + rows + kTokens, end), m.dim);
    prefetch_rows(g.dout, b, h, at + rows, std_min(at + rows + kTokens, end), m.v_dim);
    multiply<A::by_rows, false>(rows, width, m.v_dim, t.gradient, v_width, t.transposed, width, t.keyed, width);
    multiply<A::by_columns, true>(m.dim, v_width, rows, t.psi, width, t.gradient, v_width, t.matrix, v_width);
    for (int64_t r = 0; r < rows; ++r) {
      float* dpsi = t.keyed + r * width;
      if (angles.cos) rotate<true>(dpsi, angles.cos + r * angles.stride, angles.sin + r * angles.stride, m.dim);
      memset(t.phi, 0, width * sizeof(float));
      add_map_gradient(m.psi, t.raw + r * width, dpsi, m.dim, t.spare, t.phi);
      if (a.normalize) {
        each_vector(width, t.weights, dpsi, [&](Vec<kLanes> w) { return w * t.factors[r]; });
        add_map_gradient(m.phi, t.raw + r * width, dpsi, m.dim, t.spare, t.phi);
      }
      memcpy(dpsi, t.phi, width * sizeof(float));
    }
    const int64_t place = (b * a.tokens + at) * a.heads + h;
    store_rows(g.dq, place * m.dim, a.heads * m.dim, rows, m.dim, t.keyed, width);
  }
  add_to_sums(m, p, t, dkv, dk_sum);
}

}  // namespace hhattn::HHATTN_ISA
