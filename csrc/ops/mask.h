// What the ops on a BlockMask share: its tensors as pointers, and heads worked on in groups.
#pragma once

#include "tensor.h"

namespace hhattn {

template <class T>
const T* list(const Tensor& t, torch::headeronly::ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), name, " has the wrong dtype or isn't contiguous");
  return static_cast<const T*>(t.const_data_ptr());
}

// Every listed block is there: what kernels follow without looking.
inline void check_lists(const BlockMask& m, int64_t tiles) {
  for (int64_t row = 0; row < m.batches * m.heads * m.nq; ++row) {
    const int32_t partial = m.counts[row], full = m.full_counts[row];
    STD_TORCH_CHECK(partial >= 0 && partial <= m.width, "kv_num_blocks has a count beyond kv_indices' width");
    STD_TORCH_CHECK(full >= 0 && full <= m.full_width, "full_kv_num_blocks has a count beyond full_kv_indices' width");
    for (int64_t e = row * m.width; e < row * m.width + partial; ++e) {
      STD_TORCH_CHECK(m.columns[e] >= 0 && m.columns[e] < m.nk, "kv_indices names a key block that isn't there");
      STD_TORCH_CHECK(m.tiles[e] >= 0 && m.tiles[e] < tiles, "kv_tiles names a tile that isn't there");
    }
    for (int64_t e = row * m.full_width; e < row * m.full_width + full; ++e) {
      STD_TORCH_CHECK(m.full_columns[e] >= 0 && m.full_columns[e] < m.nk, "full_kv_indices names a key block that isn't there");
    }
  }
}

inline BlockMask block_mask(const MaskTensors& t, int64_t bk, int64_t k_len) {
  using torch::headeronly::ScalarType;
  check_shapes(t);
  BlockMask m;
  m.counts = list<int32_t>(t.counts, ScalarType::Int, "kv_num_blocks");
  m.columns = list<int32_t>(t.columns, ScalarType::Int, "kv_indices");
  m.tiles = list<int32_t>(t.tiles, ScalarType::Int, "kv_tiles");
  m.full_counts = list<int32_t>(t.full_counts, ScalarType::Int, "full_kv_num_blocks");
  m.full_columns = list<int32_t>(t.full_columns, ScalarType::Int, "full_kv_indices");
  m.bits = list<uint8_t>(t.bits, ScalarType::Byte, "tiles");
  m.batches = t.columns.size(0);
  m.heads = t.columns.size(1);
  m.width = t.columns.size(3);
  m.full_width = t.full_columns.size(3);
  m.bq = t.bits.size(1);
  m.bk = bk;
  m.nq = t.columns.size(2);
  m.nk = (k_len + bk - 1) / bk;
  check_lists(m, t.bits.size(0));
  return m;
}

// n up to whole vectors.
inline int64_t padded(int64_t n) { return (n + kernels().lanes - 1) / kernels().lanes * kernels().lanes; }

// f(first, count) over pairs of batch entry and key head, as many together as keep every thread busy.
template <class F>
void for_groups(int64_t pairs, int64_t blocks_of_a_pair, const F& f) {
  const int64_t enough = 8 * torch::stable::get_num_threads();
  const int64_t together = std::clamp<int64_t>(enough / std::max<int64_t>(blocks_of_a_pair, 1), 1, std::max<int64_t>(pairs, 1));
  for (int64_t first = 0; first < pairs; first += together) f(first, std::min(together, pairs - first), together);
}

}  // namespace hhattn
