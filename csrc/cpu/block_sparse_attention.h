// out_i = Σ_j exp(s_ij − lse_i) v_j, s_ij = scale · q_i·k_j, one query block at a time over the key blocks of its list.
//
// Queries lie along the vectors: scores are kept transposed, [keys, queries], so that k and v are read as they stand, maxima
// and sums of a row need no sum across a vector, and only the query block is ever transposed, once for its whole list.
// Keys are taken kKeys at a time, from one block or several; scores and values of that many stay in the nearest cache.
#pragma once

#include "exp2.h"
#include "gemm.h"
#include "tiles.h"

namespace hhattn::HHATTN_ISA {

inline constexpr int64_t kKeys = 64;

// Consecutive keys of one block: `keys` of them from token `at` on, the block's `first`-th and later. `tile` is null where all
// are attended.
struct Piece {
  int64_t at = 0, keys = 0, first = 0;
  const uint8_t* tile = nullptr;
};

// A query block's keys, up to kKeys at a time, in the order of its lists.
class Pieces {
 public:
  Pieces(const BlockMask& mask, const BlockRow& row, int64_t k_len) : mask_(mask), row_(row), k_len_(k_len) {}

  // The next pieces; false when there are none.
  bool next() {
    count = keys = 0;
    for (; entry_ < row_.partial + row_.full; ++entry_, first_ = 0) {
      const bool partial = entry_ < row_.partial;
      const int64_t start = (partial ? row_.columns[entry_] : row_.full_columns[entry_ - row_.partial]) * mask_.bk;
      for (const int64_t stop = std_min(mask_.bk, k_len_ - start); first_ < stop; first_ += piece[count++].keys) {
        const int64_t n = std_min(stop - first_, kKeys);
        if (keys + n > kKeys) return true;
        piece[count] = {start + first_, n, first_, partial ? mask_.tile(row_.tiles[entry_]) : nullptr};
        keys += n;
      }
    }
    return count > 0;
  }

  Piece piece[kKeys];
  int64_t count = 0, keys = 0;

 private:
  const BlockMask& mask_;
  const BlockRow row_;
  const int64_t k_len_;
  int64_t entry_ = 0, first_ = 0;
};

struct SparseScratch {
  float *query, *scores, *sums, *top, *total, *keep;
  uint8_t* kept;
};

// What a thread needs, laid out from `base`; returns the floats taken.
inline int64_t lay_out(const BlockSparse& a, float* base, SparseScratch& t) {
  const int64_t queries = round_up(a.mask.bq, kLanes);
  Layout layout(base);
  t.query = layout.take(a.dim * queries);
  t.scores = layout.take(kKeys * queries);
  t.sums = layout.take(a.mask.bq * round_up(a.v_dim, kLanes));
  t.top = layout.take(queries);
  t.total = layout.take(queries);
  t.keep = layout.take(queries);
  // every piece begins a row of bytes of its own, rounded up to 8 keys
  t.kept = reinterpret_cast<uint8_t*>(layout.take(8 * kKeys * round_up(queries, 8) / 32 + 1));
  return layout.taken();
}

inline int64_t block_sparse_scratch(const BlockSparse& a) {
  SparseScratch t;
  return lay_out(a, nullptr, t);
}

// −inf over the masked of `keys` rows of scores; `kept` has their bits by key.
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
    V sum[4] = {};
    for (j = 0; j + 4 <= keys; j += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const V p = exp2(read<V>(s + (j + u) * queries) - shift);
        F32::store<kLanes>(s + (j + u) * queries, p);
        sum[u] += p;
      }
    }
    for (; j < keys; ++j) {
      const V p = exp2(read<V>(s + j * queries) - shift);
      F32::store<kLanes>(s + j * queries, p);
      sum[0] += p;
    }
    const V keep = exp2(before - shift);
    F32::store<kLanes>(t.keep + i, keep);
    F32::store<kLanes>(t.total + i, read<V>(t.total + i) * keep + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    F32::store<kLanes>(t.top + i, now);
    for (int lane = 0; lane < kLanes; ++lane) moved |= keep[lane] != 1.0f;
  }
  return moved;
}

// sums [rows, width] += weightsᵀ · v, weights [keys, queries], v [keys, width]. Where bits of some pairs are 0, these pairs don't
// meet: 0 times inf or NaN would be NaN.
inline void add_attended(const uint8_t* kept, const float* weights, int64_t keys, int64_t queries, int64_t rows, const float* v,
                         int64_t width, float* sums) {
  if (!kept || all_finite(v, keys * width)) {
    return multiply<A::by_columns, true>(rows, width, keys, weights, queries, v, width, sums, width);
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      if (!(kept[j * round_up(queries, 8) / 8 + i / 8] >> i % 8 & 1)) continue;
      for (int64_t d = 0; d < width; ++d) sums[i * width + d] += weights[j * queries + i] * v[j * width + d];
    }
  }
}

// Tokens [begin, end) of one key head of k and v, as the kernel below reads them.
inline void block_sparse_pack(const BlockSparse& a, int64_t b, int64_t kv_head, int64_t begin, int64_t end, float* k, float* v) {
  copy_rows(a.k, b, begin, kv_head, end - begin, a.dim, k + begin * round_up(a.dim, kLanes));
  copy_rows(a.v, b, begin, kv_head, end - begin, a.v_dim, v + begin * round_up(a.v_dim, kLanes));
}

// One query block: batch entry b, head h, block number i; k and v are the packed ones of its key head.
inline void block_sparse_forward(const BlockSparse& a, int64_t b, int64_t h, int64_t i, const float* k, const float* v,
                                 float* scratch) {
  SparseScratch t;
  lay_out(a, scratch, t);
  const BlockMask& m = a.mask;
  const int64_t queries = round_up(m.bq, kLanes), k_width = round_up(a.dim, kLanes), width = round_up(a.v_dim, kLanes);
  const int64_t first = i * m.bq, rows = std_min(m.bq, a.q_len - first), bytes = round_up(queries, 8) / 8;
  load_columns(a.q, b, first, h, rows, a.dim, a.scale * kLog2E, queries, t.query);
  memset(t.sums, 0, rows * width * sizeof(float));
  memset(t.total, 0, queries * sizeof(float));
  for (int64_t r = 0; r < queries; ++r) t.top[r] = -__builtin_inff();

  Pieces pieces(m, m.row(b, h, i), a.k_len);
  while (pieces.next()) {
    float* scores = t.scores;
    uint8_t* kept = t.kept;
    for (int64_t p = 0; p < pieces.count; ++p) {
      const auto [at, keys, offset, tile] = pieces.piece[p];
      multiply<A::by_rows, false>(keys, queries, a.dim, k + at * k_width, k_width, t.query, queries, scores, queries);
      if (tile) {
        transpose_bits(tile, m.bq, m.bk, offset, keys, queries, kept);
        mask_scores(kept, keys, queries, scores);
      }
      scores += keys * queries;
      kept += round_up(keys, 8) * bytes;
    }
    if (soften(pieces.keys, queries, t)) scale_rows(t.keep, rows, width, t.sums);
    scores = t.scores;
    kept = t.kept;
    for (int64_t p = 0; p < pieces.count; ++p) {
      const auto [at, keys, offset, tile] = pieces.piece[p];
      add_attended(tile ? kept : nullptr, scores, keys, queries, rows, v + at * width, width, t.sums);
      scores += keys * queries;
      kept += round_up(keys, 8) * bytes;
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
