// The 16-bit floats and tf32, bit by bit: what the conversions and tensor cores of a GPU do.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt {

inline float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

enum class Round { nearest, zero };

inline float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

inline uint16_t to_bf16(float f, Round round = Round::nearest) {
  uint32_t x = float_to_bits(f);
  if (f != f) return 0x7fff;
  if (round == Round::nearest) x += 0x7fff + (x >> 16 & 1);
  return uint16_t(x >> 16);
}

inline float from_f16(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
  float tiny = float(mantissa) * 0x1p-24f;
  return sign ? -tiny : tiny;
}

inline uint16_t to_f16(float f, Round round = Round::nearest) {
  uint32_t x = float_to_bits(f);
  uint16_t sign = uint16_t(x >> 16 & 0x8000);
  x &= 0x7fffffff;
  if (x > 0x7f800000) return 0x7fff;
  if (x == 0x7f800000) return sign | 0x7c00;
  int exponent = int(x >> 23) - 112;  // biased as float16's
  if (exponent < -10) return sign;
  // the significand with its lowest kept bit at position `drop`
  uint32_t significand = (x & 0x7fffff) | 0x800000;
  unsigned drop = exponent > 0 ? 13 : unsigned(14 - exponent);
  uint32_t kept = significand >> drop, rest = significand & ((1u << drop) - 1), half = 1u << (drop - 1);
  if (round == Round::nearest && (rest > half || (rest == half && (kept & 1)))) kept++;
  // adding, not or-ing, the exponent lets a carry move into it
  uint32_t h = exponent > 0 ? kept + (uint32_t(exponent - 1) << 10) : kept;
  if (h >= 0x7c00) return sign | (round == Round::zero ? 0x7bff : 0x7c00);
  return sign | uint16_t(h);
}

// cvt.rna.tf32: to nearest, ties away from zero; tensor cores ignore the lower 13 bits.
inline uint32_t to_tf32(float f) {
  uint32_t x = float_to_bits(f);
  return (x & 0x7f800000) == 0x7f800000 ? x : (x + 0x1000) & ~0x1fffu;
}
inline float from_tf32(uint32_t bits) { return bits_to_float(bits & ~0x1fffu); }

}  // namespace simt
