// Arguments of the launchers of block_sparse_attention.
#pragma once
#include "args.h"

namespace hh {

// A BlockMask's tensors, contiguous, int32 and uint8. Lists have one line for each block of queries, and `lines` lines for each of the
// mask's entries, which is b · batch + h · head for batch entry b and head h: what batch entries or heads share has 0 there.
struct BlockSparseMask {
  const int32_t *counts = nullptr, *columns = nullptr, *tiles = nullptr, *full_counts = nullptr, *full_columns = nullptr;
  const uint8_t* bits = nullptr;  // [tiles, bq, ceil(bk / 8)]
  uint32_t batch = 0, head = 0, width = 0, full_width = 0;  // widths are of a line; lists have fewer than 2^32 numbers
  int32_t bq = 0, bk = 0, lines = 0;
};

// out_i = Σ_j softmax_j(scale · q_i·k_j) v_j over the mask's pairs. q, k, v are f16 or bf16, one dtype, their rows on edges of 16
// bytes; dims are multiples of 8 up to 256, scale is positive. out is contiguous [B, Sq, H, Dv], lse [B, H, Sq] float.
struct BlockSparseArgs {
  Heads q, k, v;
  BlockSparseMask mask;
  void* out = nullptr;
  float* lse = nullptr;
  int32_t batch = 0, q_len = 0, k_len = 0, heads = 0, kv_heads = 0, dim = 0, v_dim = 0;
  float scale = 0;
};

// The gradients in q, k and v, contiguous; none for those that are null. out and lse are the forward's, dlse is float. `by_key` has the
// lists by key block: counts and full_counts are offsets [lines + 1] of an entry, columns and full_columns query blocks, widths of an
// entry. delta and log2 are scratch like lse.
struct BlockSparseBackwardArgs : BlockSparseArgs {
  Heads dout;
  const float* dlse = nullptr;
  int64_t dlse_batch = 0, dlse_head = 0, dlse_token = 0;
  BlockSparseMask by_key;
  float *delta = nullptr, *log2 = nullptr;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
};

}  // namespace hh

extern "C" int hh_cuda_block_sparse_attention(const hh::BlockSparseArgs* args, void* stream);
extern "C" int hh_cuda_block_sparse_attention_backward(const hh::BlockSparseBackwardArgs* args, void* stream);
