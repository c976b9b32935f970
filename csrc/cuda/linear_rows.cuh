// What the kernels of linear attention share: feature maps and their gradients, rotations, floats in parts of bfloat16, rows as a
// quad of lanes holds them, and where a block's tokens are.
//
// Products are bfloat16's, whatever the inputs: a float32 number is the sum of three bfloat16 numbers, to 16 bits of two, and a
// float16 number is the sum of two. Float16's own range is too small for sums of many tokens.
#pragma once
#include <utility>

#include "block_linear_attention.h"
#include "launch.cuh"

#ifndef HH_HEAD_DIMS
#define HH_HEAD_DIMS 32, 64, 112, 128
#endif

namespace hh {

enum Map { RELU, IDENTITY, ELU1, RELU2, SOFTMAX };

constexpr float LOG2_E = 1.4426950408889634f;

// What a row's softmax needs of the row: its largest number, and 1 / the sum of exponentials.
struct Soft {
  float max = 0, scale = 0;
};

// The difference first, which is exact where it matters: rows may lie far from 0.
HH_DEVICE float soft_exp(float x, float max) { return ptx::exp2((x - max) * LOG2_E); }

// A feature map of one number. A NaN stays one. Channels beyond the head dim, which are 0, aren't below a row's maximum: what they
// are mapped to has to be finite for products with a state's zeros.
HH_DEVICE float mapped(float x, int map, Soft soft) {
  const float y = x <= 0 ? 0.0f : x;
  if (map == RELU) return y;
  if (map == IDENTITY) return x;
  if (map == ELU1) return x > 0 ? x + 1 : soft_exp(x, 0);
  if (map == RELU2) return y * y;
  return soft_exp(x > soft.max ? soft.max : x, soft.max) * soft.scale;
}

// The gradient in x for that in mapped(x); sum: Σ of softmax times gradient over the row.
HH_DEVICE float map_gradient(float x, float gradient, int map, Soft soft, float sum) {
  if (map == RELU) return x > 0 ? gradient : 0.0f;
  if (map == IDENTITY) return gradient;
  if (map == ELU1) return x > 0 ? gradient : gradient * soft_exp(x, 0);
  if (map == RELU2) return gradient * (x <= 0 ? 0.0f : 2 * x);
  return soft_exp(x, soft.max) * soft.scale * (gradient - sum);
}

HH_DEVICE float2 rotated(float2 x, float cos, float sin) { return {x.x * cos - x.y * sin, x.x * sin + x.y * cos}; }

// The bfloat16 numbers nearest to x; x is what is left.
HH_DEVICE uint32_t take_part(float2& x) {
  const uint32_t part = ptx::pack<bf16>(x.x, x.y);
  const float2 taken = ptx::unpack<bf16>(part);
  x.x -= taken.x, x.y -= taken.y;
  return part;
}

// What a kernel may count on. WHOLE: rows of x and y fill it, and begin at multiples of 16 bytes; maps are relu or identity. LEAN: that, rotary
// tables, and no map but relu. Others run the code for everything, which is long and slower.
enum Kind { ANY, WHOLE, LEAN };

template <Kind KIND>
struct Maps {
  const LinearRows& r;
  HH_DEVICE int phi() const { return KIND == LEAN ? int(RELU) : r.phi; }
  HH_DEVICE int psi() const { return KIND == LEAN ? int(RELU) : r.psi; }
  HH_DEVICE bool rotate() const { return KIND == LEAN || r.cos; }
  HH_DEVICE bool softmax() const { return KIND == ANY && (r.phi == SOFTMAX || r.psi == SOFTMAX); }
};

// f(map) with the map as a constant of the code that runs, which is asked for once for many numbers.
template <Kind KIND, class F>
HH_DEVICE void with_map(int map, const F& f) {
  if (map == RELU) return f(RELU);
  if (map == IDENTITY || KIND != ANY) return f(IDENTITY);
  if (map == ELU1) return f(ELU1);
  if (map == RELU2) return f(RELU2);
  f(SOFTMAX);
}

// Of N pairs, the j-th of row j / (N / ROWS).
template <Kind KIND, int N, int ROWS>
HH_DEVICE void map_pairs(float2 (&y)[N], const float2 (&x)[N], int map, const Soft (&soft)[ROWS]) {
  with_map<KIND>(map, [&](int known) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Soft& of = soft[j / (N / ROWS)];
      y[j] = {mapped(x[j].x, known, of), mapped(x[j].y, known, of)};
    }
  });
}

// ---- rows of a matrix product's fragment. Of each 32 channels lane t of a quad has 8 that lie side by side, and of the last 16, if
// they are left, 4: so it reads and writes 16 bytes at once. Products don't mind the order of channels, as long as both sides keep it.
// Step s of 16 channels: the first of lane t's 4.
template <int D>
HH_DEVICE int channel(int s, int t) {
  return s < D / 32 * 2 ? s / 2 * 32 + 8 * t + s % 2 * 4 : 16 * s + 4 * t;
}

// Lane t's part of a row of `width` numbers.
template <int D>
struct Row {
  uint32_t words[D / 8] = {};  // channel(s, t), + 1 are in words[2 s], + 2 and + 3 in words[2 s + 1]

  template <Kind KIND, class T>
  HH_DEVICE void load(const T* row, int t, int width) {
    if constexpr (KIND != ANY) {
#pragma unroll
      for (int b = 0; b < D / 32; ++b) {
        const uint4 v = *reinterpret_cast<const uint4*>(row + 32 * b + 8 * t);
        words[4 * b] = v.x, words[4 * b + 1] = v.y, words[4 * b + 2] = v.z, words[4 * b + 3] = v.w;
      }
      if constexpr (D % 32 != 0) {
        const uint2 v = *reinterpret_cast<const uint2*>(row + D - 16 + 4 * t);
        words[D / 8 - 2] = v.x, words[D / 8 - 1] = v.y;
      }
    } else {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const int c = channel<D>(j / 2, t) + j % 2 * 2;
        words[j] = (c < width ? row[c].bits : 0) | (c + 1 < width ? row[c + 1].bits : 0) << 16;
      }
    }
  }

  template <Kind KIND, class T>
  HH_DEVICE void store(T* row, int t, int width) const {
    if constexpr (KIND != ANY) {
#pragma unroll
      for (int b = 0; b < D / 32; ++b)
        *reinterpret_cast<uint4*>(row + 32 * b + 8 * t) =
            make_uint4(words[4 * b], words[4 * b + 1], words[4 * b + 2], words[4 * b + 3]);
      if constexpr (D % 32 != 0) *reinterpret_cast<uint2*>(row + D - 16 + 4 * t) = uint2{words[D / 8 - 2], words[D / 8 - 1]};
    } else {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const int c = channel<D>(j / 2, t) + j % 2 * 2;
        if (c < width) row[c] = T{uint16_t(words[j])};
        if (c + 1 < width) row[c + 1] = T{uint16_t(words[j] >> 16)};
      }
    }
  }
};

// ---- where
struct Place {
  int64_t b, h, number, chunk, begin, end;  // number: of the piece, all chunks' counted
};

// A block's piece. Heads come first: they share rows of the tables.
HH_DEVICE Place place_of(const LinearRows& r) {
  const LinearChunks& c = r.chunks;
  const unsigned index = blockIdx.x, heads = unsigned(r.heads), pieces = unsigned(c.count * c.pieces), each = unsigned(c.pieces);
  Place p;
  p.h = index % heads;
  p.number = index / heads % pieces;
  p.b = index / heads / pieces;
  p.chunk = unsigned(p.number) / each;
  const int64_t first = c.begin + p.chunk * c.length, last = min(first + c.length, c.end);
  p.begin = first + (unsigned(p.number) % each) * c.piece;
  p.end = min(p.begin + c.piece, last);
  return p;
}

inline dim3 grid_of(const LinearRows& r, int64_t columns = 1) {
  return dim3(unsigned(r.batch * r.heads * r.chunks.count * r.chunks.pieces), unsigned(columns));
}

// Whether rows begin at multiples of 16 bytes.
inline bool aligned(const Heads& x) {
  return reinterpret_cast<uintptr_t>(x.in.data) % 16 == 0 && x.batch % 8 == 0 && x.token % 8 == 0 && x.head % 8 == 0;
}

// ---- which kernel
inline constexpr int NO_KERNEL = 1;  // cudaErrorInvalidValue

// f(constant) with the least head dim there is a kernel for that holds `dim`.
template <class F, int... DIMS>
int with_dim(int dim, const F& f, std::integer_sequence<int, DIMS...>) {
  int result = NO_KERNEL;
  (void)((dim <= DIMS && (result = f(std::integral_constant<int, DIMS>{}), true)) || ...);
  return result;
}

// f(T{}, head dim, Kind), the last two as constants.
template <class F>
int with_kernel(const LinearRows& r, bool is_aligned, const F& f) {
  return with_dim(
      r.dim,
      [&](auto dim) {
        const bool whole = is_aligned && r.dim == dim && r.v_dim == dim && r.phi <= IDENTITY && r.psi <= IDENTITY;
        if (r.x.in.dtype == DType::f16)
          return whole ? f(f16{}, dim, std::integral_constant<Kind, WHOLE>{}) : f(f16{}, dim, std::integral_constant<Kind, ANY>{});
        if (whole && r.cos && r.phi == RELU && r.psi == RELU) return f(bf16{}, dim, std::integral_constant<Kind, LEAN>{});
        return whole ? f(bf16{}, dim, std::integral_constant<Kind, WHOLE>{}) : f(bf16{}, dim, std::integral_constant<Kind, ANY>{});
      },
      std::integer_sequence<int, HH_HEAD_DIMS>{});
}

}  // namespace hh
