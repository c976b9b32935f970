// Vectors of floats as wide as the instruction set this file is compiled for, on GCC/Clang vector extensions.
//
// Everything lives in a namespace of its own for each instruction set, and nothing here may instantiate a function of the
// standard library: the linker keeps one copy of such a function, and it could be the one that only a newer CPU can run.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef HHATTN_ISA
#error "HHATTN_ISA names the instruction set, and with it the namespace"
#endif

#if defined(HHATTN_LANES)
// set by the build: a width other than the registers', to test wide code on a narrow CPU
#elif defined(__AVX512F__)
#define HHATTN_LANES 16
#elif defined(__AVX2__)
#define HHATTN_LANES 8
#else
#define HHATTN_LANES 4
#endif

namespace hhattn::HHATTN_ISA {

inline constexpr int kLanes = HHATTN_LANES;

template <int N>
struct VecOf {
  typedef float f32 __attribute__((vector_size(4 * N)));
  typedef int32_t i32 __attribute__((vector_size(4 * N)));
  typedef uint32_t u32 __attribute__((vector_size(4 * N)));
  typedef uint16_t u16 __attribute__((vector_size(2 * N)));
};
template <int N>
using Vec = typename VecOf<N>::f32;
template <int N>
using VecU = typename VecOf<N>::u32;
template <int N>
using VecU16 = typename VecOf<N>::u16;

// Bits of one type as another of the same size.
template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <int N>
inline VecU<N> select(VecU<N> mask, VecU<N> yes, VecU<N> no) {
  return (mask & yes) | (~mask & no);
}

template <class V>
inline V read(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Storage types: how elements are read into floats and rounded back.
struct F32 {
  using Element = float;
  template <int N>
  static Vec<N> load(const float* p) {
    return read<Vec<N>>(p);
  }
  template <int N>
  static Vec<N> pack(Vec<N> v) {
    return v;
  }
  template <int N>
  static void store(float* p, Vec<N> v) {
    memcpy(p, &v, sizeof v);
  }
};

struct BF16 {
  using Element = uint16_t;
  // GCC 12 makes several instructions of a conversion that is one.
  template <int N>
  static Vec<N> load(const uint16_t* p) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return bits<Vec<N>>(bits<VecU<N>>(_mm512_cvtepu16_epi32(read<__m256i>(p))) << 16);
#endif
#if defined(__AVX2__)
    if constexpr (N == 8) return bits<Vec<N>>(bits<VecU<N>>(_mm256_cvtepu16_epi32(read<__m128i>(p))) << 16);
#endif
    return bits<Vec<N>>(__builtin_convertvector(read<VecU16<N>>(p), VecU<N>) << 16);
  }
  // To nearest, ties to even; a NaN stays a NaN instead of overflowing into the sign.
  template <int N>
  static VecU16<N> pack(Vec<N> v) {
    const VecU<N> u = bits<VecU<N>>(v);
    const VecU<N> rounded = u + 0x7fff + ((u >> 16) & 1);
    return high_halves<N>(v == v ? bits<Vec<N>>(rounded) : Vec<N>{} + __builtin_nanf(""));
  }
  template <int N>
  static void store(uint16_t* p, Vec<N> v) {
    const VecU16<N> h = pack<N>(v);
    memcpy(p, &h, sizeof h);
  }

 private:
  template <int N>
  static VecU16<N> high_halves(Vec<N> v) {
#if defined(__AVX512BW__)
    if constexpr (N == 16) return odd_elements<N>(bits<VecU16<2 * N>>(v), std::make_integer_sequence<int, N>{});
#endif
    return __builtin_convertvector(bits<VecU<N>>(v) >> 16, VecU16<N>);
  }
  template <int N, int... I>
  static VecU16<N> odd_elements(VecU16<2 * N> v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (2 * I + 1)...);
  }
};

struct F16 {
  using Element = uint16_t;
  template <int N>
  static Vec<N> load(const uint16_t* p) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return bits<Vec<N>>(_mm512_cvtph_ps(read<__m256i>(p)));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return bits<Vec<N>>(_mm256_cvtph_ps(read<__m128i>(p)));
#endif
    return widen<N>(__builtin_convertvector(read<VecU16<N>>(p), VecU<N>));
  }
  template <int N>
  static VecU16<N> pack(Vec<N> v) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return bits<VecU16<N>>(_mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return bits<VecU16<N>>(_mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
    return __builtin_convertvector(narrow<N>(v), VecU16<N>);
  }
  template <int N>
  static void store(uint16_t* p, Vec<N> v) {
    const VecU16<N> h = pack<N>(v);
    memcpy(p, &h, sizeof h);
  }

 private:
  // Subnormal halves go through an integer conversion, so that a CPU set to flush subnormals to zero still reads them.
  template <int N>
  static Vec<N> widen(VecU<N> h) {
    const VecU<N> sign = (h & 0x8000) << 16, rest = h & 0x7fff;
    const VecU<N> normal = (rest << 13) + ((127 - 15) << 23);
    const VecU<N> special = (rest << 13) | 0x7f800000;
    const Vec<N> small = __builtin_convertvector(bits<typename VecOf<N>::i32>(rest), Vec<N>) * 0x1p-24f;
    VecU<N> out = select<N>(bits<VecU<N>>(rest >= 0x7c00), special, normal);
    out = select<N>(bits<VecU<N>>(rest < 0x0400), bits<VecU<N>>(small), out);
    return bits<Vec<N>>(out | sign);
  }
  // To nearest, ties to even. Adding 0.5 aligns a subnormal half's last bit with the float's, so the FPU rounds it.
  template <int N>
  static VecU<N> narrow(Vec<N> v) {
    const VecU<N> u = bits<VecU<N>>(v), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    const VecU<N> normal = (rest - ((127 - 15) << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    const VecU<N> small = bits<VecU<N>>(bits<Vec<N>>(rest) + 0.5f) - 0x3f000000;
    VecU<N> out = select<N>(bits<VecU<N>>(rest < 0x38800000), small, normal);
    out = select<N>(bits<VecU<N>>(rest >= 0x477ff000), rest * 0 + 0x7c00, out);
    out = select<N>(bits<VecU<N>>(rest > 0x7f800000), rest * 0 + 0x7e00, out);
    return out | sign;
  }
};

// f(type) with the storage type of dtype, so that the loop inside is compiled for it.
template <class F>
inline void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(F32{});
    case DType::f16: return f(F16{});
    case DType::bf16: return f(BF16{});
  }
}

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Asks for memory that is read soon.
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at);
}

// The same number at compile time, passed to a lambda: how wide the vectors of this step are.
template <int N>
struct Width {
  static constexpr int value = N;
};

// f(i, Width) for i over [0, n): whole vectors, then what is left in steps of Tail (which divides it).
template <int Tail = 1, class F>
inline void sweep(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, Width<kLanes>{});
  for (; i < n; i += Tail) f(i, Width<Tail>{});
}

template <int N>
inline float sum(Vec<N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<N / 2> low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum<N / 2>(low + high);
  }
}

// Sum over [0, n) of f(i, Width), which gives a vector of that width. Four sums, since each waits for its last addition.
template <class F>
inline float reduce(int64_t n, const F& f) {
  Vec<kLanes> a = {}, b = {}, c = {}, d = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a += f(i, Width<kLanes>{});
    b += f(i + kLanes, Width<kLanes>{});
    c += f(i + 2 * kLanes, Width<kLanes>{});
    d += f(i + 3 * kLanes, Width<kLanes>{});
  }
  for (; i + kLanes <= n; i += kLanes) a += f(i, Width<kLanes>{});
  for (; i < n; ++i) rest += f(i, Width<1>{})[0];
  return sum<kLanes>((a + b) + (c + d)) + rest;
}

// Neighbours changed places: (v1, v0, v3, v2, ...).
template <int N, int... I>
inline Vec<N> swap_pairs(Vec<N> v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ 1)...);
}
template <int N>
inline Vec<N> swap_pairs(Vec<N> v) {
  return swap_pairs<N>(v, std::make_integer_sequence<int, N>{});
}

// n elements as floats; `fill` where there is no tensor. `at` counts elements from the start of the tensor.
inline void load_row(const In& in, int64_t at, int64_t n, float fill, float* to) {
  if (!in.data) {
    for (int64_t i = 0; i < n; ++i) to[i] = fill;
    return;
  }
  with_dtype(in.dtype, [&](auto type) {
    using T = decltype(type);
    const auto* p = static_cast<const typename T::Element*>(in.data) + at;
    sweep(n, [&](int64_t i, auto w) {
      constexpr int N = decltype(w)::value;
      F32::store<N>(to + i, T::template load<N>(p + i));
    });
  });
}

}  // namespace hhattn::HHATTN_ISA
