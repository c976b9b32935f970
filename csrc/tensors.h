// Tensors as kernels see them, on a CPU and on a GPU: plain pointers and strides; no torch, no CUDA. Strides are in elements; the last
// dim of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace hhattn {

enum class DType : int32_t { f32, f16, bf16 };

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

// [B, S, H, D].
struct Heads {
  In in;
  int64_t batch = 0, token = 0, head = 0;
};

}  // namespace hhattn
