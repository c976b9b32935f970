// block_sparse_attention, forward, for sm_90a: wgmma and TMA.
//
// A block of threads has 64 or 128 rows of a mask's block of queries. One thread of its first warpgroup, the producer, walks along
// the lists and has TMA bring tiles of keys and values into a ring in shared memory. Each other warpgroup has 64 rows:
//
//     S = Q K_n', O += P V_(n-1)       on the tensor cores; as soon as S is there, beside the product with V,
//     m, P = 2^(c S - c m), l          by the warpgroup; then O is scaled anew, if m moved
//
// so that softmax runs beside the warpgroup's own product with V and the other one's products. Two warpgroups take turns in issuing
// products (named barriers), or both might do softmax at the same time. A stage of the ring is given back when every warp's products
// with it are through. TMA writes zeros for what is beyond the head dim and the last token, so tiles have no tails; what isn't
// attended of a partial block its bits say.
#include "block_sparse_attention_sm90.h"
#include "block_sparse_exact.cuh"
#include "block_sparse_rows_sm90.cuh"
#include "launch.cuh"

namespace hh::sm90 {

struct Problem {
  TensorMap q, k, v;  // [batch, tokens, heads, dim], last first
  BlockSparseArgs args;
};

// A place in the ring, and the parity of the phase in which it is filled.
template <int STAGES>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  HH_DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// The rows of queries that a block of threads has.
struct Task {
  int batch, head, block, start, first;  // start: in the mask's block; first: in the sequence
};

// ---- the producer, one thread
template <class S>
HH_DEVICE void bring(uint32_t to, const TensorMap* map, uint32_t bar, int rows, int head, int token, int batch) {
#pragma unroll
  for (int column = 0; column < S::COLUMNS; ++column)
    ptx::tensor_load(to + column * rows * LINE_BYTES, map, bar, column * LINE, head, token, batch);
}

template <class S>
HH_DEVICE void produce(const Problem& p, const Places<S>& at, const Task& r) {
  const BlockSparseArgs& a = p.args;
  const int kv_head = r.head / (a.heads / a.kv_heads);
  auto walk = Walk<S::KEYS>::keys(a.mask, r.batch, r.head, r.block, a.k_len);
  const int steps = walk.steps();
  if (!steps) return;
  ptx::mbarrier_expect(at.q_full(), S::Q_BYTES);
  bring<S>(at.base, &p.q, at.q_full(), S::ROWS, r.head, r.first, r.batch);
  Turn<S::STAGES> turn;
  for (int step = 0; step < steps; ++step, turn.next()) {
    const int first = walk.next().first, stage = turn.stage;
    ptx::mbarrier_wait(at.k_free(stage), turn.parity ^ 1);
    ptx::mbarrier_expect(at.k_full(stage), S::TILE_BYTES);
    bring<S>(at.k(stage), &p.k, at.k_full(stage), S::KEYS, kv_head, first, r.batch);
    ptx::mbarrier_wait(at.v_free(stage), turn.parity ^ 1);
    ptx::mbarrier_expect(at.v_full(stage), S::TILE_BYTES);
    bring<S>(at.v(stage), &p.v, at.v_full(stage), S::KEYS, kv_head, first, r.batch);
  }
}

// ---- consumers, a warpgroup each
// o, the sums of all steps, and the softmax of the warpgroup's rows.
template <class T, class S>
HH_DEVICE void attend(const BlockSparseArgs& a, const Places<S>& at, const Task& r, int group, float (&o)[S::HEAD / 2],
                      Softmax& softmax) {
  const int lane = threadIdx.x % 32, row = r.start + group * 64 + threadIdx.x % GROUP / 32 * 16 + lane / 4;
  const float c = a.scale * LOG2_E;
  const auto my_turn = [&] {
    if (S::GROUPS == 2) ptx::barrier_sync(1 + group, 2 * GROUP);
  };
  const auto your_turn = [&](bool ever) {
    if (S::GROUPS == 2 && ever) ptx::barrier_arrive(2 - group, 2 * GROUP);
  };
  const auto give_back = [&](uint32_t bar) {
    if (lane == 0) ptx::mbarrier_arrive(bar);
  };
  float s[S::KEYS / 2], keep[2];
  uint32_t p[S::KEYS / 16][4];
  Bits<S::KEYS> bits;
  auto walk = Walk<S::KEYS>::keys(a.mask, r.batch, r.head, r.block, a.k_len);
  const int steps = walk.steps();
  if (!steps) return;
  your_turn(group == 1);

  Turn<S::STAGES> turn, before;
  Part part = walk.next();
  if (part.tile >= 0) bits.load(a.mask, part, row);
  ptx::mbarrier_wait(at.q_full(), 0);
  Queries<T, S, S::Q_IN_REGISTERS> q;
  q.load(at, group);
  ptx::mbarrier_wait(at.k_full(0), 0);
  my_turn();
  ptx::wgmma_fence();
  scores(s, q, at.k(0));
  your_turn(group == 0 || steps > 1);
  ptx::wgmma_wait<0>(s);
  give_back(at.k_free(0));
  if (part.tile >= 0) bits.apply(s, lane);
  softmax.next(s, c, keep);
  pack<T>(p, s);

  for (int step = 1; step < steps; ++step, before.next()) {
    turn.next();
    part = walk.next();
    if (part.tile >= 0) bits.load(a.mask, part, row);
    ptx::mbarrier_wait(at.v_full(before.stage), before.parity);
    ptx::mbarrier_wait(at.k_full(turn.stage), turn.parity);
    my_turn();
    ptx::wgmma_fence();
    scores(s, q, at.k(turn.stage));
    values<T, S>(o, p, at.v(before.stage));
    your_turn(group == 0 || step + 1 < steps);
    ptx::wgmma_wait<1>(s);
    give_back(at.k_free(turn.stage));
    if (part.tile >= 0) bits.apply(s, lane);
    const bool moved = softmax.next(s, c, keep);
    ptx::pin(s);
    if (moved) {  // a wait in each branch: behind one in line with softmax the assembler would move all of it
      ptx::wgmma_wait<0>(o);
      scale_rows(o, keep);
    } else {
      ptx::wgmma_wait<0>(o);
    }
    give_back(at.v_free(before.stage));
    pack<T>(p, s);
  }
  ptx::mbarrier_wait(at.v_full(before.stage), before.parity);
  ptx::wgmma_fence();
  values<T, S>(o, p, at.v(before.stage));
  ptx::wgmma_wait<0>(o);
}

// out = o / total and lse, through the warpgroup's part of q's shared memory, which no product reads any more.
template <class T, class S>
HH_DEVICE void store(const BlockSparseArgs& a, const Places<S>& at, const Task& r, int group, const float (&o)[S::HEAD / 2],
                     const Softmax& softmax) {
  const int lane = threadIdx.x % 32, warp_row = group * 64 + threadIdx.x % GROUP / 32 * 16, there = a.q_len - r.first;
  float shift[2], by[2];
  uint32_t again[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = ptx::quad_sum(softmax.total[i]);
    const int row = warp_row + lane / 4 + 8 * i;
    shift[i] = softmax.top[i] * (a.scale * LOG2_E);
    by[i] = total == 0 ? 0.0f : 1.0f / total;
    if (lane % 4 == 0 && row < there)
      a.lse[(int64_t(r.batch) * a.heads + r.head) * a.q_len + r.first + row] =
          total == 0 ? -INF : (shift[i] + ptx::log2(total)) * LN_2;
    bool unknown = false;  // a NaN, which 0 times infinity may have made
#pragma unroll
    for (int j = 2 * i; j < S::HEAD / 2; j += 4) unknown |= o[j] != o[j] || o[j + 1] != o[j + 1];
    again[i] = __ballot_sync(0xffffffffu, unknown && total < INF && row < there);
  }
  if (S::Q_IN_REGISTERS)
    __syncwarp();
  else
    ptx::barrier_sync(3 + group, GROUP);  // no warp of it multiplies with q
#pragma unroll
  for (int i = 0; i < S::HEAD / 4; ++i) {
    const int row = warp_row + lane / 4 + i % 2 * 8, chunk = i / 2;  // a chunk has 8 dims, of which this lane has 2
    ptx::store_shared(at.q(row, chunk) + lane % 4 * 4, ptx::pack<T>(o[2 * i] * by[i % 2], o[2 * i + 1] * by[i % 2]));
  }
  __syncwarp();
  constexpr int CHUNKS = S::HEAD / 8;
  T* out = static_cast<T*>(a.out) + ((int64_t(r.batch) * a.q_len + r.first) * a.heads + r.head) * a.v_dim;
#pragma unroll 4
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int row = warp_row + i / CHUNKS, chunk = i % CHUNKS;
    if (row < there && chunk * 8 < a.v_dim)
      *reinterpret_cast<uint4*>(out + row * (int64_t(a.heads) * a.v_dim) + chunk * 8) = ptx::load_shared4(at.q(row, chunk));
  }
  if (!(again[0] | again[1])) return;
  __syncwarp();  // these rows are written once more
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for (uint32_t rest = again[i]; rest;) {
      const int first = __ffs(int(rest)) - 1 & ~3;  // of the four lanes that have the row
      rest &= ~(15u << first);
      const float its_shift = __shfl_sync(0xffffffffu, shift[i], first), its_inverse = __shfl_sync(0xffffffffu, by[i], first);
      exact_row<T, S::HEAD>(a, r.batch, r.head, r.block, r.start + warp_row + first / 4 + 8 * i, its_shift, its_inverse);
    }
}

template <class T, int HEAD, int KEYS, int GROUPS>
__global__ void __launch_bounds__((1 + GROUPS) * GROUP, (Shape<HEAD, KEYS, GROUPS>::BLOCKS))
    forward(const __grid_constant__ Problem p) {
  using S = Shape<HEAD, KEYS, GROUPS>;
  DYNAMIC_SHARED(shared);
  const BlockSparseArgs& a = p.args;
  const Places<S> at{ptx::smem_address(shared)};
  const int parts = a.mask.bq / S::ROWS, index = blockIdx.x;
  Task r;
  r.batch = index / (a.mask.lines * parts), r.head = blockIdx.y;
  r.block = index / parts % a.mask.lines, r.start = index % parts * S::ROWS;
  r.first = r.block * a.mask.bq + r.start;
  if (r.first >= a.q_len) return;
  if (threadIdx.x == 0) {
    ptx::prefetch(&p.q);
    ptx::prefetch(&p.k);
    ptx::prefetch(&p.v);
    ptx::mbarrier_init(at.q_full(), 1);
    for (int i = 0; i < 2 * S::STAGES; ++i) ptx::mbarrier_init(at.k_full(i), 1);              // v_full too
    for (int i = 0; i < 2 * S::STAGES; ++i) ptx::mbarrier_init(at.k_free(i), 4 * S::GROUPS);  // v_free too
    ptx::mbarrier_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / GROUP, 0) - 1;
  if (group < 0) {
    ptx::fewer_registers<S::FEWER>();
    if (threadIdx.x == 0) produce<S>(p, at, r);
    return;
  }
  ptx::more_registers<S::MORE>();
  float o[HEAD / 2];
#pragma unroll
  for (int i = 0; i < HEAD / 2; ++i) o[i] = 0;
  Softmax softmax;
  attend<T, S>(a, at, r, group, o, softmax);
  store<T, S>(a, at, r, group, o, softmax);
}

// ---- the host
// x [batch, tokens, heads, dim] as TMA sees it, in boxes of `rows` tokens of 64 dims of one head.
inline bool encode(TensorMap& map, const Heads& x, int batch, int tokens, int heads, int dim, int rows) {
  const auto bytes = [](int64_t stride, int count) { return count > 1 ? static_cast<uint64_t>(2 * stride) : 16; };
  const uint64_t sizes[4] = {uint64_t(dim), uint64_t(heads), uint64_t(tokens), uint64_t(batch)};
  const uint64_t strides[3] = {bytes(x.head, heads), bytes(x.token, tokens), bytes(x.batch, batch)};
  const uint32_t box[4] = {LINE, 1, uint32_t(rows), 1};
#ifdef __CUDACC__
  static const auto driver = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool there = forgotten(error) == 0 && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(there ? found : nullptr);
  }();
  const uint32_t ones[4] = {1, 1, 1, 1};
  const auto type = x.in.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!driver) return false;
  const auto result = driver(&map, type, 4, const_cast<void*>(x.in.data), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS;
#else
  return simt::encode_tiled(map, 2, 4, x.in.data, sizes, strides, box, LINE_BYTES);
#endif
}

template <class T, int HEAD, int KEYS, int GROUPS>
int run(const BlockSparseArgs& a, void* stream) {
  using S = Shape<HEAD, KEYS, GROUPS>;
  Problem p;
  p.args = a;
  const bool encoded = encode(p.q, a.q, a.batch, a.q_len, a.heads, a.dim, S::ROWS) &&
                       encode(p.k, a.k, a.batch, a.k_len, a.kv_heads, a.dim, KEYS) &&
                       encode(p.v, a.v, a.batch, a.k_len, a.kv_heads, a.v_dim, KEYS);
  if (!encoded) return NOT_TAKEN;
  const dim3 grid(unsigned(a.batch * a.mask.lines * (a.mask.bq / S::ROWS)), unsigned(a.heads));
  return launch<SHARED_MOST>("block_sparse_attention_sm90", forward<T, HEAD, KEYS, GROUPS>, grid, dim3(S::THREADS), S::SHARED, stream, p);
}

// Two warpgroups where a mask's block has rows for them; 128 keys at once where a block has them and their scores fit registers.
template <class T, int HEAD>
int by_block(const BlockSparseArgs& a, void* stream) {
  if (a.mask.bq % 128) return run<T, HEAD, 64, 1>(a, stream);
  if constexpr (HEAD <= 128)
    if (a.mask.bk % 128 == 0) return run<T, HEAD, 128, 2>(a, stream);
  return run<T, HEAD, 64, 2>(a, stream);
}

template <class T>
int by_head(const BlockSparseArgs& a, void* stream) {
  const int dim = a.dim > a.v_dim ? a.dim : a.v_dim;
  if (dim <= 32) return by_block<T, 32>(a, stream);
  if (dim <= 64) return by_block<T, 64>(a, stream);
  if (dim <= 112) return by_block<T, 112>(a, stream);
  if (dim <= 128) return by_block<T, 128>(a, stream);
  return by_block<T, 256>(a, stream);
}

}  // namespace hh::sm90

extern "C" int hh_cuda_block_sparse_attention_sm90(const hh::BlockSparseArgs* args, void* stream) {
  using namespace hh;
#ifdef HH_ONE_SHAPE  // for seeded faults, of which each is a compilation
  return sm90::run<HH_ONE_SHAPE>(*args, stream);
#else
  return args->q.in.dtype == DType::f16 ? sm90::by_head<f16>(*args, stream) : sm90::by_head<bf16>(*args, stream);
#endif
}
