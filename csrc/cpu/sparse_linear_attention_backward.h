// Gradients of the linear branch of sparse-linear attention. With u = dout / den and e = −(dout·out) / den:
//
//   query blocks   dφ(q) = KV_i u + e K_i                    dKV_i = Σ φ(q) uᵀ    dK_i = Σ e φ(q)
//   key blocks     dφ(k) = dKV_j v + dK_j    dv = dKV_jᵀ φ(k)    dKV_j = Σ_i dKV_i    dK_j = Σ_i dK_i
//
// Sums over i are those of the mask turned round. Each slice of v's columns adds to dφ(q) and dφ(k); slices take turns at a block,
// in ascending order, so that the sums are the same bits on any number of threads. e's terms and the parts come before all slices.
#pragma once

#include "sparse_linear_attention.h"

namespace hhattn::HHATTN_ISA {

// u [tokens, Dv up to whole vectors] and e [tokens] of the tokens [begin, end) of a query head; 0 where there are no weights,
// whatever dout.
inline void marginal_upstream(const MarginalBackward& g, int64_t b, int64_t h, int64_t begin, int64_t end, float* u, float* e) {
  const Marginal& a = g.forward;
  const int64_t v_width = round_up(a.v_dim, kLanes);
  const Heads out{{a.out.data, a.out.dtype}, a.q_len * a.heads * a.v_dim, a.heads * a.v_dim, a.v_dim};
  const float* den = a.den + (b * a.heads + h) * a.q_len;
  float row[256];
  for (int64_t s = begin; s < end; ++s, u += v_width, ++e) {
    if (__builtin_isinf(den[s])) {
      memset(u, 0, v_width * sizeof(float));
      *e = 0;
      continue;
    }
    copy_rows(g.dout, b, s, h, 1, a.v_dim, u);
    copy_rows(out, b, s, h, 1, a.v_dim, row);
    *e = -dot(u, row, a.v_dim) / den[s];
    divide(u, den[s], v_width);
  }
}

// Whether one of n floats, whole vectors, isn't 0; NaN isn't.
inline bool any_not_zero(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!(x[i] == 0)) return true;
  }
  return false;
}

// x's gradient for that of its mapped rows, for tokens [begin, end) of a head of `tokens` x `heads`; dx is contiguous.
inline void map_rows_backward(const Heads& x, FeatureMap phi, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim,
                              const float* g, const Out& dx, int64_t tokens, int64_t heads) {
  const int64_t width = round_up(dim, kLanes);
  float row[256], spare[256], gradient[256];
  for (int64_t s = begin; s < end; ++s, g += width) {
    copy_rows(x, b, s, h, 1, dim, row);
    memset(gradient, 0, sizeof gradient);
    // a token that meets nothing has no gradient, even where it is NaN
    if (any_not_zero(g, width)) add_map_gradient(phi, row, g, dim, spare, gradient);
    store_rows(dx, ((b * tokens + s) * heads + h) * dim, 0, 1, dim, gradient, width);
  }
}

// ---- whole blocks: weights ----

// Begins dphi_q and dphi_k with e's terms.
inline void marginal_weights_backward(const MarginalBackward& g, const MarginalHeads& p, const MarginalGradients& to, float* scratch) {
  const Marginal& a = g.forward;
  MarginalScratch t;
  lay_out(a, MarginalWork::weights, scratch, t);
  const int64_t width = round_up(a.dim, kLanes), lines = round_up(width, kLine) / kLine;
  block_sums(p.keys, nullptr, a.k_len, a.bk, width, t.k_states);
  for (int64_t r = 0; r < a.rep(); ++r) {
    const float *q = p.queries + r * a.q_len * width, *e = to.e + r * a.q_len;
    add_lines(p.pairs[r]->whole, lines, t.k_states, false, t.q_states, t.sums);
    float* dq = to.dphi_q + r * a.q_len * width;
    for (int64_t s = 0; s < a.q_len; ++s, dq += width) {
      each_of_lines(t.q_states, a.nq, s / a.bq, width, [&](int64_t d, Vec<kLanes> k) { F32::store<kLanes>(dq + d, k * e[s]); });
    }
    block_sums(q, e, a.q_len, a.bq, width, t.q_states);
    add_lines(p.pairs[r]->whole_turned, lines, t.q_states, r > 0, t.dk_states, t.sums);
  }
  float* dk = to.dphi_k;
  for (int64_t s = 0; s < a.k_len; ++s, dk += width) {
    each_of_lines(t.dk_states, a.nk, s / a.bk, width, [&](int64_t d, Vec<kLanes> x) { F32::store<kLanes>(dk + d, x); });
  }
}

// ---- blocks that aren't attended whole ----

// The weights' gradients u·v + e [keys, queries] of a part into t.gradients, masked by t.kept; t.upstream has u by column.
inline void part_gradients(const Marginal& a, const MarginalHeads& p, const Block& keys, const Block& block, const float* e,
                           const MarginalScratch& t) {
  const int64_t v_width = round_up(a.v_dim, kLanes), queries = round_up(a.bq, kLanes);
  const float* v = p.values + keys.first * v_width;
  multiply<A::by_rows, false>(keys.rows, queries, v_width, v, v_width, t.upstream, queries, t.gradients, queries);
  memset(t.total, 0, queries * sizeof(float));
  memcpy(t.total, e + block.first, block.rows * sizeof(float));
  for (int64_t j = 0; j < keys.rows; ++j) add_scaled(t.total, 1, queries, t.gradients + j * queries);
  clear_masked(t.kept, keys.rows, queries, t.gradients);
}

// Adds the parts of query block i of head r to dphi_q.
inline void marginal_part_queries(const MarginalBackward& g, const MarginalHeads& p, const MarginalGradients& to, int64_t r, int64_t i,
                                  float* scratch) {
  const Marginal& a = g.forward;
  const MarginalPairs& pairs = *p.pairs[r];
  if (pairs.rows[i] == pairs.rows[i + 1]) return;
  MarginalScratch t;
  lay_out(a, MarginalWork::parts, scratch, t);
  const int64_t width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes), queries = round_up(a.bq, kLanes);
  const Block block = block_of(i, a.bq, a.q_len);
  turn_rows(to.u + r * a.q_len * v_width, block, v_width, queries, t.upstream);
  for (int64_t n = pairs.rows[i]; n < pairs.rows[i + 1]; ++n) {
    const PartEntry& entry = pairs.by_row[n];
    const Block keys = block_of(entry.column, a.bk, a.k_len);
    keep_bits(a, entry, keys, t);
    part_gradients(a, p, keys, block, to.e + r * a.q_len, t);
    add_attended(t.kept, t.gradients, keys.rows, queries, block.rows, p.keys + keys.first * width, width,
                 to.dphi_q + (r * a.q_len + block.first) * width);
  }
}

// sums [keys, width] += weights · x, weights [keys, queries], x [rows, width]; masked pairs don't meet.
inline void add_attending(const uint8_t* kept, const float* weights, int64_t keys, int64_t queries, int64_t rows, const float* x,
                          int64_t width, float* sums) {
  if (all_finite(x, rows * width)) {
    return multiply<A::by_rows, true>(keys, width, rows, weights, queries, x, width, sums, width);
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      if (!(kept[j * round_up(queries, 8) / 8 + i / 8] >> i % 8 & 1)) continue;
      add_scaled(x + i * width, weights[j * queries + i], width, sums + j * width);
    }
  }
}

// Adds the parts of key block j, of all query heads, to dphi_k, and makes dv_sums of them.
inline void marginal_part_keys(const MarginalBackward& g, const MarginalHeads& p, const MarginalGradients& to, int64_t j,
                               float* scratch) {
  const Marginal& a = g.forward;
  MarginalScratch t;
  lay_out(a, MarginalWork::parts, scratch, t);
  const int64_t width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes), queries = round_up(a.bq, kLanes);
  const Block keys = block_of(j, a.bk, a.k_len);
  float *dk = to.dphi_k + keys.first * width, *dv = to.dv_sums + keys.first * v_width;
  memset(dv, 0, keys.rows * v_width * sizeof(float));
  for (int64_t r = 0; r < a.rep(); ++r) {
    const MarginalPairs& pairs = *p.pairs[r];
    const float *q = p.queries + r * a.q_len * width, *u = to.u + r * a.q_len * v_width;
    for (int64_t n = pairs.columns[j]; n < pairs.columns[j + 1]; ++n) {
      const PartEntry& entry = pairs.by_column[n];
      const Block block = block_of(entry.row, a.bq, a.q_len);
      turn_rows(q, block, width, queries, t.query);
      turn_rows(u, block, v_width, queries, t.upstream);
      keep_bits(a, entry, keys, t);
      part_weights(a, p, keys, t);
      part_gradients(a, p, keys, block, to.e + r * a.q_len, t);
      add_attending(t.kept, t.weights, keys.rows, queries, block.rows, u + block.first * v_width, v_width, dv);
      add_attending(t.kept, t.gradients, keys.rows, queries, block.rows, q + block.first * width, width, dk);
    }
  }
}

// ---- whole blocks: values ----

// State i of states [width, blocks, kLine], turned: [columns, width].
inline void turn_state(const float* states, int64_t blocks, int64_t i, int64_t width, int64_t columns, float* to) {
  const float* from = states + i * kLine;
  for (int64_t d = 0; d < width; d += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec<kLanes> square[kLanes];
      for (int n = 0; n < kLanes; ++n) square[n] = F32::load<kLanes>(from + (d + n) * pitch(blocks) * kLine + c);
      transpose(square);
      for (int n = 0; n < kLanes; ++n) F32::store<kLanes>(to + (c + n) * width + d, square[n]);
    }
  }
}

// x [tokens, D] += y's columns times each block's state, turned, block by block when it is the slice's turn. Blocks without `any`
// have no state: their rows of y may be NaN.
inline void add_turned(const float* states, int64_t tokens, int64_t size, const float* y, int64_t y_width, int64_t width,
                       int64_t columns, const uint8_t* any, int32_t* turns, int64_t slice, float* turned, float* x) {
  const int64_t blocks = (tokens + size - 1) / size;
  for (int64_t i = 0; i < blocks; ++i) {
    const auto [first, rows] = block_of(i, size, tokens);
    if (any[i]) turn_state(states, blocks, i, width, columns, turned);
    wait_for_turn(turns + i, static_cast<int32_t>(slice));
    if (any[i]) multiply<A::by_rows, true>(rows, width, columns, y + first * y_width, y_width, turned, width, x + first * width, width);
    end_turn(turns + i, static_cast<int32_t>(slice));
  }
}

// A slice of dv, contiguous [B, Sk, H_kv, Dv], and what it adds to dphi_q and dphi_k.
inline void marginal_gradients(const MarginalBackward& g, const MarginalHeads& p, const MarginalGradients& to, int64_t slice,
                               float* scratch) {
  const Marginal& a = g.forward;
  MarginalScratch t;
  lay_out(a, MarginalWork::gradients, scratch, t);
  const int64_t width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes), columns = slice_columns(a, slice);
  const int64_t at = slice * kLine;
  block_states(p.keys, a.k_len, a.bk, width, p.values + at, v_width, columns, t.k_states);
  for (int64_t r = 0; r < a.rep(); ++r) {
    const float *q = p.queries + r * a.q_len * width, *u = to.u + r * a.q_len * v_width + at;
    add_lines(p.pairs[r]->whole, width, t.k_states, false, t.q_states, t.sums);
    add_turned(t.q_states, a.q_len, a.bq, u, v_width, width, columns, p.pairs[r]->whole.any, to.q_turns + r * a.nq, slice, t.turned,
               to.dphi_q + r * a.q_len * width);
    block_states(q, a.q_len, a.bq, width, u, v_width, columns, t.q_states);
    add_lines(p.pairs[r]->whole_turned, width, t.q_states, r > 0, t.dk_states, t.sums);
    for (int64_t j = 0; j < a.nk; ++j) t.any[j] = (r > 0 && t.any[j]) || p.pairs[r]->whole_turned.any[j];
  }
  add_turned(t.dk_states, a.k_len, a.bk, p.values + at, v_width, width, columns, t.any, to.k_turns, slice, t.turned, to.dphi_k);
  for (int64_t j = 0; j < a.nk; ++j) {
    const auto [first, rows] = block_of(j, a.bk, a.k_len);
    if (t.any[j]) {
      multiply<A::by_rows, false>(rows, columns, a.dim, p.keys + first * width, width, t.dk_states + j * kLine, pitch(a.nk) * kLine,
                                  t.tile, kLine);
    } else {
      memset(t.tile, 0, rows * kLine * sizeof(float));
    }
    for (int64_t row = 0; to.dv_sums && row < rows; ++row) {
      add_up(to.dv_sums + (first + row) * v_width + at, columns, t.tile + row * kLine);
    }
    store_rows(g.dv, ((p.b * a.k_len + first) * a.kv_heads + p.kv_head) * a.v_dim + at, a.kv_heads * a.v_dim, rows,
               std_min(kLine, a.v_dim - at), t.tile, kLine);
  }
}

}  // namespace hhattn::HHATTN_ISA
