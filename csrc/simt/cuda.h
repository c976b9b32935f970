// CUDA C++ on the emulator: what a .cu source finds when g++ compiles it (it is included first, by the command line). Sources use
// DYNAMIC_SHARED and LAUNCH for the two things that C++ can't spell as CUDA does, and which nvcc needs defined the CUDA way:
//   #define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
//   #define LAUNCH(kernel, grid, block, shared, ...) kernel<<<grid, block, shared>>>(__VA_ARGS__)
#pragma once
#include "ptx.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local  // their library's thread-local block is what the runtime takes for static shared memory
#define __grid_constant__

#define threadIdx (::simt::self->tid)
#define blockIdx (::simt::self->bid)
#define blockDim (::simt::self->bdim)
#define gridDim (::simt::self->gdim)
#define warpSize 32

#define DYNAMIC_SHARED(name) unsigned char *name = static_cast<unsigned char *>(::simt::dynamic_shared())
#define LAUNCH(kernel, grid, block, shared, ...) \
  ::simt::launch(#kernel, grid, block, shared, [&] { kernel(__VA_ARGS__); }, &::simt::image_marker)

namespace simt {
static thread_local char image_marker;  // in the library's thread-local block, which is its static shared memory
}

struct dim3 : simt::Dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Dim3{x, y, z} {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Sites are the callers': default arguments are evaluated where a function is called.
#define SIMT_SITE ::simt::Site site = ::simt::Site::here()
inline void __syncthreads(SIMT_SITE) { simt::barrier(0, 0, site); }
inline void __syncwarp(uint32_t mask = 0xffffffff, SIMT_SITE) { simt::sync_warp(mask, site); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace simt {
template <class T>
T shuffle(ptx::Shfl mode, uint32_t mask, T value, int by, int width, unsigned clamp, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
  for (uint32_t &w : words) w = ptx::shfl(mode, w, uint32_t(by), unsigned(32 - width) << 8 | clamp, mask, nullptr, site);
  memcpy(&value, words, sizeof(T));
  return value;
}
}  // namespace simt
template <class T>
T __shfl_sync(uint32_t mask, T v, int lane, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::ptx::Shfl::idx, mask, v, lane, width, 31, site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int by, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::ptx::Shfl::bfly, mask, v, by, width, 31, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned by, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::ptx::Shfl::down, mask, v, int(by), width, 31, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned by, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::ptx::Shfl::up, mask, v, int(by), width, 0, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, SIMT_SITE) { return simt::ptx::vote_ballot(p != 0, mask, site); }
inline int __any_sync(uint32_t mask, int p, SIMT_SITE) { return simt::ptx::vote_any(p != 0, mask, site); }
inline int __all_sync(uint32_t mask, int p, SIMT_SITE) { return simt::ptx::vote_all(p != 0, mask, site); }

// One OS thread runs everything, so a plain update is atomic; the shadow hears of it as one.
#define SIMT_ATOMIC(name, result)                                            \
  template <class T>                                                         \
  __attribute__((no_sanitize("thread"))) T name(T *p, T v, SIMT_SITE) {      \
    simt::mem_atomic(p, sizeof(T), site);                                    \
    T old = *p;                                                              \
    *p = result;                                                             \
    return old;                                                              \
  }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicMax, old > v ? old : v)
SIMT_ATOMIC(atomicMin, old < v ? old : v)
SIMT_ATOMIC(atomicExch, v)
SIMT_ATOMIC(atomicAnd, old &v)
SIMT_ATOMIC(atomicOr, old | v)
template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T *p, T compare, T v, SIMT_SITE) {
  simt::mem_atomic(p, sizeof(T), site);
  T old = *p;
  if (old == compare) *p = v;
  return old;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return simt::ptx::rsqrt_approx(x); }
inline float __uint_as_float(uint32_t i) { return simt::bits_to_float(i); }
inline uint32_t __float_as_uint(float f) { return simt::float_to_bits(f); }
inline int __float_as_int(float f) { return int(simt::float_to_bits(f)); }
inline float __int_as_float(int i) { return simt::bits_to_float(uint32_t(i)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline size_t __cvta_generic_to_shared(const void *p, SIMT_SITE) { return simt::shared_address(p, site); }
template <class T>
T __ldg(const T *p) { return *p; }
using std::max;
using std::min;
#undef SIMT_SITE
