// What bindings and kernels agree on: plain pointers, sizes and strides; no torch, no CUDA. Strides are in elements, and the last dim
// of every tensor is contiguous. Launchers take a struct of these and a stream, and return 0 or the number of a CUDA error:
//   extern "C" int hh_cuda_<what>(const <Op>Args* args, void* stream);
#pragma once
#include <cstdint>

namespace hh {

enum class DType : int32_t { f32, f16, bf16 };

inline int size_of(DType type) { return type == DType::f32 ? 4 : 2; }

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

}  // namespace hh
