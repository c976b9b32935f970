// Every PTX instruction that the kernels use (sm_80), wrapped once: assembly for nvcc, and beside it the same for the emulator, which
// runs the very sources on a CPU. The emulator's twin takes one argument more, the place in the source it is called from, so that
// reports and counters name the kernel's line; callers never give it. sm_90's are in ptx_sm90.cuh.
//
// Kernels may use the plain CUDA that both know (csrc/simt/cuda.h): threadIdx, __syncthreads, __syncwarp, shuffles, votes,
// vector types. They call what is here with its namespace, ptx::exp2, since CUDA has names of its own. Shared memory is always dynamic: static arrays of all kernels would add up in the emulator's library.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HH_DEVICE __device__ __forceinline__
#define HH_SITE_ONLY
#define HH_SITE
#define HH_HERE
#else
#include <cstring>
#define HH_DEVICE inline __attribute__((always_inline))
#define HH_SITE_ONLY [[maybe_unused]] ::simt::Site site = ::simt::Site::here()
#define HH_SITE , HH_SITE_ONLY
#define HH_HERE , site
#endif

namespace hh {

// 16-bit floats as they lie in memory. Arithmetic is float's.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace ptx {

// ---- shared memory
// The 32-bit address of a place in shared memory.
HH_DEVICE uint32_t smem_address(const void* p HH_SITE) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return simt::shared_address(p, site);
#endif
}

// cp.async of 4, 8 or 16 bytes, of which src_bytes come from src and the rest is zero. With 0 src is not read, but must be aligned.
// 16 bytes go past the first cache.
template <int BYTES>
HH_DEVICE void cp_async(uint32_t dst, const void* src, int src_bytes = BYTES HH_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#ifdef __CUDACC__
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(src_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "n"(BYTES), "r"(src_bytes)
                 : "memory");
#else
  simt::cp_async(dst, src, BYTES, static_cast<unsigned>(src_bytes), site);
#endif
}

HH_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit();
#endif
}

// Until at most N of this thread's groups are in flight. Others see the bytes after a barrier that follows.
template <int N>
HH_DEVICE void cp_async_wait(HH_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  simt::cp_async_wait(N, site);
#endif
}

// 4, 8 or 16 bytes of shared memory at an address.
HH_DEVICE uint32_t load_shared(uint32_t address HH_SITE) {
  uint32_t v;
#ifdef __CUDACC__
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
#else
  void* p = simt::shared_ptr(address, site);
  simt::mem_read(p, 4, site);
  memcpy(&v, p, 4);
#endif
  return v;
}
HH_DEVICE uint4 load_shared4(uint32_t address HH_SITE) {
  uint4 v;
#ifdef __CUDACC__
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
#else
  void* p = simt::shared_ptr(address, site);
  simt::mem_read(p, 16, site);
  memcpy(&v, p, 16);
#endif
  return v;
}
HH_DEVICE void store_shared(uint32_t address, uint32_t v HH_SITE) {
#ifdef __CUDACC__
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
#else
  simt::mem_write(simt::shared_ptr(address, site), 4, &v, site);
#endif
}
HH_DEVICE void store_shared2(uint32_t address, uint2 v HH_SITE) {
#ifdef __CUDACC__
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
#else
  simt::mem_write(simt::shared_ptr(address, site), 8, &v, site);
#endif
}
HH_DEVICE void store_shared4(uint32_t address, uint4 v HH_SITE) {
#ifdef __CUDACC__
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
  simt::mem_write(simt::shared_ptr(address, site), 16, &v, site);
#endif
}

// ---- global memory
// 16 or 8 bytes that are read once, and by nobody written meanwhile: past the first cache.
HH_DEVICE uint4 load_once(const uint4* p HH_SITE) {
#ifdef __CUDACC__
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
#else
  return *p;
#endif
}

HH_DEVICE uint2 load_once(const uint2* p HH_SITE) {
#ifdef __CUDACC__
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(__cvta_generic_to_global(p)));
  return v;
#else
  return *p;
#endif
}

// ---- matrices of 8x8 16-bit values; the whole warp together
// Lane i gives the address of row i % 8 of matrix i / 8, 16 bytes each. r[j]: of matrix j, row lane / 4, columns lane % 4 · 2 and next.
HH_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address HH_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#else
  simt::ptx::ldmatrix(r, 4, false, address, site);
#endif
}
// Lanes 0 to 15 give addresses.
HH_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t address HH_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
#else
  simt::ptx::ldmatrix(r, 2, false, address, site);
#endif
}
// Transposed: r[j] has, of matrix j, rows lane % 4 · 2 and next, column lane / 4.
HH_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address HH_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#else
  simt::ptx::ldmatrix(r, 4, true, address, site);
#endif
}
HH_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address HH_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
#else
  simt::ptx::ldmatrix(r, 2, true, address, site);
#endif
}

// d += a b, m16n8k16, float sums. a: rows lane / 4 and + 8, columns lane % 4 · 2 and + 8, as ldmatrix_x4 gives them; b: columns of n
// as rows of memory, as ldmatrix gives them; d: rows lane / 4 (d[0], d[1]) and + 8, columns lane % 4 · 2 and next.
template <class T>
HH_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] HH_SITE);

#ifdef __CUDACC__
#define HH_MMA_16816(T, type)                                                                                                     \
  template <>                                                                                                                     \
  HH_DEVICE void mma_16816<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                                    \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "     \
                 "{%0, %1, %2, %3};"                                                                                              \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                             \
  }
HH_MMA_16816(bf16, "bf16")
HH_MMA_16816(f16, "f16")
#undef HH_MMA_16816
#else
inline void mma_float(simt::ptx::Mma shape, float (&d)[4], const uint32_t* a, const uint32_t* b, simt::Site site) {
  uint32_t sums[4];
  memcpy(sums, d, sizeof sums);
  simt::ptx::mma(shape, sums, a, b, sums, site);
  memcpy(d, sums, sizeof sums);
}
template <>
HH_DEVICE void mma_16816<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Site site) {
  mma_float(simt::ptx::Mma::bf16_k16, d, a, b, site);
}
template <>
HH_DEVICE void mma_16816<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Site site) {
  mma_float(simt::ptx::Mma::f16_k16, d, a, b, site);
}
#endif

// d += a b, m16n8k8 of tf32: a, b hold floats whose lower 13 bits are ignored (to_tf32 rounds). a: rows lane / 4 (a[0], a[2]) and + 8,
// columns lane % 4 and + 4 (a[2], a[3]); b: rows lane % 4 and + 4, column lane / 4.
HH_DEVICE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] HH_SITE) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_float(simt::ptx::Mma::tf32_k8, d, a, b, site);
#endif
}
HH_DEVICE uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return simt::to_tf32(x);
#endif
}

// ---- numbers. Approximate ones err by an ulp or two on a GPU, and are rounded from double in the emulator.
// 2^x; what is subnormal is 0.
HH_DEVICE float exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::ptx::flush(simt::ptx::ex2_approx(simt::ptx::flush(x)));
#endif
}
// log2(x); of subnormals, as of 0, -inf.
HH_DEVICE float log2(float x) {
#ifdef __CUDACC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::ptx::lg2_approx(simt::ptx::flush(x));
#endif
}
// 1 / x.
HH_DEVICE float rcp(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::ptx::flush(simt::ptx::rcp_approx(simt::ptx::flush(x)));
#endif
}
HH_DEVICE float rsqrt(float x) {
#ifdef __CUDACC__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::ptx::rsqrt_approx(simt::ptx::flush(x));
#endif
}

// Two floats as a register of two 16-bit ones, rounded to nearest: lo in the lower half.
template <class T>
HH_DEVICE uint32_t pack(float lo, float hi);
template <>
HH_DEVICE uint32_t pack<bf16>(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return simt::ptx::pack_bf16(hi, lo);
#endif
}
template <>
HH_DEVICE uint32_t pack<f16>(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return simt::ptx::pack_f16(hi, lo);
#endif
}

template <class T>
HH_DEVICE float to_float(T x);
template <>
HH_DEVICE float to_float<float>(float x) {
  return x;
}
template <>
HH_DEVICE float to_float<bf16>(bf16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
template <>
HH_DEVICE float to_float<f16>(f16 x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return simt::from_f16(x.bits);
#endif
}

// Rounded to nearest.
template <class T>
HH_DEVICE T from_float(float x);
template <>
HH_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
HH_DEVICE bf16 from_float<bf16>(float x) {
  return {uint16_t(pack<bf16>(x, 0.0f))};
}
template <>
HH_DEVICE f16 from_float<f16>(float x) {
  return {uint16_t(pack<f16>(x, 0.0f))};
}

template <class T>
HH_DEVICE float2 unpack(uint32_t r) {
  return {to_float(T{uint16_t(r)}), to_float(T{uint16_t(r >> 16)})};
}
template <>
HH_DEVICE float2 unpack<bf16>(uint32_t r) {
  return {__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000u)};
}

// ---- warps. `op` over groups of N lanes side by side; each gets the same bits, as a + b and b + a are.
template <int N, class Op>
HH_DEVICE float over_lanes(float x, Op op HH_SITE) {
#pragma unroll
  for (int by = N / 2; by; by /= 2) {
#ifdef __CUDACC__
    x = op(x, __shfl_xor_sync(0xffffffffu, x, by));
#else
    x = op(x, __shfl_xor_sync(0xffffffffu, x, by, 32, site));
#endif
  }
  return x;
}
struct Sum {
  HH_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  HH_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
HH_DEVICE float warp_sum(float x HH_SITE) { return over_lanes<32>(x, Sum{} HH_HERE); }
HH_DEVICE float warp_max(float x HH_SITE) { return over_lanes<32>(x, Max{} HH_HERE); }
// Of the 4 lanes that share rows of a product's fragment.
HH_DEVICE float quad_sum(float x HH_SITE) { return over_lanes<4>(x, Sum{} HH_HERE); }
HH_DEVICE float quad_max(float x HH_SITE) { return over_lanes<4>(x, Max{} HH_HERE); }

}  // namespace ptx
}  // namespace hh
