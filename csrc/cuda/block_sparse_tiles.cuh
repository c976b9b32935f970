// Rows of a head in shared memory, and the fragments of matrix products made of them.
#pragma once
#include "args.h"
#include "ptx.cuh"

namespace hh {

inline constexpr int WARPS = 4, THREADS = 32 * WARPS;  // of a block

// A tensor [B, S, H, D] of 16-bit values, its strides and offsets in it counted in chunks of 16 bytes, so that 32 bits reach 64 GB.
struct Chunks {
  const uint4* data;
  uint32_t batch, token, head;

  HH_DEVICE uint32_t offset(uint32_t b, uint32_t h) const { return b * batch + h * head; }
};
inline Chunks chunks(const Heads& x) {
  return {static_cast<const uint4*>(x.in.data), uint32_t(x.batch / 8), uint32_t(x.token / 8), uint32_t(x.head / 8)};
}

// Rows of HEAD 16-bit values, `PITCH` bytes apart. Chunks of 16 bytes are swapped within a row so that the same chunk of 8 rows, which
// ldmatrix reads at once, and 8 chunks of a row, which copies write, lie on different banks. Tiles begin on an edge of 1024 bytes:
// the addresses of a row's chunks then differ by an exclusive or.
template <int HEAD>
struct Tile {
  static constexpr int CHUNKS = HEAD / 8, PITCH = HEAD > 128 ? 512 : HEAD > 64 ? 256 : HEAD > 32 ? 128 : 64;
  static constexpr int COLUMNS = PITCH / 16;

  static HH_DEVICE uint32_t place(int row, int chunk) {
    return row * PITCH + ((chunk ^ (PITCH == 64 ? row / 2 % 4 : row % 8)) * 16);
  }

  // Starts copying ROWS tokens from number `at` on, `dim` elements of each, of the head at `offset`; 0 beyond `dim` and `count` tokens.
  template <int ROWS>
  static HH_DEVICE void copy(uint32_t to, const Chunks& x, uint32_t offset, int at, int count, int dim) {
    const int column = threadIdx.x % COLUMNS, first = threadIdx.x / COLUMNS;
    constexpr int STEP = THREADS / COLUMNS;
    static_assert(ROWS % STEP == 0);
    if (column >= CHUNKS) return;
    if (column * 8 >= dim) count = 0;
    uint32_t source = offset + (at + first) * x.token + column;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i, source += STEP * x.token) {
      const int row = first + i * STEP;
      ptx::cp_async<16>(to + place(row, column), x.data + source, row < count ? 16 : 0);  // of 0 bytes the source isn't read
    }
  }

  // Where a lane's share of fragments begins, at 16 rows: of A, row by row, and of B, whose columns are stored as rows or as columns.
  // What is `chunks` further along the rows is at that address ^ 16 · chunks, chunks even; what is n rows further at + n · PITCH.
  static HH_DEVICE uint32_t a_rows(int lane) { return place(lane % 16, lane / 16); }
  static HH_DEVICE uint32_t b_rows(int lane) { return place(lane % 8 + lane / 16 * 8, lane / 8 % 2); }
  static HH_DEVICE uint32_t b_columns(int lane) { return place(lane % 16, lane / 16); }
};

// left and right += a · the two halves of b, 16 columns in four registers.
template <class T>
HH_DEVICE void multiply(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  ptx::mma_16816<T>(left, a, first);
  ptx::mma_16816<T>(right, a, second);
}

// s = x · yᵀ: 16 · ATOMS rows at x (a_rows), 8 · N rows at y (b_rows), of HEAD elements.
template <class T, int HEAD, int ATOMS, int N>
HH_DEVICE void times_rows(float (&s)[ATOMS][N][4], uint32_t x, uint32_t y) {
#pragma unroll
  for (int a = 0; a < ATOMS; ++a)
#pragma unroll
    for (int j = 0; j < N; ++j) s[a][j][0] = s[a][j][1] = s[a][j][2] = s[a][j][3] = 0;
#pragma unroll
  for (int d = 0; d < HEAD / 16; ++d) {
    uint32_t rows[ATOMS][4];
#pragma unroll
    for (int a = 0; a < ATOMS; ++a) ptx::ldmatrix_x4(rows[a], (x ^ (d * 32)) + a * 16 * Tile<HEAD>::PITCH);
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      uint32_t other[4];
      ptx::ldmatrix_x4(other, (y ^ (d * 32)) + j * 16 * Tile<HEAD>::PITCH);
#pragma unroll
      for (int a = 0; a < ATOMS; ++a) multiply<T>(s[a][2 * j], s[a][2 * j + 1], rows[a], other);
    }
  }
}

// Two neighbouring fragments of a product's result as one of A, 16 columns.
template <class T>
HH_DEVICE void as_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = ptx::pack<T>(left[0], left[1]), a[1] = ptx::pack<T>(left[2], left[3]);
  a[2] = ptx::pack<T>(right[0], right[1]), a[3] = ptx::pack<T>(right[2], right[3]);
}

// sum += w · y: weights of 8 · K rows at y (b_columns), whose first 8 · N elements are taken.
template <class T, int HEAD, int ATOMS, int N, int K>
HH_DEVICE void add_times(float (&sum)[ATOMS][N][4], const float (&w)[ATOMS][K][4], uint32_t y) {
#pragma unroll
  for (int k = 0; k < K / 2; ++k) {
    uint32_t weights[ATOMS][4];
#pragma unroll
    for (int a = 0; a < ATOMS; ++a) as_a<T>(weights[a], w[a][2 * k], w[a][2 * k + 1]);
#pragma unroll
    for (int d = 0; d < N / 2; ++d) {
      uint32_t rows[4];
      ptx::ldmatrix_x4_trans(rows, (y ^ (d * 32)) + k * 16 * Tile<HEAD>::PITCH);
#pragma unroll
      for (int a = 0; a < ATOMS; ++a) multiply<T>(sum[a][2 * d], sum[a][2 * d + 1], weights[a], rows);
    }
  }
}

// The first `rows` of a warp's rows of sums, each times its factor, to rows at `to`, `stride` elements apart, `dim` elements of each;
// through shared memory of the warp alone, so that stores are wide.
template <class T, int ATOMS, int N>
HH_DEVICE void store_rows(const float (&x)[ATOMS][N][4], const float (&factor)[ATOMS][2], uint32_t shared, uint16_t* to, int64_t stride,
                          int rows, int dim, int lane) {
  using Rows = Tile<8 * N>;
#pragma unroll
  for (int a = 0; a < ATOMS; ++a)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int d = 0; d < N; ++d)
        ptx::store_shared(shared + Rows::place(a * 16 + r * 8 + lane / 4, d) + lane % 4 * 4,
                          ptx::pack<T>(x[a][d][2 * r] * factor[a][r], x[a][d][2 * r + 1] * factor[a][r]));
  __syncwarp();
  const int column = lane % Rows::COLUMNS;
  if (column < N && column * 8 < dim) {
    for (int row = lane / Rows::COLUMNS; row < rows && row < 16 * ATOMS; row += 32 / Rows::COLUMNS)
      *reinterpret_cast<uint4*>(to + row * stride + column * 8) = ptx::load_shared4(shared + Rows::place(row, column));
  }
  __syncwarp();
}

// Which of 8 rows r of the sums, `there`, hold what isn't finite: a bit each.
template <int N>
HH_DEVICE uint32_t not_finite(const float (&x)[N][4], int r, bool there) {
  float zero = 0;
#pragma unroll
  for (int d = 0; d < N; ++d) zero = fmaf(x[d][2 * r], 0.0f, fmaf(x[d][2 * r + 1], 0.0f, zero));
  const uint32_t lanes = __ballot_sync(0xffffffffu, zero != 0 && there);
  uint32_t rows = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) rows |= (lanes >> 4 * i & 15) ? 1u << i : 0;
  return rows;
}

// f(row) for each row whose bit is set.
template <class F>
HH_DEVICE void for_rows(uint32_t rows, const F& f) {
#pragma unroll 1
  for (; rows; rows &= rows - 1) f(__ffs(static_cast<int>(rows)) - 1);
}

// f with the least HEAD that serves `dim`. HH_HEAD_DIMS leaves one, and HH_ONE_DTYPE one type, for compilations of a single kernel.
template <int HEAD>
struct Dim {
  static constexpr int value = HEAD;
};
template <class F>
int by_dim(int dim, const F& f) {
#ifdef HH_HEAD_DIMS
  return dim <= HH_HEAD_DIMS ? f(Dim<HH_HEAD_DIMS>{}) : 1;
#else
  if (dim <= 32) return f(Dim<32>{});
  if (dim <= 64) return f(Dim<64>{});
  if (dim <= 112) return f(Dim<112>{});
  if (dim <= 128) return f(Dim<128>{});
  return f(Dim<256>{});
#endif
}
template <class F>
int by_type(DType type, const F& f) {
#ifdef HH_ONE_DTYPE
  (void)type;
  return f(HH_ONE_DTYPE{});
#else
  return type == DType::f16 ? f(f16{}) : f(bf16{});
#endif
}

}  // namespace hh
