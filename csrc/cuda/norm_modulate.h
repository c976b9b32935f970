// Arguments of norm_modulate's launchers; see hhattn/ops/norm_modulate.py for the formula.
#pragma once
#include "args.h"
#include "part_sums.h"

namespace hh {

// Rows of [1 or B, F, C], each of which serves `each` tokens in turn; batch is 0 where they are shared.
struct Modulation {
  In in;
  int64_t batch = 0, row = 0, each = 1;
};

// y = (norm(r) * weight + bias) * (1 + scale) + shift, r = residual + gate * x. y and r are contiguous [B, S, C].
struct NormModulateArgs {
  Rows x, residual;
  Modulation scale, shift, gate;
  In weight, bias;
  Out y, r;
  int64_t batch = 0, tokens = 0, channels = 0;  // batch * tokens < 2^31, channels up to 16384
  bool layer = false;
  float eps = 0;
};

// Gradients of NormModulateArgs, whose y and r are not written; dx and dresidual are contiguous, the rest where they are asked for.
struct NormModulateBackwardArgs {
  NormModulateArgs forward;
  Rows dy, dr;
  Out dx, dresidual;
  PartSums dscale, dshift, dgate, dweight, dbias;
  int64_t run = 1;  // tokens of a piece
};

}  // namespace hh

extern "C" int hh_cuda_norm_modulate(const hh::NormModulateArgs* args, void* stream);
extern "C" int hh_cuda_norm_modulate_backward(const hh::NormModulateBackwardArgs* args, void* stream);
