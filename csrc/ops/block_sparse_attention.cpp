// Schemas and bindings of block_sparse_attention.
#include <vector>

#include "mask.h"

namespace hhattn {
namespace {

BlockSparse arguments(const Tensor& q, const Tensor& k, const Tensor& v, const BlockMask& mask, double scale) {
  check_shapes(q, k, v);
  STD_TORCH_CHECK(q.size(3) <= 256 && v.size(3) <= 256, "the head dim must be at most 256");
  STD_TORCH_CHECK(mask.nq == (q.size(1) + mask.bq - 1) / mask.bq, "the mask is for another number of queries");
  BlockSparse a;
  a.q = heads(q, "q");
  a.k = heads(k, "k");
  a.v = heads(v, "v");
  a.mask = mask;
  a.q_len = q.size(1);
  a.k_len = k.size(1);
  a.heads = q.size(2);
  a.kv_heads = k.size(2);
  a.dim = q.size(3);
  a.v_dim = v.size(3);
  a.scale = static_cast<float>(scale);
  return a;
}

// Keys are packed head by head, each for all its query blocks: rows of one head lie far apart in [B, S, H, D], on a few sets of
// the cache, and halves would be converted once for every block that attends them.
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_num_blocks,
                                   const Tensor& kv_indices, const Tensor& kv_tiles, const Tensor& full_kv_num_blocks,
                                   const Tensor& full_kv_indices, const Tensor& tiles, int64_t bk, double scale) {
  BlockSparse a = arguments(
      q, k, v, block_mask({kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles}, bk, k.size(1)),
      scale);
  Tensor out = new_tensor(q, {q.size(0), a.q_len, a.heads, a.v_dim});
  Tensor lse = new_tensor(q, {q.size(0), a.heads, a.q_len}, torch::headeronly::ScalarType::Float);
  a.out = output(out);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const Kernels& use = kernels();
  const int64_t k_floats = a.k_len * padded(a.dim), v_floats = a.k_len * padded(a.v_dim), rep = a.heads / a.kv_heads;
  Scratch packed;
  for_groups(q.size(0) * a.kv_heads, rep * a.mask.nq, [&](int64_t first, int64_t count, int64_t most) {
    if (!packed) packed = make_scratch(most * (k_floats + v_floats));
    const auto keys = [&](int64_t pair) { return packed.get() + pair * (k_floats + v_floats); };
    parallel(0, count * a.k_len, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin, stop; at < end; at = stop) {
        const int64_t pair = at / a.k_len, start = pair * a.k_len;
        stop = std::min(end, start + a.k_len);
        use.block_sparse_pack(a, (first + pair) / a.kv_heads, (first + pair) % a.kv_heads, at - start, stop - start, keys(pair),
                              keys(pair) + k_floats);
      }
    });
    for_each_item(count * rep * a.mask.nq, use.block_sparse_scratch(a), [&](int64_t item, float* scratch) {
      const int64_t pair = item / (rep * a.mask.nq), r = item / a.mask.nq % rep;
      const int64_t b = (first + pair) / a.kv_heads, h = (first + pair) % a.kv_heads * rep + r;
      use.block_sparse_forward(a, b, h, item % a.mask.nq, keys(pair), keys(pair) + k_floats, scratch);
    });
  });
  return {out, lse};
}

// The mask's lists by key block: of each batch entry and head, offsets [nk + 1] and entries by ascending query block.
struct Columns {
  std::vector<int64_t> offsets;
  std::vector<ColumnEntry> entries;
};

Columns by_column(const BlockMask& m) {
  Columns out;
  std::vector<int32_t> ranks(m.nq);
  for (int64_t b = 0; b < m.batches; ++b) {
    for (int64_t h = 0; h < m.heads; ++h) {
      const auto each = [&](const auto& f) {
        for (int64_t i = 0; i < m.nq; ++i) {
          const BlockRow row = m.row(b, h, i);
          for (int64_t e = 0; e < row.partial; ++e) f(i, row.columns[e], row.tiles[e]);
          for (int64_t e = 0; e < row.full; ++e) f(i, row.full_columns[e], -1);
        }
      };
      std::vector<int64_t> ends(m.nk + 1);
      ends[0] = static_cast<int64_t>(out.entries.size());
      each([&](int64_t, int32_t j, int32_t) { ++ends[j + 1]; });
      for (int64_t j = 0; j < m.nk; ++j) ends[j + 1] += ends[j];
      out.offsets.insert(out.offsets.end(), ends.begin(), ends.end());
      out.entries.resize(ends[m.nk]);
      each([&](int64_t i, int32_t j, int32_t tile) { out.entries[ends[j]++] = {static_cast<int32_t>(i), tile, 0}; });
      std::fill(ranks.begin(), ranks.end(), 0);
      for (size_t e = out.offsets.end()[-m.nk - 1]; e < out.entries.size(); ++e) {
        out.entries[e].rank = ranks[out.entries[e].row]++;
      }
    }
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Tensor& kv_num_blocks, const Tensor& kv_indices, const Tensor& kv_tiles,
                                            const Tensor& full_kv_num_blocks, const Tensor& full_kv_indices,
                                            const Tensor& tiles, int64_t bk, double scale) {
  using torch::headeronly::ScalarType;
  BlockSparseBackward g;
  BlockSparse& a = g.forward;
  a = arguments(q, k, v,
                block_mask({kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles}, bk, k.size(1)),
                scale);
  check_sizes(dout, {q.size(0), a.q_len, a.heads, a.v_dim}, "dout");
  check_sizes(out, {q.size(0), a.q_len, a.heads, a.v_dim}, "out");
  check_sizes(dlse, {q.size(0), a.heads, a.q_len}, "dlse");
  check_sizes(lse, {q.size(0), a.heads, a.q_len}, "lse");
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous(), "out and lse must be contiguous");
  STD_TORCH_CHECK(dout.scalar_type() == out.scalar_type(), "dout must have out's dtype");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && dlse.scalar_type() == ScalarType::Float, "lse must be float32");
  a.out = {const_cast<void*>(out.const_data_ptr()), dtype_of(out, "out")};
  a.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  g.dout = heads(dout, "dout");

  const Kernels& use = kernels();
  const int64_t pairs = q.size(0) * a.kv_heads, rep = a.heads / a.kv_heads, width = padded(a.dim), nq = a.mask.nq;
  const bool in_place = dtype_of(q, "q") == DType::f32 && width == a.dim;
  Tensor dq = in_place ? torch::stable::new_zeros(q, q.sizes()) : empty(q), dk = empty(k), dv = empty(v);
  g.dq = output(dq);
  g.dk = output(dk);
  g.dv = output(dv);
  Tensor delta = torch::stable::new_empty(lse, lse.sizes());
  g.delta = static_cast<float*>(delta.mutable_data_ptr());
  const Heads of_lse{{dlse.const_data_ptr(), DType::f32}, dlse.stride(0), dlse.stride(2), dlse.stride(1)};
  parallel(0, q.size(0) * a.q_len, 1024, [&](int64_t begin, int64_t end) {
    use.block_sparse_delta(a, g.dout, of_lse, begin, end, static_cast<float*>(delta.mutable_data_ptr()));
  });
  const Columns columns = by_column(a.mask);
  g.entries = columns.entries.data();
  g.offsets = columns.offsets.data();

  std::vector<int32_t> turns;
  Scratch sums;
  for_groups(pairs, a.mask.nk, [&](int64_t first, int64_t count, int64_t most) {
    const int64_t floats = in_place ? 0 : most * rep * nq * a.mask.bq * width;
    if (floats > 0 && !sums) {
      sums = make_scratch(floats);
      std::fill_n(sums.get(), floats, 0.0f);
      g.dq_sum = sums.get();
    }
    turns.assign(most * rep * nq, 0);
    g.turns = turns.data();
    for_each_item(count * a.mask.nk, use.block_sparse_backward_scratch(a), [&](int64_t item, float* scratch) {
      const int64_t pair = item / a.mask.nk;
      use.block_sparse_backward(g, (first + pair) / a.kv_heads, (first + pair) % a.kv_heads, item % a.mask.nk, pair * rep,
                                scratch);
    });
    if (in_place) return;
    parallel(0, count * rep * nq, 8, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t pair = item / nq, at = first * rep + pair;
        use.block_sparse_store_dq(g, at / a.heads, at % a.heads, item % nq, pair);
      }
    });
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace hhattn

STABLE_TORCH_LIBRARY_FRAGMENT(hhattn, m) {
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, Tensor kv_tiles, "
      "Tensor full_kv_num_blocks, Tensor full_kv_indices, Tensor tiles, int bk, float scale) -> (Tensor, Tensor)");
  m.def(
      "block_sparse_attention_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor kv_num_blocks, Tensor kv_indices, Tensor kv_tiles, Tensor full_kv_num_blocks, Tensor full_kv_indices, "
      "Tensor tiles, int bk, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hhattn, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&hhattn::forward));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&hhattn::backward));
}
