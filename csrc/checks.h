// What every binding asks of the tensors that an operator is given, for the CPU's kernels and for a GPU's. Written against torch's stable
// ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

#include "tensors.h"

namespace hhattn {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

inline void check_sizes(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == sizes.begin()[d];
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

// A stride that does not move where the size is 1, so that a broadcast dim needs no copy.
inline int64_t step(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

// A BlockMask's: lists of partial blocks and of their tiles of bits, lists of full blocks, and the tiles.
struct MaskTensors {
  const Tensor &counts, &columns, &tiles, &full_counts, &full_columns, &bits;
};

inline void check_shapes(const MaskTensors& t) {
  STD_TORCH_CHECK(t.columns.dim() == 4 && t.full_columns.dim() == 4 && t.bits.dim() == 3, "the mask has the wrong shape");
  const int64_t batches = t.columns.size(0), heads = t.columns.size(1), nq = t.columns.size(2);
  check_sizes(t.counts, {batches, heads, nq}, "kv_num_blocks");
  check_sizes(t.tiles, {batches, heads, nq, t.columns.size(3)}, "kv_tiles");
  check_sizes(t.full_counts, {batches, heads, nq}, "full_kv_num_blocks");
  check_sizes(t.full_columns, {batches, heads, nq, t.full_columns.size(3)}, "full_kv_indices");
}

// q [B, Sq, H, D], k [B, Sk, H_kv, D], v [B, Sk, H_kv, Dv], H a multiple of H_kv.
inline void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, S, H, D]");
  check_sizes(k, {q.size(0), k.size(1), k.size(2), q.size(3)}, "k");
  check_sizes(v, {q.size(0), k.size(1), k.size(2), v.size(3)}, "v");
  STD_TORCH_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "q must have a multiple of k's heads");
}

}  // namespace hhattn
