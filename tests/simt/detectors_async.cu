// What is on its way: cp.async, mbarriers and bulk copies, wgmma.
#include "detectors.h"

// ---- cp.async: 32 threads bring 16 bytes each, twice
__device__ inline uint32_t bring(uint32_t s, const float *x, int half) {
  uint32_t at = s + uint32_t(half) * 512 + threadIdx.x * 16;
  simt::cp_async(at, x + half * 128 + threadIdx.x * 4, 16, 16);
  simt::cp_async_commit();
  return at;
}
template <bool WeakWait, bool NoBarrier, bool NoWait>
__device__ void copies(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<float *>(smem);
  uint32_t at = simt::shared_address(smem);
  for (int i = 0; i < 8; i++) s[threadIdx.x + 32 * i] = 0;
  __syncthreads();
  for (int half = 0; half < 2; half++) bring(at, x, half);
  if (!NoWait) simt::cp_async_wait(WeakWait ? 1 : 0);
  if (!NoBarrier) __syncthreads();
  for (int i = NoWait ? 2 : 0; i < 2; i++)
    for (int j = 0; j < 4; j++) y[i * 128 + int(threadIdx.x) * 4 + j] = s[i * 128 + 127 - (int(threadIdx.x) * 4 + j)];
}
KERNEL weak_wait(const float *x, float *y) { copies<Bug, false, false>(x, y); }
ENTRY run_weak_wait(int bug, const float *x, float *y) { RUN(weak_wait, dim3(1), dim3(32), 1024, x, y); }
KERNEL wait_without_barrier(const float *x, float *y) { copies<false, Bug, false>(x, y); }
ENTRY run_wait_without_barrier(int bug, const float *x, float *y) { RUN(wait_without_barrier, dim3(1), dim3(32), 1024, x, y); }
KERNEL never_waited(const float *x, float *y) { copies<false, false, Bug>(x, y); }
ENTRY run_never_waited(int bug, const float *x, float *y) { RUN(never_waited, dim3(1), dim3(32), 1024, x, y); }

// ---- mbarriers and bulk copies: thread 0 brings 512 bytes twice through the same buffer
enum BulkBug { NONE, NO_WAIT, WRONG_PARITY, NO_INIT_BARRIER, NO_INIT, TOO_FEW_BYTES, NO_REUSE_BARRIER };
template <BulkBug B>
__device__ void bulk(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<const float *>(smem);
  uint32_t at = simt::shared_address(smem), bar = at + 512;
  unsigned t = threadIdx.x;
  if (t == 0 && B != NO_INIT) simt::mbarrier_init(bar, 1);
  if (B != NO_INIT_BARRIER) __syncthreads();
  for (unsigned i = 0; i < 2; i++) {
    if (t == 0) {
      simt::mbarrier_arrive_expect_tx(bar, B == TOO_FEW_BYTES ? 528 : 512);
      simt::bulk_load(at, x + i * 128, 512, bar);
    }
    if (B != NO_WAIT)
      while (!simt::mbarrier_test(bar, B == WRONG_PARITY ? 1 - i : i)) {
      }
    for (unsigned j = t; j < 128; j += 64) y[i * 128 + j] = s[127 - j];
    if (B != NO_REUSE_BARRIER) __syncthreads();
  }
}
#define BULK(name, B)                                                     \
  KERNEL name(const float *x, float *y) { bulk<Bug ? B : NONE>(x, y); }   \
  ENTRY run_##name(int bug, const float *x, float *y) { RUN(name, dim3(1), dim3(64), 520, x, y); }
BULK(bulk_no_wait, NO_WAIT)
BULK(bulk_wrong_parity, WRONG_PARITY)
BULK(mbarrier_no_barrier, NO_INIT_BARRIER)
BULK(mbarrier_no_init, NO_INIT)
BULK(mbarrier_wrong_bytes, TOO_FEW_BYTES)
BULK(bulk_no_reuse_barrier, NO_REUSE_BARRIER)

template <bool NoFence, bool Early, bool NoWait>
__device__ void bulk_out(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<float *>(smem);
  unsigned t = threadIdx.x;
  for (unsigned i = 0; i < 4; i++) s[t + 32 * i] = x[t + 32 * i];
  if (!NoFence) simt::fence_proxy_async();
  __syncthreads();
  if (t == 0) {
    simt::bulk_store(y, simt::shared_address(smem), 512);
    simt::bulk_commit();
    if (!Early && !NoWait) simt::bulk_wait(0, true);
    s[0] = NoWait ? s[0] : 7;
    if (Early) simt::bulk_wait(0, true);
  }
}
KERNEL store_without_fence(const float *x, float *y) { bulk_out<Bug, false, false>(x, y); }
ENTRY run_store_without_fence(int bug, const float *x, float *y) { RUN(store_without_fence, dim3(1), dim3(32), 512, x, y); }
KERNEL store_source_reused(const float *x, float *y) { bulk_out<false, Bug, false>(x, y); }
ENTRY run_store_source_reused(int bug, const float *x, float *y) { RUN(store_source_reused, dim3(1), dim3(32), 512, x, y); }

// ---- wgmma: a warpgroup multiplies 64x16 by 16x8, both unswizzled in shared memory
enum WgmmaBug { FINE, NO_GROUP_WAIT, NO_REGISTER_FENCE, NO_PROXY_FENCE, OPERAND_REUSED, LEFT_IN_FLIGHT };
template <WgmmaBug B>
__device__ void product(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<unsigned short *>(smem);
  unsigned t = threadIdx.x;
  for (unsigned i = t; i < 80 * 16; i += 128) s[i] = simt::to_bf16(x[i % 64]);
  if (B != NO_PROXY_FENCE) simt::fence_proxy_async();
  __syncthreads();
  uint32_t at = simt::shared_address(smem), d[4] = {}, *registers[4] = {d, d + 1, d + 2, d + 3};
  auto descriptor = [](uint32_t a) { return uint64_t(a >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32; };
  simt::Wgmma op{.n = 8, .type = simt::Element::bf16, .accumulate = false};
  if (B != NO_REGISTER_FENCE) simt::wgmma_fence();
  simt::wgmma(op, registers, nullptr, descriptor(at), descriptor(at + 2048));
  simt::wgmma_commit();
  if (B == OPERAND_REUSED) s[t] = 0;
  if (B != NO_GROUP_WAIT && B != LEFT_IN_FLIGHT) simt::wgmma_wait(0);
  if (B != LEFT_IN_FLIGHT)
    for (unsigned i = 0; i < 4; i++) {
      if (B == NO_GROUP_WAIT) simt::wgmma_touch(d + i);
      y[t * 4 / 2 % 256] = simt::bits_to_float(d[0]);
    }
  if (B == NO_GROUP_WAIT) simt::wgmma_wait(0);
}
#define WGMMA(name, B)                                                     \
  KERNEL name(const float *x, float *y) { product<Bug ? B : FINE>(x, y); } \
  ENTRY run_##name(int bug, const float *x, float *y) { RUN(name, dim3(1), dim3(128), 2560, x, y); }
WGMMA(wgmma_no_wait, NO_GROUP_WAIT)
WGMMA(wgmma_no_fence, NO_REGISTER_FENCE)
WGMMA(wgmma_no_proxy_fence, NO_PROXY_FENCE)
WGMMA(wgmma_operand_reused, OPERAND_REUSED)
WGMMA(wgmma_left_in_flight, LEFT_IN_FLIGHT)

// A warpgroup says that another warp may write what it multiplies, and only then waits for the product.
KERNEL wgmma_given_back_early(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<unsigned short *>(smem);
  unsigned t = threadIdx.x;
  for (unsigned i = t; i < 80 * 16; i += 160) s[i] = simt::to_bf16(x[i % 64]);
  simt::fence_proxy_async();
  __syncthreads();
  if (t >= 128) {
    simt::barrier(1, 160);
    s[t - 128] = 0;
    return;
  }
  uint32_t at = simt::shared_address(smem), d[4] = {}, *registers[4] = {d, d + 1, d + 2, d + 3};
  auto descriptor = [](uint32_t a) { return uint64_t(a >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32; };
  simt::Wgmma op{.n = 8, .type = simt::Element::bf16, .accumulate = false};
  simt::wgmma_fence();
  simt::wgmma(op, registers, nullptr, descriptor(at), descriptor(at + 2048));
  simt::wgmma_commit();
  if (Bug) simt::barrier_arrive(1, 160);
  simt::wgmma_wait(0);
  if (!Bug) simt::barrier_arrive(1, 160);
  y[t] = simt::bits_to_float(d[0]);
}
ENTRY run_wgmma_given_back_early(int bug, const float *x, float *y) {
  RUN(wgmma_given_back_early, dim3(1), dim3(160), 2560, x, y);
}

// A in registers: they are the warpgroup's until the product is there.
KERNEL wgmma_source_overwritten(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<unsigned short *>(smem);
  unsigned t = threadIdx.x;
  s[t] = simt::to_bf16(x[t]);
  simt::fence_proxy_async();
  __syncthreads();
  uint32_t at = simt::shared_address(smem), d[4] = {}, *registers[4] = {d, d + 1, d + 2, d + 3};
  uint32_t a[4] = {t, t, t, t};
  const uint32_t *sources[4] = {a, a + 1, a + 2, a + 3};
  simt::Wgmma op{.n = 8, .type = simt::Element::bf16, .accumulate = false};
  simt::wgmma_fence();
  simt::wgmma(op, registers, sources, 0, uint64_t(at >> 4) | uint64_t(128 >> 4) << 16);
  simt::wgmma_commit();
  if (Bug) a[2] = 0;
  simt::wgmma_wait(0);
  a[2] = t;
  y[t] = simt::bits_to_float(d[0] ^ *sources[2]);
}
ENTRY run_wgmma_source_overwritten(int bug, const float *x, float *y) {
  RUN(wgmma_source_overwritten, dim3(1), dim3(128), 256, x, y);
}

KERNEL wgmma_past_end(const float *, float *) {
  uint32_t d[4] = {}, *registers[4] = {d, d + 1, d + 2, d + 3};
  simt::Wgmma op{8, simt::Element::bf16, false};
  simt::wgmma_fence();
  simt::wgmma(op, registers, nullptr, uint64_t(0x3fff), uint64_t(0x3fff));
}
ENTRY run_wgmma_past_end(int bug, const float *x, float *y) { RUN(wgmma_past_end, dim3(1), dim3(128), 512, x, y); }
