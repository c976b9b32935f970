// What the C++ made from PTX (hhattn/simt/translate.py) consists of besides the instruction twins of ptx.h: registers' bits as values,
// integer arithmetic as PTX defines it where C++ doesn't (shifts beyond the width, division by zero), and loads and stores that tell
// the runtime.
#pragma once
#include "numbers.h"
#include "ptx.h"
#include "simt.h"

namespace tr {

using simt::Site;

// ---- bits and values
inline float f32(uint32_t x) { return __builtin_bit_cast(float, x); }
inline double f64(uint64_t x) { return __builtin_bit_cast(double, x); }
inline uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
inline uint64_t bits(double x) { return __builtin_bit_cast(uint64_t, x); }
inline float ftz(uint32_t x) { return simt::ptx::flush(f32(x)); }
inline uint32_t flushed(float x) { return bits(simt::ptx::flush(x)); }
inline uint32_t pack(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }
inline uint16_t half0(uint32_t x) { return uint16_t(x); }
inline uint16_t half1(uint32_t x) { return uint16_t(x >> 16); }
template <class To>
To piece(uint64_t x, int at) {
  return To(x >> at);
}

// ---- floats
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }
inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }
inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }
template <class T>
bool numbers(T a, T b) {
  return a == a && b == b;
}
// cvt.rni, rzi, rmi, rpi: to an integer, nearest even, towards zero, down, up.
template <class T>
T rni(T x) { return T(__builtin_rint(x)); }
template <class T>
T rzi(T x) { return T(__builtin_trunc(x)); }
template <class T>
T rmi(T x) { return T(__builtin_floor(x)); }
template <class T>
T rpi(T x) { return T(__builtin_ceil(x)); }
template <class To>
To to_integer(double x) {  // clamps; 0 for NaN
  constexpr bool is_signed = To(-1) < To(0);
  constexpr unsigned width = sizeof(To) * 8;
  constexpr To most = is_signed ? To(~(uint64_t(1) << (width - 1))) : To(~uint64_t(0));
  constexpr double high = double(uint64_t(1) << (width - 1)) * (is_signed ? 1 : 2), low = is_signed ? -high : 0;
  return x != x ? To(0) : x < low ? To(low) : x >= high ? most : To(x);
}

// An integer of up to 32 bits as a float that rounds on to 16 bits as the integer itself would: what is cut off leaves the last bit set.
inline float to_odd(int64_t x) {
  auto f = float(x);
  if (int64_t(f) == x) return f;
  uint32_t b = bits(f);
  if ((int64_t(f) > x) == (x > 0)) b--;  // it was rounded away from zero
  return f32(b | 1);
}

// ---- integers
template <class T>
struct Wide;
template <> struct Wide<int16_t> { using type = int32_t; };
template <> struct Wide<uint16_t> { using type = uint32_t; };
template <> struct Wide<int32_t> { using type = int64_t; };
template <> struct Wide<uint32_t> { using type = uint64_t; };
template <> struct Wide<int64_t> { using type = __int128; };
template <> struct Wide<uint64_t> { using type = unsigned __int128; };

template <class T>
typename Wide<T>::type mul_wide(T a, T b) {
  return static_cast<typename Wide<T>::type>(a) * b;
}
template <class T>
T mul_lo(T a, T b) {
  return T(uint64_t(a) * uint64_t(b));
}
template <class T>
T mul_hi(T a, T b) {
  return T(mul_wide(a, b) >> sizeof(T) * 8);
}
template <class T>
T abs(T a) {
  return a < 0 ? T(0) - a : a;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
// By zero, and the one quotient that overflows: PTX leaves the first open, a CPU traps on both.
template <class T>
T div(T a, T b) {
  return b == 0 ? T(~T(0)) : b == T(-1) && T(-1) < T(0) ? T(T(0) - a) : T(a / b);
}
template <class T>
T rem(T a, T b) {
  return b == 0 ? a : b == T(-1) && T(-1) < T(0) ? T(0) : T(a % b);
}
template <class T>
T shl(T a, uint32_t n) {
  return n >= sizeof(T) * 8 ? T(0) : T(uint64_t(a) << n);
}
template <class T>
T shr(T a, uint32_t n) {  // of a negative number, it shifts in ones
  return n < sizeof(T) * 8 ? T(a >> n) : a < 0 ? T(-1) : T(0);
}
inline uint32_t popc(uint64_t a) { return uint32_t(__builtin_popcountll(a)); }
inline uint32_t clz(uint32_t a) { return a ? uint32_t(__builtin_clz(a)) : 32; }
inline uint32_t clz(uint64_t a) { return a ? uint32_t(__builtin_clzll(a)) : 64; }
inline uint32_t brev(uint32_t a) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i++) out |= (a >> i & 1) << (31 - i);
  return out;
}

// ---- memory
template <class T>
T param(const void *params, int i) {  // every parameter takes 8 bytes
  return *reinterpret_cast<const T *>(static_cast<const char *>(params) + 8 * i);
}
inline void *global(uint64_t address) { return reinterpret_cast<void *>(address); }
template <class T, int N>
void load(T (&out)[N], const void *p, Site site = Site::here()) {
  simt::mem_read(p, sizeof(out), site);
  __builtin_memcpy(out, p, sizeof(out));
}
template <class T, int N>
void store(const T (&value)[N], void *p, Site site = Site::here()) {
  simt::mem_write(p, sizeof(value), value, site);
}

}  // namespace tr
