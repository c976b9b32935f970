// PTX instructions of sm_90a, each wrapped once as in ptx.cuh: mbarriers, TMA, wgmma, and what warpgroups need to share an SM.
#pragma once
#include "ptx.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace hh {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = simt::TensorMap;
#endif

namespace ptx {

// ---- warps and warpgroups
// Registers of each thread of this warpgroup from here on; all its warps together. A multiple of 8.
template <int N>
HH_DEVICE void more_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
HH_DEVICE void fewer_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// bar.sync and bar.arrive: barrier `id` (0 is __syncthreads) completes when `threads` came.
HH_DEVICE void barrier_sync(int id, int threads HH_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  simt::barrier(id, unsigned(threads), site);
#endif
}
HH_DEVICE void barrier_arrive(int id, int threads HH_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  simt::barrier_arrive(id, unsigned(threads), site);
#endif
}

// ---- mbarriers, by shared address, 8 bytes each
HH_DEVICE void mbarrier_init(uint32_t bar, uint32_t count HH_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
#else
  simt::mbarrier_init(bar, count, site);
#endif
}
// After initialising some, before copies may complete them; a __syncthreads makes them known to other threads.
HH_DEVICE void mbarrier_fence() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
HH_DEVICE void mbarrier_arrive(uint32_t bar HH_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
#else
  simt::mbarrier_arrive(bar, 1, site);
#endif
}
// Arrives, and has the phase wait for this many bytes of copies as well.
HH_DEVICE void mbarrier_expect(uint32_t bar, uint32_t bytes HH_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
#else
  simt::mbarrier_arrive_expect_tx(bar, bytes, site);
#endif
}
// Until the phase of this parity is complete: the first one's is 0. The one before the first counts as complete.
HH_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity HH_SITE) {
#ifdef __CUDACC__
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
  } while (!done);
#else
  while (!simt::mbarrier_test(bar, parity, site)) {
  }
#endif
}

// ---- TMA
HH_DEVICE void prefetch(const TensorMap* map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  (void)map;
#endif
}
// The box of a tensor of four dimensions that begins at (a, b, c, d), the first being the contiguous one; zeros for what lies outside.
HH_DEVICE void tensor_load(uint32_t dst, const TensorMap* map, uint32_t bar, int a, int b, int c, int d HH_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      :
      : "r"(dst), "l"(map), "r"(bar), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
#else
  const int at[4] = {a, b, c, d};
  simt::tensor_load(dst, *map, at, bar, site);
#endif
}

// ---- wgmma: a warpgroup multiplies; what it reads and writes is its own until the group is waited for
// Registers that were written or read the ordinary way are handed over.
HH_DEVICE void wgmma_fence(HH_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  simt::wgmma_fence(site);
#endif
}
HH_DEVICE void wgmma_commit(HH_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simt::wgmma_commit(site);
#endif
}
// For the compiler, which else moves arithmetic past waits: x is computed before what follows, and used after what went before.
template <int COUNT>
HH_DEVICE void pin(float (&x)[COUNT]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(x[i])::"memory");
#else
  (void)x;
#endif
}
// Until at most N groups are in flight; d are the sums that are there then.
template <int N, int COUNT>
HH_DEVICE void wgmma_wait(float (&d)[COUNT] HH_SITE) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  simt::wgmma_wait(N, site);
#endif
  pin(d);
}

// Where a matrix of lines of 128 bytes lies in shared memory: TMA's swizzle of 128 bytes, the tile aligned to 1024 bytes, its lines
// one after another. K-major operands: a line is a row of M or N, of which a product of k = 16 reads 32 bytes. MN-major ones: a line
// is a k, and `next` the distance of the next 64 elements of it.
HH_DEVICE uint64_t descriptor(uint32_t address, uint32_t next = 16) {
  constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62, EIGHT_LINES = uint64_t(1024 >> 4) << 32;
  return SWIZZLE_128 | EIGHT_LINES | uint64_t(next >> 4) << 16 | (address >> 4 & 0x3fff);
}

// Products m64 nN k16 with float sums: d[i] is row lane / 4 + i / 2 % 2 · 8 of the warp's 16, column i / 4 · 8 + lane % 4 · 2 + i % 2.
//   shared:    d = a b, or with go_on d += a b; both K-major by descriptor: b's lines are the columns of d
//   registers: the same with a as mma_16816's; with K_LINES b is MN-major: its lines are k
template <class T, int N>
struct Wgmma;

#ifdef __CUDACC__
#define HH_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HH_F8(i) HH_F4(i), HH_F4(i + 4)
#define HH_F16(i) HH_F8(i), HH_F8(i + 8)
#define HH_F32(i) HH_F16(i), HH_F16(i + 16)
#define HH_F56(i) HH_F32(i), HH_F8(i + 32), HH_F8(i + 40), HH_F8(i + 48)
#define HH_F64(i) HH_F32(i), HH_F32(i + 32)
#define HH_F128(i) HH_F64(i), HH_F64(i + 64)
#define HH_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HH_R32 HH_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HH_R56 HH_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43" \
                      ", %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55"
#define HH_R64 HH_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define HH_R96 HH_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
                      ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define HH_R128 HH_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
                       ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The operands after the sums are numbers A, B, C, ... A predicate says whether the sums go on.
#define HH_WGMMA(T, type, N, SUMS, A, B, C, D, E, F, G)                                                                           \
  template <>                                                                                                                     \
  struct Wgmma<T, N> {                                                                                                            \
    static HH_DEVICE void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool go_on) {                                         \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #C ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type      \
                   " {" HH_R##SUMS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;}"                                                         \
                   : HH_F##SUMS(0)                                                                                                \
                   : "l"(a), "l"(b), "r"(int(go_on)));                                                                            \
    }                                                                                                                             \
    template <bool K_LINES>                                                                                                       \
    static HH_DEVICE void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool go_on) {                          \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #F ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type      \
                   " {" HH_R##SUMS "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E ", p, 1, 1, %" #G ";}"                         \
                   : HH_F##SUMS(0)                                                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(go_on)), "n"(int(K_LINES)));                     \
    }                                                                                                                             \
  };
#define HH_WGMMA_BOTH(N, SUMS, ...)           \
  HH_WGMMA(bf16, "bf16", N, SUMS, __VA_ARGS__) \
  HH_WGMMA(f16, "f16", N, SUMS, __VA_ARGS__)
HH_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21, 22)
HH_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37, 38)
HH_WGMMA_BOTH(112, 56, 56, 57, 58, 59, 60, 61, 62)
HH_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69, 70)
HH_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef HH_WGMMA_BOTH
#undef HH_WGMMA
#else
template <class T>
inline constexpr simt::Element ELEMENT = simt::Element::f16;
template <>
inline constexpr simt::Element ELEMENT<bf16> = simt::Element::bf16;

inline void wgmma_emulated(const simt::Wgmma& how, float* d, const uint32_t* a, uint64_t a_at, uint64_t b_at, simt::Site site) {
  uint32_t* sums[128];
  for (unsigned i = 0; i < how.n / 2; ++i) sums[i] = reinterpret_cast<uint32_t*>(d + i);
  const uint32_t* sources[4] = {a, a + 1, a + 2, a + 3};
  simt::wgmma(how, sums, a ? sources : nullptr, a_at, b_at, site);
}
template <class T, int N>
struct Wgmma {
  static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool go_on HH_SITE) {
    wgmma_emulated({.n = N, .type = ELEMENT<T>, .accumulate = go_on}, d, nullptr, a, b, site);
  }
  template <bool K_LINES>
  static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool go_on HH_SITE) {
    wgmma_emulated({.n = N, .type = ELEMENT<T>, .accumulate = go_on, .trans_b = K_LINES}, d, a, 0, b, site);
  }
};
#endif

}  // namespace ptx
}  // namespace hh
