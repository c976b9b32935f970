// PTX instructions as functions, for C++ made from PTX and for .cu sources' wrappers. Registers are uint32_t whatever they hold; a
// pair of 16-bit values has the first in the lower half. Matrices are in the fragments of the PTX ISA.
#pragma once
#include <algorithm>

#include "numbers.h"
#include "simt.h"

namespace simt::ptx {

// ---- matrices, for the whole warp
// ldmatrix.m8n8.x1/x2/x4[.trans].b16: count = 1, 2, 4; lane i gives the address of row i % 8 of matrix i / 8.
void ldmatrix(uint32_t *r, unsigned count, bool trans, uint32_t address, Site = Site::here());
void stmatrix(uint32_t address, const uint32_t *r, unsigned count, bool trans, Site = Site::here());

// mma.sync.m16n8kK.row.col, D = A B + C. Registers: D and C 4 (2 when they are float16), A and B by K.
enum class Mma { bf16_k16, bf16_k8, f16_k16, f16_k8, tf32_k8, tf32_k4, f16_k16_f16, f16_k8_f16 };  // _f16: float16 C and D
void mma(Mma, uint32_t *d, const uint32_t *a, const uint32_t *b, const uint32_t *c, Site = Site::here());

// ---- warps
enum class Shfl { idx, up, down, bfly };
// shfl.sync.mode.b32 d|p, value, b, c, mask. in_range: p, or null.
uint32_t shfl(Shfl, uint32_t value, uint32_t b, uint32_t c, uint32_t mask, bool *in_range = nullptr, Site = Site::here());
uint32_t vote_ballot(bool p, uint32_t mask, Site = Site::here());
inline bool vote_any(bool p, uint32_t mask, Site s = Site::here()) { return vote_ballot(p, mask, s) != 0; }
inline bool vote_all(bool p, uint32_t mask, Site s = Site::here()) { return vote_ballot(!p, mask, s) == 0; }
enum class Redux { add, min_s32, max_s32, min_u32, max_u32, and_, or_, xor_ };
uint32_t redux(Redux, uint32_t value, uint32_t mask, Site = Site::here());
bool elect(uint32_t mask, uint32_t *leader = nullptr, Site = Site::here());  // elect.sync: the lowest lane of mask

// ---- bits
inline uint32_t bfe_u32(uint32_t a, uint32_t pos, uint32_t len) {
  pos &= 255, len &= 255;
  if (pos > 31 || !len) return 0;
  return a >> pos & (len > 31 ? ~0u : (1u << len) - 1);
}
inline uint32_t bfe_s32(uint32_t a, uint32_t pos, uint32_t len) {
  pos &= 255, len &= 255;
  if (!len) return 0;
  uint32_t top = std::min(pos + len - 1, 31u), sign = a >> top & 1 ? ~0u : 0;  // beyond the field: its sign
  uint32_t mask = len > 31 ? ~0u : (1u << len) - 1, field = pos > 31 ? sign : a >> pos | (pos ? sign << (32 - pos) : 0);
  return (field & mask) | (sign & ~mask);
}
inline uint64_t bfe_u64(uint64_t a, uint32_t pos, uint32_t len) {
  pos &= 255, len &= 255;
  if (pos > 63 || !len) return 0;
  return a >> pos & (len > 63 ? ~0ull : (1ull << len) - 1);
}
inline uint32_t bfi_b32(uint32_t a, uint32_t b, uint32_t pos, uint32_t len) {
  pos &= 255, len &= 255;
  if (pos > 31 || !len) return b;
  uint32_t mask = (len > 31 ? ~0u : (1u << len) - 1) << pos;
  return (b & ~mask) | (a << pos & mask);
}
inline uint64_t bfi_b64(uint64_t a, uint64_t b, uint32_t pos, uint32_t len) {
  pos &= 255, len &= 255;
  if (pos > 63 || !len) return b;
  uint64_t mask = (len > 63 ? ~0ull : (1ull << len) - 1) << pos;
  return (b & ~mask) | (a << pos & mask);
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (unsigned i = 0; i < 4; i++) {
    uint32_t s = selector >> 4 * i & 15, byte = uint32_t(bytes >> 8 * (s & 7) & 255);
    if (s & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, unsigned table) {
  uint32_t out = 0;
  for (unsigned i = 0; i < 8; i++)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}
// shf.l / shf.r; wrap: the amount modulo 32, else clamped to 32.
inline uint32_t shf_l(uint32_t lo, uint32_t hi, uint32_t by, bool wrap) {
  by = wrap ? by & 31 : std::min(by, 32u);
  return uint32_t((uint64_t(hi) << 32 | lo) << by >> 32);
}
inline uint32_t shf_r(uint32_t lo, uint32_t hi, uint32_t by, bool wrap) {
  by = wrap ? by & 31 : std::min(by, 32u);
  return uint32_t((uint64_t(hi) << 32 | lo) >> by);
}

// ---- floats
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }  // .ftz
inline float relu(float x) { return x > 0 || x != x ? x : 0.0f; }
inline float fmax_nan(float a, float b) { return a != a || b != b ? bits_to_float(0x7fffffff) : std::fmax(a, b); }  // max.NaN
inline float fmin_nan(float a, float b) { return a != a || b != b ? bits_to_float(0x7fffffff) : std::fmin(a, b); }
inline float fmax(float a, float b) {  // +0 > -0, a NaN loses
  if (a == 0 && b == 0) return std::signbit(a) ? b : a;
  return std::fmax(a, b);
}
inline float fmin(float a, float b) {
  if (a == 0 && b == 0) return std::signbit(a) ? a : b;
  return std::fmin(a, b);
}
// Approximate on a GPU (ex2 2 ulp, lg2 and rsqrt about 2, rcp 1); here rounded from double.
inline float ex2_approx(float x) { return float(std::exp2(double(x))); }
inline float lg2_approx(float x) { return float(std::log2(double(x))); }
inline float rcp_approx(float x) { return float(1.0 / double(x)); }
inline float rsqrt_approx(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float tanh_approx(float x) { return float(std::tanh(double(x))); }
inline float sin_approx(float x) { return float(std::sin(double(x))); }
inline float cos_approx(float x) { return float(std::cos(double(x))); }

// cvt to pairs: .bf16x2 / .f16x2 d, hi, lo.
inline uint32_t pack_bf16(float hi, float lo, Round r = Round::nearest) { return uint32_t(to_bf16(hi, r)) << 16 | to_bf16(lo, r); }
inline uint32_t pack_f16(float hi, float lo, Round r = Round::nearest) { return uint32_t(to_f16(hi, r)) << 16 | to_f16(lo, r); }

// Arithmetic of 16-bit floats rounds once, as these do: products and sums of two are exact or rounded twice harmlessly in float.
template <class F>
inline uint16_t bf16_op(F f, uint16_t a, uint16_t b) { return to_bf16(f(from_bf16(a), from_bf16(b))); }
template <class F>
inline uint16_t f16_op(F f, uint16_t a, uint16_t b) { return to_f16(f(from_f16(a), from_f16(b))); }
uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c);
uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c);
// The same on both halves.
template <class F>
inline uint32_t each_half(F f, uint32_t a, uint32_t b) {
  return uint32_t(f(uint16_t(a >> 16), uint16_t(b >> 16))) << 16 | f(uint16_t(a), uint16_t(b));
}

}  // namespace simt::ptx
