// Stores that go past the cache. A store to memory that isn't cached reads the line first, a third of what a copy moves; and
// an output larger than the cache would only drive out what is in it.
#pragma once

#include "simd.h"

namespace hhattn::HHATTN_ISA {

// Writes a vector to memory aligned to its size.
template <class V>
inline void stream(void* to, const V& v) {
  char* p = static_cast<char*>(to);
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits<__m512i>(v));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 64) {
    __m256i halves[2];
    memcpy(halves, &v, sizeof v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves[0]);
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, halves[1]);
  }
  if constexpr (sizeof v == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(v));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof v == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits<__m128i>(v));
  if constexpr (sizeof v == 8) return _mm_stream_si64(reinterpret_cast<long long*>(p), bits<long long>(v));
#endif
  memcpy(p, &v, sizeof v);
}

// Rows that are whole, aligned vectors can be streamed, the others can't.
template <class T>
inline bool can_stream(const void* data, int64_t row) {
  constexpr int64_t bytes = kLanes * sizeof(typename T::Element);
  return reinterpret_cast<uintptr_t>(data) % 64 == 0 && row * sizeof(typename T::Element) % bytes == 0;
}

template <class T, int N>
inline void put(typename T::Element* p, Vec<N> v, bool streamed) {
  if (N == kLanes && streamed) return stream(p, T::template pack<N>(v));
  T::template store<N>(p, v);
}

// What was streamed is in memory before what is stored after this. Every thread that streams ends with it.
inline void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace hhattn::HHATTN_ISA
