// What a warpgroup does with its 64 rows in block_sparse_attention_sm90.cu: products by wgmma, bits of partial blocks, the running
// softmax. A lane holds of two rows, lane / 4 of its warp's 16 and 8 further, columns lane % 4 · 2 and next of every 8.
#pragma once
#include "block_sparse_lists.cuh"
#include "ptx_sm90.cuh"

namespace hh::sm90 {

constexpr int GROUP = 128;                  // threads of a warpgroup
constexpr int LINE = 64, LINE_BYTES = 128;  // of a tile in shared memory: elements, bytes
constexpr int SHARED_MOST = 227 << 10, MAX_STAGES = 4;
constexpr float INF = __builtin_inff();
constexpr float LAZY = 8;  // to base 2

// Tiles of ROWS = 64 · GROUPS queries and KEYS keys of HEAD dims, and where they lie in shared memory: each as columns of 64 dims.
template <int HEAD_, int KEYS_, int GROUPS_>
struct Shape {
  static constexpr int HEAD = HEAD_, KEYS = KEYS_, GROUPS = GROUPS_;
  static constexpr int ROWS = 64 * GROUPS, COLUMNS = (HEAD + LINE - 1) / LINE, THREADS = GROUP * (1 + GROUPS);
  static constexpr int BLOCKS = GROUPS == 1 && HEAD <= 128 ? 2 : 1;  // of an SM
  static constexpr int Q_BYTES = ROWS * COLUMNS * LINE_BYTES, TILE_BYTES = KEYS * COLUMNS * LINE_BYTES;
  static constexpr int BARRIERS = 8 * (4 * MAX_STAGES + 1);
  static constexpr int FIT = (SHARED_MOST / BLOCKS - 1024 * (BLOCKS - 1) - Q_BYTES - BARRIERS) / (2 * TILE_BYTES);
  static constexpr int STAGES = FIT < MAX_STAGES ? FIT : MAX_STAGES;
  static constexpr int SHARED = Q_BYTES + 2 * STAGES * TILE_BYTES + BARRIERS;
  static constexpr int MORE = BLOCKS == 2 ? 216 : 240, FEWER = BLOCKS == 2 ? 40 : 24;  // registers: of consumers, of the producer
  static constexpr bool Q_IN_REGISTERS = HEAD <= 128;
  static_assert(STAGES >= 2);
};

// Shared memory's addresses.
template <class S>
struct Places {
  uint32_t base;
  // 16 bytes of q, or of out.
  HH_DEVICE uint32_t q(int row, int chunk) const {
    return base + (chunk / 8 * S::ROWS + row) * LINE_BYTES + (chunk % 8 ^ row % 8) * 16;
  }
  HH_DEVICE uint32_t k(int stage) const { return base + S::Q_BYTES + stage * S::TILE_BYTES; }
  HH_DEVICE uint32_t v(int stage) const { return k(S::STAGES + stage); }
  HH_DEVICE uint32_t bar(int i) const { return k(2 * S::STAGES) + 8 * i; }
  HH_DEVICE uint32_t q_full() const { return bar(0); }
  HH_DEVICE uint32_t k_full(int stage) const { return bar(1 + stage); }
  HH_DEVICE uint32_t v_full(int stage) const { return bar(1 + S::STAGES + stage); }
  HH_DEVICE uint32_t k_free(int stage) const { return bar(1 + 2 * S::STAGES + stage); }
  HH_DEVICE uint32_t v_free(int stage) const { return bar(1 + 3 * S::STAGES + stage); }
};

// The warpgroup's rows of q, from where wgmma has them: registers where they fit, since shared memory has enough to do with keys and
// values, or shared memory, by descriptor.
template <class T, class S, bool IN_REGISTERS>
struct Queries {
  uint32_t a[S::HEAD / 16][4];

  HH_DEVICE void load(const Places<S>& at, int group) {
    const int lane = threadIdx.x % 32, row = group * 64 + threadIdx.x % GROUP / 32 * 16 + lane % 16;
#pragma unroll
    for (int t = 0; t < S::HEAD / 16; ++t) ptx::ldmatrix_x4(a[t], at.q(row, 2 * t + lane / 16));
  }
  HH_DEVICE void times(float (&s)[S::KEYS / 2], int t, uint64_t k) const {
    ptx::Wgmma<T, S::KEYS>::template registers<false>(s, a[t], k, t > 0);
  }
};
template <class T, class S>
struct Queries<T, S, false> {
  uint64_t a;

  HH_DEVICE void load(const Places<S>& at, int group) { a = ptx::descriptor(at.q(group * 64, 0)); }
  HH_DEVICE void times(float (&s)[S::KEYS / 2], int t, uint64_t k) const {
    ptx::Wgmma<T, S::KEYS>::shared(s, a + (t / 4 * S::ROWS * LINE_BYTES + t % 4 * 32) / 16, k, t > 0);
  }
};

// s = q k', not waited for.
template <class T, class S, bool IN_REGISTERS>
HH_DEVICE void scores(float (&s)[S::KEYS / 2], const Queries<T, S, IN_REGISTERS>& q, uint32_t k) {
  const uint64_t b = ptx::descriptor(k);
#pragma unroll
  for (int t = 0; t < S::HEAD / 16; ++t) q.times(s, t, b + (t / 4 * S::KEYS * LINE_BYTES + t % 4 * 32) / 16);
  ptx::wgmma_commit();
}

// o += p v, not waited for.
template <class T, class S>
HH_DEVICE void values(float (&o)[S::HEAD / 2], const uint32_t (&p)[S::KEYS / 16][4], uint32_t v) {
  const uint64_t b = ptx::descriptor(v, S::KEYS * LINE_BYTES);
#pragma unroll
  for (int t = 0; t < S::KEYS / 16; ++t) ptx::Wgmma<T, S::HEAD>::template registers<true>(o, p[t], b + t * LINE_BYTES, true);
  ptx::wgmma_commit();
}

// A lane's bits of a partial block: of its two rows, of KEYS keys.
template <int KEYS>
struct Bits {
  uint32_t words[2][KEYS / 32];

  HH_DEVICE void load(const BlockSparseMask& m, const Part& part, int row) {
    const uint8_t* line = m.bits + ((static_cast<int64_t>(part.tile) * m.bq + row) * m.bk + part.start) / 8;
#pragma unroll
    for (int r = 0; r < 2; ++r, line += m.bk) {  // 8 rows further
      if constexpr (KEYS == 128) {
        const uint4 four = *reinterpret_cast<const uint4*>(line);
        words[r][0] = four.x, words[r][1] = four.y, words[r][2] = four.z, words[r][3] = four.w;
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(line);
        words[r][0] = two.x, words[r][1] = two.y;
      }
    }
  }

  HH_DEVICE void apply(float (&s)[KEYS / 2], int lane) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int w = 0; w < KEYS / 32; ++w) {
        const uint32_t mine = words[r][w] >> lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& score = s[(4 * w + i / 2) * 4 + 2 * r + i % 2];
          score = mine & 1u << (i / 2 * 8 + i % 2) ? score : -INF;
        }
      }
  }
};

// The running softmax of a lane's two rows: `top`, the scores that weights are relative to, the largest ones or such as weigh at most
// 2^LAZY times less; sums of this lane's weights.
struct Softmax {
  float top[2] = {-INF, -INF}, total[2] = {0, 0};

  // Scores become weights. Whether former sums have to be multiplied by `keep`, for some row of the warp.
  template <int COUNT>
  HH_DEVICE bool next(float (&s)[COUNT], float c, float (&keep)[2]) {
    float now[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      now[r] = s[2 * r];
#pragma unroll
      for (int i = 0; i < COUNT; i += 4) now[r] = fmaxf(fmaxf(now[r], s[i + 2 * r]), s[i + 2 * r + 1]);
      now[r] = ptx::quad_max(now[r]);
    }
    const bool moved = __any_sync(0xffffffffu, now[0] * c > top[0] * c + LAZY || now[1] * c > top[1] * c + LAZY);
    if (moved)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float most = fmaxf(top[r], now[r]);
        keep[r] = most == -INF ? 1.0f : ptx::exp2((top[r] - most) * c);
        top[r] = most;
        total[r] *= keep[r];
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = top[r] == -INF ? 0.0f : top[r] * c;
#pragma unroll
      for (int i = 0; i < COUNT; i += 4)
#pragma unroll
        for (int j = 2 * r; j < 2 * r + 2; ++j) total[r] += s[i + j] = ptx::exp2(fmaf(s[i + j], c, -shift));
    }
    return moved;
  }
};

template <class T, int COUNT>
HH_DEVICE void pack(uint32_t (&p)[COUNT / 8][4], const float (&s)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) p[i / 4][i % 4] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
}

template <int COUNT>
HH_DEVICE void scale_rows(float (&o)[COUNT], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) o[i] *= by[i / 2 % 2];
}

}  // namespace hh::sm90
