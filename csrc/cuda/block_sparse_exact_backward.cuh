// Rows of block_sparse_attention's gradients where what is summed isn't finite: in products of tiles a masked pair's 0 makes NaN of it.
// Here a warp goes along a list, 32 pairs at a time, and leaves out what is 0. This is slow, and for rows that need it alone.
#pragma once
#include "block_sparse_lists.cuh"

namespace hh {

HH_DEVICE const uint16_t* head_of(const Heads& x, int64_t batch, int64_t head) {
  return static_cast<const uint16_t*>(x.in.data) + batch * x.batch + head * x.head;
}

template <class T>
HH_DEVICE float product(const uint16_t* x, const uint16_t* y, int dim) {
  float sum = 0;
#pragma unroll 1
  for (int d = 0; d < dim; d += 8) {
    const uint4 four = *reinterpret_cast<const uint4*>(x + d), other = *reinterpret_cast<const uint4*>(y + d);
    const uint32_t xs[4] = {four.x, four.y, four.z, four.w}, ys[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 s = ptx::unpack<T>(xs[i]), t = ptx::unpack<T>(ys[i]);
      sum = fmaf(s.x, t.x, fmaf(s.y, t.y, sum));
    }
  }
  return sum;
}

// One pair's p and ds, 0 unless it is kept.
struct Pair {
  float p = 0, ds = 0;
};
template <class T>
HH_DEVICE Pair pair_of(const BlockSparseBackwardArgs& a, int64_t batch, int head, int64_t query, int64_t key) {
  const int64_t kv_head = head / (a.heads / a.kv_heads), at = (batch * a.heads + head) * a.q_len + query;
  const float s = product<T>(head_of(a.q, batch, head) + query * a.q.token, head_of(a.k, batch, kv_head) + key * a.k.token, a.dim);
  const float dp =
      product<T>(head_of(a.dout, batch, head) + query * a.dout.token, head_of(a.v, batch, kv_head) + key * a.v.token, a.v_dim);
  const float p = ptx::exp2(fmaf(s, a.scale * LOG2_E, -a.log2[at]));
  const auto rounded = [](float x) { return ptx::to_float(ptx::from_float<T>(x)); };  // as products of tiles take them
  return {rounded(p), rounded(p * (dp - a.delta[at]))};
}

HH_DEVICE bool bit_of(const BlockSparseMask& m, int tile, int row, int column) {
  if (tile < 0) return true;
  return m.bits[(static_cast<int64_t>(tile) * m.bq + row) * ((m.bk + 7) / 8) + column / 8] >> column % 8 & 1;
}

// A row of sums, dims lane, lane + 32 and so on.
template <class T>
struct Row {
  float sums[8] = {};

  // += Σ_j weight_j · row j at x, of the lanes' weights; `weight` is this lane's.
  HH_DEVICE void add(float weight, int count, const uint16_t* x, int64_t stride, int dim) {
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const float w = __shfl_sync(0xffffffffu, weight, j);
      if (w == 0) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (const int d = threadIdx.x % 32 + 32 * i; d < dim) sums[i] = fmaf(w, ptx::to_float(T{x[j * stride + d]}), sums[i]);
    }
  }
  HH_DEVICE void store(void* to, int64_t row, int dim, float factor) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (const int d = threadIdx.x % 32 + 32 * i; d < dim) static_cast<T*>(to)[row * dim + d] = ptx::from_float<T>(sums[i] * factor);
  }
};

// dq of row `row` of query block `block`.
template <class T>
HH_DEVICE void exact_dq(const BlockSparseBackwardArgs& a, int64_t batch, int head, int block, int row) {
  const int lane = threadIdx.x % 32, kv_head = head / (a.heads / a.kv_heads);
  const int64_t query = static_cast<int64_t>(block) * a.mask.bq + row;
  Row<T> dq;
  auto walk = Walk<32>::keys(a.mask, batch, head, block, a.k_len);
#pragma unroll 1
  for (int step = walk.steps(); step > 0; --step) {
    const Part part = walk.next();
    Pair pair;
    if (lane < part.count && bit_of(a.mask, part.tile, row, part.start + lane))
      pair = pair_of<T>(a, batch, head, query, part.first + lane);
    dq.add(pair.ds, part.count, head_of(a.k, batch, kv_head) + part.first * a.k.token, a.k.token, a.dim);
  }
  dq.store(a.dq, (batch * a.q_len + query) * a.heads + head, a.dim, a.scale);
}

// dk and dv of row `row` of key block `block`.
template <class T>
HH_DEVICE void exact_dkv(const BlockSparseBackwardArgs& a, int64_t batch, int kv_head, int block, int row) {
  const int lane = threadIdx.x % 32, group = a.heads / a.kv_heads;
  const int64_t key = static_cast<int64_t>(block) * a.by_key.bk + row, to = (batch * a.k_len + key) * a.kv_heads + kv_head;
  Row<T> dk, dv;
#pragma unroll 1
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    auto walk = Walk<32>::queries(a.by_key, batch, head, block, a.q_len);
#pragma unroll 1
    for (int step = walk.steps(); step > 0; --step) {
      const Part part = walk.next();
      Pair pair;
      if (lane < part.count && bit_of(a.by_key, part.tile, part.start + lane, row))
        pair = pair_of<T>(a, batch, head, part.first + lane, key);
      dk.add(pair.ds, part.count, head_of(a.q, batch, head) + part.first * a.q.token, a.q.token, a.dim);
      dv.add(pair.p, part.count, head_of(a.dout, batch, head) + part.first * a.dout.token, a.dout.token, a.v_dim);
    }
  }
  dk.store(a.dk, to, a.dim, a.scale);
  dv.store(a.dv, to, a.v_dim, 1.0f);
}

}  // namespace hh
