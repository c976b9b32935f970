// Rows of a head in shared memory, and the fragments of matrix products made of them.
#pragma once
#include "ptx.cuh"

namespace hh {

inline constexpr int WARPS = 4, THREADS = 32 * WARPS;  // of a block

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

  // Starts copying ROWS rows, `stride` elements apart, `dim` elements of each; 0 beyond `dim` and beyond `count` rows.
  template <int ROWS>
  static HH_DEVICE void copy(uint32_t to, const uint16_t* from, int64_t stride, int count, int dim) {
    const int column = threadIdx.x % COLUMNS, first = threadIdx.x / COLUMNS;
    constexpr int STEP = THREADS / COLUMNS;
    static_assert(ROWS % STEP == 0);
    if (column >= CHUNKS) return;
    if (column * 8 >= dim) count = 0;
    const uint16_t* source = from + first * stride + column * 8;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i, source += STEP * stride) {
      const int row = first + i * STEP;
      ptx::cp_async<16>(to + place(row, column), source, row < count ? 16 : 0);  // of 0 bytes the source isn't read
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

}  // namespace hh
