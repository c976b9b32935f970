// A BlockMask's pairs, or all others, as the kernels of linear attention take them: whole blocks as matrices of zeros and ones whose
// rows' sums share sums of fours, and the rest as entries that point to bits.
#pragma once

#include <vector>

#include "mask.h"

namespace hhattn {

// What the bits of a partial block hold, seen within the lengths: a ragged block attended as far as it goes is whole.
class Parts {
 public:
  static constexpr int32_t kNothing = -1, kWhole = -2;

  Parts(const BlockMask& m, int64_t tiles, int64_t q_len, int64_t k_len, bool complement)
      : m_(m), tiles_(tiles), q_len_(q_len), k_len_(k_len), bytes_((m.bk + 7) / 8), complement_(complement) {
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t count = 0;
      for (int64_t at = 0; at < m.bq * bytes_; ++at) count += __builtin_popcount(m.tile(t)[at]);
      counts_.push_back(count);
    }
    if (complement) turned_.assign(4 * tiles, kNothing);
  }

  // The tile of block (i, j), whose tile in the mask is `tile`; or kNothing, or kWhole.
  int32_t of(int64_t i, int64_t j, int32_t tile) {
    const int64_t rows = std::min(m_.bq, q_len_ - i * m_.bq), keys = std::min(m_.bk, k_len_ - j * m_.bk);
    const int64_t count = complement_ ? rows * keys - counts_[tile] : counts_[tile];
    if (count == 0) return kNothing;
    if (count == rows * keys) return kWhole;
    if (!complement_) return tile;
    int32_t& turned = turned_[((rows < m_.bq) * 2 + (keys < m_.bk)) * tiles_ + tile];
    if (turned == kNothing) turned = turn(tile, rows, keys);
    return turned;
  }
  const uint8_t* bits() const { return complement_ ? bits_.data() : m_.bits; }

 private:
  int32_t turn(int32_t tile, int64_t rows, int64_t keys) {
    const size_t at = bits_.size();
    bits_.resize(at + m_.bq * bytes_);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t key = 0; key < keys; key += 8) {
        const int64_t byte = r * bytes_ + key / 8;
        bits_[at + byte] = static_cast<uint8_t>(~m_.tile(tile)[byte] & (keys - key < 8 ? (1 << (keys - key)) - 1 : 255));
      }
    }
    return static_cast<int32_t>(at / (m_.bq * bytes_));
  }

  const BlockMask& m_;
  int64_t tiles_, q_len_, k_len_, bytes_;
  bool complement_;
  std::vector<int64_t> counts_;
  std::vector<int32_t> turned_;  // by kind of edge and tile
  std::vector<uint8_t> bits_;
};

// A matrix of zeros and ones [rows, n], whose element (r, i) is at r·row + i·column.
class SubsetLists {
 public:
  void make(const std::vector<uint8_t>& ones, int64_t rows, int64_t n, int64_t row, int64_t column) {
    any_.assign(rows, 0);
    for (int64_t first = 0; first < n; first += 4 * kFours) {
      for (int64_t r = 0; r < rows; ++r) {
        const size_t before = entries_.size();
        for (int64_t at = first; at < std::min(first + 4 * kFours, n); at += 4) {
          int code = 0;
          for (int64_t i = at; i < std::min(at + 4, n); ++i) code |= ones[r * row + i * column] << (i - at);
          if (code) entries_.push_back(static_cast<uint8_t>((at - first) / 4 * 16 + code));
        }
        counts_.push_back(static_cast<uint8_t>(entries_.size() - before));
        any_[r] |= entries_.size() > before;
      }
    }
    view_ = {counts_.data(), entries_.data(), any_.data(), rows, n};
  }
  const Subsets& view() const { return view_; }

 private:
  std::vector<uint8_t> counts_, entries_, any_;
  Subsets view_;
};

// The pairs of one batch entry and head of a mask.
class PairLists {
 public:
  PairLists(const BlockMask& m, int64_t b, int64_t h, bool complement, bool backward, Parts& parts) {
    std::vector<uint8_t> whole(m.nq * m.nk, complement);
    rows_.push_back(0);
    for (int64_t i = 0; i < m.nq; ++i) {
      const BlockRow row = m.row(b, h, i);
      for (int64_t e = 0; e < row.full; ++e) whole[i * m.nk + row.full_columns[e]] = !complement;
      for (int64_t e = 0; e < row.partial; ++e) {
        const int32_t j = row.columns[e], tile = parts.of(i, j, row.tiles[e]);
        whole[i * m.nk + j] = tile == Parts::kWhole;
        if (tile >= 0) by_row_.push_back({static_cast<int32_t>(i), j, tile});
      }
      rows_.push_back(static_cast<int64_t>(by_row_.size()));
    }
    whole_.make(whole, m.nq, m.nk, m.nk, 1);
    if (backward) {
      turned_.make(whole, m.nk, m.nq, 1, m.nk);
      by_column_ = by_row_;
      std::stable_sort(by_column_.begin(), by_column_.end(), [](const auto& x, const auto& y) { return x.column < y.column; });
      columns_.assign(m.nk + 1, 0);
      for (const PartEntry& e : by_column_) ++columns_[e.column + 1];
      for (int64_t j = 0; j < m.nk; ++j) columns_[j + 1] += columns_[j];
    }
    view_ = {whole_.view(), turned_.view(), by_row_.data(), by_column_.data(), rows_.data(), columns_.data()};
  }
  PairLists(PairLists&&) = default;
  const MarginalPairs& view() const { return view_; }
  bool has_parts() const { return !by_row_.empty(); }

 private:
  SubsetLists whole_, turned_;
  std::vector<PartEntry> by_row_, by_column_;
  std::vector<int64_t> rows_, columns_;
  MarginalPairs view_;
};

}  // namespace hhattn
