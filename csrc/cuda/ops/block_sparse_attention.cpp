// Bindings of block_sparse_attention.
#include "../block_sparse_attention_sm90.h"

#include <limits>

#include "tensor.h"

namespace hh {
namespace {

const int32_t* list(Call& call, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), name, " must be contiguous int32");
  STD_TORCH_CHECK(t.numel() <= std::numeric_limits<uint32_t>::max(), name, " has more than 2^32 - 1 entries");
  return static_cast<const int32_t*>(call.read(t, name));
}

// Lists whose batch entries and heads are those of `shape`, [Bm, Hm, ...], `lines` lines of `width` and `full_width` for each.
BlockSparseMask lists(Call& call, const MaskTensors& m, const Tensor& shape, int64_t lines, int64_t width, int64_t full_width, int64_t bk) {
  STD_TORCH_CHECK(m.bits.scalar_type() == ScalarType::Byte && m.bits.is_contiguous() && m.bits.dim() == 3, "tiles must be uint8 [T, bq, ceil(bk / 8)]");
  BlockSparseMask out;
  out.counts = list(call, m.counts, "kv_num_blocks");
  out.columns = list(call, m.columns, "kv_indices");
  out.tiles = list(call, m.tiles, "kv_tiles");
  out.full_counts = list(call, m.full_counts, "full_kv_num_blocks");
  out.full_columns = list(call, m.full_columns, "full_kv_indices");
  out.bits = static_cast<const uint8_t*>(call.read(call.aligned(m.bits), "tiles"));
  out.batch = shape.size(0) > 1 ? shape.size(1) : 0;
  out.head = shape.size(1) > 1 ? 1 : 0;
  out.width = width;
  out.full_width = full_width;
  out.bq = m.bits.size(1);
  out.bk = bk;
  out.lines = lines;
  return out;
}

// [B, S, H, D] whose rows lie on edges of 16 bytes, or would if the first one did.
Heads heads(Call& call, const Tensor& given, const char* name) {
  const Tensor t = call.aligned(given);
  Heads out = call.heads(t, name);
  out.batch = step(t, 0), out.token = step(t, 1), out.head = step(t, 2);
  STD_TORCH_CHECK(out.in.dtype != DType::f32, name, " must be float16 or bfloat16");
  STD_TORCH_CHECK(t.size(3) % 8 == 0 && t.size(3) <= 256, name, " must have a head dim that is a multiple of 8, up to 256");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(out.in.data) % 16 == 0 && out.batch % 8 == 0 && out.token % 8 == 0 && out.head % 8 == 0,
                  name, " must have rows on edges of 16 bytes");
  int64_t last = 0;
  for (int64_t d = 0; d < 3; ++d) last += (t.size(d) - 1) * step(t, d);
  STD_TORCH_CHECK(last / 8 < std::numeric_limits<uint32_t>::max() - 32, name, " reaches beyond 64 GB");
  return out;
}

void arguments(Call& call, BlockSparseArgs& a, const Tensor& q, const Tensor& k, const Tensor& v, const MaskTensors& mask, int64_t bk,
               double scale) {
  a.q = heads(call, q, "q");
  a.k = heads(call, k, "k");
  a.v = heads(call, v, "v");
  check_shapes(q, k, v);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
  STD_TORCH_CHECK(scale > 0, "scale must be positive");
  check_shapes(mask);
  const int64_t batches = mask.columns.size(0), mask_heads = mask.columns.size(1), lines = mask.columns.size(2);
  STD_TORCH_CHECK((batches == 1 || batches == q.size(0)) && (mask_heads == 1 || mask_heads == q.size(2)), "the mask is for other heads");
  a.mask = lists(call, mask, mask.columns, lines, mask.columns.size(3), mask.full_columns.size(3), bk);
  STD_TORCH_CHECK(lines == (q.size(1) + a.mask.bq - 1) / a.mask.bq, "the mask is for another number of queries");
  a.batch = q.size(0);
  a.q_len = q.size(1);
  a.k_len = k.size(1);
  a.heads = q.size(2);
  a.kv_heads = k.size(2);
  a.dim = q.size(3);
  a.v_dim = v.size(3);
  a.scale = static_cast<float>(scale);
}

// The forward has no use for the lists by key block, which callers keep for the backward.
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_num_blocks,
                                   const Tensor& kv_indices, const Tensor& kv_tiles, const Tensor& full_kv_num_blocks,
                                   const Tensor& full_kv_indices, const Tensor& tiles, int64_t bk, double scale, const OptTensor&,
                                   const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&) {
  Call call(q);
  BlockSparseArgs a;
  arguments(call, a, q, k, v, {kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles}, bk, scale);
  Tensor out = call.empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
  Tensor lse = call.empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  a.out = call.write(out, "out");
  a.lse = static_cast<float*>(call.write(lse, "lse"));
  const bool taken = call.arch() == 90 && takes_sm90(a) && HH_TRY(call, hh_cuda_block_sparse_attention_sm90, a, NOT_TAKEN);
  if (!taken) HH_CALL(call, hh_cuda_block_sparse_attention, a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, const Tensor& kv_num_blocks,
                                            const Tensor& kv_indices, const Tensor& kv_tiles, const Tensor& full_kv_num_blocks,
                                            const Tensor& full_kv_indices, const Tensor& tiles, int64_t bk, double scale,
                                            const OptTensor& offsets, const OptTensor& indices, const OptTensor& places,
                                            const OptTensor& full_offsets, const OptTensor& full_indices, bool to_q, bool to_kv) {
  Call call(q);
  BlockSparseBackwardArgs a;
  arguments(call, a, q, k, v, {kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles}, bk, scale);
  check_sizes(out, {q.size(0), q.size(1), q.size(2), v.size(3)}, "out");
  check_sizes(dout, {q.size(0), q.size(1), q.size(2), v.size(3)}, "dout");
  check_sizes(lse, {q.size(0), q.size(2), q.size(1)}, "lse");
  check_sizes(dlse, {q.size(0), q.size(2), q.size(1)}, "dlse");
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous(), "out and lse must be contiguous");
  STD_TORCH_CHECK(lse.numel() <= std::numeric_limits<uint32_t>::max(), "lse has more than 2^32 - 1 elements");
  STD_TORCH_CHECK(out.scalar_type() == q.scalar_type() && dout.scalar_type() == q.scalar_type(), "out and dout must have q's dtype");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && dlse.scalar_type() == ScalarType::Float, "lse must be float32");
  a.dout = heads(call, dout, "dout");
  a.out = const_cast<void*>(call.read(call.aligned(out), "out"));
  a.lse = const_cast<float*>(static_cast<const float*>(call.read(lse, "lse")));
  a.dlse = static_cast<const float*>(call.read(dlse, "dlse"));
  a.dlse_batch = step(dlse, 0), a.dlse_head = step(dlse, 1), a.dlse_token = step(dlse, 2);
  Tensor delta = call.empty(lse), log2 = call.empty(lse);
  a.delta = static_cast<float*>(call.write(delta, "delta"));
  a.log2 = static_cast<float*>(call.write(log2, "log2"));
  Tensor dq = to_q ? call.empty(q) : nothing(q), dk = to_kv ? call.empty(k) : nothing(k), dv = to_kv ? call.empty(v) : nothing(v);
  if (dq.numel()) a.dq = call.write(dq, "dq");
  if (dk.numel()) {
    STD_TORCH_CHECK(offsets && indices && places && full_offsets && full_indices, "the lists by key block are missing");
    const int64_t nk = (k.size(1) + bk - 1) / bk;
    check_sizes(*offsets, {kv_indices.size(0), kv_indices.size(1), nk + 1}, "offsets");
    check_sizes(*full_offsets, {kv_indices.size(0), kv_indices.size(1), nk + 1}, "full_offsets");
    a.by_key = lists(call, {*offsets, *indices, *places, *full_offsets, *full_indices, tiles}, kv_indices, nk, indices->size(2),
                     full_indices->size(2), bk);
    a.dk = call.write(dk, "dk");
    a.dv = call.write(dv, "dv");
  }
  if (a.dq || a.dk) HH_CALL(call, hh_cuda_block_sparse_attention_backward, a);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace hh

STABLE_TORCH_LIBRARY_IMPL(HH_LIBRARY, HH_DEVICE_KEY, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&hh::forward));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&hh::backward));
}
