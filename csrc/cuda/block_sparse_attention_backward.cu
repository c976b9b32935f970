// block_sparse_attention, backward, on mma.sync (sm_80 and later). Scores are computed again from lse; with
// delta_i = do_i·o_i - dlse_i:
//
//     p_ij = exp(s_ij - lse_i)      ds_ij = p_ij (do_i·v_j - delta_i)
//     dq_i = scale Σ_j ds_ij k_j      dk_j = scale Σ_i ds_ij q_i      dv_j = Σ_i p_ij do_i
//
// dq goes along lists of keys, dk and dv along lists of queries. Every sum is made by one block in the order of its list, so
// gradients are the same bits every time, without atomics.
#include "block_sparse_lists.cuh"
#include "block_sparse_tiles.cuh"
#include "launch.cuh"

namespace hh {
namespace {

HH_DEVICE const uint16_t* head_of(const Heads& x, int64_t batch, int64_t head) {
  return static_cast<const uint16_t*>(x.in.data) + batch * x.batch + head * x.head;
}

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

// dq of 64 queries (32 beyond 128 dims): two warps share the rows of each other two, and take the other half of every tile's keys.
template <class Type, int HEAD_>
struct DqShape {
  using T = Type;
  static constexpr int HEAD = HEAD_, ATOMS = HEAD > 128 ? 1 : 2, WARP_ROWS = 16 * ATOMS, ROWS = 2 * WARP_ROWS;
  static constexpr int KEYS = HEAD > 128 ? 32 : 64, WARP_KEYS = KEYS / 2;
  using Rows = Tile<HEAD>;
  static constexpr uint32_t QUERIES = ROWS * Rows::PITCH, SLOT = KEYS * Rows::PITCH;
  static constexpr uint32_t SHARED = 2 * QUERIES + 3 * SLOT;  // q, do, keys twice, values
};

template <class S>
__global__ void __launch_bounds__(THREADS) backward_dq(const __grid_constant__ BlockSparseBackwardArgs a) {
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
  const uint16_t *k = head_of(a.k, batch, kv_head), *v = head_of(a.v, batch, kv_head);
  const float c = a.scale * LOG2_E;

  auto walk = Walk<S::KEYS>::keys(a.mask, batch, head, line, a.k_len);
  const int steps = walk.steps();
  const auto load = [&](uint32_t to, const uint16_t* from, int64_t token, int dim, const Part& part) {
    Rows::template copy<S::KEYS>(to, from + part.first * token, token, part.count, dim);
  };
  Part part{};
  if (steps > 0) {
    part = walk.next();
    Rows::template copy<S::ROWS>(q_tile, head_of(a.q, batch, head) + first * a.q.token, a.q.token, rows, a.dim);
    Rows::template copy<S::ROWS>(do_tile, head_of(a.dout, batch, head) + first * a.dout.token, a.dout.token, rows, a.v_dim);
    load(keys, k, a.k.token, a.dim, part);
    load(values, v, a.v.token, a.v_dim, part);
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
  uint32_t slot = 0;
  for (int step = 1; step <= steps; ++step) {
    const uint32_t key = keys + slot + warp_key * Rows::PITCH;
    Part next{};
    ptx::cp_async_wait<0>();
    __syncthreads();  // keys and values are there, the other keys done with
    if (step < steps) {
      next = walk.next();
      load(keys + (slot ^ S::SLOT), k, a.k.token, a.dim, next);
    }
    const bool masked = part.tile >= 0 || part.count < S::KEYS;
    Kept<S::ATOMS, S::WARP_KEYS> kept;
    if (masked) kept.load(a.mask, part, start + warp_row + lane / 4, start + rows, warp_key);
    float ds[S::ATOMS][S::WARP_KEYS / 8][4], s[S::ATOMS][S::WARP_KEYS / 8][4];
    times_rows<T, S::HEAD>(ds, do_at, values + warp_key * Rows::PITCH + Rows::b_rows(lane));
    __syncthreads();  // the values are done with
    if (step < steps) load(values, v, a.v.token, a.v_dim, next);
    ptx::cp_async_commit();
    times_rows<T, S::HEAD>(s, q_at, key + Rows::b_rows(lane));
#pragma unroll
    for (int i = 0; i < S::ATOMS; ++i)
#pragma unroll
      for (int j = 0; j < S::WARP_KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ds[i][j][e] = ptx::exp2(fmaf(s[i][j][e], c, -log2[i][e / 2])) * (ds[i][j][e] - delta[i][e / 2]);
    if (masked) {
#pragma unroll
      for (int i = 0; i < S::ATOMS * S::WARP_KEYS / 2; ++i) {
        const int atom = i / (S::WARP_KEYS / 2), j = i / 4 % (S::WARP_KEYS / 8);
        if (!kept(atom, j, i % 4, lane)) ds[atom][j][i % 4] = 0;
      }
    }
    add_times<T, S::HEAD>(dq, ds, key + Rows::b_columns(lane));
    slot ^= S::SLOT;
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
#pragma unroll
  for (int i = 0; i < 2 * S::ATOMS; ++i) factor[i / 2][i % 2] = a.scale;
  __syncwarp();
  uint16_t* to = static_cast<uint16_t*>(a.dq) + ((batch * a.q_len + first + warp_row) * a.heads + head) * a.dim;
  store_rows<T>(dq, factor, values + warp_row * Rows::PITCH, to, int64_t(a.heads) * a.dim, rows - warp_row, a.dim, lane);
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
__global__ void __launch_bounds__(THREADS) backward_dkv(const __grid_constant__ BlockSparseBackwardArgs a) {
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

  Rows::template copy<S::ROWS>(k_tile, head_of(a.k, batch, kv_head) + first * a.k.token, a.k.token, rows, a.dim);
  Rows::template copy<S::ROWS>(v_tile, head_of(a.v, batch, kv_head) + first * a.v.token, a.v.token, rows, a.v_dim);
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
    const uint16_t *q = head_of(a.q, batch, head), *dout = head_of(a.dout, batch, head);
    const float* numbers = (threadIdx.x < S::QUERIES ? a.log2 : a.delta) + (batch * a.heads + head) * a.q_len;
    auto walk = Walk<S::QUERIES>::queries(mask, batch, head, line, a.q_len);
    const int steps = walk.steps();
    // Starts bringing a tile of queries to the half of shared memory that `odd` says.
    const auto load = [&](const Part& part, int odd) {
      Rows::template copy<S::QUERIES>(shared + odd * 2 * S::SLOT, q + part.first * a.q.token, a.q.token, part.count, a.dim);
      Rows::template copy<S::QUERIES>(shared + odd * 2 * S::SLOT + S::SLOT, dout + part.first * a.dout.token, a.dout.token,
                                      part.count, a.v_dim);
      const int row = threadIdx.x % S::QUERIES;
      if (threadIdx.x < 2 * S::QUERIES)
        ptx::cp_async<4>(shared + S::NUMBERS + odd * 8 * S::QUERIES + threadIdx.x * 4, numbers + part.first + row,
                         row < part.count ? 4 : 0);
      ptx::cp_async_commit();
      if (threadIdx.x < S::QUERIES && (part.tile >= 0 || part.count < S::QUERIES)) {
        uint32_t words[2] = {~0u, ~0u};
        if (row >= part.count) words[0] = words[1] = 0;
        else if (part.tile >= 0) mask_words(words, mask, part.tile, part.start + row, start & ~63);
        ptx::store_shared2(shared + S::BITS + odd * 8 * S::QUERIES + row * 8, uint2{words[0], words[1]});
      }
    };
    __syncthreads();  // k and v, or the last head's queries, are done with
    Part part{};
    if (steps > 0) load(part = walk.next(), 0);
    for (int step = 1; step <= steps; ++step) {
      const int odd = (step - 1) % 2;
      Part next{};
      ptx::cp_async_wait<0>();
      __syncthreads();  // queries are there, those before done with
      if (step < steps) load(next = walk.next(), odd ^ 1);
      const bool masked = part.tile >= 0 || part.count < S::QUERIES;
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
          if (masked) word = ptx::load_shared(bits + query * 8 + (start + warp_row) / 32 % 2 * 4) >> ((start + warp_row) % 32 + lane / 4);
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
  const float scaled[1][2] = {{a.scale, a.scale}}, plain[1][2] = {{1.0f, 1.0f}};
  const int64_t row = (batch * a.k_len + first + warp_row) * a.kv_heads + kv_head;
  store_rows<T>(dk, scaled, mine, static_cast<uint16_t*>(a.dk) + row * a.dim + half / 2, int64_t(a.kv_heads) * a.dim, rows - warp_row,
                a.dim - half / 2, lane);
  store_rows<T>(dv, plain, mine, static_cast<uint16_t*>(a.dv) + row * a.v_dim + half / 2, int64_t(a.kv_heads) * a.v_dim,
                rows - warp_row, a.v_dim - half / 2, lane);
}

template <class T, int HEAD>
int run(const BlockSparseBackwardArgs& a, void* stream) {
  using Q = DqShape<T, HEAD>;
  using KV = DkvShape<T, HEAD>;
  int error = 0;
  if (a.dq) {
    const int parts = (a.mask.bq + Q::ROWS - 1) / Q::ROWS;
    error = launch("block_sparse_attention_dq", backward_dq<Q>, dim3(a.mask.lines * parts, a.heads, a.batch), dim3(THREADS),
                   Q::SHARED, stream, a);
  }
  if (a.dk && !error) {
    const int parts = (a.mask.bk + KV::ROWS - 1) / KV::ROWS;
    error = launch("block_sparse_attention_dkv", backward_dkv<KV>, dim3(a.by_key.lines * parts, a.kv_heads, a.batch),
                   dim3(THREADS), KV::SHARED, stream, a);
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
  const int dim = max(a.dim, a.v_dim);
  if (dim <= 32) return run<T, 32>(a, stream);
  if (dim <= 64) return run<T, 64>(a, stream);
  if (dim <= 112) return run<T, 112>(a, stream);
  if (dim <= 128) return run<T, 128>(a, stream);
  return run<T, 256>(a, stream);
}

}  // namespace
}  // namespace hh

extern "C" int hh_cuda_block_sparse_attention_backward(const hh::BlockSparseBackwardArgs* args, void* stream) {
  return args->q.in.dtype == hh::DType::f16 ? hh::by_head<hh::f16>(*args, stream) : hh::by_head<hh::bf16>(*args, stream);
}
