// Threads that race, miss one another or reach where they may not; and what the emulator counts.
#include "detectors.h"

// ---- races in shared memory
KERNEL missing_barrier(const float *x, float *y) {
  __shared__ float s[64];
  unsigned t = threadIdx.x;
  s[t] = 0;
  __syncthreads();
  s[t] = x[t];
  if (!Bug) __syncthreads();
  y[t] = s[63 - t];
}
ENTRY run_missing_barrier(int bug, const float *x, float *y) { RUN(missing_barrier, dim3(1), dim3(64), 0, x, y); }

KERNEL missing_reuse_barrier(const float *x, float *y) {
  __shared__ float s[64];
  unsigned t = threadIdx.x;
  float sum = 0;
  for (int i = 0; i < 2; i++) {
    s[t] = x[t] + float(i);
    __syncthreads();
    sum += s[63 - t];
    if (!Bug) __syncthreads();
  }
  y[t] = sum;
}
ENTRY run_missing_reuse_barrier(int bug, const float *x, float *y) { RUN(missing_reuse_barrier, dim3(1), dim3(64), 0, x, y); }

// One warp in lockstep needs no barrier? It does.
KERNEL missing_warp_sync(const float *x, float *y) {
  __shared__ float s[32];
  unsigned t = threadIdx.x;
  s[t] = 0;
  __syncwarp();
  s[t] = x[t];
  if (!Bug)
    __syncwarp();
  else
    __shfl_xor_sync(0xffffffff, x[t], 1);  // makes lanes wait, and orders no memory
  y[t] = s[t ^ 1];
}
ENTRY run_missing_warp_sync(int bug, const float *x, float *y) { RUN(missing_warp_sync, dim3(1), dim3(32), 0, x, y); }

// Producer warps and a consumer warp meet at barrier 1; the bug lets one producer go to barrier 2.
KERNEL wrong_named_barrier(const float *x, float *y) {
  __shared__ float s[64];
  unsigned t = threadIdx.x, warp = t / 32;
  if (warp < 2) s[t] = 0;
  __syncthreads();
  if (warp < 2) {
    s[t] = x[t];
    simt::barrier_arrive(1, Bug ? 64 : 96);
    if (Bug && warp == 1) simt::barrier_arrive(1, 64);
  } else {
    simt::barrier(1, Bug ? 64 : 96);
    y[t - 64] = s[t - 64];
    y[t - 32] = s[t - 32];
  }
}
ENTRY run_wrong_named_barrier(int bug, const float *x, float *y) { RUN(wrong_named_barrier, dim3(1), dim3(96), 0, x, y); }

// What a lane writes after its own arrival isn't covered by the others'.
KERNEL written_after_arrival(const float *x, float *y) {
  __shared__ float s[64];
  unsigned t = threadIdx.x;
  s[t] = 0;
  __syncthreads();
  if (t < 32) {
    if (!Bug) s[t] = x[t];
    simt::barrier_arrive(1, 64);
    if (Bug) s[t] = x[t];
  } else {
    simt::barrier(1, 64);
    y[t] = s[t - 32];
  }
}
ENTRY run_written_after_arrival(int bug, const float *x, float *y) { RUN(written_after_arrival, dim3(1), dim3(64), 0, x, y); }

// Half of a warp meets: the other half's writes are as unordered as before.
KERNEL half_a_warp_meets(const float *x, float *y) {
  __shared__ float s[32];
  unsigned t = threadIdx.x;
  s[t] = 0;
  __syncwarp();
  s[t] = x[t];
  if (t < 16)
    __syncwarp(0xffff);
  else
    __syncwarp(0xffff0000);
  y[t] = s[t ^ (Bug ? 16 : 1)];
}
ENTRY run_half_a_warp_meets(int bug, const float *x, float *y) { RUN(half_a_warp_meets, dim3(1), dim3(32), 0, x, y); }

// One lane waits for the other warp; the rest may read only once they have met it.
KERNEL one_lane_waits(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<float *>(smem);
  uint32_t bar = simt::shared_address(smem) + 128;
  unsigned t = threadIdx.x;
  if (t == 0) simt::mbarrier_init(bar, 32);
  if (t < 32) s[t] = 0;
  __syncthreads();
  if (t < 32) {
    s[t] = x[t];
    simt::mbarrier_arrive(bar);
  } else {
    if (t == 32)
      while (!simt::mbarrier_test(bar, 0)) {
      }
    if (Bug)
      __shfl_xor_sync(0xffffffff, x[t], 1);
    else
      __syncwarp();
    y[t] = s[63 - t];
  }
}
ENTRY run_one_lane_waits(int bug, const float *x, float *y) { RUN(one_lane_waits, dim3(1), dim3(64), 136, x, y); }

// One lane arrives for its warp, which is right only once it has met the others.
KERNEL one_lane_arrives(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<float *>(smem);
  uint32_t bar = simt::shared_address(smem) + 128;
  unsigned t = threadIdx.x;
  if (t == 0) simt::mbarrier_init(bar, 1);
  if (t < 32) s[t] = 0;
  __syncthreads();
  if (t < 32) {
    s[t] = x[t];
    if (!Bug) __syncwarp();
    if (t == 5) simt::mbarrier_arrive(bar);
  } else {
    while (!simt::mbarrier_test(bar, 0)) {
    }
    y[t] = s[63 - t];
  }
}
ENTRY run_one_lane_arrives(int bug, const float *x, float *y) { RUN(one_lane_arrives, dim3(1), dim3(64), 136, x, y); }

// Neighbours that share four bytes don't share a place.
KERNEL halves(const float *x, float *y) {
  __shared__ unsigned short s[64];
  auto *out = reinterpret_cast<unsigned short *>(y);
  unsigned t = threadIdx.x;
  s[t] = 0;
  __syncthreads();
  s[t] = static_cast<unsigned short>(x[t]);
  out[t] = static_cast<unsigned short>(s[Bug ? t ^ 1 : t] + t);
}
ENTRY run_halves(int bug, const float *x, float *y) { RUN(halves, dim3(1), dim3(64), 0, x, y); }

// Each lane stores half of a word; the even ones' stores must not vanish behind those of the odd.
KERNEL halves_of_evens(const float *x, float *y) {
  __shared__ unsigned short s[32];
  unsigned t = threadIdx.x;
  s[t] = 0;
  __syncthreads();
  s[t] = static_cast<unsigned short>(x[t]);
  if (!Bug) __syncwarp();
  y[t] = s[t & ~3u];
}
ENTRY run_halves_of_evens(int bug, const float *x, float *y) { RUN(halves_of_evens, dim3(1), dim3(32), 0, x, y); }

// Each lane updates its half in place: nobody else's, though two share a word.
KERNEL halves_in_place(const float *x, float *y) {
  __shared__ unsigned short s[34];
  unsigned t = threadIdx.x;
  s[t] = static_cast<unsigned short>(x[t]);
  if (t < 2) s[32 + t] = 0;
  __syncthreads();
  unsigned short mine = s[t], next = s[Bug ? t + 1 : t];
  s[t] = static_cast<unsigned short>(mine + next);
  y[t] = mine;
}
ENTRY run_halves_in_place(int bug, const float *x, float *y) { RUN(halves_in_place, dim3(1), dim3(32), 0, x, y); }

KERNEL global_halves(const float *x, float *y) {
  auto *h = reinterpret_cast<unsigned short *>(y);
  unsigned t = threadIdx.x;
  h[t] = static_cast<unsigned short>(x[t]);
  if (!Bug) __syncwarp();
  y[128 + t] = h[t & ~3u];
}
ENTRY run_global_halves(int bug, const float *x, float *y) { RUN(global_halves, dim3(1), dim3(32), 0, x, y); }

// ---- races in global memory
// Who writes is the last who read, and not the only one.
KERNEL sum_of_neighbours(const float *, float *y) {
  float sum = y[threadIdx.x] + y[threadIdx.x + 1];
  if (!Bug) __syncwarp();
  y[threadIdx.x] = sum;
}
ENTRY run_sum_of_neighbours(int bug, const float *x, float *y) { RUN(sum_of_neighbours, dim3(1), dim3(32), 0, x, y); }

KERNEL blocks_write(const float *x, float *y) { y[threadIdx.x + (Bug ? 0 : 32 * blockIdx.x)] = x[threadIdx.x] + blockIdx.x; }
ENTRY run_blocks_write(int bug, const float *x, float *y) { RUN(blocks_write, dim3(2), dim3(32), 0, x, y); }

KERNEL block_reads(const float *, float *y) {
  unsigned i = threadIdx.x + 32 * blockIdx.x, other = i ^ 32;
  float v = y[Bug ? other : i];
  y[i] = v + 1;
}
ENTRY run_block_reads(int bug, const float *x, float *y) { RUN(block_reads, dim3(2), dim3(32), 0, x, y); }

KERNEL threads_in_block(const float *x, float *y) {
  y[threadIdx.x] = x[threadIdx.x];
  if (!Bug) __syncthreads();
  float v = y[63 - threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = v;
}
ENTRY run_threads_in_block(int bug, const float *x, float *y) { RUN(threads_in_block, dim3(1), dim3(64), 0, x, y); }

// Threads of a block may store the same value to the same place, as compilers make replicated lanes do; blocks may not.
KERNEL blocks_store_the_same(const float *, float *y) {
  float one = 1;
  simt::mem_write(y + (Bug ? 0 : blockIdx.x), 4, &one);
}
ENTRY run_blocks_store_the_same(int bug, const float *x, float *y) { RUN(blocks_store_the_same, dim3(2), dim3(32), 0, x, y); }

KERNEL plain_add(const float *x, float *y) {
  if (Bug)
    y[0] += x[threadIdx.x];
  else
    atomicAdd(y, x[threadIdx.x]);
}
ENTRY run_plain_add(int bug, const float *x, float *y) { RUN(plain_add, dim3(2), dim3(32), 0, x, y); }

// ---- never written
KERNEL uninitialized_shared(const float *x, float *y) {
  __shared__ float s[32];
  unsigned t = threadIdx.x;
  if (t < (Bug ? 31 : 32)) s[t] = x[t];
  __syncthreads();
  y[t] = s[31 - t];
}
ENTRY run_uninitialized_shared(int bug, const float *x, float *y) { RUN(uninitialized_shared, dim3(1), dim3(32), 0, x, y); }

KERNEL stale_output(const float *x, float *y) {
  float before = Bug ? y[threadIdx.x] : 0;
  y[threadIdx.x] = before + x[threadIdx.x];
}
ENTRY run_stale_output(int bug, const float *x, float *y) { RUN(stale_output, dim3(1), dim3(32), 0, x, y); }

// ---- out of bounds and forbidden
KERNEL read_past_end(const float *x, float *y) {
  unsigned t = threadIdx.x + 64 * blockIdx.x;
  if (t < (Bug ? 65 : 64)) y[t % 64] = x[t];
}
ENTRY run_read_past_end(int bug, const float *x, float *y) { RUN(read_past_end, dim3(2), dim3(64), 0, x, y); }

KERNEL write_before_begin(const float *x, float *y) {
  int t = int(threadIdx.x) - (Bug ? 1 : 0);
  y[t] = x[threadIdx.x];
}
ENTRY run_write_before_begin(int bug, const float *x, float *y) { RUN(write_before_begin, dim3(1), dim3(32), 0, x, y); }

KERNEL shared_past_end(const float *x, float *y) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<float *>(smem);
  unsigned t = threadIdx.x;
  s[t + (Bug ? 1 : 0)] = x[t];
  __syncthreads();
  y[t] = s[t + (Bug ? 1 : 0)];
}
ENTRY run_shared_past_end(int bug, const float *x, float *y) { RUN(shared_past_end, dim3(1), dim3(32), 128, x, y); }

KERNEL ldmatrix_past_end(const float *, float *y) {
  uint32_t r[4];
  simt::ptx::ldmatrix(r, 4, false, simt::SHARED_BASE + 16 * threadIdx.x + (Bug ? 4096 : 0));
  y[threadIdx.x] = float(r[0]);
}
ENTRY run_ldmatrix_past_end(int bug, const float *x, float *y) { RUN(ldmatrix_past_end, dim3(1), dim3(32), 512, x, y); }

KERNEL write_read_only(const float *x, float *y) {
  auto *out = Bug ? const_cast<float *>(x) : y;
  out[threadIdx.x] = 1;
}
ENTRY run_write_read_only(int bug, const float *x, float *y) { RUN(write_read_only, dim3(1), dim3(32), 0, x, y); }

KERNEL misaligned_vector(const float *x, float *y) {
  auto *v = reinterpret_cast<const float4 *>(x + (Bug ? 1 : 0));
  float4 f = v[threadIdx.x];
  y[threadIdx.x] = f.x + f.y + f.z + f.w;
}
ENTRY run_misaligned_vector(int bug, const float *x, float *y) { RUN(misaligned_vector, dim3(1), dim3(8), 0, x, y); }

// ---- threads that don't meet
KERNEL split_barrier(const float *x, float *y) {
  __shared__ float s[32];
  unsigned t = threadIdx.x;
  s[t] = x[t];
  if (Bug && t < 16) {
    __syncthreads();
    y[t] = 0;
  } else {
    __syncthreads();
  }
  y[t] = s[31 - t];
}
ENTRY run_split_barrier(int bug, const float *x, float *y) { RUN(split_barrier, dim3(1), dim3(32), 0, x, y); }

KERNEL shuffle_in_branch(const float *x, float *y) {
  unsigned t = threadIdx.x;
  float v = x[t];
  if (t < 16)
    v += __shfl_xor_sync(Bug ? 0xffffffff : 0xffff, v, 1);
  else
    __syncwarp(0xffff0000);
  __syncthreads();
  y[t] = v;
}
ENTRY run_shuffle_in_branch(int bug, const float *x, float *y) { RUN(shuffle_in_branch, dim3(1), dim3(32), 0, x, y); }

KERNEL product_in_branch(const float *x, float *y) {
  uint32_t a[4] = {}, b[2] = {}, c[4] = {}, d[4];
  if (!Bug || threadIdx.x < 16)
    simt::ptx::mma(simt::ptx::Mma::bf16_k16, d, a, b, c);
  else
    simt::ptx::mma(simt::ptx::Mma::bf16_k16, d, c, b, a);
  y[threadIdx.x] = simt::bits_to_float(d[0]) + x[0];
}
ENTRY run_product_in_branch(int bug, const float *x, float *y) { RUN(product_in_branch, dim3(1), dim3(32), 0, x, y); }

KERNEL missing_arrival(const float *x, float *y) {
  unsigned t = threadIdx.x;
  if (!Bug || t < 32) simt::barrier(3, 64);
  y[t] = x[t];
}
ENTRY run_missing_arrival(int bug, const float *x, float *y) { RUN(missing_arrival, dim3(1), dim3(64), 0, x, y); }

KERNEL inactive_source(const float *x, float *y) {
  unsigned t = threadIdx.x;
  y[t] = t < 16 ? __shfl_sync(0xffff, x[t], Bug ? 20 : 3) : 0;
}
ENTRY run_inactive_source(int bug, const float *x, float *y) { RUN(inactive_source, dim3(1), dim3(32), 0, x, y); }

KERNEL endless_poll(const float *x, float *y) {
  if (threadIdx.x == 0) {
    while (Bug && y[33] == 0) simt::yield();
    y[0] = x[0];
  }
}
ENTRY run_endless_poll(int bug, const float *x, float *y) { RUN(endless_poll, dim3(1), dim3(32), 0, x, y); }

KERNEL too_many_threads(const float *x, float *y) {
  if (threadIdx.x < 32) y[threadIdx.x] = x[threadIdx.x];
}
ENTRY run_too_many_threads(int bug, const float *x, float *y) { RUN(too_many_threads, dim3(1), dim3(bug ? 1025 : 1024), 0, x, y); }

// ---- the schedule: threads draw tickets between meetings
__global__ void tickets(unsigned *order, unsigned *next) {
  for (int i = 0; i < 2; i++) {
    order[atomicAdd(next, 1u)] = threadIdx.x + blockDim.x * blockIdx.x;
    __syncwarp();
  }
}
ENTRY run_tickets(unsigned *order, unsigned *next) { LAUNCH(tickets, dim3(3), dim3(128), 0, order, next); }

// One block waits for what another does, in either order: possible only if they run interleaved.
__global__ void hand_over(unsigned *flag) {
  if (blockIdx.x == 0)
    while (atomicAdd(flag, 0u) == 0) simt::yield();
  else
    atomicAdd(flag, 1u);
}
ENTRY run_hand_over(unsigned *flag) { LAUNCH(hand_over, dim3(2), dim3(1), 0, flag); }

// ---- counters: a column of a row-major tile, and a column of global memory
__global__ void strides(const float *x, float *y, int stride) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<float *>(smem);
  s[int(threadIdx.x) * stride] = x[int(threadIdx.x) * stride];
  y[threadIdx.x] = 0;
}
ENTRY run_strides(const float *x, float *y, int stride) { LAUNCH(strides, dim3(1), dim3(32), 32 * 32 * 4, x, y, stride); }
