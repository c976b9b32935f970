// A chunk's state in shared memory, as products with rows of tokens take it: KV [D, Dv] in two parts of bfloat16, 16 bits in all, in
// the very order in which lanes read it, 16 bytes a lane. A warp has 16 tokens, and passes them by the whole state: no lane waits for
// another warp.
#pragma once
#include "linear_rows.cuh"

namespace hh {

constexpr int WARPS = 4;  // of a block that passes tokens by a state

// Fragments of a matrix of K x N: for step s of 16 of K and columns 8 n ... of N, lane by lane the first part's two registers and the
// second's. K and N are in the order of `channel`. TRANSPOSED: the matrix is KVᵀ.
template <int K, int N, bool TRANSPOSED>
struct State {
  static constexpr int SHARED = K * N * 4;  // bytes

  static HH_DEVICE int place(int s, int n, int lane) { return (s * (N / 8) + n) * 32 + lane; }

  // kv: the element of row 0, column 0; of `rows` rows of K and `columns` of N, zeros beyond; width: of a row of kv as it lies in memory.
  static HH_DEVICE void load(uint4* state, const float* kv, int rows, int columns, int width, int warp, int lane) {
    const int t = lane % 4, pair = lane / 4;
    for (int i = warp; i < K / 16 * (N / 16); i += WARPS) {
      const int s = i / (N / 16), n = i % (N / 16);
      const int row = channel<K>(s, t), column = channel<N>(n, pair / 2) + pair % 2 * 2;
      float x[2][4];
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = row + j, c = column + e;
          x[e][j] = r < rows && c < columns ? kv[TRANSPOSED ? int64_t(c) * width + r : int64_t(r) * width + c] : 0.0f;
        }
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) {
        const int e = (pair + turn) % 2;  // odd pairs begin with the second: so 8 lanes write to all banks
        float2 low = {e ? x[1][0] : x[0][0], e ? x[1][1] : x[0][1]}, high = {e ? x[1][2] : x[0][2], e ? x[1][3] : x[0][3]};
        const uint32_t first = take_part(low), second = take_part(high);
        state[place(s, 2 * n + pair % 2, 4 * (pair / 2 * 2 + e) + t)] = make_uint4(first, second, take_part(low), take_part(high));
      }
    }
  }

  // sums += Σ of PARTS parts of 16 x 16 numbers times both parts of the state; the product of the least parts is left out.
  template <int PARTS>
  static HH_DEVICE void multiply(float (&sums)[N / 8][4], const uint32_t (&parts)[PARTS][4], const uint4* state, int s,
                                 int lane) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const uint4 b = state[place(s, n, lane)];
      ptx::mma_16816<bf16>(sums[n], parts[0], {b.x, b.y});
      ptx::mma_16816<bf16>(sums[n], parts[0], {b.z, b.w});
      if constexpr (PARTS > 1) ptx::mma_16816<bf16>(sums[n], parts[1], {b.x, b.y});
    }
  }
};

// Two parts of bfloat16 of the numbers that a lane has of two rows, for a step.
template <int PARTS>
HH_DEVICE void take_parts(uint32_t (&parts)[PARTS][4], float2 (&x)[4]) {
#pragma unroll
  for (int i = 0; i < PARTS; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) parts[i][j] = take_part(x[j % 2 * 2 + j / 2]);
}

// Rows of a quad's two tokens, 8 apart.
template <int D>
struct Two {
  Row<D> row[2];

  template <Kind KIND, class T>
  HH_DEVICE void load(const T* from, int64_t stride, int64_t token, int64_t end, int t, int width) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (token + 8 * i < end) row[i].template load<KIND>(from + (token + 8 * i) * stride, t, width);
  }

  // Of step s, both rows' two pairs.
  template <class T>
  HH_DEVICE void pairs(float2 (&x)[4], int s) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = ptx::unpack<T>(row[j / 2].words[2 * s + j % 2]);
  }

  // What softmax needs of both rows, of `width` numbers.
  template <class T>
  HH_DEVICE void soften(Soft (&soft)[2], int t, int width) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = -INFINITY, sum = 0;
#pragma unroll
      for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          const int c = channel<D>(j / 2, t) + j % 2 * 2;
          const float2 x = ptx::unpack<T>(row[i].words[j]);
          if (pass == 0)
            most = fmaxf(most, fmaxf(c < width ? x.x : -INFINITY, c + 1 < width ? x.y : -INFINITY));
          else
            sum += (c < width ? soft_exp(x.x, most) : 0) + (c + 1 < width ? soft_exp(x.y, most) : 0);
        }
        if (pass == 0) most = ptx::quad_max(most) * LOG2_E;
      }
      soft[i] = {most, 1 / ptx::quad_sum(sum)};
    }
  }
};

// cos or sin of the two pairs that a lane has of step s: of a token's row [dim/2].
template <int D, Kind KIND>
HH_DEVICE float2 angles(const float* row, int s, int t, int dim) {
  const int c = channel<D>(s, t);
  if constexpr (KIND != ANY) return *reinterpret_cast<const float2*>(row + c / 2);
  return {c < dim ? row[c / 2] : 0.0f, c + 2 < dim ? row[c / 2 + 1] : 0.0f};
}

// 1 / x and what to multiply by it first, so that neither is infinite where a quotient isn't.
struct Quotient {
  float scale = 1, inverse = 1;
  HH_DEVICE explicit Quotient(float x) {
    scale = fabsf(x) < 0x1p-100f ? 0x1p100f : 1.0f;
    inverse = ptx::rcp(x * scale);
  }
  HH_DEVICE float of(float x) const { return x * scale * inverse; }
};

}  // namespace hh
