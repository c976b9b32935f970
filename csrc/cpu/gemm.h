// Matrix products of small float tiles, the core of every attention kernel.
//
// C (+)= A·B by outer products: a block of C stays in registers while one column of A is broadcast against one row of B.
// Nothing is packed here. B and C are read by rows; A either by rows (a row of A makes a row of C) or by columns, so that a
// transpose never needs to be made.
#pragma once

#include <type_traits>

#include "simd.h"

namespace hhattn::HHATTN_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
inline constexpr int kParts = kLanes / 8;  // registers a vector takes
#else
inline constexpr int kParts = 1;
#endif

// A block of C is kColumns vectors wide, or what is left of it, and as many rows high as fit the registers.
inline constexpr int kColumns = (kRegisters == 32 ? 4 : 2) / kParts;
constexpr int block_rows(int columns) {
  return columns * kParts == 4 ? 6 : columns * kParts == 3 ? 8 : kRegisters == 32 ? 12 : columns * kParts == 2 ? 6 : 10;
}

// Element (row, k) of A is at row·stride + k, or at k·stride + row.
enum class A { by_rows, by_columns };

// What is done between the steps of a product: nothing, or what keeps memory busy.
struct Nothing {
  void operator()() const {}
};
inline constexpr int64_t kStep = 16;  // of depth

// C [M, NV vectors] (+)= A [M, depth] · B [depth, NV vectors]; meanwhile() after every kStep of depth, and at the end.
template <int M, int NV, A kind, bool add, class F>
inline void multiply_block(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                           F& meanwhile) {
  using V = Vec<kLanes>;
  V sums[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sums[i][j] = V{};
  }
  const int64_t step = std::is_same_v<const F, const Nothing> ? depth : kStep;
  for (int64_t k = 0; k < depth;) {
    for (const int64_t end = k + step < depth ? k + step : depth; k < end; ++k) {
      V row[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) row[j] = read<V>(b + k * ldb + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const float x = kind == A::by_rows ? a[i * lda + k] : a[k * lda + i];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sums[i][j] += x * row[j];
      }
    }
    meanwhile();
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * ldc + j * kLanes;
      if (add) sums[i][j] += read<V>(to);  // not at the start: rounding grows with a sum, and C may be large by now
      memcpy(to, &sums[i][j], sizeof(V));
    }
  }
}

// The last rows, fewer than a block has: as one block of just that height.
template <int M, int NV, A kind, bool add, class F>
inline void multiply_rest(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                          int64_t ldc, F& meanwhile) {
  if constexpr (M > 0) {
    if (rows == M) return multiply_block<M, NV, kind, add>(depth, a, lda, b, ldb, c, ldc, meanwhile);
    multiply_rest<M - 1, NV, kind, add>(rows, depth, a, lda, b, ldb, c, ldc, meanwhile);
  }
}

template <int NV, A kind, bool add, class F>
inline void multiply_panel(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                           int64_t ldc, F& meanwhile) {
  constexpr int M = block_rows(NV);
  const int64_t step = kind == A::by_rows ? lda : 1;
  int64_t i = 0;
  for (; i + M <= rows; i += M) multiply_block<M, NV, kind, add>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, meanwhile);
  multiply_rest<M - 1, NV, kind, add>(rows - i, depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, meanwhile);
}

// Vectors that the next blocks are wide where `left` are left: five are three and two, since one alone would leave the
// multipliers waiting for their sums.
constexpr int panel_width(int64_t left) {
  if (left <= kColumns) return static_cast<int>(left);
  return left == kColumns + 1 && kColumns > 2 ? kColumns - 1 : kColumns;
}

// How often `multiply` calls what is to be done meanwhile, or a few times less.
inline int64_t calls_of(int64_t rows, int64_t columns, int64_t depth) {
  int64_t blocks = 0;
  for (int64_t left = columns / kLanes; left > 0; left -= panel_width(left)) blocks += rows / block_rows(panel_width(left));
  return blocks * ((depth + kStep - 1) / kStep);
}

// C [rows, columns] (+)= A [rows, depth] · B [depth, columns]. `columns` is a multiple of kLanes.
template <A kind, bool add, class F = const Nothing>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                     float* c, int64_t ldc, F&& meanwhile = {}) {
  for (int64_t left = columns / kLanes, width = 0; left > 0; left -= width, b += width * kLanes, c += width * kLanes) {
    width = panel_width(left);
    if constexpr (kColumns >= 4) {
      if (width == 4) multiply_panel<4, kind, add>(rows, depth, a, lda, b, ldb, c, ldc, meanwhile);
      if (width == 3) multiply_panel<3, kind, add>(rows, depth, a, lda, b, ldb, c, ldc, meanwhile);
    }
    if constexpr (kColumns >= 2) {
      if (width == 2) multiply_panel<2, kind, add>(rows, depth, a, lda, b, ldb, c, ldc, meanwhile);
    }
    if (width == 1) multiply_panel<1, kind, add>(rows, depth, a, lda, b, ldb, c, ldc, meanwhile);
  }
}

}  // namespace hhattn::HHATTN_ISA
