// block_linear_attention's gradient in what a token holds: in k, from the gradients of its chunk's sums, and in q, from the gradient
// of the outputs. The gradients of v and of what the outputs saw are the forward's kernels with other arguments (ops/).
//
// With u = y / den and e = -(y·out) / den, den = φ(x)ᵀ K + eps, of the outputs, and u = gate · y, e = 1 of the sums:
//
//   dx = ∂ψ(x)ᵀ R⁻¹ KV u + ∂φ(x)ᵀ K e          dgate = (R ψ(x))ᵀ KV y = den (y·out)
//
// so `out`, which was rounded, isn't read.
// KV y is a product as the outputs' is, with the state transposed; its columns are x's channels, in the order in which a lane holds
// them, so all that follows happens in a lane's registers and sums over a quad.
#include "linear_state.cuh"

namespace hh {
namespace {

template <class T, int D, Kind KIND>
struct Gradients {
  using Kv = State<D, D, true>;
  const LinearGradientsArgs& a;
  const Maps<KIND> maps;
  const Place p;
  uint4* state;  // D values after D values
  float* keys;   // K
  const int lane, g, t;

  // 16 tokens, of which this lane has `token` and the one 8 further.
  HH_DEVICE void pass(int64_t token) const {
    const LinearRows& r = a.rows;
    Two<D> x;
    const T* from = static_cast<const T*>(r.x.in.data) + p.b * r.x.batch + p.h * r.x.head;
    x.template load<KIND>(from, r.x.token, token, p.end, t, r.dim);
    const T* y = static_cast<const T*>(a.y.in.data) + p.b * a.y.batch + p.h * a.y.head;
    float sums[D / 8][4] = {};
    for (int v = 0; v < r.v_dim; v += D) {
      Two<D> rows;
      rows.template load<KIND>(y + v, a.y.token, token, p.end, t, r.v_dim - v);
      multiply(sums, rows, state + v / D * (Kv::SHARED / 16));
    }
    finish(x, sums, token);
  }

  HH_DEVICE void multiply(float (&sums)[D / 8][4], const Two<D>& rows, const uint4* state) const {
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      if constexpr (std::is_same_v<T, bf16>) {
        const uint32_t part[1][4] = {{rows.row[0].words[2 * s], rows.row[1].words[2 * s], rows.row[0].words[2 * s + 1],
                                      rows.row[1].words[2 * s + 1]}};
        Kv::multiply(sums, part, state, s, lane);
      } else {
        float2 x[4];
        rows.template pairs<T>(x, s);
        uint32_t parts[2][4];
        take_parts(parts, x);
        Kv::multiply(sums, parts, state, s, lane);
      }
    }
  }

  // f(channel, word, x, its two products, cos, sin, two keys) for the i-th row's pairs.
  template <class F>
  HH_DEVICE void for_pairs(const Two<D>& x, const float (&sums)[D / 8][4], int i, int64_t at, const F& f) const {
    const LinearRows& r = a.rows;
    const float *row_cos = r.cos + at * (r.dim / 2), *row_sin = r.sin + at * (r.dim / 2);
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      float2 cos = {1, 1}, sin = {0, 0};
      if (maps.rotate()) cos = angles<D, KIND>(row_cos, s, t, r.dim), sin = angles<D, KIND>(row_sin, s, t, r.dim);
      const float4 key = *reinterpret_cast<const float4*>(keys + channel<D>(s, t));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = 2 * s + j;
        f(channel<D>(s, t) + 2 * j, n, ptx::unpack<T>(x.row[i].words[n]), float2{sums[n][2 * i], sums[n][2 * i + 1]},
          j ? cos.y : cos.x, j ? sin.y : sin.x, j ? float2{key.z, key.w} : float2{key.x, key.y});
      }
    }
  }

  HH_DEVICE void finish(const Two<D>& x, const float (&sums)[D / 8][4], int64_t token) const {
    const LinearRows& r = a.rows;
    Soft soft[2];
    if (maps.softmax()) x.template soften<T>(soft, t, r.dim);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = min(token + 8 * i, p.end - 1), place = (p.b * r.tokens + at) * r.heads + p.h;
      const bool there = token + 8 * i < p.end;
      float factor = 1, e = 1;
      if (a.factor || a.dgate) {
        float den = 0, inner = 0;  // φ(x)ᵀ K, (R ψ(x))ᵀ KV y
        for_pairs(x, sums, i, at, [&](int, int, float2 x, float2 product, float cos, float sin, float2 key) {
          const float2 psi = {mapped(x.x, maps.psi(), soft[i]), mapped(x.y, maps.psi(), soft[i])}, turned = rotated(psi, cos, sin);
          inner += turned.x * product.x + turned.y * product.y;
          if (maps.phi() == maps.psi())
            den += psi.x * key.x + psi.y * key.y;
          else
            den += mapped(x.x, maps.phi(), soft[i]) * key.x + mapped(x.y, maps.phi(), soft[i]) * key.y;
        });
        inner = ptx::quad_sum(inner), den = ptx::quad_sum(den);
        if (a.factor) {
          const Quotient by(den + a.eps);
          factor = by.of(1.0f), e = -by.of(by.of(inner));
          if (there && t == 0) a.factor[place] = factor, a.weight[place] = e;
        } else {
          factor = r.gate[place];
          if (there && t == 0) a.dgate[place] = inner;
        }
      }
      float to_phi = 0, to_psi = 0;  // softmax's sums
      if (maps.softmax()) {
        for_pairs(x, sums, i, at, [&](int c, int, float2 x, float2 product, float cos, float sin, float2 key) {
          const float2 turned = rotated({product.x * factor, product.y * factor}, cos, -sin);
          const float one = c < r.dim ? mapped(x.x, SOFTMAX, soft[i]) : 0.0f;
          const float two = c + 1 < r.dim ? mapped(x.y, SOFTMAX, soft[i]) : 0.0f;
          to_psi += one * turned.x + two * turned.y;
          to_phi += (one * key.x + two * key.y) * e;
        });
        to_psi = ptx::quad_sum(to_psi), to_phi = ptx::quad_sum(to_phi);
      }
      Row<D> dx;
      for_pairs(x, sums, i, at, [&](int, int n, float2 x, float2 product, float cos, float sin, float2 key) {
        const float2 turned = rotated({product.x * factor, product.y * factor}, cos, -sin);
        dx.words[n] = ptx::pack<T>(both(x.x, turned.x, key.x * e, soft[i], to_psi, to_phi),
                                   both(x.y, turned.y, key.y * e, soft[i], to_psi, to_phi));
      });
      if (there) dx.template store<KIND>(static_cast<T*>(a.dx.data) + place * r.dim, t, r.dim);
    }
  }

  // The gradient in x through both maps; without K there is no φ, whose keys are zeros then.
  HH_DEVICE float both(float x, float to_psi, float to_phi, Soft soft, float psi_sum, float phi_sum) const {
    if (maps.phi() == maps.psi()) return map_gradient(x, to_psi + to_phi, maps.psi(), soft, psi_sum + phi_sum);
    return map_gradient(x, to_psi, maps.psi(), soft, psi_sum) + map_gradient(x, to_phi, maps.phi(), soft, phi_sum);
  }
};

template <class T, int D, Kind KIND>
__global__ void __launch_bounds__(32 * WARPS) linear_gradients(const LinearGradientsArgs a) {
  using Kv = State<D, D, true>;
  DYNAMIC_SHARED(bytes);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const LinearRows& r = a.rows;
  auto* keys = reinterpret_cast<float*>(bytes);
  auto* state = reinterpret_cast<uint4*>(bytes + D * 4);
  const Gradients<T, D, KIND> o{a, {r}, place_of(r), state, keys, lane, lane / 4, lane % 4};
  const Place& p = o.p;
  if (p.begin >= p.end) return;
  const int64_t place = (p.b * r.heads + p.h) * a.places + a.place + p.chunk;
  const float* kv = a.kv + place * r.dim * r.v_dim;
  for (int v = 0; v < r.v_dim; v += D) Kv::load(state + v / D * (Kv::SHARED / 16), kv + v, r.v_dim - v, r.dim, r.v_dim, warp, lane);
  for (int d = int(threadIdx.x); d < D; d += 32 * WARPS) keys[d] = a.k_sum && d < r.dim ? a.k_sum[place * r.dim + d] : 0;
  __syncthreads();
  for (int64_t token = p.begin + 16 * warp + o.g; token - o.g < p.end; token += 16 * WARPS) o.pass(token);
}

}  // namespace
}  // namespace hh

extern "C" int hh_cuda_linear_gradients(const hh::LinearGradientsArgs* args, void* stream) {
  using namespace hh;
  const LinearRows& r = args->rows;
  return with_kernel(r, aligned(r.x) && aligned(args->y), [&](auto type, auto dim, auto kind) {
    constexpr int D = dim;
    return launch("linear_gradients", linear_gradients<decltype(type), D, decltype(kind)::value>, grid_of(r), dim3(32 * WARPS),
                  (r.v_dim + D - 1) / D * State<D, D, true>::SHARED + D * 4, stream, *args);
  });
}
