// Launching: kernel<<<...>>> for nvcc, the emulator's launch for g++. Both call the same kernels with the same arguments.
#pragma once
#include <cstddef>

#include "args.h"
#include "ptx.cuh"

// Dynamic shared memory; there is no other (see ptx.cuh). Its start is aligned to 1024 bytes.
#ifdef __CUDACC__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace hh {

inline constexpr size_t SHARED_WITHOUT_ASKING = 48 << 10;
// What a block gets of shared memory on every part that code for 8.0 or 12.0 runs on; 8.0 itself has 163 KiB, 9.0 227.
inline constexpr size_t SHARED_EVERYWHERE = 99 << 10;
inline constexpr int INVALID_VALUE = 1;  // cudaErrorInvalidValue

#ifdef __CUDACC__
// The number of an error, which the runtime no longer remembers: the next launch would be blamed for it.
inline int forgotten(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}
#endif

// Runs `kernel` and returns 0 or the number of a CUDA error, as launchers do. An empty grid is no launch. `name` is what the emulator's
// reports and counters call it. MOST: bytes of shared memory that there are.
template <size_t MOST = SHARED_EVERYWHERE, class... Params, class... Args>
int launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  if (shared_bytes > MOST) return INVALID_VALUE;
#ifdef __CUDACC__
  (void)name;
  if (shared_bytes > SHARED_WITHOUT_ASKING) {
    const auto asked = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (const int error = forgotten(asked)) return error;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return static_cast<int>(cudaGetLastError());
#else
  (void)stream;
  if (simt::recorded(reinterpret_cast<const void*>(kernel), name, grid, block, shared_bytes)) return 0;
  simt::launch(name, grid, block, shared_bytes, [&] { kernel(args...); }, &simt::image_marker);
  return 0;
#endif
}

// f(T{}) with the C++ type of a dtype.
template <class F>
int with_type(DType type, const F& f) {
  switch (type) {
    case DType::f32: return f(float{});
    case DType::f16: return f(f16{});
    default: return f(bf16{});
  }
}

}  // namespace hh
