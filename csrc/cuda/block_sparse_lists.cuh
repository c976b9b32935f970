// A mask's lists, as kernels of block_sparse_attention follow them, and the bits of its partial blocks.
#pragma once
#include "block_sparse_attention.h"
#include "ptx.cuh"

namespace hh {

inline constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Some consecutive tokens of a listed block.
struct Part {
  int first;  // the first token in its sequence
  int start;  // and in its block
  int count;  // tokens that are real and the block's; none or less beyond the sequence
  int tile;   // of bits, or -1 in a full block
};

// Goes along a line of a mask's lists, full blocks and then partial ones, SIZE tokens at a time. Blocks have `block` tokens of a
// sequence of `length`. What a list names is loaded one block ahead of its use.
template <int SIZE>
class Walk {
 public:
  // Full blocks are full_columns[full ... full + fulls), partial ones columns and tiles[partial ... partial + partials).
  HH_DEVICE Walk(const BlockSparseMask& mask, uint32_t full, int fulls, uint32_t partial, int partials, int block, int length)
      : mask_(mask), partial_(partial), at_(full), left_(fulls), partials_(partials), block_(block), length_(length) {
    fetch();
  }
  // Keys of query block `row`.
  static HH_DEVICE Walk keys(const BlockSparseMask& m, uint32_t batch, uint32_t head, uint32_t row, int length) {
    const uint32_t line = (batch * m.batch + head * m.head) * m.lines + row;
    return Walk(m, line * m.full_width, m.full_counts[line], line * m.width, m.counts[line], m.bk, length);
  }
  // Queries of key block `column`: a mask's lists by key block, of which counts and full_counts are offsets [lines + 1] of an entry.
  static HH_DEVICE Walk queries(const BlockSparseMask& m, uint32_t batch, uint32_t head, uint32_t column, int length) {
    const uint32_t entry = batch * m.batch + head * m.head, line = entry * (m.lines + 1) + column;
    const int full = m.full_counts[line], partial = m.counts[line];
    return Walk(m, entry * m.full_width + full, m.full_counts[line + 1] - full, entry * m.width + partial,
                m.counts[line + 1] - partial, m.bq, length);
  }
  // How often next() may be called; asked before the first time.
  HH_DEVICE int steps() const { return (max(left_, 0) + partials_) * parts(); }
  // Whether next() may be called once more.
  HH_DEVICE bool more() const { return left_ > -partials_; }
  HH_DEVICE Part next() {
    const Part out{number_ * block_ + start_, start_, min(min(SIZE, block_ - start_), length_ - number_ * block_ - start_), tile_};
    start_ += SIZE;
    if (start_ >= block_) {
      start_ = 0;
      ++at_;
      --left_;
      fetch();
    }
    return out;
  }

 private:
  HH_DEVICE int parts() const { return (block_ + SIZE - 1) / SIZE; }
  HH_DEVICE void fetch() {
    if (left_ == 0) at_ = partial_;
    if (left_ > 0) {
      number_ = mask_.full_columns[at_];
    } else if (left_ > -partials_) {
      number_ = mask_.columns[at_];
      tile_ = mask_.tiles[at_];
    }
  }

  const BlockSparseMask& mask_;
  const uint32_t partial_;
  uint32_t at_;
  int left_;  // full blocks, the one at hand included; then less than 1
  const int partials_, block_, length_;
  int start_ = 0, number_ = 0, tile_ = -1;
};

// Starts bringing a tile's bits of 64 keys, `start` being a multiple of 64, to shared memory: 8 bytes each of ROWS rows from `row` on, of
// which the first `rows` are real and the others get 0. They are there after a wait for copies and a barrier.
template <int ROWS>
HH_DEVICE void copy_bits(uint32_t to, const BlockSparseMask& m, int tile, int row, int rows, int start) {
  const int i = threadIdx.x, width = (m.bk + 7) / 8;
  if (i >= ROWS) return;
  const uint8_t* from = m.bits + (static_cast<int64_t>(tile) * m.bq + row + i) * width + start / 8;
  if (m.bk % 64 == 0) {
    ptx::cp_async<8>(to + 8 * i, from, i < rows ? 8 : 0);
  } else {  // rows of bits aren't aligned
    uint64_t bits = 0;
#pragma unroll 1
    for (int at = i < rows ? min(8, width - start / 8) : 0; at > 0; --at) bits = bits << 8 | from[at - 1];
    ptx::store_shared2(to + 8 * i, uint2{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)});
  }
}

// Bits [start, start + 32 N) of which those below `count` are set.
template <int N>
HH_DEVICE void first_words(uint32_t (&words)[N], int start, int count) {
#pragma unroll
  for (int w = 0; w < N; ++w) {
    const int left = count - start - 32 * w;
    words[w] = left <= 0 ? 0u : left >= 32 ? ~0u : (1u << left) - 1;
  }
}

// Which pairs of a product's fragments are kept: of a warp's 16 · ATOMS rows of queries, KEYS keys. A lane holds rows lane / 4 and
// + 8 of every 16, and columns lane % 4 · 2 and + 1 of every 8.
template <int ATOMS, int KEYS>
struct Kept {
  static constexpr int WORDS = (KEYS + 31) / 32;
  uint32_t words[ATOMS][2][WORDS] = {};

  // `bits` is where copy_bits brought the lane's first row; `key` the warp's first of `part`.
  HH_DEVICE void load(uint32_t bits, const Part& part, int key) {
#pragma unroll
    for (int a = 0; a < ATOMS; ++a)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (part.tile < 0) {
          first_words(words[a][r], key / 32 * 32, part.count);
        } else {
          const uint32_t at = bits + (a * 16 + r * 8) * 8 + (part.start + key) / 32 % 2 * 4;
#pragma unroll
          for (int w = 0; w < WORDS; ++w) words[a][r][w] = ptx::load_shared(at + 4 * w);
        }
        if constexpr (KEYS < 32) words[a][r][0] >>= key % 32;
      }
  }
  // Element e of fragment j of 16 rows.
  HH_DEVICE bool operator()(int a, int j, int e, int lane) const {
    const uint32_t word = words[a][e / 2][j / 4] >> (lane % 4 * 2);
    return word & (1u << (j % 4 * 8 + e % 2));
  }
};

}  // namespace hh
