// block_linear_attention's sums of chunks. A block of threads adds up one piece of one head, D x Dv in registers: a warp has 16 of the
// D rows, so that it maps, rotates and splits each key's channels once, and all columns.
//
// The product is Ψᵀ V over tokens. MMA row r and r + 8 are channels 2 r and 2 r + 1 of the warp's 16, so that a thread holds whole
// pairs for the rotation; it reads them as one word of a token's row. Rows of tiles are 4 words longer than their numbers: then what
// a warp reads at once lies in different banks.
#include "linear_state.cuh"

namespace hh {
namespace {

constexpr int TOKENS = 32;  // of a tile; two are there at once, one on its way

// Words of a tile: x, y, cos and sin in rows of STRIDE words, gate and weight.
template <int D>
struct SumsTile {
  static constexpr int STRIDE = D / 2 + 4, SIZE = TOKENS * STRIDE;
  static constexpr int X = 0, Y = SIZE, COS = 2 * SIZE, SIN = 3 * SIZE, GATE = 4 * SIZE, WEIGHT = GATE + TOKENS;
  static constexpr int WORDS = WEIGHT + TOKENS;
  static constexpr int SHARED = (2 * WORDS + 2 * TOKENS) * 4;  // bytes: two tiles, and what softmax needs
};

// One row's 16 bytes from number c on, of `width`, to shared memory; zeros if `there` is false.
template <Kind KIND, class T>
HH_DEVICE void bring(uint32_t to, const T* row, int c, int width, bool there) {
  if constexpr (KIND != ANY) {
    ptx::cp_async<16>(to, row + c, there ? 16 : 0);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (sizeof(T) == 2) {
        const int d = c + 2 * j;
        words[j] = (there && d < width ? row[d].bits : 0) | (there && d + 1 < width ? row[d + 1].bits : 0) << 16;
      } else {
        words[j] = there && c + j < width ? __float_as_uint(row[c + j]) : 0;
      }
    }
    ptx::store_shared4(to, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

template <class T, int D, Kind KIND>
struct Sums {
  using Tile = SumsTile<D>;
  const LinearSumsArgs& a;
  const Maps<KIND> maps;
  const Place p;
  const int warp, lane, g, t, v_begin;
  float sums[D / 8][4] = {};
  float2 total = {0, 0};

  // A tile's tokens from `at` on; those from p.end on, and channels there are none of, are zeros. Without waiting.
  HH_DEVICE void load(int64_t at, uint32_t tile) {
    const LinearRows& r = a.rows;
    const int tid = 32 * warp + lane, column = tid % (D / 8), row = tid / (D / 8);
    const T* x = static_cast<const T*>(r.x.in.data) + p.b * r.x.batch + p.h * r.x.head;
    const T* y = static_cast<const T*>(a.y.in.data) + p.b * a.y.batch + p.h * a.y.head;
#pragma unroll
    for (int i = 0; i < TOKENS; i += 16) {
      const bool there = at + row + i < p.end;
      const int64_t token = there ? at + row + i : p.begin;
      const uint32_t to = tile + ((row + i) * Tile::STRIDE + 4 * column) * 4;
      bring<KIND>(to + Tile::X * 4, x + token * r.x.token, 8 * column, r.dim, there);
      bring<KIND>(to + Tile::Y * 4, y + token * a.y.token + v_begin, 8 * column, r.v_dim - v_begin, there);
      if (maps.rotate()) {
        bring<KIND>(to + Tile::COS * 4, r.cos + token * (r.dim / 2), 4 * column, r.dim / 2, there);
        bring<KIND>(to + Tile::SIN * 4, r.sin + token * (r.dim / 2), 4 * column, r.dim / 2, there);
      }
    }
    const int64_t token = at + lane;
    const int64_t place = (p.b * r.tokens + (token < p.end ? token : p.begin)) * r.heads + p.h;
    if (warp == 0 && r.gate) ptx::cp_async<4>(tile + (Tile::GATE + lane) * 4, r.gate + place, token < p.end ? 4 : 0);
    if (warp == 1 && a.weight) ptx::cp_async<4>(tile + (Tile::WEIGHT + lane) * 4, a.weight + place, token < p.end ? 4 : 0);
  }

  // What softmax needs of each token of the tile, a warp a token.
  HH_DEVICE void soften(uint32_t tile, uint32_t softs) {
    const LinearRows& r = a.rows;
    for (int token = warp; token < TOKENS; token += D / 16) {
      float2 x[2];
      bool there[2][2];
      float most = -INFINITY, sum = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int word = lane + 32 * i;
        x[i] = word < D / 2 ? ptx::unpack<T>(ptx::load_shared(tile + (Tile::X + token * Tile::STRIDE + word) * 4)) : float2{0, 0};
        there[i][0] = 2 * word < r.dim, there[i][1] = 2 * word + 1 < r.dim;
        if (there[i][0]) most = fmaxf(most, x[i].x);
        if (there[i][1]) most = fmaxf(most, x[i].y);
      }
      most = ptx::warp_max(most);
#pragma unroll
      for (int i = 0; i < 2; ++i) sum += (there[i][0] ? soft_exp(x[i].x, most) : 0) + (there[i][1] ? soft_exp(x[i].y, most) : 0);
      sum = ptx::warp_sum(sum);
      if (lane == 0) ptx::store_shared2(softs + token * 8, uint2{__float_as_uint(most), __float_as_uint(1 / sum)});
    }
    __syncthreads();
  }

  // 16 tokens from the tile's `first` on.
  HH_DEVICE void step(uint32_t tile, uint32_t softs, int64_t at, int first) {
    const LinearRows& r = a.rows;
    float2 x[4], phi[4], psi[4];  // channels 2 g and 2 g + 1 of tokens 2 t, 2 t + 1 (from the first on), 2 t + 8, 2 t + 9
    Soft soft[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + 2 * t + i % 2 + i / 2 * 8;
      x[i] = ptx::unpack<T>(ptx::load_shared(tile + (Tile::X + token * Tile::STRIDE + 8 * warp + g) * 4));
      if (maps.softmax())
        soft[i] = {__uint_as_float(ptx::load_shared(softs + token * 8)), __uint_as_float(ptx::load_shared(softs + token * 8 + 4))};
    }
    map_pairs<KIND>(psi, x, maps.psi(), soft);
    if (maps.phi() == maps.psi()) {
#pragma unroll
      for (int i = 0; i < 4; ++i) phi[i] = psi[i];
    } else {
      map_pairs<KIND>(phi, x, maps.phi(), soft);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + 2 * t + i % 2 + i / 2 * 8;
      const uint32_t place = tile + (token * Tile::STRIDE + 8 * warp + g) * 4;
      if (a.weight) {
        const float weight = __uint_as_float(ptx::load_shared(tile + (Tile::WEIGHT + token) * 4));
        phi[i].x *= weight, phi[i].y *= weight;
      }
      if (at + token < p.end) total.x += phi[i].x, total.y += phi[i].y;
      if (maps.rotate())
        psi[i] = rotated(psi[i], __uint_as_float(ptx::load_shared(place + Tile::COS * 4)),
                         __uint_as_float(ptx::load_shared(place + Tile::SIN * 4)));
      if (r.gate) {
        const float gate = __uint_as_float(ptx::load_shared(tile + (Tile::GATE + token) * 4));
        psi[i].x *= gate, psi[i].y *= gate;
      }
    }
    // lane i gives the address of token i % 8 (+ 8 for odd matrices), columns 8 further for the last two
    const uint32_t row = tile + (Tile::Y + (first + lane % 16) * Tile::STRIDE + lane / 16 * 4) * 4;
    // ReLU and identity keep a key's bits: one part of bfloat16, two of float16
    if (maps.rotate() || r.gate || r.psi > IDENTITY)
      products<3>(psi, row);
    else
      products<std::is_same_v<T, bf16> ? 1 : 2>(psi, row);
  }

  template <int PARTS>
  HH_DEVICE void products(const float2 (&psi)[4], uint32_t row) {
    uint32_t parts[PARTS][4];
    float2 rest[4] = {{psi[0].x, psi[1].x}, {psi[0].y, psi[1].y}, {psi[2].x, psi[3].x}, {psi[2].y, psi[3].y}};
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) parts[i][j] = take_part(rest[j]);
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t y[4];
      ptx::ldmatrix_x4_trans(y, row + n * 16);
      if constexpr (std::is_same_v<T, bf16>) {
        multiply<PARTS>(parts, n, y);
      } else {
        uint32_t z[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float2 x = ptx::unpack<T>(y[i]);
          y[i] = take_part(x), z[i] = take_part(x);
        }
        multiply<PARTS>(parts, n, y);
        multiply<2>(parts, n, z);  // least times least is nothing
      }
    }
  }

  template <int PARTS, int N>
  HH_DEVICE void multiply(const uint32_t (&parts)[N][4], int n, const uint32_t (&y)[4]) {
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      ptx::mma_16816<bf16>(sums[n], parts[i], {y[0], y[1]});
      ptx::mma_16816<bf16>(sums[n + 1], parts[i], {y[2], y[3]});
    }
  }

  HH_DEVICE void store() {
    const LinearRows& r = a.rows;
    const int64_t place = (p.b * r.heads + p.h) * a.places + a.place + p.number;
    const int d = 16 * warp + 2 * g;
    float* kv = a.kv + place * r.dim * r.v_dim;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int c = v_begin + 8 * n + 2 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* to = kv + int64_t(d + i) * r.v_dim + c;
        if (KIND == ANY && d + i >= r.dim) continue;
        if (KIND != ANY) {
          *reinterpret_cast<float2*>(to) = {sums[n][2 * i], sums[n][2 * i + 1]};
        } else {
          if (c < r.v_dim) to[0] = sums[n][2 * i];
          if (c + 1 < r.v_dim) to[1] = sums[n][2 * i + 1];
        }
      }
    }
    const float2 all = {ptx::quad_sum(total.x), ptx::quad_sum(total.y)};
    if (t != 0 || v_begin != 0) return;
    float* k_sum = a.k_sum + place * r.dim + d;
    if (KIND != ANY) {
      *reinterpret_cast<float2*>(k_sum) = all;
    } else {
      if (d < r.dim) k_sum[0] = all.x;
      if (d + 1 < r.dim) k_sum[1] = all.y;
    }
  }
};

// Blocks that a multiprocessor's registers are for: without spills.
constexpr int sums_blocks(bool half, int dim, Kind kind) {
  return dim > 64 && (half || kind != LEAN) ? 1 : 256 / dim;
}

template <class T, int D, Kind KIND>
__global__ void __launch_bounds__(2 * D, sums_blocks(std::is_same_v<T, f16>, D, KIND)) linear_sums(const LinearSumsArgs a) {
  using Tile = SumsTile<D>;
  DYNAMIC_SHARED(bytes);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const uint32_t shared = ptx::smem_address(bytes), softs = shared + 2 * Tile::WORDS * 4;
  Sums<T, D, KIND> s{a, {a.rows}, place_of(a.rows), warp, lane, lane / 4, lane % 4, int(blockIdx.y) * D};
    if (s.p.begin < s.p.end) s.load(s.p.begin, shared);
  ptx::cp_async_commit();
  int turn = 0;
  for (int64_t at = s.p.begin; at < s.p.end; at += TOKENS, turn ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there, and the other one no longer read
    if (at + TOKENS < s.p.end) s.load(at + TOKENS, shared + (turn ^ 1) * Tile::WORDS * 4);
    ptx::cp_async_commit();
    const uint32_t tile = shared + turn * Tile::WORDS * 4;
    if (s.maps.softmax()) s.soften(tile, softs);
#pragma unroll 1
    for (int first = 0; first < TOKENS; first += 16) s.step(tile, softs, at, first);
  }
  ptx::cp_async_wait<0>();
  s.store();
}

// ---- outputs
// Columns of a state that a block of threads takes; the code for everything has no registers for 128.
constexpr int columns(int dim, Kind kind) { return kind == ANY && dim > 112 ? 64 : dim; }

// A block's piece of tokens, and N columns of its chunk's state from blockIdx.y · N on, which it keeps in shared memory.
template <class T, int D, Kind KIND>
struct Outputs {
  static constexpr int N = columns(D, KIND);
  using Kv = State<D, N, false>;
  const LinearOutputsArgs& a;
  const Maps<KIND> maps;
  const Place p;
  uint4* state;
  float* keys;  // K
  const int lane, g, t, v_begin;

  // 16 tokens, of which this lane has `token` and the one 8 further.
  HH_DEVICE void pass(int64_t token) const {
    const LinearRows& r = a.rows;
    Two<D> rows;
    const T* from = static_cast<const T*>(r.x.in.data) + p.b * r.x.batch + p.h * r.x.head;
    rows.template load<KIND>(from, r.x.token, token, p.end, t, r.dim);
    const int64_t first = min(token, p.end - 1) * (r.dim / 2), second = min(token + 8, p.end - 1) * (r.dim / 2);
    const float *cos[2] = {r.cos + first, r.cos + second}, *sin[2] = {r.sin + first, r.sin + second};
    float2 c[2][2], z[2][2];  // cosines and sines of a row and step
    float sums[N / 8][4] = {}, weight[2] = {};
    Soft soft[2];
    if (maps.softmax()) rows.template soften<T>(soft, t, r.dim);
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      float2 x[4], psi[4];
      rows.template pairs<T>(x, s);
      map_pairs<KIND>(psi, x, maps.psi(), soft);
      if (a.k_sum) {
        if (maps.phi() == maps.psi()) {
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = psi[j];
        } else {
          map_pairs<KIND>(x, x, maps.phi(), soft);
        }
        const float4 key = *reinterpret_cast<const float4*>(keys + channel<D>(s, t));
#pragma unroll
        for (int j = 0; j < 4; ++j) weight[j / 2] += x[j].x * (j % 2 ? key.z : key.x) + x[j].y * (j % 2 ? key.w : key.y);
      }
      if (maps.rotate()) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (s % 2 == 0) angles<D, KIND>(c[i], cos[i], s, t, r.dim), angles<D, KIND>(z[i], sin[i], s, t, r.dim);
          psi[2 * i] = rotated(psi[2 * i], c[i][s % 2].x, z[i][s % 2].x);
          psi[2 * i + 1] = rotated(psi[2 * i + 1], c[i][s % 2].y, z[i][s % 2].y);
        }
      }
      uint32_t parts[2][4];
      take_parts(parts, psi);
      Kv::multiply(sums, parts, state, s, lane);
    }
    store(sums, weight, token);
  }

  HH_DEVICE void store(const float (&sums)[N / 8][4], const float (&weight)[2], int64_t token) const {
    const LinearRows& r = a.rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Quotient by(a.k_sum ? ptx::quad_sum(weight[i]) + a.eps : 1.0f);
      if (token + 8 * i >= p.end) continue;
      const int64_t place = (p.b * r.tokens + token + 8 * i) * r.heads + p.h;
      const float gate = r.gate ? r.gate[place] : 1.0f;
      Row<N> out;
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
        out.words[j] = ptx::pack<T>(by.of(sums[j][2 * i]) * gate, by.of(sums[j][2 * i + 1]) * gate);
      out.template store<KIND>(static_cast<T*>(a.out.data) + place * r.v_dim + v_begin, t, r.v_dim - v_begin);
    }
  }
};

template <class T, int D, Kind KIND>
__global__ void __launch_bounds__(32 * WARPS) linear_outputs(const LinearOutputsArgs a) {
  constexpr int N = columns(D, KIND);
  using Kv = State<D, N, false>;
  DYNAMIC_SHARED(bytes);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  auto* state = reinterpret_cast<uint4*>(bytes);
  auto* keys = reinterpret_cast<float*>(bytes + Kv::SHARED);
  const LinearRows& r = a.rows;
  const Outputs<T, D, KIND> o{a, {r}, place_of(r), state, keys, lane, lane / 4, lane % 4, int(blockIdx.y) * N};
  const Place& p = o.p;
  if (p.begin >= p.end) return;
  const int64_t place = (p.b * r.heads + p.h) * a.places + a.place + p.chunk;
  const float* kv = a.kv + place * r.dim * r.v_dim + o.v_begin;
  Kv::load(state, kv, r.dim, r.v_dim - o.v_begin, r.v_dim, warp, lane);
  if (a.k_sum)
    for (int d = int(threadIdx.x); d < D; d += 32 * WARPS) keys[d] = d < r.dim ? a.k_sum[place * r.dim + d] : 0;
  __syncthreads();
  for (int64_t token = p.begin + 16 * warp + o.g; token - o.g < p.end; token += 16 * WARPS) o.pass(token);
}

constexpr int FOLD = 256;  // threads, and numbers of a row that they add

__global__ void __launch_bounds__(FOLD) linear_fold(const LinearFoldArgs a) {
  const int64_t row = int64_t(blockIdx.x) / a.count, chunk = int64_t(blockIdx.x) % a.count;
  const int64_t e = int64_t(blockIdx.y) * FOLD + threadIdx.x;
  if (e >= a.size) return;
  const float* from = a.from + (row * a.count + chunk) * a.pieces * a.size + e;
  float sum = from[0];
  for (int64_t i = 1; i < a.pieces; ++i) sum += from[i * a.size];
  a.to[(row * a.places + a.place + chunk) * a.size + e] = sum;
}

}  // namespace
}  // namespace hh

extern "C" int hh_cuda_linear_sums(const hh::LinearSumsArgs* args, void* stream) {
  using namespace hh;
  const LinearRows& r = args->rows;
  return with_kernel(r, aligned(r.x) && aligned(args->y), [&](auto type, auto dim, auto kind) {
    constexpr int D = dim;
    return launch("linear_sums", linear_sums<decltype(type), D, decltype(kind)::value>, grid_of(r, (r.v_dim + D - 1) / D), dim3(2 * D),
                  SumsTile<D>::SHARED, stream, *args);
  });
}

extern "C" int hh_cuda_linear_outputs(const hh::LinearOutputsArgs* args, void* stream) {
  using namespace hh;
  const LinearRows& r = args->rows;
  return with_kernel(r, aligned(r.x), [&](auto type, auto dim, auto kind) {
    constexpr int D = dim, N = columns(D, kind);
    return launch("linear_outputs", linear_outputs<decltype(type), D, decltype(kind)::value>, grid_of(r, (r.v_dim + N - 1) / N),
                  dim3(32 * WARPS), State<D, N, false>::SHARED + D * 4, stream, *args);
  });
}

extern "C" int hh_cuda_linear_fold(const hh::LinearFoldArgs* args, void* stream) {
  using namespace hh;
  const dim3 grid(unsigned(args->rows * args->count), unsigned((args->size + FOLD - 1) / FOLD));
  return launch("linear_fold", linear_fold, grid, dim3(FOLD), 0, stream, *args);
}
