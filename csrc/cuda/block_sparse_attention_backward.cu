// block_sparse_attention, backward, on mma.sync (sm_80 and later). Scores are computed again from lse; with
// delta_i = do_i·o_i - dlse_i:
//
//     p_ij = exp(s_ij - lse_i)      ds_ij = p_ij (do_i·v_j - delta_i)
//     dq_i = scale Σ_j ds_ij k_j      dk_j = scale Σ_i ds_ij q_i      dv_j = Σ_i p_ij do_i
//
// dq goes along lists of keys, dk and dv along lists of queries. Every sum is made by one block in the order of its list, so
// gradients are the same bits every time, without atomics.
#include "block_sparse_exact_backward.cuh"
#include "block_sparse_lists.cuh"
#include "block_sparse_tiles.cuh"
#include "launch.cuh"

namespace hh {
namespace {

// delta, and lse to base 2, +inf where a query attends nothing, so that its weights are 0. LANES lanes take a row.
template <class T>
__global__ void __launch_bounds__(THREADS) delta(const __grid_constant__ BlockSparseBackwardArgs a, int lanes) {
  const int64_t row = int64_t(blockIdx.x) * (THREADS / lanes) + threadIdx.x / lanes;  // of [B, Sq, H]
  const int lane = threadIdx.x % lanes;
  const bool there = row < int64_t(a.batch) * a.q_len * a.heads;
  const int64_t head = row % a.heads, token = row / a.heads % a.q_len, batch = row / a.heads / a.q_len;
  float sum = 0;
  if (there && lane * 8 < a.v_dim) {
    const uint4 x = *reinterpret_cast<const uint4*>(head_of(a.dout, batch, head) + token * a.dout.token + lane * 8);
    const uint4 y = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.out) + row * a.v_dim + lane * 8);
    const uint32_t dout[] = {x.x, x.y, x.z, x.w}, out[] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 p = ptx::unpack<T>(dout[i]), q = ptx::unpack<T>(out[i]);
      sum += p.x * q.x + p.y * q.y;
    }
  }
  for (int by = lanes / 2; by; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
  if (there && lane == 0) {
    const int64_t at = (batch * a.heads + head) * a.q_len + token;
    a.delta[at] = sum - a.dlse[batch * a.dlse_batch + head * a.dlse_head + token * a.dlse_token];
    a.log2[at] = a.lse[at] == -INFINITY ? INFINITY : a.lse[at] * LOG2_E;
  }
}

struct Problem {
  BlockSparseBackwardArgs args;
  Chunks q, k, v, dout;
};

// dq of 64 queries (32 beyond 128 dims): two warps share the rows of each other two, and take the other half of every tile's keys.
template <class Type, int HEAD_>
struct DqShape {
  using T = Type;
  static constexpr int HEAD = HEAD_, ATOMS = HEAD > 128 ? 1 : 2, WARP_ROWS = 16 * ATOMS, ROWS = 2 * WARP_ROWS;
  static constexpr int KEYS = HEAD > 128 ? 32 : 64, WARP_KEYS = KEYS / 2;
  using Rows = Tile<HEAD>;
  static constexpr uint32_t QUERIES = ROWS * Rows::PITCH, SLOT = KEYS * Rows::PITCH;
  static constexpr uint32_t BITS = 2 * QUERIES + 3 * SLOT, SHARED = BITS + 16 * ROWS;  // q, do, keys twice, values; bits twice
};

template <class S>
__global__ void __launch_bounds__(THREADS, 2) backward_dq(const __grid_constant__ Problem problem) {
  const BlockSparseBackwardArgs& a = problem.args;
  using T = typename S::T;
  using Rows = typename S::Rows;
  DYNAMIC_SHARED(memory);
  const uint32_t q_tile = ptx::smem_address(memory), do_tile = q_tile + S::QUERIES, keys = do_tile + S::QUERIES,
                 values = keys + 2 * S::SLOT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int parts = (a.mask.bq + S::ROWS - 1) / S::ROWS;
  const int64_t batch = blockIdx.z;
  const int line = blockIdx.x / parts, start = blockIdx.x % parts * S::ROWS, head = blockIdx.y;
  const int first = line * a.mask.bq + start, rows = min(a.mask.bq - start, a.q_len - first);
  const int warp_row = warp % 2 * S::WARP_ROWS, warp_key = warp / 2 * S::WARP_KEYS;
  const int kv_head = head / (a.heads / a.kv_heads);
  const uint32_t k = problem.k.offset(batch, kv_head), v = problem.v.offset(batch, kv_head);
  const float c = a.scale * LOG2_E;

  auto walk = Walk<S::KEYS>::keys(a.mask, batch, head, line, a.k_len);
  const auto load = [&](uint32_t to, const Chunks& x, uint32_t offset, int dim, const Part& part) {
    Rows::template copy<S::KEYS>(to, x, offset, part.first, part.count, dim);
  };
  const auto load_bits = [&](const Part& part, int odd) {
    if (part.tile >= 0)
      copy_bits<S::ROWS>(q_tile + S::BITS + odd * 8 * S::ROWS, a.mask, part.tile, start, rows, part.start & ~63);
  };
  Part part{};
  bool more = walk.more();
  if (more) {
    part = walk.next();
    load_bits(part, 0);
    Rows::template copy<S::ROWS>(q_tile, problem.q, problem.q.offset(batch, head), first, rows, a.dim);
    Rows::template copy<S::ROWS>(do_tile, problem.dout, problem.dout.offset(batch, head), first, rows, a.v_dim);
    load(keys, problem.k, k, a.dim, part);
    load(values, problem.v, v, a.v_dim, part);
  }
  ptx::cp_async_commit();

  float log2[S::ATOMS][2], delta[S::ATOMS][2], dq[S::ATOMS][S::HEAD / 8][4] = {};
#pragma unroll
  for (int i = 0; i < 2 * S::ATOMS; ++i) {
    const int row = warp_row + i * 8 + lane / 4;
    const int64_t at = (batch * a.heads + head) * a.q_len + first + row;
    log2[i / 2][i % 2] = row < rows ? a.log2[at] : INFINITY;
    delta[i / 2][i % 2] = row < rows ? a.delta[at] : 0.0f;
  }
  const uint32_t q_at = q_tile + warp_row * Rows::PITCH + Rows::a_rows(lane), do_at = q_at + S::QUERIES;
  for (int odd = 0; more; odd ^= 1) {
    more = walk.more();
    const uint32_t key = keys + odd * S::SLOT + warp_key * Rows::PITCH;
    Part next{};
    ptx::cp_async_wait<0>();
    __syncthreads();  // keys and values are there, the other keys done with
    if (more) {
      next = walk.next();
      load(keys + (odd ^ 1) * S::SLOT, problem.k, k, a.dim, next);
      load_bits(next, odd ^ 1);
    }
    float ds[S::ATOMS][S::WARP_KEYS / 8][4], s[S::ATOMS][S::WARP_KEYS / 8][4];
    times_rows<T, S::HEAD>(ds, do_at, values + warp_key * Rows::PITCH + Rows::b_rows(lane));
    __syncthreads();  // the values are done with
    if (more) load(values, problem.v, v, a.v_dim, next);
    ptx::cp_async_commit();
    times_rows<T, S::HEAD>(s, q_at, key + Rows::b_rows(lane));
#pragma unroll
    for (int i = 0; i < S::ATOMS; ++i)
#pragma unroll
      for (int j = 0; j < S::WARP_KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ds[i][j][e] = ptx::exp2(fmaf(s[i][j][e], c, -log2[i][e / 2])) * (ds[i][j][e] - delta[i][e / 2]);
    if (part.tile >= 0 || part.count < S::KEYS) {
      Kept<S::ATOMS, S::WARP_KEYS> kept;
      kept.load(q_tile + S::BITS + (odd * S::ROWS + warp_row + lane / 4) * 8, part, warp_key);
#pragma unroll
      for (int i = 0; i < S::ATOMS * S::WARP_KEYS / 2; ++i) {
        const int atom = i / (S::WARP_KEYS / 2), j = i / 4 % (S::WARP_KEYS / 8);
        if (!kept(atom, j, i % 4, lane)) ds[atom][j][i % 4] = 0;
      }
    }
    add_times<T, S::HEAD>(dq, ds, key + Rows::b_columns(lane));
    part = next;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // queries and keys are done with
  const uint32_t mine = q_tile + (warp % 2 * S::ATOMS * S::HEAD / 2 * 32 + lane) * 4;  // float i of every lane, then float i + 1
#pragma unroll
  for (int i = 0; i < S::ATOMS * S::HEAD / 2; ++i)
    if (warp >= 2) ptx::store_shared(mine + 128 * i, __float_as_uint(dq[i / (S::HEAD / 2)][i / 4 % (S::HEAD / 8)][i % 4]));
  __syncthreads();
  if (warp >= 2) return;
#pragma unroll
  for (int i = 0; i < S::ATOMS * S::HEAD / 2; ++i)
    dq[i / (S::HEAD / 2)][i / 4 % (S::HEAD / 8)][i % 4] += __uint_as_float(ptx::load_shared(mine + 128 * i));
  float factor[S::ATOMS][2];
  uint32_t again = 0;
#pragma unroll
  for (int i = 0; i < 2 * S::ATOMS; ++i) {
    factor[i / 2][i % 2] = a.scale;
    again |= not_finite(dq[i / 2], i % 2, warp_row + i * 8 + lane / 4 < rows) << (i * 8);
  }
  __syncwarp();
  uint16_t* to = static_cast<uint16_t*>(a.dq) + ((batch * a.q_len + first + warp_row) * a.heads + head) * a.dim;
  store_rows<T>(dq, factor, values + warp_row * Rows::PITCH, to, int64_t(a.heads) * a.dim, rows - warp_row, a.dim, lane);
  for_rows(again, [&](int row) { exact_dq<T>(a, batch, head, line, start + warp_row + row); });
}

// dk and dv of 64 keys, 16 a warp, whose rows of k and v stay in registers; beyond 128 dims of 32 keys, and of the sums, which fill
// the registers, two warps hold one half each.
template <class Type, int HEAD_>
struct DkvShape {
  using T = Type;
  static constexpr int HEAD = HEAD_, HALVES = HEAD > 128 ? 2 : 1, WIDTH = HEAD / HALVES, ROWS = 16 * WARPS / HALVES;
  static constexpr int QUERIES = HEAD > 128 ? 32 : 64;
  static constexpr bool KEEP = HEAD <= 128;
  using Rows = Tile<HEAD>;
  static constexpr uint32_t KEYS = ROWS * Rows::PITCH, SLOT = QUERIES * Rows::PITCH;  // of k or v; of q or do
  // q and do, twice; log2, delta and the mask's bits of each query, twice; k and v, where they don't lie where q and do will
  static constexpr uint32_t NUMBERS = 4 * SLOT, BITS = NUMBERS + 16 * QUERIES, OTHERS = BITS + 16 * QUERIES;
  static constexpr uint32_t SHARED = OTHERS + (KEEP ? 0 : 2 * KEYS);
};

template <class S>
__global__ void __launch_bounds__(THREADS, 2) backward_dkv(const __grid_constant__ Problem problem) {
  const BlockSparseBackwardArgs& a = problem.args;
  using T = typename S::T;
  using Rows = typename S::Rows;
  DYNAMIC_SHARED(memory);
  const uint32_t shared = ptx::smem_address(memory), k_tile = S::KEEP ? shared : shared + S::OTHERS, v_tile = k_tile + S::KEYS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const BlockSparseMask& mask = a.by_key;
  const int parts = (mask.bk + S::ROWS - 1) / S::ROWS;
  const int64_t batch = blockIdx.z;
  const int line = blockIdx.x / parts, start = blockIdx.x % parts * S::ROWS, kv_head = blockIdx.y, group = a.heads / a.kv_heads;
  const int first = line * mask.bk + start, rows = min(mask.bk - start, a.k_len - first);
  const int warp_row = warp / S::HALVES * 16, half = warp % S::HALVES * S::WIDTH * 2;  // in bytes
  const float c = a.scale * LOG2_E;

  Rows::template copy<S::ROWS>(k_tile, problem.k, problem.k.offset(batch, kv_head), first, rows, a.dim);
  Rows::template copy<S::ROWS>(v_tile, problem.v, problem.v.offset(batch, kv_head), first, rows, a.v_dim);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const uint32_t k_at = k_tile + warp_row * Rows::PITCH + Rows::a_rows(lane), v_at = k_at + S::KEYS;
  uint32_t k[S::KEEP ? S::HEAD / 16 : 1][4], v[S::KEEP ? S::HEAD / 16 : 1][4];
  if constexpr (S::KEEP) {
#pragma unroll
    for (int d = 0; d < S::HEAD / 16; ++d) ptx::ldmatrix_x4(k[d], k_at ^ (d * 32)), ptx::ldmatrix_x4(v[d], v_at ^ (d * 32));
  }

  float dk[1][S::WIDTH / 8][4] = {}, dv[1][S::WIDTH / 8][4] = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const uint32_t q = problem.q.offset(batch, head), dout = problem.dout.offset(batch, head);
    const uint32_t numbers = (uint32_t(batch) * a.heads + head) * a.q_len;
    auto walk = Walk<S::QUERIES>::queries(mask, batch, head, line, a.q_len);
    // Starts bringing a tile of queries to the half of shared memory that `odd` says.
    const auto load = [&](const Part& part, int odd) {
      Rows::template copy<S::QUERIES>(shared + odd * 2 * S::SLOT, problem.q, q, part.first, part.count, a.dim);
      Rows::template copy<S::QUERIES>(shared + odd * 2 * S::SLOT + S::SLOT, problem.dout, dout, part.first, part.count,
                                      a.v_dim);
      const int row = threadIdx.x % S::QUERIES;
      if (threadIdx.x < 2 * S::QUERIES)
        ptx::cp_async<4>(shared + S::NUMBERS + odd * 8 * S::QUERIES + threadIdx.x * 4, (threadIdx.x < S::QUERIES ? a.log2 : a.delta) + numbers + part.first + row,
                         row < part.count ? 4 : 0);
      if (part.tile >= 0)
        copy_bits<S::QUERIES>(shared + S::BITS + odd * 8 * S::QUERIES, mask, part.tile, part.start, part.count, start & ~63);
      ptx::cp_async_commit();
    };
    __syncthreads();  // k and v, or the last head's queries, are done with
    Part part{};
    bool more = walk.more();
    if (more) load(part = walk.next(), 0);
    for (int odd = 0; more; odd ^= 1) {
      Part next{};
      more = walk.more();
      ptx::cp_async_wait<0>();
      __syncthreads();  // queries are there, those before done with
      if (more) load(next = walk.next(), odd ^ 1);
      const uint32_t q_tile = shared + odd * 2 * S::SLOT, numbers_at = shared + S::NUMBERS + odd * 8 * S::QUERIES,
                     bits = shared + S::BITS + odd * 8 * S::QUERIES;
#pragma unroll 1
      for (int j = 0; j < S::QUERIES; j += 16) {
        float p[1][2][4] = {}, ds[1][2][4] = {};
        const uint32_t q_rows = q_tile + j * Rows::PITCH + Rows::b_rows(lane);
#pragma unroll
        for (int d = 0; d < S::HEAD / 16; ++d) {
          uint32_t other[4], row[4];
          if constexpr (!S::KEEP) ptx::ldmatrix_x4(row, k_at ^ (d * 32));
          ptx::ldmatrix_x4(other, q_rows ^ (d * 32));
          multiply<T>(p[0][0], p[0][1], S::KEEP ? k[S::KEEP ? d : 0] : row, other);
          if constexpr (!S::KEEP) ptx::ldmatrix_x4(row, v_at ^ (d * 32));
          ptx::ldmatrix_x4(other, (q_rows + S::SLOT) ^ (d * 32));
          multiply<T>(ds[0][0], ds[0][1], S::KEEP ? v[S::KEEP ? d : 0] : row, other);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int query = j + i / 2 * 8 + lane % 4 * 2 + i % 2;
          const float log2 = __uint_as_float(ptx::load_shared(numbers_at + query * 4));
          const float delta = __uint_as_float(ptx::load_shared(numbers_at + (S::QUERIES + query) * 4));
          uint32_t word = ~0u;
          if (part.tile >= 0)
            word = ptx::load_shared(bits + query * 8 + (start + warp_row) / 32 % 2 * 4) >> ((start + warp_row) % 32 + lane / 4);
          else if (query >= part.count)
            word = 0;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float &x = p[0][i / 2][2 * r + i % 2], &y = ds[0][i / 2][2 * r + i % 2];
            const bool kept = word & (1u << (8 * r));
            x = ptx::exp2(fmaf(x, c, -log2));
            y = kept ? x * (y - delta) : 0.0f;
            x = kept ? x : 0.0f;
          }
        }
        const uint32_t q_columns = (q_tile + j * Rows::PITCH + Rows::b_columns(lane)) ^ half;
        add_times<T, S::HEAD>(dv, p, q_columns + S::SLOT);
        add_times<T, S::HEAD>(dk, ds, q_columns);
      }
      part = next;
    }
  }
  __syncthreads();  // queries are done with
  const uint32_t mine = shared + warp * 16 * Tile<S::WIDTH>::PITCH;
  uint32_t again = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool there = warp_row + r * 8 + lane / 4 < rows;
    again |= (not_finite(dk[0], r, there) | not_finite(dv[0], r, there)) << (r * 8);
  }
  const float scaled[1][2] = {{a.scale, a.scale}}, plain[1][2] = {{1.0f, 1.0f}};
  const int64_t row = (batch * a.k_len + first + warp_row) * a.kv_heads + kv_head;
  store_rows<T>(dk, scaled, mine, static_cast<uint16_t*>(a.dk) + row * a.dim + half / 2, int64_t(a.kv_heads) * a.dim, rows - warp_row,
                a.dim - half / 2, lane);
  store_rows<T>(dv, plain, mine, static_cast<uint16_t*>(a.dv) + row * a.v_dim + half / 2, int64_t(a.kv_heads) * a.v_dim,
                rows - warp_row, a.v_dim - half / 2, lane);
  if constexpr (S::HALVES > 1) __syncthreads();  // what another warp stored, this one may store again
  for_rows(again, [&](int row) { exact_dkv<T>(a, batch, kv_head, line, start + warp_row + row); });
}

template <class T, int HEAD>
int run(const BlockSparseBackwardArgs& a, void* stream) {
  using Q = DqShape<T, HEAD>;
  using KV = DkvShape<T, HEAD>;
  const Problem problem{a, chunks(a.q), chunks(a.k), chunks(a.v), chunks(a.dout)};
  int error = 0;
  if (a.dq) {
    const int parts = (a.mask.bq + Q::ROWS - 1) / Q::ROWS;
    error = launch("block_sparse_attention_dq", backward_dq<Q>, dim3(a.mask.lines * parts, a.heads, a.batch), dim3(THREADS),
                   Q::SHARED, stream, problem);
  }
  if (a.dk && !error) {
    const int parts = (a.mask.bk + KV::ROWS - 1) / KV::ROWS;
    error = launch("block_sparse_attention_dkv", backward_dkv<KV>, dim3(a.by_key.lines * parts, a.kv_heads, a.batch),
                   dim3(THREADS), KV::SHARED, stream, problem);
  }
  return error;
}

template <class T>
int by_head(const BlockSparseBackwardArgs& a, void* stream) {
  int lanes = 1;
  while (lanes * 8 < a.v_dim) lanes *= 2;
  const int64_t rows = int64_t(a.batch) * a.q_len * a.heads, each = THREADS / lanes;
  const int error = launch("block_sparse_attention_delta", delta<T>, dim3((rows + each - 1) / each), dim3(THREADS), 0, stream, a, lanes);
  if (error) return error;
  return by_dim(max(a.dim, a.v_dim), [&](auto head) { return run<T, head.value>(a, stream); });
}

}  // namespace
}  // namespace hh

extern "C" int hh_cuda_block_sparse_attention_backward(const hh::BlockSparseBackwardArgs* args, void* stream) {
  return hh::by_type(args->q.in.dtype, [&](auto type) { return hh::by_head<decltype(type)>(*args, stream); });
}
