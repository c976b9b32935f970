// What the static gates look at, in kernels whose machine code is known: tests/test_compile_only_cuda.py.
#include <cstdint>

namespace hh {

// y = x, 16 bytes a lane, in a loop.
__global__ void __launch_bounds__(64) copy(uint4* y, const uint4* x, int n) {
#pragma unroll 1
  for (int i = blockIdx.x * 64 + threadIdx.x; i < n; i += gridDim.x * 64) y[i] = x[i];
}

// STEPS products a run of the loop, and one more in a branch that few runs take.
template <int STEPS, bool RARE>
__global__ void __launch_bounds__(4 * 32) products(float* y, const uint32_t* x, int n) {
  float d[4] = {};
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    const uint32_t v = x[i * 32 + threadIdx.x % 32];
    auto multiply = [&](uint32_t by) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %5}, {%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(v), "r"(by));
    };
#pragma unroll
    for (int k = 0; k < STEPS; k++) multiply(v);
    if (RARE && v == 7) {
      __syncwarp();
      multiply(v + 1);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++) y[threadIdx.x * 4 + k] = d[k];
}
template __global__ void products<4, false>(float*, const uint32_t*, int);
template __global__ void products<4, true>(float*, const uint32_t*, int);

// An array that registers can't hold: every place is written before the first is read.
__global__ void __launch_bounds__(1024) spilling(float* y, const float* x) {
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; i++) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; i++) y[i * 1024 + threadIdx.x] = held[i] + held[(5 * i + 1) % 96] * held[(7 * i + 2) % 96];
}

}  // namespace hh
