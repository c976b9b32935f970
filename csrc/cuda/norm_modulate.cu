// norm_modulate forward: a row stays in registers between the one read of x and residual and the one write of y and r. It is bound
// by that traffic; rows of modulation serve many tokens and come from the first cache.
#include "norm_modulate.cuh"

namespace hh {

// Channels of a row that a thread holds, and most threads: 16384 channels in all. Scalars need registers for their masks.
template <int VEC>
inline constexpr int VALUES = VEC == 1 ? 32 : 16;
template <int VEC>
inline constexpr int THREADS = 16384 / VALUES<VEC>;

template <int VEC>
__global__ void __launch_bounds__(THREADS<VEC>) norm_modulate_rows(const __grid_constant__ NormModulateArgs a, const __grid_constant__ Places at) {
  DYNAMIC_SHARED(smem);
  const Place here = at.place();
  if (here.row >= at.rows) return;  // a whole warp, which has the row for itself: nobody waits for it
  const auto channels = uint32_t(a.channels);
  Row<VEC, VALUES<VEC> / VEC> r, other;
  r.template load<true>(a.x.in, here.b * a.x.batch + here.s * a.x.token, channels);
  if (a.residual.in.data) {
    if (a.gate.in.data) {
      other.load(a.gate.in, at.gate(a.gate, here), channels);
      r.each([](float& x, float gate) { x *= gate; }, other);
    }
    other.template load<true>(a.residual.in, here.b * a.residual.batch + here.s * a.residual.token, channels);
    r.each([](float& x, float residual) { x += residual; }, other);
    r.store(a.r, int64_t(here.row) * a.channels, channels);
  }
  auto* partial = reinterpret_cast<float*>(smem);
  if (a.layer) centre(r, channels, partial);
  float squares = 0;
  r.each([&](float& x) { squares += x * x; });
  const float rstd = reciprocal_deviation(row_sum(squares, partial + 32), a);
  r.each([&](float& x) { x *= rstd; });
  if (a.weight.data) {
    other.load(a.weight, 0, channels);
    r.each([](float& n, float weight) { n *= weight; }, other);
  }
  if (a.bias.data) {
    other.load(a.bias, 0, channels);
    r.each([](float& n, float bias) { n += bias; }, other);
  }
  if (a.scale.in.data) {
    other.load(a.scale.in, at.scale(a.scale, here), channels);
    r.each([](float& n, float scale) { n += n * scale; }, other);
  }
  if (a.shift.in.data) {
    other.load(a.shift.in, at.shift(a.shift, here), channels);
    r.each([](float& n, float shift) { n += shift; }, other);
  }
  r.store(a.y, int64_t(here.row) * a.channels, channels);
}

}  // namespace hh

extern "C" int hh_cuda_norm_modulate(const hh::NormModulateArgs* args, void* stream) {
  using namespace hh;
  Vectors vectors = fitting(*args);
  vectors.fit(args->y.data, args->y.dtype, {args->channels}, true);
  vectors.fit(args->r.data, args->r.dtype, {args->channels}, true);
  const int vec = vectors.widest();
  const RowShape shape(vec == 1 ? VALUES<1> : VALUES<8>, args->channels);
  const Places at(*args);
  const auto kernel = vec == 8 ? norm_modulate_rows<8> : vec == 4 ? norm_modulate_rows<4> : norm_modulate_rows<1>;
  const dim3 grid((at.rows + shape.rows - 1) / shape.rows);
  return launch("norm_modulate", kernel, grid, shape.block, shape.shared(2), stream, *args, at);
}
