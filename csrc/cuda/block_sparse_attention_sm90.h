// block_sparse_attention's forward on wgmma and TMA.
#pragma once
#include "block_sparse_attention.h"

namespace hh {

inline constexpr int NOT_TAKEN = -1;

// Whether hh_cuda_block_sparse_attention_sm90 takes these arguments, which must be such as the other launcher takes: mask blocks of
// whole 64 queries and keys, which TMA brings at once; strides that it can follow; bits that are read 16 bytes at a time.
inline bool takes_sm90(const BlockSparseArgs& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const auto step = [](int64_t stride, int64_t count) {
    return count <= 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t(1) << 39);
  };
  const auto fits = [&](const Heads& x, int64_t tokens, int64_t heads) {
    return aligned(x.in.data) && step(x.batch, a.batch) && step(x.token, tokens) && step(x.head, heads);
  };
  return a.batch > 0 && a.q_len > 0 && a.k_len > 0 && a.dim > 0 && a.v_dim > 0 && a.dim % 8 == 0 && a.v_dim % 8 == 0 &&
         a.mask.bq % 64 == 0 && a.mask.bk % 64 == 0 && aligned(a.mask.bits) && fits(a.q, a.q_len, a.heads) &&
         fits(a.k, a.k_len, a.kv_heads) && fits(a.v, a.k_len, a.kv_heads);
}

}  // namespace hh

// Returns hh::NOT_TAKEN, having done nothing, where the driver has no tensor maps for these arguments.
extern "C" int hh_cuda_block_sparse_attention_sm90(const hh::BlockSparseArgs* args, void* stream);
