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
    for (int v = 0; v < (KIND == ANY ? r.v_dim : D); v += D) {
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

  // A step of a row: its two pairs, their products with the state, angles and keys.
  struct Step {
    int s;
    float2 x[2], product[2], cos, sin, key[2];

    // R⁻¹ of the products times a factor.
    HH_DEVICE void turn_back(float2 (&y)[2], float factor) const {
      y[0] = rotated({product[0].x * factor, product[0].y * factor}, cos.x, -sin.x);
      y[1] = rotated({product[1].x * factor, product[1].y * factor}, cos.y, -sin.y);
    }
  };

  // f(step) for each of the first row.
  template <class F>
  HH_DEVICE void for_steps(const Two<D>& x, const float (&sums)[D / 8][4], int64_t at, const F& f) const {
    const LinearRows& r = a.rows;
    const float *row_cos = r.cos + at * (r.dim / 2), *row_sin = r.sin + at * (r.dim / 2);
    float2 cos[2] = {{1, 1}, {1, 1}}, sin[2] = {};  // of two steps
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      if (maps.rotate() && s % 2 == 0) angles<D, KIND>(cos, row_cos, s, t, r.dim), angles<D, KIND>(sin, row_sin, s, t, r.dim);
      const float4 key = *reinterpret_cast<const float4*>(keys + channel<D>(s, t));
      f(Step{s,
             {ptx::unpack<T>(x.row[0].words[2 * s]), ptx::unpack<T>(x.row[0].words[2 * s + 1])},
             {{sums[2 * s][0], sums[2 * s][1]}, {sums[2 * s + 1][0], sums[2 * s + 1][1]}},
             cos[s % 2], sin[s % 2], {{key.x, key.y}, {key.z, key.w}}});
    }
  }

  // φ(x)ᵀ K and (R ψ(x))ᵀ KV y of the first row.
  HH_DEVICE float2 inner(const Two<D>& x, const float (&sums)[D / 8][4], int64_t at, const Soft (&soft)[1]) const {
    float den = 0, inner = 0;
    for_steps(x, sums, at, [&](const Step& step) {
      float2 psi[2], phi[2];
      map_pairs<KIND>(psi, step.x, maps.psi(), soft);
      if (maps.phi() == maps.psi())
        phi[0] = psi[0], phi[1] = psi[1];
      else
        map_pairs<KIND>(phi, step.x, maps.phi(), soft);
      psi[0] = rotated(psi[0], step.cos.x, step.sin.x), psi[1] = rotated(psi[1], step.cos.y, step.sin.y);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        den += phi[j].x * step.key[j].x + phi[j].y * step.key[j].y;
        inner += psi[j].x * step.product[j].x + psi[j].y * step.product[j].y;
      }
    });
    return {ptx::quad_sum(den), ptx::quad_sum(inner)};
  }

  // Σ of softmax times the gradients in ψ(x) and φ(x).
  HH_DEVICE float2 soft_sums(const Two<D>& x, const float (&sums)[D / 8][4], int64_t at, Soft soft, float factor,
                             float e) const {
    float2 sum = {0, 0};
    for_steps(x, sums, at, [&](const Step& step) {
      float2 turned[2];
      step.turn_back(turned, factor);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = channel<D>(step.s, t) + 2 * j;
        const float one = c < a.rows.dim ? mapped(step.x[j].x, SOFTMAX, soft) : 0.0f;
        const float two = c + 1 < a.rows.dim ? mapped(step.x[j].y, SOFTMAX, soft) : 0.0f;
        sum.x += one * turned[j].x + two * turned[j].y;
        sum.y += (one * step.key[j].x + two * step.key[j].y) * e;
      }
    });
    return {ptx::quad_sum(sum.x), ptx::quad_sum(sum.y)};
  }

  // Both rows, one after another: the second moves to the first one's place, so that the code for everything stands there once.
  HH_DEVICE void finish(Two<D>& x, float (&sums)[D / 8][4], int64_t token) const {
    const LinearRows& r = a.rows;
    Soft softs[2];
    if (maps.softmax()) x.template soften<T>(softs, t, r.dim);
#pragma unroll(KIND == ANY ? 1 : 2)
    for (int i = 0; i < 2; ++i) {
      const Soft soft[1] = {softs[0]};
      const int64_t at = min(token + 8 * i, p.end - 1), place = (p.b * r.tokens + at) * r.heads + p.h;
      const bool there = token + 8 * i < p.end;
      float factor = 1, e = 1;
      if (a.factor || a.dgate) {
        const float2 both = inner(x, sums, at, soft);
        if (a.factor) {
          const Quotient by(both.x + a.eps);
          factor = by.of(1.0f), e = -by.of(by.of(both.y));
          if (there && t == 0) a.factor[place] = factor, a.weight[place] = e;
        } else {
          factor = r.gate[place];
          if (there && t == 0) a.dgate[place] = both.y;
        }
      }
      const float2 sum = maps.softmax() ? soft_sums(x, sums, at, softs[0], factor, e) : float2{0, 0};
      Row<D> dx;
      for_steps(x, sums, at, [&](const Step& step) {
        float2 to_psi[2], to_phi[2], to_x[2] = {};
        step.turn_back(to_psi, factor);
#pragma unroll
        for (int j = 0; j < 2; ++j) to_phi[j] = {step.key[j].x * e, step.key[j].y * e};
        if (maps.phi() == maps.psi()) {
#pragma unroll
          for (int j = 0; j < 2; ++j) to_psi[j].x += to_phi[j].x, to_psi[j].y += to_phi[j].y;
          add_gradient(to_x, step.x, to_psi, maps.psi(), softs[0], sum.x + sum.y);
        } else {
          add_gradient(to_x, step.x, to_psi, maps.psi(), softs[0], sum.x);
          add_gradient(to_x, step.x, to_phi, maps.phi(), softs[0], sum.y);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) dx.words[2 * step.s + j] = ptx::pack<T>(to_x[j].x, to_x[j].y);
      });
      if (there) dx.template store<KIND>(static_cast<T*>(a.dx.data) + place * r.dim, t, r.dim);
      x.row[0] = x.row[1], softs[0] = softs[1];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) sums[n][0] = sums[n][2], sums[n][1] = sums[n][3];
    }
  }

  static HH_DEVICE void add_gradient(float2 (&to)[2], const float2 (&x)[2], const float2 (&gradient)[2], int map, Soft soft, float sum) {
    with_map<KIND>(map, [&](int known) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        to[j].x += map_gradient(x[j].x, gradient[j].x, known, soft, sum);
        to[j].y += map_gradient(x[j].y, gradient[j].y, known, soft, sum);
      }
    });
  }
};

template <class T, int D, Kind KIND>
__global__ void __launch_bounds__(32 * WARPS, KIND == LEAN && D <= 112 ? 3 : 2) linear_gradients(const LinearGradientsArgs a) {
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
