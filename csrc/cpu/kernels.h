// What the callers and the CPU kernels agree on: tensors.h and the arguments of each kernel; nothing that depends on the
// instruction set.
#pragma once

#include "../tensors.h"

namespace hhattn {

// Rows of [1 or B, F, C], each of which serves tokens_per_row tokens in turn.
struct Modulation {
  In in;
  int64_t batch = 0, row = 0, tokens_per_row = 1;
};

// y = (norm(r)·weight + bias)·(1 + scale) + shift, r = residual + gate·x. y and r are contiguous [B, S, C].
struct NormModulate {
  Rows x, residual;
  Modulation scale, shift, gate;
  In weight, bias;
  Out y, r;
  int64_t tokens = 0, channels = 0;
  bool layer = false;
  bool stream = false;  // outputs go past the cache
  float eps = 0;
  // Floats of scratch that a thread needs.
  int64_t scratch() const { return 7 * channels; }
};

// The gradient of a Modulation, contiguous: `out` itself where a row's tokens are all in one piece of the work, else sums that
// become it at the end.
struct ModulationGradient {
  Out out;
  double* sums = nullptr;
  int64_t batch = 0, tokens_per_row = 1;  // batch counts rows
};

// Gradients of NormModulate, all but x's where they are asked for; dx and dresidual are contiguous. The rows of B·S are worked on
// in pieces, whose sums are added up in the order of the pieces.
struct NormModulateBackward {
  NormModulate forward;  // y and r are not written
  Rows dy, dr;
  Out dx, dresidual;
  ModulationGradient dscale, dshift, dgate;
  double *dweight = nullptr, *dbias = nullptr;
  int64_t rows = 0, piece = 0;
  int32_t* turn = nullptr;  // null where nothing is summed over pieces
  int64_t scratch() const { return 13 * forward.channels; }
};

enum class Norm : int { none, rms, layer };

// cos or sin, [1 or B, S_video, 1 or H, D].
struct Table {
  In in;
  int64_t batch = 0, token = 0, head = 0;
};

// y = rotated(norm(x)·weight + bias) for x [B, S, H, D], one norm a head or one for all; y is contiguous. Output token s is
// input token order[s], or s. Tokens start ... start + video - 1 are rotated.
struct NormRope {
  In x;
  int64_t batch = 0, token = 0, head = 0;
  Table cos, sin;
  In weight, bias;
  Out y;
  const int64_t* order = nullptr;
  int64_t tokens = 0, heads = 0, dim = 0, start = 0, video = 0;
  Norm norm = Norm::none;
  bool across_heads = false, interleaved = true, stream = false;
  float eps = 0;
  int64_t scratch() const { return 3 * heads * dim + 2 * heads + 2 * dim; }
};

// Gradients of NormRope; dx is contiguous.
struct NormRopeGradients {
  NormRope forward;  // y is not written
  Heads dy;
  Out dx;
  double *dweight = nullptr, *dbias = nullptr;
  int64_t table_head = 0;  // elements of dcos from one head to the next
  int64_t scratch() const { return 6 * forward.heads * forward.dim + 2 * forward.dim; }
};

// The same for q and k together, and of their tables, contiguous [1 or B, S_video, 1 or H, D]. The rows of S·B, a token's batch
// entries side by side, are worked on in pieces, whose sums are added up in the order of the pieces.
struct NormRopeBackward {
  NormRopeGradients q, k;
  Out dcos, dsin;
  int64_t table_batch = 0, table_width = 0;  // elements from one batch entry to the next (0: they share a table), and of a token
  int64_t batches = 0, piece = 0;
  int32_t* turn = nullptr;
  int64_t scratch() const { return q.scratch() + k.scratch() + 2 * table_width; }
};

// A BlockMask's lists of one batch entry and head: `partial` of the key blocks have bits, the others are attended whole.
struct BlockRow {
  const int32_t *columns = nullptr, *tiles = nullptr, *full_columns = nullptr;
  int64_t partial = 0, full = 0;
};

struct BlockMask {
  const int32_t *counts = nullptr, *columns = nullptr, *tiles = nullptr, *full_counts = nullptr, *full_columns = nullptr;
  const uint8_t* bits = nullptr;  // [tiles, bq, ceil(bk / 8)]
  int64_t batches = 1, heads = 1, width = 0, full_width = 0;
  int64_t bq = 0, bk = 0, nq = 0, nk = 0;

  int64_t row_index(int64_t b, int64_t h, int64_t i) const {
    return ((batches == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h)) * nq + i;
  }
  BlockRow row(int64_t b, int64_t h, int64_t i) const {
    const int64_t at = row_index(b, h, i);
    return {columns + at * width, tiles + at * width, full_columns + at * full_width, counts[at], full_counts[at]};
  }
  const uint8_t* tile(int64_t number) const { return bits + number * bq * ((bk + 7) / 8); }
};

// out_i = Σ_j softmax_j(scale · q_i·k_j) v_j over the mask's pairs; out is contiguous [B, Sq, H, Dv], lse [B, H, Sq].
struct BlockSparse {
  Heads q, k, v;
  BlockMask mask;
  Out out;
  float* lse = nullptr;
  int64_t q_len = 0, k_len = 0, heads = 0, kv_heads = 0, dim = 0, v_dim = 0;
  float scale = 0;
};

// One query block's turn in a key block's list: tile -1 is a full block, `rank` counts the row's blocks before this one.
struct ColumnEntry {
  int32_t row, tile, rank;
};

// Gradients of BlockSparse; dq, dk and dv are contiguous. Several query blocks' sums are at work at once in dq itself, or in
// dq_sum, float32 [pairs of batch entry and head, nq·bq, D up to whole vectors], where a pair's place is its turns' place.
struct BlockSparseBackward {
  BlockSparse forward;  // out and lse are read
  Heads dout;
  const float* delta = nullptr;  // [B, H, Sq], scale · (dout·out − dlse)
  Out dq, dk, dv;
  float* dq_sum = nullptr;
  int32_t* turns = nullptr;  // [pairs, nq]: the contributions that dq has got
  const ColumnEntry* entries = nullptr;
  const int64_t* offsets = nullptr;  // [mask batches, mask heads, nk + 1] into entries
};

enum class FeatureMap : int { relu, identity, elu1, relu2, softmax };

// What keys and queries of linear attention go through: φ for the weights, ψ and the rotation for the sums. cos and sin [S, D],
// or none.
struct LinearMaps {
  FeatureMap phi = FeatureMap::relu, psi = FeatureMap::relu;
  Heads cos, sin;
  int64_t dim = 0, v_dim = 0;
};

// Tokens [begin, end) of batch entry b and of heads from h on, within one chunk; the rank-th piece of its chunk, whose sums take
// turns. Sums and turns of the next head lie `step` chunks' further.
struct LinearPiece {
  int64_t b = 0, h = 0, heads = 1, begin = 0, end = 0, step = 0;
  int32_t rank = 0;
  int32_t* turn = nullptr;
};

// Σ g·Rψ(k)vᵀ and Σ φ(k); gate [B, S, H] or null.
struct LinearSums {
  LinearMaps maps;
  Heads k, v;
  const float* gate = nullptr;
  int64_t tokens = 0, heads = 0;
};

struct LinearSumsBackward {
  LinearSums forward;
  Out dk, dv;
  float* dgate = nullptr;
};

// Rψ(q)ᵀ KV, divided by φ(q)ᵀK + eps where `normalize`; out is contiguous.
struct LinearOutputs {
  LinearMaps maps;
  Heads q;
  Out out;
  int64_t tokens = 0, heads = 0;
  bool normalize = true;
  bool stream = false;  // the output goes past the cache
  float eps = 0;
};

struct LinearOutputsBackward {
  LinearOutputs forward;  // out is read
  Heads dout;
  Out dq;
};

// A matrix of zeros and ones [rows, n] that vectors are multiplied by. Its columns are taken in fours, whose 15 sums are made once
// for all rows, kFours of them at a time. For each kFours, row by row: counts has the number of fours that aren't all zeros,
// entries each one's number times 16 plus its bits.
inline constexpr int64_t kFours = 12;
struct Subsets {
  const uint8_t *counts = nullptr, *entries = nullptr;
  const uint8_t* any = nullptr;  // of each row, whether there is a one in it
  int64_t rows = 0, n = 0;
};

// Blocks that aren't attended whole: `tile` of the mask's bits says which pairs are.
struct PartEntry {
  int32_t row, column, tile;
};

// The pairs of one entry of a mask: whole blocks [nq, nk], those [nk, nq] for the backward, and the others by row and by column,
// whose first entries are at `rows` [nq + 1] and `columns` [nk + 1].
struct MarginalPairs {
  Subsets whole, whole_turned;
  const PartEntry *by_row = nullptr, *by_column = nullptr;
  const int64_t *rows = nullptr, *columns = nullptr;
};

// out_i = Σ_j φ(q_i)·φ(k_j) v_j / (Σ_j φ(q_i)·φ(k_j) + eps) over a mask's pairs; out is contiguous [B, Sq, H, Dv], den [B, H, Sq] the
// divisors, infinite where there are no weights.
struct Marginal {
  Heads q, k, v;
  FeatureMap phi = FeatureMap::softmax;
  Out out;
  float* den = nullptr;
  const uint8_t* bits = nullptr;  // [tiles, bq, ceil(bk / 8)]
  int64_t q_len = 0, k_len = 0, heads = 0, kv_heads = 0, dim = 0, v_dim = 0, bq = 0, bk = 0, nq = 0, nk = 0;
  float eps = 0;
  int64_t rep() const { return heads / kv_heads; }
};

// The kernels of linear attention over a mask, by what scratch they need.
inline constexpr int64_t kSlice = 32;  // columns of v that are worked on at a time
enum class MarginalWork : int { parts, weights, outputs, gradients };

// One key head of a batch entry and the `rep` query heads that share it. Rows are padded to whole vectors: keys φ(k) [Sk, D], values
// [Sk, Dv], queries φ(q) [rep, Sq, D], sums [rep, Sq, Dv] over pairs that aren't in whole blocks, or null.
struct MarginalHeads {
  int64_t b = 0, kv_head = 0;
  float *keys = nullptr, *values = nullptr, *queries = nullptr, *sums = nullptr;
  const MarginalPairs* const* pairs = nullptr;  // [rep]
};

// Gradients of Marginal, whose out and den are read. With u = dout / den and e = −(dout·out) / den, padded like the rows above:
// u [rep, Sq, Dv], e [rep, Sq]; gradients of the features dphi_q [rep, Sq, D] and dphi_k [Sk, D]; dv_sums [Sk, Dv] like `sums`.
// Columns of v are worked on in slices, which take turns at a block of dphi_q [rep, nq] and of dphi_k [nk].
struct MarginalBackward {
  Marginal forward;
  Heads dout;
  Out dv;
};
struct MarginalGradients {
  float *u = nullptr, *e = nullptr, *dphi_q = nullptr, *dphi_k = nullptr, *dv_sums = nullptr;
  int32_t *q_turns = nullptr, *k_turns = nullptr;
};

// The kernels as compiled for one instruction set. The norms work on the rows [begin, end) of B·S.
struct Kernels {
  const char* isa;
  int lanes;
  void (*norm_modulate)(const NormModulate&, int64_t begin, int64_t end, float* scratch);
  void (*norm_modulate_backward)(const NormModulateBackward&, int64_t piece, float* scratch);
  void (*norm_rope)(const NormRope&, int64_t begin, int64_t end, float* scratch);
  void (*norm_rope_backward)(const NormRopeBackward&, int64_t piece, float* scratch);
  void (*store_sums)(const double* sums, int64_t n, const Out&);
  int64_t (*block_sparse_scratch)(const BlockSparse&);
  void (*block_sparse_pack)(const BlockSparse&, int64_t b, int64_t kv_head, int64_t begin, int64_t end, float* k, float* v);
  void (*block_sparse_forward)(const BlockSparse&, int64_t b, int64_t h, int64_t i, const float* k, const float* v, float* scratch);
  int64_t (*block_sparse_backward_scratch)(const BlockSparse&);
  void (*block_sparse_delta)(const BlockSparse&, const Heads& dout, const Heads& dlse, int64_t begin, int64_t end, float* delta);
  void (*block_sparse_backward)(const BlockSparseBackward&, int64_t b, int64_t kv_head, int64_t j, int64_t pair, float* scratch);
  void (*block_sparse_store_dq)(const BlockSparseBackward&, int64_t b, int64_t h, int64_t i, int64_t pair);
  int64_t (*block_linear_scratch)(const LinearMaps&, int64_t heads);
  void (*block_linear_sums)(const LinearSums&, const LinearPiece&, float* kv, float* k_sum, float* scratch);
  void (*block_linear_sums_backward)(const LinearSumsBackward&, const LinearPiece&, const float* dkv, const float* dk_sum,
                                     float* scratch);
  void (*block_linear_outputs)(const LinearOutputs&, const LinearPiece&, const float* kv, const float* k_sum, float* scratch);
  void (*block_linear_outputs_backward)(const LinearOutputsBackward&, const LinearPiece&, const float* kv, const float* k_sum,
                                        float* dkv, float* dk_sum, float* scratch);
  // rows [begin, end) of a head, mapped, as floats in whole vectors; and back, the gradient for that of mapped rows
  void (*map_rows)(const Heads&, FeatureMap, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim, float* to);
  void (*map_rows_backward)(const Heads&, FeatureMap, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim, const float* g,
                            const Out&, int64_t tokens, int64_t heads);
  int64_t (*marginal_scratch)(const Marginal&, MarginalWork);
  void (*marginal_part_sums)(const Marginal&, const MarginalHeads&, int64_t r, int64_t i, float* scratch);
  void (*marginal_weights)(const Marginal&, const MarginalHeads&, int64_t r, float* scratch);
  void (*marginal_outputs)(const Marginal&, const MarginalHeads&, int64_t slice, float* scratch);
  void (*marginal_upstream)(const MarginalBackward&, int64_t b, int64_t h, int64_t begin, int64_t end, float* u, float* e);
  void (*marginal_weights_backward)(const MarginalBackward&, const MarginalHeads&, const MarginalGradients&, float* scratch);
  void (*marginal_part_queries)(const MarginalBackward&, const MarginalHeads&, const MarginalGradients&, int64_t r, int64_t i,
                                float* scratch);
  void (*marginal_part_keys)(const MarginalBackward&, const MarginalHeads&, const MarginalGradients&, int64_t j, float* scratch);
  void (*marginal_gradients)(const MarginalBackward&, const MarginalHeads&, const MarginalGradients&, int64_t slice,
                             float* scratch);
};

}  // namespace hhattn
