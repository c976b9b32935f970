// The linear branch of sparse-linear attention, out_i = φ(q_i)ᵀ KV_i / (φ(q_i)ᵀ K_i + eps) with sums over a query block's own list:
//
//   states of key blocks     KV_j = Σ φ(k) vᵀ     K_j = Σ φ(k)          products of bk rows
//   states of query blocks   KV_i = Σ_j KV_j      K_i = Σ_j K_j         sums of subsets, nothing else grows with the pairs
//   outputs                  products of bq rows with their block's state
//
// States of all blocks at once would be larger than q, k and v by D / bk. So kSlice columns of v are worked on at a time, for which a
// thread holds D x kSlice floats a block; the weights come first, since every slice is divided by them. Elements of a state lie
// apart, [D, blocks, kSlice], so that the same element of all blocks is summed where it stands.
//
// Blocks that aren't attended whole have no state: their weights are computed pair by pair, as in softmax attention.
#pragma once

#include "block_sparse_attention.h"
#include "linear_rows.h"
#include "subsets.h"

namespace hhattn::HHATTN_ISA {

// Blocks' states lie this far apart: an odd number of cache lines, since powers of two would meet in few sets of the cache.
inline int64_t pitch(int64_t blocks) { return blocks | 1; }

struct MarginalScratch {
  float *query, *upstream, *weights, *gradients, *total;  // parts
  uint8_t* kept;
  float *k_states, *q_states, *dk_states, *tile, *turned, *sums;
  uint8_t* any;  // of each key block, whether one of the query heads attends it whole
};

inline int64_t lay_out(const Marginal& a, MarginalWork work, float* base, MarginalScratch& t) {
  const int64_t width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes), queries = round_up(a.bq, kLanes);
  Layout layout(base);
  if (work == MarginalWork::parts) {
    t.query = layout.take(width * queries);
    t.upstream = layout.take(v_width * queries);
    t.weights = layout.take(a.bk * queries);
    t.gradients = layout.take(a.bk * queries);
    t.total = layout.take(queries);
    t.kept = reinterpret_cast<uint8_t*>(layout.take(round_up(a.bk, 8) * round_up(queries, 8) / 32 + 1));
    return layout.taken();
  }
  const int64_t elements = work == MarginalWork::weights ? round_up(width, kLine) : width * kLine;
  t.k_states = layout.take(elements * pitch(a.nk));
  t.q_states = layout.take(elements * pitch(a.nq));
  t.dk_states = work == MarginalWork::outputs ? nullptr : layout.take(elements * pitch(a.nk));
  t.tile = layout.take(std_max(a.bq, a.bk) * kLine);
  t.turned = layout.take(kLine * width);
  t.sums = layout.take(kSums);
  t.any = reinterpret_cast<uint8_t*>(layout.take(a.nk / 4 + 1));
  return layout.taken();
}

inline int64_t marginal_scratch(const Marginal& a, MarginalWork work) {
  MarginalScratch t;
  return lay_out(a, work, nullptr, t);
}

// φ of tokens [begin, end) of a head, into rows of whole vectors, zeros behind.
inline void map_rows(const Heads& x, FeatureMap phi, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim, float* to) {
  const int64_t width = round_up(dim, kLanes);
  copy_rows(x, b, begin, h, end - begin, dim, to);
  for (int64_t s = begin; s < end && phi != FeatureMap::identity; ++s, to += width) {
    apply_map(phi, to, dim, to);
    for (int64_t d = dim; d < width; ++d) to[d] = 0;
  }
}

// One query block's or key block's tokens.
struct Block {
  int64_t first, rows;
};
inline Block block_of(int64_t i, int64_t size, int64_t tokens) { return {i * size, std_min(size, tokens - i * size)}; }

// ---- blocks that aren't attended whole ----

// 0 over the masked of `keys` rows of x; `kept` has their bits by key.
inline void clear_masked(const uint8_t* kept, int64_t keys, int64_t queries, float* x) {
  using U = VecU<kLanes>;
  for (int64_t j = 0; j < keys; ++j) {
    const uint8_t* row = kept + j * round_up(queries, 8) / 8;
    for (int64_t i = 0; i < queries; i += kLanes) {
      float* at = x + j * queries + i;
      F32::store<kLanes>(at, bits<Vec<kLanes>>(bits<U>((lane_bits(row, i) & lane_weights()) != 0) & read<U>(at)));
    }
  }
}

// A part's bits by key into t.kept.
inline void keep_bits(const Marginal& a, const PartEntry& e, const Block& keys, const MarginalScratch& t) {
  const uint8_t* tile = a.bits + e.tile * a.bq * ((a.bk + 7) / 8);
  transpose_bits(tile, a.bq, a.bk, 0, keys.rows, round_up(a.bq, kLanes), t.kept);
}

// A part's weights [keys, queries] into t.weights, masked by t.kept; t.query has the block's queries by column.
inline void part_weights(const Marginal& a, const MarginalHeads& p, const Block& keys, const MarginalScratch& t) {
  const int64_t width = round_up(a.dim, kLanes), queries = round_up(a.bq, kLanes);
  const float* k = p.keys + keys.first * width;
  multiply<A::by_rows, false>(keys.rows, queries, a.dim, k, width, t.query, queries, t.weights, queries);
  clear_masked(t.kept, keys.rows, queries, t.weights);
}

// Rows of whole vectors from `first` on, as columns.
inline void turn_rows(const float* x, const Block& block, int64_t width, int64_t columns, float* to) {
  load_columns({{x, DType::f32}, 0, width, 0}, 0, block.first, 0, block.rows, width, 1, columns, to);
}

// Query block i's sums over its parts: p.sums and the weights' sums, into den.
inline void marginal_part_sums(const Marginal& a, const MarginalHeads& p, int64_t r, int64_t i, float* scratch) {
  MarginalScratch t;
  lay_out(a, MarginalWork::parts, scratch, t);
  const int64_t width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes), queries = round_up(a.bq, kLanes);
  const MarginalPairs& pairs = *p.pairs[r];
  const Block block = block_of(i, a.bq, a.q_len);
  float* sums = p.sums + (r * a.q_len + block.first) * v_width;
  memset(sums, 0, block.rows * v_width * sizeof(float));
  memset(t.total, 0, queries * sizeof(float));
  if (pairs.rows[i] < pairs.rows[i + 1]) turn_rows(p.queries + r * a.q_len * width, block, width, queries, t.query);
  for (int64_t n = pairs.rows[i]; n < pairs.rows[i + 1]; ++n) {
    const Block keys = block_of(pairs.by_row[n].column, a.bk, a.k_len);
    keep_bits(a, pairs.by_row[n], keys, t);
    part_weights(a, p, keys, t);
    for (int64_t j = 0; j < keys.rows; ++j) add_scaled(t.weights + j * queries, 1, queries, t.total);
    add_attended(t.kept, t.weights, keys.rows, queries, block.rows, p.values + keys.first * v_width, v_width, sums);
  }
  const int64_t h = p.kv_head * a.rep() + r;
  memcpy(a.den + (p.b * a.heads + h) * a.q_len + block.first, t.total, block.rows * sizeof(float));
}

// ---- whole blocks: weights ----

// Σ factor · x over each block's rows of whole vectors, as lines [width / kLine, blocks, kLine]; no factors are ones.
inline void block_sums(const float* x, const float* factors, int64_t tokens, int64_t size, int64_t width, float* to) {
  const int64_t blocks = (tokens + size - 1) / size, step = pitch(blocks) * kLine;
  memset(to, 0, round_up(width, kLine) / kLine * step * sizeof(float));
  for (int64_t s = 0; s < tokens; ++s, x += width) {
    const float factor = factors ? factors[s] : 1;
    for (int64_t d = 0; d < width; d += kLanes) {
      float* at = to + d / kLine * step + s / size * kLine + d % kLine;
      F32::store<kLanes>(at, F32::load<kLanes>(at) + F32::load<kLanes>(x + d) * factor);
    }
  }
}

// The lines of each row's sums.
inline void add_lines(const Subsets& m, int64_t lines, const float* x, bool add, float* y, float* sums) {
  for (int64_t line = 0; line < lines; ++line) {
    subset_sums(m, x + line * pitch(m.n) * kLine, add, y + line * pitch(m.rows) * kLine, sums);
  }
}

// f(d, vector) for a block's vectors of lines [width / kLine, blocks, kLine].
template <class F>
inline void each_of_lines(const float* lines, int64_t blocks, int64_t i, int64_t width, const F& f) {
  for (int64_t d = 0; d < width; d += kLanes) f(d, F32::load<kLanes>(lines + (d / kLine * pitch(blocks) + i) * kLine + d % kLine));
}

// den of query head r, from its part sums if there are any.
inline void marginal_weights(const Marginal& a, const MarginalHeads& p, int64_t r, float* scratch) {
  MarginalScratch t;
  lay_out(a, MarginalWork::weights, scratch, t);
  const int64_t width = round_up(a.dim, kLanes), lines = round_up(width, kLine) / kLine;
  block_sums(p.keys, nullptr, a.k_len, a.bk, width, t.k_states);
  add_lines(p.pairs[r]->whole, lines, t.k_states, false, t.q_states, t.sums);
  const uint8_t* any = p.pairs[r]->whole.any;  // a query that meets nothing may be NaN, which times 0 isn't 0
  const float* q = p.queries + r * a.q_len * width;
  float* den = a.den + (p.b * a.heads + p.kv_head * a.rep() + r) * a.q_len;
  for (int64_t s = 0; s < a.q_len; ++s, q += width) {
    Vec<kLanes> total = {};
    each_of_lines(t.q_states, a.nq, s / a.bq, width, [&](int64_t d, Vec<kLanes> k) { total += F32::load<kLanes>(q + d) * k; });
    const float weight = (any[s / a.bq] ? sum<kLanes>(total) : 0) + (p.sums ? den[s] : 0);
    den[s] = weight == 0 ? __builtin_inff() : weight + a.eps;
  }
}

// ---- whole blocks: values ----

// The columns of a slice: so many, from kLine · slice on.
inline int64_t slice_columns(const Marginal& a, int64_t slice) { return std_min(kLine, round_up(a.v_dim, kLanes) - slice * kLine); }

// Asks for lines `step` floats apart, a few between the steps of a product: they lie on as many pages, too many for the hardware to
// look ahead on.
class AheadLines {
 public:
  AheadLines(const float* first, int64_t step, int64_t lines, int64_t times)
      : line_(first), step_(step), lines_(lines), left_(lines), times_(times) {}
  void operator()() {
    for (due_ += lines_; due_ >= times_ && left_ > 0; due_ -= times_, --left_, line_ += step_) __builtin_prefetch(line_, 1, 2);
  }

 private:
  const float* line_;
  int64_t step_, lines_, left_, times_, due_ = 0;
};

// States [width, blocks, kLine] of each block: Σ x yᵀ over its rows, of y [tokens, y_width] the `columns` at y.
inline void block_states(const float* x, int64_t tokens, int64_t size, int64_t width, const float* y, int64_t y_width,
                         int64_t columns, float* to) {
  const int64_t blocks = (tokens + size - 1) / size, step = pitch(blocks) * kLine;
  if (columns < kLine) memset(to, 0, width * step * sizeof(float));
  for (int64_t i = 0; i < blocks; ++i) {
    const auto [first, rows] = block_of(i, size, tokens);
    AheadLines ahead(to + std_min(i + 1, blocks - 1) * kLine, step, width, calls_of(width, columns, rows));
    multiply<A::by_columns, false>(width, columns, rows, x + first * width, width, y + first * y_width, y_width, to + i * kLine, step,
                                   ahead);
  }
}

// A slice of the outputs of every query head, contiguous [B, Sq, H, Dv].
inline void marginal_outputs(const Marginal& a, const MarginalHeads& p, int64_t slice, float* scratch) {
  MarginalScratch t;
  lay_out(a, MarginalWork::outputs, scratch, t);
  const int64_t width = round_up(a.dim, kLanes), v_width = round_up(a.v_dim, kLanes), columns = slice_columns(a, slice);
  const int64_t at = slice * kLine, step = pitch(a.nq) * kLine;
  block_states(p.keys, a.k_len, a.bk, width, p.values + at, v_width, columns, t.k_states);
  for (int64_t r = 0; r < a.rep(); ++r) {
    const int64_t h = p.kv_head * a.rep() + r;
    add_lines(p.pairs[r]->whole, a.dim, t.k_states, false, t.q_states, t.sums);
    for (int64_t i = 0; i < a.nq; ++i) {
      const auto [first, rows] = block_of(i, a.bq, a.q_len);
      const float *q = p.queries + (r * a.q_len + first) * width, *den = a.den + (p.b * a.heads + h) * a.q_len + first;
      AheadLines ahead(t.q_states + std_min(i + 1, a.nq - 1) * kLine, step, a.dim, calls_of(rows, columns, a.dim));
      if (p.pairs[r]->whole.any[i]) {
        multiply<A::by_rows, false>(rows, columns, a.dim, q, width, t.q_states + i * kLine, step, t.tile, kLine, ahead);
      } else {
        memset(t.tile, 0, rows * kLine * sizeof(float));
      }
      for (int64_t row = 0; row < rows; ++row) {
        if (p.sums) add_up(p.sums + (r * a.q_len + first + row) * v_width + at, columns, t.tile + row * kLine);
        each_vector(columns, t.tile + row * kLine, t.tile + row * kLine, [&](Vec<kLanes> x) { return x / den[row]; });
      }
      store_rows(a.out, ((p.b * a.q_len + first) * a.heads + h) * a.v_dim + at, a.heads * a.v_dim, rows,
                 std_min(kLine, a.v_dim - at), t.tile, kLine);
    }
  }
}

}  // namespace hhattn::HHATTN_ISA
