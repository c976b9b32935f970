// Linear attention in two halves, with a prefix over the chunks between them that is made elsewhere:
//
//   sums of a chunk     KV = Σ_j g_j · R_j ψ(k_j) v_jᵀ      K = Σ_j φ(k_j)
//   outputs of a chunk  out_p = (R_p ψ(q_p))ᵀ KV / (φ(q_p)ᵀ K + eps)
//
// and the gradients of both. kTokens tokens of a head are mapped and rotated at a time, in the nearest caches; what is made of
// them goes into one matrix product and is never written out. Heads that lie side by side in memory take turns at the same
// tokens, and each one's rows are asked for while those of the one before are multiplied.
#pragma once

#include "gemm.h"
#include "linear_rows.h"
#include "stream.h"

namespace hhattn::HHATTN_ISA {

// Scratch: matrices of kTokens rows, of D and Dv up to whole vectors, rows, and D x Dv matrices; of `matrix`, `weights` and `sum`
// there is one a head.
struct LinearScratch {
  float *raw, *psi, *keyed, *valued, *gradient, *cos, *sin, *phi, *spare, *weights, *factors, *matrix, *transposed, *sum;
};

inline int64_t lay_out(const LinearMaps& m, int64_t heads, float* base, LinearScratch& t) {
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
  t.weights = layout.take(heads * width);
  t.factors = layout.take(kTokens);
  t.matrix = layout.take(heads * m.dim * v_width);
  t.transposed = layout.take(m.v_dim * width);
  t.sum = layout.take(heads * width);
  return layout.taken();
}

inline int64_t block_linear_scratch(const LinearMaps& m, int64_t heads) {
  LinearScratch t;
  return lay_out(m, heads, nullptr, t);
}

// The tokens and the head that come after `rows` tokens from `at` on of the i-th head of a piece; no tokens at its end.
struct Next {
  int64_t token, head, rows;
};
inline Next next_of(const LinearPiece& p, int64_t at, int64_t rows, int64_t i) {
  if (i + 1 < p.heads) return {at, p.h + i + 1, rows};
  return {at + rows, p.h, std_min(kTokens, p.end - at - rows)};
}

inline Angles load_angles(const LinearMaps& m, int64_t token, int64_t rows, const LinearScratch& t) {
  if (!m.cos.in.data) return {};
  const bool floats = m.cos.in.dtype == DType::f32 && m.sin.in.dtype == DType::f32;
  if (floats && m.cos.token == m.sin.token && m.dim % kLanes == 0) {
    const int64_t at = token * m.cos.token;
    return {static_cast<const float*>(m.cos.in.data) + at, static_cast<const float*>(m.sin.in.data) + at, m.cos.token};
  }
  copy_rows(m.cos, 0, token, 0, rows, m.dim, t.cos);
  copy_rows(m.sin, 0, token, 0, rows, m.dim, t.sin);
  return {t.cos, t.sin, round_up(m.dim, kLanes)};
}

// R ψ of one row.
inline void map_and_rotate_row(const LinearMaps& m, const float* raw, const Angles& angles, int64_t r, float* psi) {
  apply_map(m.psi, raw, m.dim, psi);
  if (angles.cos) rotate(psi, angles.cos + r * angles.stride, angles.sin + r * angles.stride, m.dim);
}

// x [rows, width], each divided by its factor if there are any, into rows of n elements at `at`, `stride` apart: products, but
// where a reciprocal overflows.
inline void store_quotients(const LinearOutputs& a, int64_t at, int64_t rows, float* x, const float* factors) {
  const int64_t n = a.maps.v_dim, width = round_up(n, kLanes);
  with_dtype(a.out.dtype, [&](auto type) {
    using T = decltype(type);
    const bool streamed = a.stream && can_stream<T>(a.out.data, n) && n * sizeof(typename T::Element) % 64 == 0;
    auto* to = static_cast<typename T::Element*>(a.out.data) + at;
    for (int64_t r = 0; r < rows; ++r, to += a.heads * n, x += width) {
      float once = factors ? 1 / factors[r] : 1.0f;
      if (__builtin_isinf(once)) {
        divide(x, factors[r], width);
        once = 1;
      }
      sweep(n, [&](int64_t d, auto w) {
        constexpr int N = decltype(w)::value;
        put<T, N>(to + d, F32::load<N>(x + d) * once, streamed);
      });
    }
  });
}

// Adds a piece's i-th head's matrix and sum to kv [D, Dv] and k_sum [D] when it is this piece's turn; the first writes them.
inline void add_to_sums(const LinearMaps& m, const LinearPiece& p, const LinearScratch& t, int64_t i, float* kv, float* k_sum) {
  const int64_t v_width = round_up(m.v_dim, kLanes);
  const float *matrix = t.matrix + i * m.dim * v_width, *sum = t.sum + i * round_up(m.dim, kLanes);
  kv += i * p.step * m.dim * m.v_dim;
  k_sum += i * p.step * m.dim;
  wait_for_turn(p.turn + i * p.step, p.rank);
  if (p.rank == 0) {
    store_rows({kv, DType::f32}, 0, m.v_dim, m.dim, m.v_dim, matrix, v_width);
    memcpy(k_sum, sum, m.dim * sizeof(float));
  } else {
    for (int64_t d = 0; d < m.dim; ++d) add_up(matrix + d * v_width, m.v_dim, kv + d * m.v_dim);
    add_up(sum, m.dim, k_sum);
  }
  end_turn(p.turn + i * p.step, p.rank);
}

// Sums of the i-th head over `rows` tokens from `at` on.
inline void add_tokens(const LinearSums& a, const LinearPiece& p, int64_t i, int64_t at, int64_t rows, const Angles& angles,
                       const LinearScratch& t) {
  const LinearMaps& m = a.maps;
  const int64_t b = p.b, h = p.h + i, width = round_up(m.dim, kLanes), v_width = round_up(m.v_dim, kLanes);
  const MappedRows phi = rows_of(a.k, b, at, h, rows, m.dim, m.phi, t.raw);
  const MappedRows psi = m.phi == m.psi ? phi : rows_of(a.k, b, at, h, rows, m.dim, m.psi, t.keyed);
  add_mapped(phi, rows, width, t.spare, t.sum + i * width);
  map_and_rotate(psi, angles, rows, width, t.psi);
  for (int64_t r = 0; a.gate && r < rows; ++r) scale(t.psi + r * width, a.gate[(b * a.tokens + at + r) * a.heads + h], width);
  copy_rows(a.v, b, at, h, rows, m.v_dim, t.valued);
  const Next next = next_of(p, at, rows, i);
  const int64_t times = calls_of(m.dim, v_width, rows);
  Ahead k(a.k, b, next.token, next.head, next.rows, m.dim, times), v(a.v, b, next.token, next.head, next.rows, m.v_dim, times);
  multiply<A::by_columns, true>(m.dim, v_width, rows, t.psi, width, t.valued, v_width, t.matrix + i * m.dim * v_width, v_width,
                                [&] { k(), v(); });
  k.rest(), v.rest();
}

// Sums over a piece's tokens, into kv [D, Dv] and k_sum [D] of its chunk.
inline void block_linear_sums(const LinearSums& a, const LinearPiece& p, float* kv, float* k_sum, float* scratch) {
  const LinearMaps& m = a.maps;
  LinearScratch t;
  lay_out(m, p.heads, scratch, t);
  memset(t.matrix, 0, p.heads * m.dim * round_up(m.v_dim, kLanes) * sizeof(float));
  memset(t.sum, 0, p.heads * round_up(m.dim, kLanes) * sizeof(float));
  for (int64_t at = p.begin; at < p.end; at += kTokens) {
    const int64_t rows = std_min(kTokens, p.end - at);
    const Angles angles = load_angles(m, at, rows, t);
    for (int64_t i = 0; i < p.heads; ++i) add_tokens(a, p, i, at, rows, angles, t);
  }
  for (int64_t i = 0; i < p.heads; ++i) add_to_sums(m, p, t, i, kv, k_sum);
}

// Gradients of the above: of k and v (contiguous [B, S, H, D]), and of the gate [B, S, H].
inline void block_linear_sums_backward(const LinearSumsBackward& g, const LinearPiece& p, const float* dkv,
                                       const float* dk_sum, float* scratch) {
  const int64_t b = p.b, h = p.h, begin = p.begin, end = p.end;
  const LinearSums& a = g.forward;
  const LinearMaps& m = a.maps;
  LinearScratch t;
  lay_out(m, p.heads, scratch, t);
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
      map_and_rotate_row(m, t.raw + r * width, angles, r, psi);
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

// Outputs of the i-th head for `rows` tokens from `at` on.
inline void token_outputs(const LinearOutputs& a, const LinearPiece& p, int64_t i, int64_t at, int64_t rows, const Angles& angles,
                          const LinearScratch& t) {
  const LinearMaps& m = a.maps;
  const int64_t b = p.b, h = p.h + i, width = round_up(m.dim, kLanes), v_width = round_up(m.v_dim, kLanes);
  const MappedRows phi = rows_of(a.q, b, at, h, rows, m.dim, m.phi, t.raw);
  const MappedRows psi = m.phi == m.psi ? phi : rows_of(a.q, b, at, h, rows, m.dim, m.psi, t.keyed);
  if (a.normalize) weigh(phi, rows, width, t.weights + i * width, a.eps, t.factors);
  map_and_rotate(psi, angles, rows, width, t.psi);
  const Next next = next_of(p, at, rows, i);
  Ahead q(a.q, b, next.token, next.head, next.rows, m.dim, calls_of(rows, v_width, m.dim));
  multiply<A::by_rows, false>(rows, v_width, m.dim, t.psi, width, t.matrix + i * m.dim * v_width, v_width, t.gradient, v_width, q);
  q.rest();
  store_quotients(a, ((b * a.tokens + at) * a.heads + h) * m.v_dim, rows, t.gradient, a.normalize ? t.factors : nullptr);
}

// Outputs of a piece's tokens, out contiguous [B, S, H, Dv], from kv [D, Dv] and k_sum [D] of its chunk.
inline void block_linear_outputs(const LinearOutputs& a, const LinearPiece& p, const float* kv, const float* k_sum,
                                 float* scratch) {
  const LinearMaps& m = a.maps;
  const int64_t width = round_up(m.dim, kLanes), v_width = round_up(m.v_dim, kLanes);
  LinearScratch t;
  lay_out(m, p.heads, scratch, t);
  for (int64_t i = 0; i < p.heads; ++i) {
    pad_rows(kv + i * p.step * m.dim * m.v_dim, m.dim, m.v_dim, t.matrix + i * m.dim * v_width);
    pad_rows(k_sum + i * p.step * m.dim, 1, m.dim, t.weights + i * width);
  }
  for (int64_t at = p.begin; at < p.end; at += kTokens) {
    const int64_t rows = std_min(kTokens, p.end - at);
    const Angles angles = load_angles(m, at, rows, t);
    for (int64_t i = 0; i < p.heads; ++i) token_outputs(a, p, i, at, rows, angles, t);
  }
  end_stream();
}

// Gradients of the above: of q (contiguous [B, S, H, D]), and of kv and k_sum, summed like the sums.
//
// With u = dout / den and e = −(dout·out) / den:  dψ = R⁻¹ KV u,  dφ = e K,  dKV = Σ R ψ(q) uᵀ,  dK = Σ e φ(q).
inline void block_linear_outputs_backward(const LinearOutputsBackward& g, const LinearPiece& p, const float* kv,
                                          const float* k_sum, float* dkv, float* dk_sum, float* scratch) {
  const int64_t b = p.b, h = p.h, begin = p.begin, end = p.end;
  const LinearOutputs& a = g.forward;
  const LinearMaps& m = a.maps;
  LinearScratch t;
  lay_out(m, p.heads, scratch, t);
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
      map_and_rotate_row(m, t.raw + r * width, angles, r, t.psi + r * width);
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
  add_to_sums(m, p, t, 0, dkv, dk_sum);
}

}  // namespace hhattn::HHATTN_ISA
