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

  // kv [rows, columns] of K x N, zeros beyond, as it lies in memory in rows of `width`, or in columns if TRANSPOSED. A lane reads 16
  // bytes, its neighbours what lies beside them; odd ones store in another order, so that 8 lanes write to all banks.
  static HH_DEVICE void load(uint4* state, const float* kv, int rows, int columns, int width, int warp, int lane) {
    if constexpr (TRANSPOSED) {
      const int q = lane % 8, quad = lane / 8;
      for (int i = warp; i < (K + 31) / 32 * (N / 8); i += WARPS) {
        const int b = i / (N / 8), n = i % (N / 8), row = 32 * b + 4 * q, column = channel<N>(n / 2, quad) + n % 2 * 2;
        const bool last = 32 * b + 32 > K;
        if (row >= K) continue;
        float4 x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) x[e] = four(kv + int64_t(column + e) * width, row, column + e < columns ? rows : 0, width);
        const int s = last ? 2 * b : 2 * b + q % 2, t = last ? q : q / 2;
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
          const int e = (q + turn) % 2;
          const float4 y = e ? x[1] : x[0];
          store(state, s, n, 4 * (2 * quad + e) + t, {y.x, y.y}, {y.z, y.w});
        }
      }
    } else {
      const int t = lane % 4, pair = lane / 4;
      for (int i = warp; i < K / 16 * ((N + 31) / 32); i += WARPS) {
        const int s = i % (K / 16), b = i / (K / 16), row = channel<K>(s, t);
        const bool last = 32 * b + 32 > N;  // 16 columns are left, of which a lane has 2
        const int column = 32 * b + (last ? 2 : 4) * pair;
        float4 x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* from = kv + int64_t(row + j) * width;
          x[j] = last ? two(from, column, row + j < rows ? columns : 0, width) : four(from, column, row + j < rows ? columns : 0, width);
        }
        for (int j = 0; j < (last ? 1 : 2); ++j) {
          const int n = 4 * b + (last ? pair % 2 : pair % 2 * 2 + j);
#pragma unroll
          for (int turn = 0; turn < 2; ++turn) {
            const int e = (pair + turn) % 2;
            store(state, s, n, 4 * (pair / 2 * 2 + e) + t, {pick(x[0], j, e), pick(x[1], j, e)}, {pick(x[2], j, e), pick(x[3], j, e)});
          }
        }
      }
    }
  }

  static HH_DEVICE float pick(const float4& x, int j, int e) { return j ? (e ? x.w : x.z) : (e ? x.y : x.x); }

  // Numbers of a row from c on, zeros from `end` on; several at once where rows of `width` allow it.
  static HH_DEVICE float4 four(const float* row, int c, int end, int width) {
    if (width % 4 == 0 && c + 4 <= end) return *reinterpret_cast<const float4*>(row + c);
    return {c < end ? row[c] : 0, c + 1 < end ? row[c + 1] : 0, c + 2 < end ? row[c + 2] : 0, c + 3 < end ? row[c + 3] : 0};
  }
  static HH_DEVICE float4 two(const float* row, int c, int end, int width) {
    if (width % 2 == 0 && c + 2 <= end) {
      const float2 x = *reinterpret_cast<const float2*>(row + c);
      return {x.x, x.y, 0, 0};
    }
    return {c < end ? row[c] : 0, c + 1 < end ? row[c + 1] : 0, 0, 0};
  }

  // Both parts of the four numbers that a lane has of a step and a column.
  static HH_DEVICE void store(uint4* state, int s, int n, int lane, float2 low, float2 high) {
    const uint32_t first = take_part(low), second = take_part(high);
    state[place(s, n, lane)] = make_uint4(first, second, take_part(low), take_part(high));
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
        if (pass == 0) most = ptx::quad_max(most);
      }
      soft[i] = {most, 1 / ptx::quad_sum(sum)};
    }
  }
};

// cos or sin of the pairs that a lane has of a token's row [dim/2], of steps s and s + 1 (of the last alone, if it has no other), s even.
template <int D, Kind KIND>
HH_DEVICE void angles(float2 (&y)[2], const float* row, int s, int t, int dim) {
  const int c = channel<D>(s, t), pairs = s + 1 < D / 16 ? 4 : 2;
  if (KIND != ANY && pairs == 4) {
    const float4 v = *reinterpret_cast<const float4*>(row + c / 2);
    y[0] = {v.x, v.y}, y[1] = {v.z, v.w};
  } else if (KIND != ANY) {
    y[0] = *reinterpret_cast<const float2*>(row + c / 2);
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int d = c + 4 * j;
      if (2 * j < pairs) y[j] = {d < dim ? row[d / 2] : 0.0f, d + 2 < dim ? row[d / 2 + 1] : 0.0f};
    }
  }
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
