// Exponentials of vectors.
#pragma once

#include "simd.h"

namespace hhattn::HHATTN_ISA {

// a > b ? a : b in one instruction; b where either is a NaN.
inline Vec<kLanes> larger(Vec<kLanes> a, Vec<kLanes> b) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return bits<Vec<kLanes>>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#elif defined(__AVX2__)
  if constexpr (kLanes == 8) return bits<Vec<kLanes>>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
#endif
  return a > b ? a : b;
}

// 2^x for x <= 0, within 2 units in the last place; 0 below 2^-127, -inf included; a NaN stays one. For x > 0 a number of no
// meaning, or inf, or NaN.
//
// 2^x = 2^n · 2^f with n the nearest integer; 2^f for |f| <= 1/2 is 1 + f·q(f), q of degree 4 with the least largest relative
// error (9e-8).
inline Vec<kLanes> exp2(Vec<kLanes> x) {
  using V = Vec<kLanes>;
  const auto power_of_fraction = [](V f) {
    V p = f * 1.326472731307149e-03f + 9.671512991189957e-03f;
    p = p * f + 5.550733581185341e-02f;
    p = p * f + 2.4022242426872253e-01f;
    p = p * f + 6.931470036506653e-01f;
    return p * f + 1.0f;
  };
#if defined(__AVX512DQ__)
  if constexpr (kLanes == 16) {
    // f = x - n, and 0 for -inf; scaling by 2^n takes any n, so nothing needs a bound
    const __m512 f = _mm512_reduce_ps(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return bits<V>(_mm512_scalef_ps(bits<__m512>(power_of_fraction(bits<V>(f))), bits<__m512>(x - bits<V>(f))));
  }
#endif
  constexpr float kMagic = 0x1.8p23f;  // added, it leaves x's integer in the lowest bits
  x = larger(V{} - 127.0f, x);
  const V shifted = x + kMagic;
  // the integer moved to the exponent's place; -127 becomes 0
  const VecU<kLanes> power = (bits<VecU<kLanes>>(shifted) << 23) + 0x3f800000u;
  return power_of_fraction(x - (shifted - kMagic)) * bits<V>(power);
}

}  // namespace hhattn::HHATTN_ISA
