// Arguments of qk_norm_rope's launchers, which take q or k; see hhattn/ops/qk_norm_rope.py for the formula.
#pragma once
#include "args.h"
#include "part_sums.h"

namespace hh {

enum class Norm : int32_t { none, rms, layer };

// cos or sin, [1 or B, S_video, 1 or H, D]; strides are 0 where it is shared.
struct Table {
  In in;
  int64_t batch = 0, token = 0, head = 0;
};

// y = rotated(norm(x) * weight + bias) for x [B, S, H, D], one norm a head or one for all; y is contiguous. Output token s is input
// token order[s], or s. Tokens start ... start + video - 1 are rotated. B * S < 2^31, D <= 256.
struct NormRopeArgs {
  Heads x;
  Table cos, sin;
  In weight, bias;
  Out y;
  const int64_t* order = nullptr;
  int64_t batch = 0, tokens = 0, heads = 0, dim = 0, start = 0, video = 0;
  Norm norm = Norm::none;
  bool across_heads = false, interleaved = true;
  float eps = 0;
};

// Gradients of NormRopeArgs, whose y is not written; dx is contiguous, the rest where it is asked for. Blocks work on pieces of `run`
// of the B * S tokens.
struct NormRopeBackwardArgs {
  NormRopeArgs forward;
  Heads dy;
  Out dx;
  PartSums dweight, dbias;                 // parts: [pieces, H * D or D]
  float *dcos = nullptr, *dsin = nullptr;  // what each head adds to the tables: table_batch numbers a batch entry, table_head a head,
  int64_t table_batch = 0, table_head = 0, table_token = 0;  // table_token a token
  int64_t run = 1;
};

// dcos and dsin once q and k have added to them.
struct TableSumsArgs {
  PartSums dcos, dsin;
};

}  // namespace hh

extern "C" int hh_cuda_norm_rope(const hh::NormRopeArgs* args, void* stream);
extern "C" int hh_cuda_norm_rope_backward(const hh::NormRopeBackwardArgs* args, void* stream);
extern "C" int hh_cuda_table_sums(const hh::TableSumsArgs* args, void* stream);
