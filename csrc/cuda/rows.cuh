// Rows of channels as the norms' kernels hold them: in registers, as float32, a few 128-bit vectors of channels a thread.
//
// A row belongs to blockDim.x threads, a warp having 32 * VECS * VEC channels side by side, a thread vector j * 32 + lane of these: so a
// warp reads memory without gaps, and a thread's addresses differ by constants. VEC is 8 for 16-bit rows and 4 for float32 ones, 16
// bytes each; 1 where a pointer, a stride or the number of channels doesn't allow vectors. dtypes are looked at when a row is loaded:
// tensors may have any mixture, and a branch that a whole warp takes costs little beside the memory that it waits for.
#pragma once
#include "launch.cuh"

namespace hh {

// n / d for 32 bits by a multiplication, as divisors are only known at launch.
struct Divisor {
  uint32_t multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint64_t d) {
    while ((uint64_t(1) << shift) < d) ++shift;
    multiplier = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  HH_DEVICE uint32_t operator()(uint32_t n) const { return uint32_t(((uint64_t(multiplier) * n >> 32) + n) >> shift); }
};

// ---- VEC numbers of type T at p, as float
template <class T, int VEC, bool ONCE>
HH_DEVICE void load_vector(const T* p, float* v) {
  constexpr int BYTES = VEC * int(sizeof(T)), WORDS = BYTES / 4;
  if constexpr (VEC == 1) {
    v[0] = ptx::to_float(*p);
  } else {
    uint32_t words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i += WORDS < 4 ? 2 : 4) {
      if constexpr (WORDS >= 4) {
        const auto* at = reinterpret_cast<const uint4*>(p) + i / 4;
        const uint4 q = ONCE ? ptx::load_once(at) : *at;
        words[i] = q.x, words[i + 1] = q.y, words[i + 2] = q.z, words[i + 3] = q.w;
      } else {
        const auto* at = reinterpret_cast<const uint2*>(p);
        const uint2 q = ONCE ? ptx::load_once(at) : *at;
        words[i] = q.x, words[i + 1] = q.y;
      }
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (sizeof(T) == 4) {
        v[i] = __uint_as_float(words[i]);
      } else {
        const float2 two = ptx::unpack<T>(words[i]);
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
      }
    }
  }
}

template <class T, int VEC>
HH_DEVICE void store_vector(T* p, const float* v) {
  constexpr int BYTES = VEC * int(sizeof(T)), WORDS = BYTES / 4;
  if constexpr (VEC == 1) {
    *p = ptx::from_float<T>(v[0]);
  } else {
    uint32_t words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (sizeof(T) == 4)
        words[i] = __float_as_uint(v[i]);
      else
        words[i] = ptx::pack<T>(v[2 * i], v[2 * i + 1]);
    }
    if constexpr (WORDS == 2) {
      *reinterpret_cast<uint2*>(p) = uint2{words[0], words[1]};
    } else if constexpr (WORDS == 4) {
      *reinterpret_cast<uint4*>(p) = uint4{words[0], words[1], words[2], words[3]};
    } else {  // float32 beside 16-bit rows: sums, and rows that many tokens share
      auto* halves = reinterpret_cast<uint4*>(p);
      halves[0] = uint4{words[0], words[1], words[2], words[3]}, halves[1] = uint4{words[4], words[5], words[6], words[7]};
    }
  }
}

// A thread's part of a row of `channels`.
template <int VEC, int VECS>
struct Row {
  float v[VECS][VEC];

  HH_DEVICE static uint32_t channel(int j) { return (threadIdx.x / 32 * 32 * VECS + threadIdx.x % 32 + 32 * j) * VEC; }

  HH_DEVICE void fill(float value) {
    each([&](float& x) { x = value; });
  }

  // f(x, other's, ...) for every number.
  template <class F, class... Others>
  HH_DEVICE void each(const F& f, const Others&... others) {
#pragma unroll
    for (int j = 0; j < VECS; ++j)
#pragma unroll
      for (int i = 0; i < VEC; ++i) f(v[j][i], others.v[j][i]...);
  }

  // Channels from in.data + at on; what lies beyond the row is 0. ONCE: nobody will want them in the first cache again.
  template <bool ONCE = false>
  HH_DEVICE void load(const In& in, int64_t at, uint32_t channels) {
#ifdef HH_ONE_DTYPE  // what the kernel report counts: the code that one dtype executes
    return load_as<HH_ONE_DTYPE, ONCE>(in.data, at, channels);
#endif
    switch (in.dtype) {
      case DType::f32: return load_as<float, ONCE>(in.data, at, channels);
      case DType::f16: return load_as<f16, ONCE>(in.data, at, channels);
      default: return load_as<bf16, ONCE>(in.data, at, channels);
    }
  }
  HH_DEVICE void store(const Out& out, int64_t at, uint32_t channels) const {
#ifdef HH_ONE_DTYPE
    return store_as<HH_ONE_DTYPE>(out.data, at, channels);
#endif
    switch (out.dtype) {
      case DType::f32: return store_as<float>(out.data, at, channels);
      case DType::f16: return store_as<f16>(out.data, at, channels);
      default: return store_as<bf16>(out.data, at, channels);
    }
  }

 private:
  template <class T, bool ONCE>
  HH_DEVICE void load_as(const void* data, int64_t at, uint32_t channels) {
    const T* p = static_cast<const T*>(data) + at + channel(0);
    fill(0.0f);
#pragma unroll
    for (int j = 0; j < VECS; ++j)
      if (channel(j) < channels) load_vector<T, VEC, ONCE>(p + 32 * VEC * j, v[j]);
  }
  template <class T>
  HH_DEVICE void store_as(void* data, int64_t at, uint32_t channels) const {
    T* p = static_cast<T*>(data) + at + channel(0);
#pragma unroll
    for (int j = 0; j < VECS; ++j)
      if (channel(j) < channels) store_vector<T, VEC>(p + 32 * VEC * j, v[j]);
  }
};

// Sums over the threads of a row; each thread gets the same bits. `partial` is 32 * N floats of shared memory that no sum uses whose
// readers might not be done, or unused where one warp has the row.
template <int N>
HH_DEVICE void row_sums(float (&x)[N], float* partial) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = ptx::warp_sum(x[i]);
  const unsigned warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return;
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) partial[32 * i + threadIdx.x / 32] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = ptx::warp_sum(lane < warps ? partial[32 * i + lane] : 0.0f);
}
HH_DEVICE float row_sum(float x, float* partial) {
  float sums[1] = {x};
  row_sums(sums, partial);
  return sums[0];
}

// ---- on the host
// How rows are given to threads that hold `values` each: a block has several rows where a warp is enough for one.
struct RowShape {
  dim3 block;
  unsigned rows;  // a block

  RowShape(int values, int64_t channels) {
    const unsigned warps = unsigned((channels + 32 * values - 1) / (32 * values));
    rows = warps > 1 ? 1 : 4;
    block = dim3(32 * warps, rows);
  }
  size_t shared(int sums) const { return block.x > 32 ? sums * 32 * sizeof(float) : 0; }
};

// The widest vectors that tensors of rows allow; see `fit`.
class Vectors {
 public:
  explicit Vectors(int64_t channels) : channels_(channels) {}

  // A tensor of rows: large ones decide by their dtype that vectors are of 16 bytes.
  void fit(const void* data, DType dtype, std::initializer_list<int64_t> strides, bool large) {
    if (!data) return;
    if (large && dtype == DType::f32) most_ = 4;
    for (int vec : {8, 4}) {
      const int64_t bytes = vec * size_of(dtype) < 16 ? 8 : 16;
      bool fits = reinterpret_cast<uintptr_t>(data) % bytes == 0 && channels_ % vec == 0;
      for (int64_t stride : strides) fits = fits && stride * size_of(dtype) % bytes == 0;
      if (!fits && most_ >= vec) most_ = vec / 2;
    }
  }
  int widest() const { return most_ >= 8 ? 8 : most_ >= 4 ? 4 : 1; }

 private:
  int64_t channels_;
  int most_ = 8;
};

}  // namespace hh
