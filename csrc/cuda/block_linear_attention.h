// Launchers of block_linear_attention's kernels: the sums of chunks, the outputs of tokens, and the gradients in what a token holds.
//
//   sums         KV = Σ_j gate_j · R_j ψ(x_j) y_jᵀ     K = Σ_j weight_j · φ(x_j)                over the tokens of a chunk
//   outputs      out_p = gate_p · (R_p ψ(x_p))ᵀ KV / (φ(x_p)ᵀ K + eps)                          with its chunk's KV and K
//   gradients    dx_p = ∂ψᵀ R_p⁻¹ KV y_p · gate_p + ∂φᵀ K                                        of the sums, or of the outputs
//
// Rows x have `dim` channels, y, out and the columns of KV `v_dim`, at most 128 each, bfloat16 or float16; all else is float32.
#pragma once
#include "args.h"

namespace hh {

// `count` chunks of `length` tokens from token `begin` on, the last may be shorter, until `end`; `pieces` pieces of `piece` tokens a
// chunk, of which the last may be shorter, or empty.
struct LinearChunks {
  int64_t begin, end, length, count, pieces, piece;
};

struct LinearRows {
  Heads x;  // [B, S, H, D]
  int64_t batch, tokens, heads;
  int dim, v_dim;
  int phi, psi;                                      // 0 relu, 1 identity, 2 elu + 1, 3 squared relu, 4 softmax
  const float *cos = nullptr, *sin = nullptr;        // [S, D/2], one a pair, or both null
  const float *gate = nullptr;                       // [B, S, H], or null
  LinearChunks chunks;
};

struct LinearSumsArgs {
  LinearRows rows;
  Heads y;
  const float* weight = nullptr;                     // [B, S, H], or null
  float *kv, *k_sum;                                 // [B, H, places, D, Dv], [B, H, places, D]; a place for each piece
  int64_t places, place;                             // of which the first is `place`
};

struct LinearFoldArgs {                              // the pieces of each chunk added up, one after another
  const float* from;                                 // [B·H, count · pieces, size]
  float* to;                                         // [B·H, places, size], from `place` on
  int64_t rows, size, count, pieces, places, place;
};

struct LinearOutputsArgs {
  LinearRows rows;
  const float *kv, *k_sum = nullptr;                 // [B, H, places, D, Dv], [B, H, places, D]; k_sum null: not divided
  int64_t places, place;                             // a place for each chunk, from `place` on
  Out out;                                           // [B, S, H, Dv] contiguous
  float eps = 0;
};

struct LinearGradientsArgs {
  LinearRows rows;                                   // gate: of the sums
  Heads y;                                           // v, or the gradient of out
  const float *kv, *k_sum = nullptr;                 // as above: gradients of the sums, or what the outputs saw
  int64_t places, place;
  Out dx;                                            // [B, S, H, D] contiguous
  float *dgate = nullptr;                            // [B, S, H] of the gate's gradient, or null
  float *factor = nullptr, *weight = nullptr;        // [B, S, H] of divided outputs: 1/den and -(y·out)/den, for the sums; or null
  float eps = 0;
};

}  // namespace hh

extern "C" {
int hh_cuda_linear_sums(const hh::LinearSumsArgs* args, void* stream);
int hh_cuda_linear_fold(const hh::LinearFoldArgs* args, void* stream);
int hh_cuda_linear_outputs(const hh::LinearOutputsArgs* args, void* stream);
int hh_cuda_linear_gradients(const hh::LinearGradientsArgs* args, void* stream);
}
