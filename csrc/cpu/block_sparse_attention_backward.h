// Gradients of block-sparse attention, one key block at a time over the query blocks that attend it:
//
//   p_ij = exp(s_ij − lse_i)    ds_ij = scale · p_ij (do_i·v_j − delta_i)
//   dv_j = Σ_i p_ij do_i        dk_j = Σ_i ds_ij q_i        dq_i = Σ_j ds_ij k_j
//
// dk and dv stay with the thread. dq is added to by one key block after another, in ascending order: each waits for its turn,
// so that the sums are the same bits on any number of threads. Key blocks begin in that order too, hence someone can always go on.
#pragma once

#include "exp2.h"
#include "gemm.h"
#include "tiles.h"

namespace hhattn::HHATTN_ISA {

struct SparseBackwardScratch {
  float *k, *k_columns, *v_columns, *dk, *dv, *q, *dout, *p, *ds;
};

inline int64_t lay_out(const BlockSparse& a, float* base, SparseBackwardScratch& t) {
  const int64_t keys = round_up(a.mask.bk, kLanes), k_width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes);
  Layout layout(base);
  t.k = layout.take(a.mask.bk * k_width);
  t.k_columns = layout.take(a.dim * keys);
  t.v_columns = layout.take(a.v_dim * keys);
  t.dk = layout.take(a.mask.bk * k_width);
  t.dv = layout.take(a.mask.bk * v_width);
  t.q = layout.take(a.mask.bq * k_width);
  t.dout = layout.take(a.mask.bq * v_width);
  t.p = layout.take(a.mask.bq * keys);
  t.ds = layout.take(a.mask.bq * keys);
  return layout.taken();
}

inline int64_t block_sparse_backward_scratch(const BlockSparse& a) {
  SparseBackwardScratch t;
  return lay_out(a, nullptr, t);
}

// scale · (dout·out − dlse) of the tokens [begin, end) of B·Sq, all heads.
inline void block_sparse_delta(const BlockSparse& a, const Heads& dout, const Heads& dlse, int64_t begin, int64_t end,
                               float* delta) {
  with_dtype(a.out.dtype, [&](auto type) {
    using T = decltype(type);
    using E = typename T::Element;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / a.q_len, s = row % a.q_len;
      for (int64_t h = 0; h < a.heads; ++h) {
        const E* x = static_cast<const E*>(a.out.data) + (row * a.heads + h) * a.v_dim;
        const E* y = static_cast<const E*>(dout.in.data) + b * dout.batch + s * dout.token + h * dout.head;
        const float product = reduce(a.v_dim, [&](int64_t d, auto w) {
          constexpr int N = decltype(w)::value;
          return T::template load<N>(x + d) * T::template load<N>(y + d);
        });
        const float of_lse = static_cast<const float*>(dlse.in.data)[b * dlse.batch + s * dlse.token + h * dlse.head];
        delta[(b * a.heads + h) * a.q_len + s] = a.scale * (product - of_lse);
      }
    }
  });
}

// Scores p and products ds = scale · dout·v, both [rows, keys], become weights and score gradients. `tile` [bq, bk] bits, or
// null for a full block; masked pairs become 0, whatever they were.
inline void weigh(const BlockMask& m, const uint8_t* tile, const float* lse, const float* delta, int64_t rows, int64_t keys,
                  float* p, float* ds) {
  using V = Vec<kLanes>;
  using U = VecU<kLanes>;
  const int64_t bytes = (m.bk + 7) / 8;
  for (int64_t r = 0; r < rows; ++r, p += keys, ds += keys) {
    const float bottom = lse[r] == -__builtin_inff() ? 0 : lse[r] * kLog2E, minus = delta[r];
    uint8_t kept[34] = {};  // a whole vector's bits may be read past the tile's own
    if (tile) memcpy(kept, tile + r * bytes, bytes);
    for (int64_t j = 0; j < keys; j += kLanes) {
      V weight = exp2(read<V>(p + j) - bottom);
      V gradient = weight * (read<V>(ds + j) - minus);
      if (tile) {
        const U attended = bits<U>((lane_bits(kept, j) & lane_weights()) != 0);
        weight = bits<V>(bits<U>(weight) & attended);
        gradient = bits<V>(bits<U>(gradient) & attended);
      }
      F32::store<kLanes>(p + j, weight);
      F32::store<kLanes>(ds + j, gradient);
    }
  }
}

// dv [keys, width] += pᵀ · dout, p [rows, stride]; masked pairs don't meet, since 0 times inf or NaN would be NaN.
inline void add_to_dv(const BlockMask& m, const uint8_t* tile, const float* p, int64_t stride, int64_t rows, int64_t keys,
                      const float* dout, int64_t width, float* dv) {
  if (!tile || all_finite(dout, rows * width)) {
    return multiply<A::by_columns, true>(keys, width, rows, p, stride, dout, width, dv, width);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < keys; ++j) {
      if (!(tile[r * ((m.bk + 7) / 8) + j / 8] >> j % 8 & 1)) continue;
      for (int64_t d = 0; d < width; ++d) dv[j * width + d] += p[r * stride + j] * dout[r * width + d];
    }
  }
}

// What query block `e.row` of head h adds: to dk and dv in t, and to dq.
inline void add_query_block(const BlockSparseBackward& g, const ColumnEntry& e, int64_t b, int64_t h, int64_t pair, int64_t n,
                            const SparseBackwardScratch& t) {
  const BlockSparse& a = g.forward;
  const BlockMask& m = a.mask;
  const int64_t keys = round_up(m.bk, kLanes), k_width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes);
  const int64_t first = e.row * m.bq, rows = std_min(m.bq, a.q_len - first), at = (b * a.heads + h) * a.q_len + first;
  const uint8_t* tile = e.tile < 0 ? nullptr : m.tile(e.tile);
  copy_rows(a.q, b, first, h, rows, a.dim, t.q);
  copy_rows(g.dout, b, first, h, rows, a.v_dim, t.dout);
  multiply<A::by_rows, false>(rows, keys, a.dim, t.q, k_width, t.k_columns, keys, t.p, keys);
  multiply<A::by_rows, false>(rows, keys, a.v_dim, t.dout, v_width, t.v_columns, keys, t.ds, keys);
  weigh(m, tile, a.lse + at, g.delta + at, rows, keys, t.p, t.ds);
  add_to_dv(m, tile, t.p, keys, rows, n, t.dout, v_width, t.dv);
  if (tile) make_finite(rows * k_width, t.q);  // an attended q that isn't finite has made ds NaN already
  multiply<A::by_columns, true>(n, k_width, rows, t.ds, keys, t.q, k_width, t.dk, k_width);

  int32_t* turn = g.turns + pair * m.nq + e.row;
  float* dq = g.dq_sum ? g.dq_sum + (pair * m.nq + e.row) * m.bq * k_width
                       : static_cast<float*>(g.dq.data) + ((b * a.q_len + first) * a.heads + h) * a.dim;
  wait_for_turn(turn, e.rank);
  multiply<A::by_rows, true>(rows, k_width, n, t.ds, keys, t.k, k_width, dq, g.dq_sum ? k_width : a.heads * a.dim);
  end_turn(turn, e.rank);
}

// Key block j of batch entry b and a key head; `pair` is the place of its first query head among the pairs at work.
inline void block_sparse_backward(const BlockSparseBackward& g, int64_t b, int64_t kv_head, int64_t j, int64_t pair,
                                  float* scratch) {
  const BlockSparse& a = g.forward;
  const BlockMask& m = a.mask;
  SparseBackwardScratch t;
  lay_out(a, scratch, t);
  const int64_t keys = round_up(m.bk, kLanes), k_width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes);
  const int64_t first = j * m.bk, n = std_min(m.bk, a.k_len - first), rep = a.heads / a.kv_heads;
  copy_rows(a.k, b, first, kv_head, n, a.dim, t.k);
  make_finite(n * k_width, t.k);  // as above
  load_columns(a.k, b, first, kv_head, n, a.dim, a.scale * kLog2E, keys, t.k_columns);
  load_columns(a.v, b, first, kv_head, n, a.v_dim, a.scale, keys, t.v_columns);
  memset(t.dk, 0, n * k_width * sizeof(float));
  memset(t.dv, 0, n * v_width * sizeof(float));
  for (int64_t r = 0; r < rep; ++r) {
    const int64_t h = kv_head * rep + r, mask = (m.batches == 1 ? 0 : b) * m.heads + (m.heads == 1 ? 0 : h);
    const int64_t* offset = g.offsets + mask * (m.nk + 1) + j;
    for (int64_t e = offset[0]; e < offset[1]; ++e) add_query_block(g, g.entries[e], b, h, pair + r, n, t);
  }
  store_rows(g.dk, ((b * a.k_len + first) * a.kv_heads + kv_head) * a.dim, a.kv_heads * a.dim, n, a.dim, t.dk, k_width);
  store_rows(g.dv, ((b * a.k_len + first) * a.kv_heads + kv_head) * a.v_dim, a.kv_heads * a.v_dim, n, a.v_dim, t.dv, v_width);
}

// Query block i of dq from its sum, which becomes 0 again.
inline void block_sparse_store_dq(const BlockSparseBackward& g, int64_t b, int64_t h, int64_t i, int64_t pair) {
  const BlockSparse& a = g.forward;
  const int64_t width = round_up(a.dim, kLanes), first = i * a.mask.bq, rows = std_min(a.mask.bq, a.q_len - first);
  float* sum = g.dq_sum + (pair * a.mask.nq + i) * a.mask.bq * width;
  store_rows(g.dq, ((b * a.q_len + first) * a.heads + h) * a.dim, a.heads * a.dim, rows, a.dim, sum, width);
  memset(sum, 0, rows * width * sizeof(float));
}

}  // namespace hhattn::HHATTN_ISA
