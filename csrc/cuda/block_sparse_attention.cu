// block_sparse_attention, forward, on mma.sync (sm_80 and later): a block of four warps holds a tile of a mask block's queries and
// follows its list. With c = scale · log2 e and raw scores r_ij = q_i·k_j, a tile of keys at a time:
//
//     p_ij = 2^(c·r_ij - c·m_i)      l_i = Σ_j p_ij      out_i = Σ_j p_ij v_j / l_i      lse_i = (c·m_i + log2 l_i) / log2 e
//
// m_i is the largest score that has been seen, or one at most 2^8 times smaller in weight: sums are scaled anew when it no longer is.
//
// A warp has 32 rows, so that a fragment of keys or values, read once from shared memory, serves two products: with 16 the reading,
// 128 bytes a clock, would take as long as the tensor cores do. Tiles of keys and values follow one another through a ring of three:
// one is worked on, one is on its way. Where a mask block has 64 queries, two warps hold them and the other two take the other half
// of every tile's keys; their sums are added at the end.
#include "block_sparse_exact.cuh"
#include "block_sparse_lists.cuh"
#include "block_sparse_tiles.cuh"
#include "launch.cuh"

namespace hh {
namespace {

// What a block does: dims up to HEAD, KEY_WARPS warps side by side along the keys.
template <class Type, int HEAD_, int KEY_WARPS_>
struct Shape {
  using T = Type;
  static constexpr int HEAD = HEAD_, KEY_WARPS = KEY_WARPS_;
  static constexpr int ATOMS = HEAD > 128 ? 1 : 2;  // 16 rows each, of a warp; beyond 128 dims the sums of two don't fit registers
  static constexpr int WARP_ROWS = 16 * ATOMS, ROWS = WARP_ROWS * WARPS / KEY_WARPS;
  static constexpr int KEYS = HEAD > 128 || (HEAD > 64 && KEY_WARPS == 1) ? 32 : 64, WARP_KEYS = KEYS / KEY_WARPS;
  using Rows = Tile<HEAD>;
  static constexpr uint32_t SLOT = KEYS * Rows::PITCH, RING = 3 * SLOT;
  static constexpr uint32_t BITS = ROWS * Rows::PITCH + RING, SHARED = BITS + 8 * ROWS;  // q, keys and values, the mask's bits
};

constexpr float LAZY = 8;  // how far scores, to base 2, may pass m before sums are scaled anew

// One warp's rows: their sums, and the running softmax. A lane holds rows lane / 4 and + 8 of every 16, and their columns
// lane % 4 · 2 and + 1 of every 8.
template <class S>
struct Sums {
  float out[S::ATOMS][S::HEAD / 8][4] = {};
  float top[S::ATOMS][2], total[S::ATOMS][2] = {};
};

// Scores become weights; top, total and out follow.
template <class S>
HH_DEVICE void softmax(float (&s)[S::ATOMS][S::WARP_KEYS / 8][4], Sums<S>& sums, float c) {
  float now[S::ATOMS][2];
  bool moved = false;
#pragma unroll
  for (int a = 0; a < S::ATOMS; ++a)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = s[a][0][2 * r];
#pragma unroll
      for (int j = 0; j < S::WARP_KEYS / 8; ++j) most = fmaxf(most, fmaxf(s[a][j][2 * r], s[a][j][2 * r + 1]));
      now[a][r] = ptx::quad_max(most);
      moved |= now[a][r] * c > sums.top[a][r] * c + LAZY;
    }
  if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
    for (int a = 0; a < S::ATOMS; ++a)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float top = fmaxf(sums.top[a][r], now[a][r]);
        const float keep = top == -INFINITY ? 1.0f : ptx::exp2((sums.top[a][r] - top) * c);
        sums.top[a][r] = top;
        sums.total[a][r] *= keep;
#pragma unroll
        for (int d = 0; d < S::HEAD / 8; ++d) sums.out[a][d][2 * r] *= keep, sums.out[a][d][2 * r + 1] *= keep;
      }
  }
#pragma unroll
  for (int a = 0; a < S::ATOMS; ++a)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = sums.top[a][r] == -INFINITY ? 0.0f : sums.top[a][r] * c;
      float total = 0;
#pragma unroll
      for (int j = 0; j < S::WARP_KEYS / 8; ++j)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) total += s[a][j][e] = ptx::exp2(fmaf(s[a][j][e], c, -shift));
      sums.total[a][r] += total;
    }
}

// The sums of the warps that took the second half of the keys, added to those of the first.
template <class S>
HH_DEVICE void join(Sums<S>& sums, uint32_t shared, int warp, int lane, float c) {
  constexpr int ROW_WARPS = WARPS / S::KEY_WARPS, FLOATS = S::ATOMS * (S::HEAD / 2 + 4);
  const uint32_t at = shared + (warp % ROW_WARPS * 32 * FLOATS + lane) * 4;  // float i of every lane, then float i + 1
  const auto each = [&](auto f) {
    int i = 0;
#pragma unroll
    for (int a = 0; a < S::ATOMS; ++a)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float keep[2];
        f(sums.top[a][r], at + 128 * i++, keep, 0);
        f(sums.total[a][r], at + 128 * i++, keep, 1);
#pragma unroll
        for (int d = 0; d < S::HEAD / 8; ++d)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) f(sums.out[a][d][e], at + 128 * i++, keep, 1);
      }
  };
  __syncthreads();  // the ring is free
  if (warp >= ROW_WARPS) each([](float x, uint32_t to, float*, int) { ptx::store_shared(to, __float_as_uint(x)); });
  __syncthreads();
  if (warp < ROW_WARPS) {
    each([c](float& x, uint32_t from, float* keep, int kind) {
      const float other = __uint_as_float(ptx::load_shared(from));
      if (kind == 0) {
        const float top = fmaxf(x, other);
        keep[0] = top == -INFINITY ? 1.0f : ptx::exp2((x - top) * c);
        keep[1] = top == -INFINITY ? 1.0f : ptx::exp2((other - top) * c);
        x = top;
      } else {
        x = x * keep[0] + other * keep[1];
      }
    });
  }
}

// out and lse of the warp's rows, `rows` of which are real, the first being query `start` of block `line`. Rows whose sums aren't
// finite, though their weights are, are computed again: a weight of 0 may have met an infinite value.
template <class S>
HH_DEVICE void store(const Sums<S>& sums, const BlockSparseArgs& a, uint32_t shared, int64_t batch, int head, int line, int start,
                     int rows, int lane, float c) {
  const int64_t first = int64_t(line) * a.mask.bq + start;
  float factor[S::ATOMS][2];
  uint32_t again = 0;
#pragma unroll
  for (int i = 0; i < S::ATOMS; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = i * 16 + r * 8 + lane / 4;
      const float total = ptx::quad_sum(sums.total[i][r]);
      factor[i][r] = total == 0 ? 0.0f : 1 / total;
      if (lane % 4 == 0 && row < rows)
        a.lse[(batch * a.heads + head) * a.q_len + first + row] =
            total == 0 ? -INFINITY : (sums.top[i][r] * c + ptx::log2(total)) * LN_2;
      again |= not_finite(sums.out[i], r, total < INFINITY && row < rows) << (i * 16 + r * 8);
    }
  uint16_t* out = static_cast<uint16_t*>(a.out) + ((batch * a.q_len + first) * a.heads + head) * a.v_dim;
  store_rows<typename S::T>(sums.out, factor, shared, out, int64_t(a.heads) * a.v_dim, rows, a.v_dim, lane);
  if (!again) return;
#pragma unroll
  for (int i = 0; i < 2 * S::ATOMS; ++i)
    if (lane % 4 == 0)
      ptx::store_shared2(shared + (i * 8 + lane / 4) * 8,
                         uint2{__float_as_uint(sums.top[i / 2][i % 2] * c), __float_as_uint(factor[i / 2][i % 2])});
  __syncwarp();
  for_rows(again, [&](int row) {
    const float shift = __uint_as_float(ptx::load_shared(shared + row * 8));
    const float inverse = __uint_as_float(ptx::load_shared(shared + row * 8 + 4));
    exact_row<typename S::T, S::HEAD>(a, batch, head, line, start + row, shift, inverse);
  });
}

struct Problem {
  BlockSparseArgs args;
  Chunks q, k, v;
};

template <class S>
__global__ void __launch_bounds__(THREADS, 2) forward(const __grid_constant__ Problem p) {
  const BlockSparseArgs& a = p.args;
  DYNAMIC_SHARED(memory);
  const uint32_t shared = ptx::smem_address(memory), ring = shared + S::ROWS * S::Rows::PITCH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int parts = (a.mask.bq + S::ROWS - 1) / S::ROWS;
  const int64_t batch = blockIdx.z;
  const int line = blockIdx.x / parts, start = blockIdx.x % parts * S::ROWS, head = blockIdx.y;
  const int first = line * a.mask.bq + start, rows = min(a.mask.bq - start, a.q_len - first);
  const int warp_row = warp % (WARPS / S::KEY_WARPS) * S::WARP_ROWS, warp_key = warp / (WARPS / S::KEY_WARPS) * S::WARP_KEYS;
  const int kv_head = head / (a.heads / a.kv_heads);
  const uint32_t k = p.k.offset(batch, kv_head), v = p.v.offset(batch, kv_head);
  const float c = a.scale * LOG2_E;

  auto walk = Walk<S::KEYS>::keys(a.mask, batch, head, line, a.k_len);
  const auto load = [&](uint32_t slot, const Chunks& x, uint32_t offset, int dim, const Part& part) {
    S::Rows::template copy<S::KEYS>(ring + slot, x, offset, part.first, part.count, dim);
  };
  const auto after = [](uint32_t slot) { return slot + S::SLOT == S::RING ? 0 : slot + S::SLOT; };
  Part part{};
  bool more = walk.more();
  if (more) {
    part = walk.next();
    S::Rows::template copy<S::ROWS>(shared, p.q, p.q.offset(batch, head), first, rows, a.dim);
    load(0, p.k, k, a.dim, part);
  }
  if (more && part.tile >= 0) copy_bits<S::ROWS>(shared + S::BITS, a.mask, part.tile, start, rows, part.start & ~63);
  ptx::cp_async_commit();
  if (more) load(S::SLOT, p.v, v, a.v_dim, part);
  ptx::cp_async_commit();

  Sums<S> sums;
#pragma unroll
  for (int i = 0; i < 2 * S::ATOMS; ++i) sums.top[i / 2][i % 2] = -INFINITY;
  const uint32_t q_at = shared + warp_row * S::Rows::PITCH + S::Rows::a_rows(lane);
  const uint32_t k_at = ring + warp_key * S::Rows::PITCH + S::Rows::b_rows(lane);
  const uint32_t v_at = ring + warp_key * S::Rows::PITCH + S::Rows::b_columns(lane);
  const uint32_t bits_at = shared + S::BITS + (warp_row + lane / 4) * 8;
  uint32_t slot = 0;  // of the keys; the values' comes next
  while (more) {
    const uint32_t values = after(slot), ahead = after(values);
    Part next{};
    more = walk.more();
    ptx::cp_async_wait<1>();
    __syncthreads();  // keys and bits are there, the last values done with
    if (more) {
      next = walk.next();
      load(ahead, p.k, k, a.dim, next);
    }
    ptx::cp_async_commit();
    float s[S::ATOMS][S::WARP_KEYS / 8][4];
    times_rows<typename S::T, S::HEAD>(s, q_at, k_at + slot);
    if (part.tile >= 0 || part.count < S::KEYS) {
      Kept<S::ATOMS, S::WARP_KEYS> kept;
      kept.load(bits_at, part, warp_key);
#pragma unroll
      for (int i = 0; i < S::ATOMS * S::WARP_KEYS / 2; ++i) {
        const int atom = i / (S::WARP_KEYS / 2), j = i / 4 % (S::WARP_KEYS / 8);
        if (!kept(atom, j, i % 4, lane)) s[atom][j][i % 4] = -INFINITY;
      }
    }
    softmax<S>(s, sums, c);
    ptx::cp_async_wait<1>();
    __syncthreads();  // values are there, keys and bits done with
    if (more && next.tile >= 0)
      copy_bits<S::ROWS>(shared + S::BITS, a.mask, next.tile, start, rows, next.start & ~63);
    ptx::cp_async_commit();
    if (more) load(slot, p.v, v, a.v_dim, next);
    ptx::cp_async_commit();
    add_times<typename S::T, S::HEAD>(sums.out, s, v_at + values);
    slot = ahead;
    part = next;
  }
  ptx::cp_async_wait<0>();
  if constexpr (S::KEY_WARPS > 1) {
    join<S>(sums, ring, warp, lane, c);
    if (warp_key) return;
  }
  store<S>(sums, a, shared + warp_row * S::Rows::PITCH, batch, head, line, start + warp_row, rows - warp_row, lane, c);
}

template <class T, int HEAD, int KEY_WARPS>
int run(const BlockSparseArgs& a, void* stream) {
  using S = Shape<T, HEAD, KEY_WARPS>;
  const int parts = (a.mask.bq + S::ROWS - 1) / S::ROWS;
  const dim3 grid(a.mask.lines * parts, a.heads, a.batch);
  return launch("block_sparse_attention", forward<S>, grid, dim3(THREADS), S::SHARED, stream,
                Problem{a, chunks(a.q), chunks(a.k), chunks(a.v)});
}

// Mask blocks are cut into tiles of 128 queries, or of 64 where that leaves less of the last one empty.
template <class T, int HEAD>
int by_rows(const BlockSparseArgs& a, void* stream) {
  if constexpr (HEAD > 128) return run<T, HEAD, 1>(a, stream);
  else return (a.mask.bq - 1) % 128 < 64 ? run<T, HEAD, 2>(a, stream) : run<T, HEAD, 1>(a, stream);
}

template <class T>
int by_head(const BlockSparseArgs& a, void* stream) {
  return by_dim(max(a.dim, a.v_dim), [&](auto head) { return by_rows<T, head.value>(a, stream); });
}

}  // namespace
}  // namespace hh

extern "C" int hh_cuda_block_sparse_attention(const hh::BlockSparseArgs* args, void* stream) {
  return hh::by_type(args->q.in.dtype, [&](auto type) { return hh::by_head<decltype(type)>(*args, stream); });
}
