// A row of block_sparse_attention's out where values aren't finite: in products of tiles a weight of 0 makes NaN of them.
#pragma once
#include "block_sparse_lists.cuh"

namespace hh {

// Row `row` of query block `block` once more, by one warp, key after key: a weight of 0 takes nothing, whatever the value. `shift`
// and `inverse` are the row's: a pair's weight is 2^(c·q·k - shift) · inverse. This is slow, and for rows that need it alone.
template <class T, int HEAD>
HH_DEVICE void exact_row(const BlockSparseArgs& a, int batch, int head, int block, int row, float shift, float inverse) {
  const auto rows = [&](const Heads& x, int h) { return static_cast<const T*>(x.in.data) + batch * x.batch + h * x.head; };
  const int lane = threadIdx.x % 32, kv_head = head / (a.heads / a.kv_heads), query = block * a.mask.bq + row;
  const T *q = rows(a.q, head) + query * a.q.token, *keys = rows(a.k, kv_head), *values = rows(a.v, kv_head);
  const float c = a.scale * LOG2_E;
  float sums[HEAD / 32 + (HEAD % 32 > 0)] = {};
  auto walk = Walk<32>::keys(a.mask, batch, head, block, a.k_len);
#pragma unroll 1
  for (int step = walk.steps(); step > 0; --step) {
    const Part part = walk.next();
    bool kept = lane < part.count;
    if (kept && part.tile >= 0) {
      const int64_t line = static_cast<int64_t>(part.tile) * a.mask.bq + row;
      kept = a.mask.bits[line * ((a.mask.bk + 7) / 8) + (part.start + lane) / 8] >> (part.start + lane) % 8 & 1;
    }
    float score = 0;
#pragma unroll 1
    for (int d = 0; kept && d < a.dim; d += 8) {
      const uint4 x = *reinterpret_cast<const uint4*>(q + d);
      const uint4 y = *reinterpret_cast<const uint4*>(keys + (part.first + lane) * a.k.token + d);
      const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 s = ptx::unpack<T>(xs[i]), t = ptx::unpack<T>(ys[i]);
        score = fmaf(s.x, t.x, fmaf(s.y, t.y, score));
      }
    }
    const float weight = kept ? ptx::to_float(ptx::from_float<T>(ptx::exp2(fmaf(score, c, -shift)))) : 0.0f;  // as tiles have it
#pragma unroll 1
    for (int j = 0; j < part.count; ++j) {
      const float w = __shfl_sync(0xffffffffu, weight, j);
      if (w == 0) continue;
      const T* value = values + (part.first + j) * a.v.token;
#pragma unroll
      for (int i = 0; i < int(sizeof sums / 4); ++i)
        if (lane + 32 * i < a.v_dim) sums[i] = fmaf(w, ptx::to_float(value[lane + 32 * i]), sums[i]);
    }
    bool settled = true;  // NaNs stay
#pragma unroll
    for (int i = 0; i < int(sizeof sums / 4); ++i) settled &= sums[i] != sums[i] || lane + 32 * i >= a.v_dim;
    if (__all_sync(0xffffffffu, settled)) break;
  }
  T* out = static_cast<T*>(a.out) + ((static_cast<int64_t>(batch) * a.q_len + query) * a.heads + head) * a.v_dim;
#pragma unroll
  for (int i = 0; i < int(sizeof sums / 4); ++i)
    if (lane + 32 * i < a.v_dim) out[lane + 32 * i] = ptx::from_float<T>(sums[i] * inverse);
}

}  // namespace hh
