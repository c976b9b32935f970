// The wrappers of csrc/cuda/ptx.cuh, each in a kernel of one warp that shows what it does.
#include "launch.cuh"

using namespace hh;


// c [16, 8] = a [16, 16] b^T, b [8, 16]: through cp.async, whose rows from `rows` on are zero, and ldmatrix.
template <class T>
__global__ void product(const uint16_t* a, const uint16_t* b, float* c, int rows) {
  DYNAMIC_SHARED(smem);
  const unsigned lane = threadIdx.x;
  const uint32_t to_a = ptx::smem_address(smem), to_b = to_a + 512;
  const unsigned row = lane / 2;
  ptx::cp_async<16>(to_a + lane * 16, a + lane * 8, int(row) < rows ? 16 : 0);
  ptx::cp_async_commit();
  if (row < 8) ptx::cp_async<16>(to_b + lane * 16, b + lane * 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  uint32_t x[4], y[2];
  ptx::ldmatrix_x4(x, to_a + lane % 16 * 32 + lane / 16 * 16);
  ptx::ldmatrix_x2(y, to_b + lane % 8 * 32 + lane / 8 % 2 * 16);
  float d[4] = {0, 0, 0, 0};
  ptx::mma_16816<T>(d, x, y);
  ptx::mma_16816<T>(d, x, y);  // accumulates
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i] / 2;
}

// c [16, 8] = a [16, 16] b, b [16, 8]: transposed on the way, x4 for a that lies by columns, a^T [16, 16].
__global__ void transposed(const uint16_t* at, const uint16_t* b, float* c) {
  DYNAMIC_SHARED(smem);
  const unsigned lane = threadIdx.x;
  const uint32_t to_a = ptx::smem_address(smem), to_b = to_a + 512;
  ptx::cp_async<16>(to_a + lane * 16, at + lane * 8);
  ptx::cp_async<8>(to_b + lane * 8, b + lane * 4);
  ptx::cp_async_wait<0>();
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  uint32_t x[4], y[2];
  ptx::ldmatrix_x4_trans(x, to_a + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16);
  ptx::ldmatrix_x2_trans(y, to_b + lane % 16 * 16);
  float d[4] = {0, 0, 0, 0};
  ptx::mma_16816<bf16>(d, x, y);
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// c [16, 8] = a [16, 8] b^T, b [8, 8], in tf32.
__global__ void product_tf32(const float* a, const float* b, float* c) {
  const unsigned row = threadIdx.x / 4, column = threadIdx.x % 4;
  const uint32_t x[4] = {ptx::to_tf32(a[row * 8 + column]), ptx::to_tf32(a[(row + 8) * 8 + column]), ptx::to_tf32(a[row * 8 + column + 4]),
                         ptx::to_tf32(a[(row + 8) * 8 + column + 4])};
  const uint32_t y[2] = {ptx::to_tf32(b[row * 8 + column]), ptx::to_tf32(b[row * 8 + column + 4])};
  float d[4] = {0, 0, 0, 0};
  ptx::mma_1688_tf32(d, x, y);
  for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = d[i];
}

// x [128] a lane's four: turned about in shared memory, through accesses of every width.
__global__ void shared(const uint4* x, uint4* y) {
  DYNAMIC_SHARED(smem);
  const uint32_t lane = threadIdx.x, at = ptx::smem_address(smem);
  const uint4 v = ptx::load_once(x + lane);
  ptx::store_shared4(at + lane * 16, v);
  __syncwarp();
  const uint4 other = ptx::load_shared4(at + (31 - lane) * 16);
  __syncwarp();
  ptx::store_shared2(at + lane * 16, {other.y, other.x});
  ptx::store_shared(at + lane * 16 + 8, other.w);
  ptx::store_shared(at + lane * 16 + 12, other.z);
  __syncwarp();
  const uint32_t back = at + (31 - lane) * 16;
  y[lane] = {ptx::load_shared(back), ptx::load_shared(back + 4), ptx::load_shared(back + 8), ptx::load_shared(back + 12)};
}

// x [32]: y [10, 32].
__global__ void numbers(const float* x, float* y) {
  const unsigned lane = threadIdx.x;
  const float v = x[lane], by_bf16 = ptx::unpack<bf16>(ptx::pack<bf16>(0, v)).y, by_f16 = ptx::unpack<f16>(ptx::pack<f16>(v, 0)).x;
  const float all[10] = {ptx::exp2(v), ptx::log2(v), ptx::rcp(v), ptx::rsqrt(v), by_bf16, by_f16, ptx::to_float(ptx::from_float<bf16>(v)) - ptx::to_float(ptx::from_float<f16>(v)),
                         ptx::warp_sum(v), ptx::warp_max(v), ptx::quad_sum(v) + ptx::quad_max(v)};
  for (int i = 0; i < 10; i++) y[i * 32 + lane] = all[i];
}

extern "C" int run_product(int half, const uint16_t* a, const uint16_t* b, float* c, int rows, void* stream) {
  return launch("product", half ? product<f16> : product<bf16>, dim3(1), dim3(32), 768, stream, a, b, c, rows);
}
extern "C" int run_transposed(const uint16_t* a, const uint16_t* b, float* c, void* stream) {
  return launch("transposed", transposed, dim3(1), dim3(32), 768, stream, a, b, c);
}
extern "C" int run_product_tf32(const float* a, const float* b, float* c, void* stream) {
  return launch("product_tf32", product_tf32, dim3(1), dim3(32), 0, stream, a, b, c);
}
extern "C" int run_shared(const uint4* x, uint4* y, void* stream) {
  return launch("shared", shared, dim3(1), dim3(32), 512, stream, x, y);
}
extern "C" int run_numbers(const float* x, float* y, void* stream) {
  return launch("numbers", numbers, dim3(1), dim3(32), 0, stream, x, y);
}
