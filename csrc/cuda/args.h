// What bindings and kernels agree on. Launchers take a struct made of these and a stream, and return 0 or the number of a CUDA error:
//   extern "C" int hh_cuda_<what>(const <Op>Args* args, void* stream);
#pragma once
#include "../tensors.h"

namespace hh {

using hhattn::DType, hhattn::Heads, hhattn::In, hhattn::Out, hhattn::Rows;

inline int size_of(DType type) { return type == DType::f32 ? 4 : 2; }

}  // namespace hh
