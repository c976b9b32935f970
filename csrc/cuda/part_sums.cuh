// Sums over tokens in two steps, each in a fixed order: blocks add up pieces of `run` tokens of a batch entry, and sum_parts adds up
// what several pieces hold of a row. No atomics, so gradients are the same bits every time.
#pragma once
#include "launch.cuh"
#include "part_sums.h"

namespace hh {

inline constexpr int PART_GROUPS = 8;  // threads that share the terms of a sum

// Where a block puts its sum over the tokens of one row that are in its piece, tokens begin ... end - 1 of batch entry b: row `row`
// has tokens first ... first + each - 1. Beside it, whether that is the gradient itself.
struct PartPlace {
  Out to;
  int64_t at;
};
HH_DEVICE PartPlace part_place(const PartSums& a, uint32_t b, uint32_t row, uint32_t begin, uint32_t end, uint32_t piece) {
  const int64_t first = int64_t(row) * a.each;
  if (a.parts && !(first >= begin && first + a.each <= end && !a.always))
    return {{a.parts, DType::f32}, (int64_t(piece) * a.slots + (first > begin)) * a.channels};
  return {a.whole ? Out{a.whole, DType::f32} : a.out, (int64_t(b) * a.rows + row) * a.channels};
}

// out[row] for a row of one batch entry, or of all. A block has 32 channels, its warps every PART_GROUPS-th term.
template <int GROUPS>
__global__ void __launch_bounds__(32 * GROUPS) sum_parts(const __grid_constant__ PartSums a) {
  DYNAMIC_SHARED(smem);
  auto* partial = reinterpret_cast<float*>(smem);
  const int64_t row = blockIdx.x % a.rows, entry = blockIdx.x / a.rows;
  const int64_t c = blockIdx.y * 32 + threadIdx.x, first = row * a.each, last = first + a.each - 1;
  const int64_t from = first / a.run, pieces = last / a.run - from + 1;
  const bool whole = pieces == 1 && !a.always;
  if (whole && !a.whole) return;  // the first step wrote it
  const int64_t per_entry = whole ? 1 : pieces, terms = per_entry * a.summed;
  float sum = 0;
  if (c < a.channels)
    for (int64_t term = threadIdx.y; term < terms; term += GROUPS) {
      const int64_t b = entry * a.summed + term / per_entry, piece = from + term % per_entry;
      if (whole)
        sum += a.whole[(b * a.rows + row) * a.channels + c];
      else
        sum += a.parts[((b * a.pieces + piece) * a.slots + (first > piece * a.run)) * a.channels + c];
    }
  partial[threadIdx.y * 32 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || c >= a.channels) return;
  for (int group = 1; group < GROUPS; ++group) sum += partial[group * 32 + threadIdx.x];
  const int64_t at = (entry * a.rows + row) * a.channels + c;
  switch (a.out.dtype) {
    case DType::f32: static_cast<float*>(a.out.data)[at] = sum; break;
    case DType::f16: static_cast<f16*>(a.out.data)[at] = ptx::from_float<f16>(sum); break;
    default: static_cast<bf16*>(a.out.data)[at] = ptx::from_float<bf16>(sum);
  }
}

// The second step of one gradient, where it needs one.
inline int launch_sum_parts(const PartSums& a, void* stream) {
  if (!a.out.data || !(a.parts || a.whole)) return 0;
  const dim3 grid(unsigned(a.rows * a.entries / a.summed), unsigned((a.channels + 31) / 32));
  return launch("sum_parts", sum_parts<PART_GROUPS>, grid, dim3(32, PART_GROUPS), 32 * PART_GROUPS * sizeof(float), stream, a);
}

}  // namespace hh
