// A box of a tensor of three dimensions, brought by TMA and copied out 16 bytes at a time as its swizzle has it.
struct Box {
  int at[3];
  unsigned rows, row_bytes, swizzle, expected;  // rows and bytes of the box; bytes that the barrier is told of
  bool wait;
};

__global__ void bring(simt::TensorMap map, Box box, unsigned char *out) {
  DYNAMIC_SHARED(smem);
  const uint32_t tile = simt::shared_address(smem), bar = tile + box.rows * box.row_bytes;
  if (threadIdx.x == 0) simt::mbarrier_init(bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    simt::mbarrier_arrive_expect_tx(bar, box.expected);
    simt::tensor_load(tile, map, box.at, bar);
  }
  if (box.wait)
    while (!simt::mbarrier_test(bar, 0)) {
    }
  for (unsigned i = threadIdx.x * 16; i < box.rows * box.row_bytes; i += 32 * 16) {
    const uint32_t at = tile + i, chunks = box.swizzle / 16;
    *reinterpret_cast<uint4 *>(out + i) = *static_cast<uint4 *>(simt::shared_ptr(at ^ (at / 128 % chunks) * 16));
  }
}

// 0: refused, as cuTensorMapEncodeTiled would.
extern "C" int run_bring(const void *x, const uint64_t *sizes, const uint64_t *strides, const uint32_t *box, unsigned swizzle, const int *at,
                         int missing_bytes, int wait, unsigned char *out) {
  simt::TensorMap map;
  if (!simt::encode_tiled(map, 2, 3, x, sizes, strides, box, swizzle)) return 0;
  const unsigned rows = box[1] * box[2], bytes = rows * box[0] * 2;
  Box how{{at[0], at[1], at[2]}, rows, box[0] * 2, swizzle, bytes - unsigned(missing_bytes), wait != 0};
  LAUNCH(bring, dim3(1), dim3(32), bytes + 8, map, how, out);
  return 1;
}
