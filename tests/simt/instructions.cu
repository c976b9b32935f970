// Each instruction on operands from memory, a row of registers a lane: what the tests compare with their own arithmetic.
namespace ptx = simt::ptx;
#define ENTRY extern "C" void

__global__ void one_mma(ptx::Mma kind, int na, int nb, int nc, const uint32_t *a, const uint32_t *b, const uint32_t *c, uint32_t *d) {
  unsigned t = threadIdx.x;
  uint32_t out[4];
  ptx::mma(kind, out, a + t * na, b + t * nb, c + t * nc);
  for (int i = 0; i < nc; i++) d[t * nc + i] = out[i];
}
ENTRY run_mma(int kind, int na, int nb, int nc, const uint32_t *a, const uint32_t *b, const uint32_t *c, uint32_t *d) {
  LAUNCH(one_mma, dim3(1), dim3(32), 0, ptx::Mma(kind), na, nb, nc, a, b, c, d);
}

__global__ void matrices(bool store, unsigned count, bool trans, const uint32_t *in, uint32_t *out) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<uint32_t *>(smem);
  unsigned t = threadIdx.x, words = count * 32;
  uint32_t address = simt::shared_address(smem) + (t % (8 * count)) * 16, r[4];
  if (store) {
    for (unsigned i = 0; i < count; i++) r[i] = in[t * count + i];
    ptx::stmatrix(address, r, count, trans);
    __syncwarp();
    for (unsigned i = t; i < words; i += 32) out[i] = s[i];
  } else {
    for (unsigned i = t; i < words; i += 32) s[i] = in[i];
    __syncwarp();
    ptx::ldmatrix(r, count, trans, address);
    for (unsigned i = 0; i < count; i++) out[t * count + i] = r[i];
  }
}
ENTRY run_matrices(int store, int count, int trans, const uint32_t *in, uint32_t *out) {
  LAUNCH(matrices, dim3(1), dim3(32), 512, store != 0, unsigned(count), trans != 0, in, out);
}

__global__ void shuffles(ptx::Shfl mode, unsigned b, unsigned c, const uint32_t *in, uint32_t *out, uint32_t *in_range) {
  bool p = false;
  out[threadIdx.x] = ptx::shfl(mode, in[threadIdx.x], b, c, 0xffffffff, &p);
  in_range[threadIdx.x] = p;
}
ENTRY run_shuffles(int mode, unsigned b, unsigned c, const uint32_t *in, uint32_t *out, uint32_t *in_range) {
  LAUNCH(shuffles, dim3(1), dim3(32), 0, ptx::Shfl(mode), b, c, in, out, in_range);
}

__global__ void votes(uint32_t mask, const uint32_t *in, uint32_t *out) {  // 11 results a lane
  uint32_t t = threadIdx.x, v = in[t], *o = out + 11 * t;
  if (!(mask >> t & 1)) return;
  o[0] = ptx::vote_ballot(v & 1, mask);
  o[1] = ptx::vote_any(v & 1, mask);
  o[2] = ptx::vote_all(v & 1, mask);
  for (int op = 0; op < 8; op++) o[3 + op] = ptx::redux(ptx::Redux(op), v, mask);
}
ENTRY run_votes(uint32_t mask, const uint32_t *in, uint32_t *out) { LAUNCH(votes, dim3(1), dim3(32), 0, mask, in, out); }

// The block's shared memory is `image`; a warpgroup multiplies what the descriptors say.
__global__ void one_wgmma(simt::Wgmma op, const uint32_t *a, uint64_t a_desc, uint64_t b_desc, const uint32_t *image, int words,
                          uint32_t *d) {
  DYNAMIC_SHARED(smem);
  auto *s = reinterpret_cast<uint32_t *>(smem);
  unsigned t = threadIdx.x, count = op.n / 2;
  for (int i = int(t); i < words; i += 128) s[i] = image[i];
  simt::fence_proxy_async();
  __syncthreads();
  uint32_t acc[128], *registers[128];
  for (unsigned i = 0; i < count; i++) acc[i] = d[t * count + i], registers[i] = acc + i;
  simt::wgmma_fence();
  uint64_t base = simt::shared_address(smem) >> 4;
  const uint32_t *sources[4] = {a + 4 * t, a + 4 * t + 1, a + 4 * t + 2, a + 4 * t + 3};
  simt::wgmma(op, registers, a ? sources : nullptr, a_desc + base, b_desc + base);
  op.accumulate = true;
  simt::wgmma(op, registers, a ? sources : nullptr, a_desc + base, b_desc + base);  // the same again: a chain
  simt::wgmma_commit();
  simt::wgmma_wait(0);
  for (unsigned i = 0; i < count; i++) d[t * count + i] = acc[i];
}
ENTRY run_wgmma(int n, int type, int accumulate, int sign_a, int sign_b, int trans_a, int trans_b, const uint32_t *a, uint64_t a_desc,
                uint64_t b_desc, const uint32_t *image, int words, uint32_t *d) {
  simt::Wgmma op{unsigned(n), simt::Element(type), accumulate != 0, sign_a, sign_b, trans_a != 0, trans_b != 0};
  LAUNCH(one_wgmma, dim3(1), dim3(128), size_t(words) * 4, op, a, a_desc, b_desc, image, words, d);
}

// Instructions of one thread, over arrays; no launch is needed for them.
using Scalar = uint32_t (*)(uint32_t, uint32_t, uint32_t, uint32_t);
static const Scalar SCALARS[] = {
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t) { return ptx::bfe_u32(a, b, c); },
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t) { return ptx::bfe_s32(a, b, c); },
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return ptx::bfi_b32(a, b, c, d); },
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t) { return ptx::prmt(a, b, c); },
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return ptx::lop3(a, b, c, d & 255); },
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return ptx::shf_l(a, b, c, d & 1); },
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return ptx::shf_r(a, b, c, d & 1); },
    [](uint32_t a, uint32_t b, uint32_t, uint32_t) { return ptx::pack_bf16(simt::bits_to_float(a), simt::bits_to_float(b)); },
    [](uint32_t a, uint32_t b, uint32_t, uint32_t) { return ptx::pack_f16(simt::bits_to_float(a), simt::bits_to_float(b)); },
    [](uint32_t a, uint32_t b, uint32_t, uint32_t) {
      return ptx::pack_bf16(simt::bits_to_float(a), simt::bits_to_float(b), simt::Round::zero);
    },
    [](uint32_t a, uint32_t b, uint32_t, uint32_t) {
      return ptx::pack_f16(simt::bits_to_float(a), simt::bits_to_float(b), simt::Round::zero);
    },
    [](uint32_t a, uint32_t, uint32_t, uint32_t) { return simt::to_tf32(simt::bits_to_float(a)); },
    [](uint32_t a, uint32_t, uint32_t, uint32_t) { return simt::float_to_bits(simt::from_f16(uint16_t(a))); },
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t) { return uint32_t(ptx::fma_bf16(uint16_t(a), uint16_t(b), uint16_t(c))); },
    [](uint32_t a, uint32_t b, uint32_t c, uint32_t) { return uint32_t(ptx::fma_f16(uint16_t(a), uint16_t(b), uint16_t(c))); },
    [](uint32_t a, uint32_t b, uint32_t, uint32_t) {
      return simt::float_to_bits(ptx::fmax(simt::bits_to_float(a), simt::bits_to_float(b)));
    },
    [](uint32_t a, uint32_t b, uint32_t, uint32_t) {
      return simt::float_to_bits(ptx::fmin_nan(simt::bits_to_float(a), simt::bits_to_float(b)));
    },
};
ENTRY run_scalar(int op, int n, const uint32_t *a, const uint32_t *b, const uint32_t *c, const uint32_t *d, uint32_t *out) {
  for (int i = 0; i < n; i++) out[i] = SCALARS[op](a[i], b[i], c[i], d[i]);
}
