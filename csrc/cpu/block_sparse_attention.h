// out_i = Σ_j exp(s_ij − lse_i) v_j, s_ij = scale · q_i·k_j, one query block at a time over the key blocks of its list.
//
// Queries lie along the vectors: scores are kept transposed, [keys, queries], so that k and v are read as they stand, maxima
// and sums of a row need no sum across a vector, and only the query block is ever transposed, once for its whole list.
// Several key blocks are taken together until they make about kKeys keys; their scores stay in the cache.
#pragma once

#include "exp2.h"
#include "gemm.h"
#include "tiles.h"

namespace hhattn::HHATTN_ISA {

inline constexpr int64_t kKeys = 128;

struct SparseScratch {
  float *query, *scores, *sums, *top, *total, *keep, *tile;
  uint8_t* kept;
};

// What a thread needs, laid out from `base`; returns the floats taken.
inline int64_t lay_out(const BlockSparse& a, float* base, SparseScratch& t) {
  const int64_t queries = round_up(a.mask.bq, kLanes), keys = std_max(a.mask.bk, kKeys);
  float* at = base;
  const auto take = [&](int64_t n) {
    float* taken = at;
    at += round_up(n, 16);
    return taken;
  };
  t.query = take(a.dim * queries);
  t.scores = take(keys * queries);
  t.sums = take(a.mask.bq * round_up(a.v_dim, kLanes));
  t.top = take(queries);
  t.total = take(queries);
  t.keep = take(queries);
  t.tile = take(a.mask.bk * round_up(std_max(a.dim, a.v_dim), kLanes));
  t.kept = reinterpret_cast<uint8_t*>(take(round_up(a.mask.bk, 8) * round_up(queries, 8) / 32 + 1));
  return at - base;
}

// −inf over the masked of `keys` rows of scores; `kept` has the tile's bits by key.
inline void mask_scores(const uint8_t* kept, int64_t keys, int64_t queries, float* scores) {
  using U = VecU<kLanes>;
  const Vec<kLanes> nothing = Vec<kLanes>{} - __builtin_inff();
  for (int64_t j = 0; j < keys; ++j) {
    const uint8_t* row = kept + j * round_up(queries, 8) / 8;
    for (int64_t i = 0; i < queries; i += kLanes) {
      const U out = bits<U>((lane_bits(row, i) & lane_weights()) == 0);
      float* s = scores + j * queries + i;
      F32::store<kLanes>(s, bits<Vec<kLanes>>(select<kLanes>(out, bits<U>(nothing), read<U>(s))));
    }
  }
}

// Turns scores [keys, queries] into weights exp2(s − top), with the running top and total; whether any top moved.
inline bool soften(int64_t keys, int64_t queries, const SparseScratch& t) {
  using V = Vec<kLanes>;
  bool moved = false;
  for (int64_t i = 0; i < queries; i += kLanes) {
    float* s = t.scores + i;
    const V before = read<V>(t.top + i);
    V top[4] = {before, before, before, before};
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) top[u] = larger(read<V>(s + (j + u) * queries), top[u]);
    }
    for (; j < keys; ++j) top[0] = larger(read<V>(s + j * queries), top[0]);
    const V now = larger(larger(top[0], top[1]), larger(top[2], top[3]));
    const V shift = now == V{} - __builtin_inff() ? V{} : now;
    V sum[2] = {};
    for (j = 0; j + 2 <= keys; j += 2) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const V p = exp2(read<V>(s + (j + u) * queries) - shift);
        F32::store<kLanes>(s + (j + u) * queries, p);
        sum[u] += p;
      }
    }
    if (j < keys) {
      const V p = exp2(read<V>(s + j * queries) - shift);
      F32::store<kLanes>(s + j * queries, p);
      sum[0] += p;
    }
    const V keep = exp2(before - shift);
    F32::store<kLanes>(t.keep + i, keep);
    F32::store<kLanes>(t.total + i, read<V>(t.total + i) * keep + (sum[0] + sum[1]));
    F32::store<kLanes>(t.top + i, now);
    for (int lane = 0; lane < kLanes; ++lane) moved |= keep[lane] != 1.0f;
  }
  return moved;
}

// sums [queries, v_dim] += weightsᵀ [queries, keys] · v, for one key block.
inline void add_values(const BlockSparse& a, const Tile& v, const uint8_t* kept, const float* weights, int64_t queries,
                       int64_t rows, float* sums) {
  const int64_t width = round_up(a.v_dim, kLanes);
  if (!kept || all_finite(v, width)) {
    return multiply<A::by_columns, true>(rows, width, v.rows, weights, queries, v.data, v.stride, sums, width);
  }
  // a weight of 0 times inf or NaN is NaN, but a masked pair must not meet: slowly, pair by pair
  for (int64_t j = 0; j < v.rows; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      if (!(kept[j * round_up(queries, 8) / 8 + i / 8] >> i % 8 & 1)) continue;
      for (int64_t d = 0; d < width; ++d) sums[i * width + d] += weights[j * queries + i] * v.data[j * v.stride + d];
    }
  }
}

// One query block: batch entry b, head h, block number i.
inline void block_sparse_forward(const BlockSparse& a, int64_t b, int64_t h, int64_t i, float* scratch) {
  SparseScratch t;
  lay_out(a, scratch, t);
  const BlockMask& m = a.mask;
  const BlockRow row = m.row(b, h, i);
  const int64_t queries = round_up(m.bq, kLanes), width = round_up(a.v_dim, kLanes), first = i * m.bq;
  const int64_t rows = std_min(m.bq, a.q_len - first), kv_head = h / (a.heads / a.kv_heads);
  load_columns(a.q, b, first, h, rows, a.dim, a.scale * kLog2E, queries, t.query);
  memset(t.sums, 0, rows * width * sizeof(float));
  memset(t.total, 0, queries * sizeof(float));
  for (int64_t r = 0; r < queries; ++r) t.top[r] = -__builtin_inff();

  const int64_t blocks = row.partial + row.full, together = std_max(1, kKeys / m.bk);
  for (int64_t start = 0; start < blocks; start += together) {
    const int64_t stop = std_min(blocks, start + together);
    int64_t keys = 0;
    for (int64_t e = start; e < stop; ++e) {
      const int64_t at = column_of(row, e) * m.bk, n = std_min(m.bk, a.k_len - at);
      const Tile k = load_rows(a.k, b, at, kv_head, n, a.dim, 1, t.tile);
      float* scores = t.scores + keys * queries;
      multiply<A::by_rows, false>(n, queries, a.dim, k.data, k.stride, t.query, queries, scores, queries);
      if (e < row.partial) {
        transpose_bits(m.tile(row.tiles[e]), m.bq, m.bk, queries, t.kept);
        mask_scores(t.kept, n, queries, scores);
      }
      keys += n;
    }
    const bool moved = soften(keys, queries, t);
    if (moved && start > 0) scale_rows(t.keep, rows, width, t.sums);
    keys = 0;
    for (int64_t e = start; e < stop; ++e) {
      const int64_t at = column_of(row, e) * m.bk, n = std_min(m.bk, a.k_len - at);
      const Tile v = load_rows(a.v, b, at, kv_head, n, a.v_dim, kLanes, t.tile);
      const bool partial = e < row.partial;
      if (partial && together > 1) transpose_bits(m.tile(row.tiles[e]), m.bq, m.bk, queries, t.kept);
      add_values(a, v, partial ? t.kept : nullptr, t.scores + keys * queries, queries, rows, t.sums);
      keys += n;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const bool empty = t.total[r] == 0;
    t.keep[r] = empty ? 0 : 1 / t.total[r];
    a.lse[(b * a.heads + h) * a.q_len + first + r] =
        empty ? -__builtin_inff() : (t.top[r] + __builtin_log2f(t.total[r])) / kLog2E;
  }
  scale_rows(t.keep, rows, width, t.sums);
  store_rows(a.out, ((b * a.q_len + first) * a.heads + h) * a.v_dim, a.heads * a.v_dim, rows, a.v_dim, t.sums, width);
}

}  // namespace hhattn::HHATTN_ISA
