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

// d[0], d[1] += a · the left and the right half of b, 16 columns in four registers.
template <class T>
HH_DEVICE void multiply(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  ptx::mma_16816<T>(left, a, first);
  ptx::mma_16816<T>(right, a, second);
}

}  // namespace hh
