// What the callers and the CPU kernels agree on: plain pointers and strides, no torch, nothing that depends on the
// instruction set. Strides are in elements; the last dim of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace hhattn {

enum class DType : int { f32, f16, bf16 };

// A tensor, or none when data is null.
struct In {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

struct Out {
  void* data = nullptr;
  DType dtype = DType::f32;
};

// Rows of [B, S, C].
struct Rows {
  In in;
  int64_t batch = 0, token = 0;
};

// Rows of [1 or B, F, C], each of which serves tokens_per_row tokens in turn.
struct Modulation {
  In in;
  int64_t batch = 0, row = 0, tokens_per_row = 1;
};

// y = (norm(r)·weight + bias)·(1 + scale) + shift, r = residual + gate·x. y and r are contiguous [B, S, C].
struct NormModulate {
  Rows x, residual;
  Modulation scale, shift, gate;
  In weight, bias;
  Out y, r;
  int64_t tokens = 0, channels = 0;
  bool layer = false;
  float eps = 0;
  // Floats of scratch that a thread needs.
  int64_t scratch() const { return 4 * channels; }
};

enum class Norm : int { none, rms, layer };

// cos or sin, [1 or B, S_video, 1 or H, D].
struct Table {
  In in;
  int64_t batch = 0, token = 0, head = 0;
};

// y = rotated(norm(x)·weight + bias) for x [B, S, H, D], one norm a head or one for all; y is contiguous. Output token s is
// input token order[s], or s. Tokens start ... start + video - 1 are rotated.
struct NormRope {
  In x;
  int64_t batch = 0, token = 0, head = 0;
  Table cos, sin;
  In weight, bias;
  Out y;
  const int64_t* order = nullptr;
  int64_t tokens = 0, heads = 0, dim = 0, start = 0, video = 0;
  Norm norm = Norm::none;
  bool across_heads = false, interleaved = true;
  float eps = 0;
  int64_t scratch() const { return 3 * heads * dim + 2 * dim; }
};

// The kernels as compiled for one instruction set. Each works on the rows [begin, end) of B·S.
struct Kernels {
  const char* isa;
  int lanes;
  void (*norm_modulate)(const NormModulate&, int64_t begin, int64_t end, float* scratch);
  void (*norm_rope)(const NormRope&, int64_t begin, int64_t end, float* scratch);
};

}  // namespace hhattn
