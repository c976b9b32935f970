// norm_modulate backward. With n = norm(r), g the gradient in y and u = g * weight * (1 + scale):
//   dresidual = dr + rstd (u - n mean(u n) - mean(u)),    dx = gate * dresidual
//   dshift = sum of g,  dscale = of g (n weight + bias),  dgate = of dresidual * x,  dweight = of g n (1 + scale),
//   dbias = of g (1 + scale)
//
// A block has a piece of consecutive tokens. Each row is read once; sums over tokens stay in registers until their row of modulation
// ends, or the piece does (part_sums.cuh): modulation of every token is written as it is, without scratch. The kernel is bound by
// the rows' traffic; what many tokens share (gate, scale, weight) comes from the first cache for every token anew, as registers are
// scarce.
#include "norm_modulate.cuh"
#include "part_sums.cuh"

namespace hh {

// What is summed: gradients of the modulation, of weight and bias, or all.
enum class Sums { modulation, affine, all };

// Channels a thread and most threads: 5120 channels without spilled registers (with few for Sums::all), up to 8192 with some.
template <int VALUES>
inline constexpr int THREADS = VALUES == 8 ? 640 : 512;

// The row of modulation that serves a token, and the first token beyond it.
struct Span {
  uint32_t row, end;
};

template <int VEC, int VALUES, Sums SUMS>
__global__ void __launch_bounds__(THREADS<VALUES>)
    norm_modulate_pieces(const __grid_constant__ NormModulateBackwardArgs a, const __grid_constant__ Places at, Divisor by_pieces,
                         uint32_t pieces) {
  constexpr bool MODULATION = SUMS != Sums::affine, AFFINE = SUMS != Sums::modulation;
  using Part = Row<VEC, VALUES / VEC>;
  DYNAMIC_SHARED(smem);
  auto* partial = reinterpret_cast<float*>(smem);
  const NormModulateArgs& f = a.forward;
  const auto channels = uint32_t(f.channels);
  const uint32_t piece = blockIdx.x * blockDim.y + threadIdx.y, b = by_pieces(piece);
  if (b >= f.batch) return;  // a whole warp, which has the piece for itself
  const uint32_t begin = (piece - b * pieces) * uint32_t(a.run), end = min(begin + uint32_t(a.run), at.tokens);

  Part to_scale, to_shift, to_gate, to_weight, to_bias;
  to_scale.fill(0), to_shift.fill(0), to_gate.fill(0), to_weight.fill(0), to_bias.fill(0);
  const auto span = [](const Divisor& by, const Modulation& m, uint32_t s) {
    const uint32_t row = by(s);
    return Span{row, (row + 1) * uint32_t(m.each)};
  };
  Span scale_span = span(at.by_scale, f.scale, begin), shift_span = span(at.by_shift, f.shift, begin);
  Span gate_span = span(at.by_gate, f.gate, begin);
  // At the end of a row of modulation, or of the piece: the sum goes to memory.
  const auto flush = [&](Part& sum, Span& where, const PartSums& to, const Modulation& m, uint32_t s) {
    if (!to.out.data || (s + 1 != where.end && s + 1 != end)) return;
    const PartPlace place = part_place(to, b, where.row, begin, end, piece);
    sum.store(place.to, place.at, channels);
    sum.fill(0.0f);
    ++where.row, where.end += uint32_t(m.each);
  };

  for (uint32_t s = begin; s < end; ++s) {
    const int64_t row = (int64_t(b) * f.tokens + s) * f.channels;
    const Place here{0, b, s};
    Part x, r, g, u, other;
    x.template load<true>(f.x.in, b * f.x.batch + s * f.x.token, channels);
    g.template load<true>(a.dy.in, b * a.dy.batch + s * a.dy.token, channels);
    r = x;
    if (f.residual.in.data) {
      if (f.gate.in.data) {
        other.load(f.gate.in, at.gate(f.gate, here), channels);
        r.each([](float& v, float gate) { v *= gate; }, other);
      }
      other.template load<true>(f.residual.in, b * f.residual.batch + s * f.residual.token, channels);
      r.each([](float& v, float residual) { v += residual; }, other);
    }
    u = g;
    if (f.weight.data) {
      other.load(f.weight, 0, channels);
      u.each([](float& v, float weight) { v *= weight; }, other);
    }
    if (f.scale.in.data) {
      other.load(f.scale.in, at.scale(f.scale, here), channels);
      u.each([](float& v, float scale) { v += v * scale; }, other);
    }
    if (f.layer) centre(r, channels, partial);
    float sums[3] = {0, 0, 0};  // of r^2, u r, u
    u.each([&](float& v, float r) { sums[0] += r * r, sums[1] += v * r, sums[2] += v; }, r);
    row_sums(sums, partial + 32 + s % 2 * 96);  // where rms has no other barrier, the row before may still be read
    const float rstd = reciprocal_deviation(sums[0], f), count = float(channels);
    r.each([&](float& v) { v *= rstd; });  // n
    const float slope = rstd * sums[1] / count, mean = f.layer ? sums[2] / count : 0.0f;
    u.each([&](float& v, float n) { v = rstd * (v - n * slope - mean); }, r);  // what comes back through the norm
    if (a.dr.in.data) {
      other.template load<true>(a.dr.in, b * a.dr.batch + s * a.dr.token, channels);
      u.each([](float& v, float dr) { v += dr; }, other);
    }
    if (a.dresidual.data) u.store(a.dresidual, row, channels);
    if constexpr (MODULATION) {
      if (f.gate.in.data) to_gate.each([](float& sum, float d, float x) { sum += d * x; }, u, x);
      if (f.shift.in.data) to_shift.each([](float& sum, float g) { sum += g; }, g);
    }
    if (f.gate.in.data) {
      other.load(f.gate.in, at.gate(f.gate, here), channels);
      u.each([](float& v, float gate) { v *= gate; }, other);
    }
    u.store(a.dx, row, channels);
    if constexpr (AFFINE) {
      other.fill(0.0f);
      if (f.scale.in.data) other.load(f.scale.in, at.scale(f.scale, here), channels);
      to_bias.each([](float& sum, float g, float scale) { sum += g + g * scale; }, g, other);
      to_weight.each([](float& sum, float g, float scale, float n) { sum += (g + g * scale) * n; }, g, other, r);
    }
    if constexpr (MODULATION) {
      if (f.scale.in.data) {
        if (f.weight.data) {
          other.load(f.weight, 0, channels);
          r.each([](float& n, float weight) { n *= weight; }, other);
        }
        if (f.bias.data) {
          other.load(f.bias, 0, channels);
          r.each([](float& n, float bias) { n += bias; }, other);
        }
        to_scale.each([](float& sum, float g, float n) { sum += g * n; }, g, r);
      }
      flush(to_scale, scale_span, a.dscale, f.scale, s);
      flush(to_shift, shift_span, a.dshift, f.shift, s);
      flush(to_gate, gate_span, a.dgate, f.gate, s);
    }
  }
  if constexpr (AFFINE) {
    const Out weights{a.dweight.parts, DType::f32}, biases{a.dbias.parts, DType::f32};
    if (weights.data) to_weight.store(weights, int64_t(piece) * f.channels, channels);
    if (biases.data) to_bias.store(biases, int64_t(piece) * f.channels, channels);
  }
}

template <int VEC, int VALUES>
auto kernel_of(const NormModulateBackwardArgs& a) {
  const bool affine = a.dweight.out.data || a.dbias.out.data;
  const bool modulation = a.dscale.out.data || a.dshift.out.data || a.dgate.out.data;
  if constexpr (VEC != 1 && VALUES == 8) {  // the common case; elsewhere time matters less than the code's size
    if (!affine) return norm_modulate_pieces<VEC, VALUES, Sums::modulation>;
    if (!modulation) return norm_modulate_pieces<VEC, VALUES, Sums::affine>;
  }
  return norm_modulate_pieces<VEC, VALUES, Sums::all>;
}

inline auto kernel_of(const NormModulateBackwardArgs& a, [[maybe_unused]] int vec, bool few) {
#ifdef HH_VEC  // one kernel, for tests that compile it often
  return norm_modulate_pieces<HH_VEC, 8, Sums::all>;
#else
  if (few) return vec == 8 ? kernel_of<8, 8>(a) : vec == 4 ? kernel_of<4, 8>(a) : kernel_of<1, 8>(a);
  return vec == 8 ? kernel_of<8, 16>(a) : vec == 4 ? kernel_of<4, 16>(a) : kernel_of<1, 16>(a);
#endif
}

}  // namespace hh

extern "C" int hh_cuda_norm_modulate_backward(const hh::NormModulateBackwardArgs* args, void* stream) {
  using namespace hh;
  const NormModulateArgs& f = args->forward;
  Vectors vectors = fitting(f);
  for (const Rows* rows : {&args->dy, &args->dr}) vectors.fit(rows->in.data, rows->in.dtype, {rows->batch, rows->token}, true);
  for (const Out* out : {&args->dx, &args->dresidual}) vectors.fit(out->data, out->dtype, {f.channels}, true);
  for (const PartSums* sums : {&args->dscale, &args->dshift, &args->dgate})
    vectors.fit(sums->out.data, sums->out.dtype, {f.channels}, false);
  const int vec = vectors.widest();
  const bool few = f.channels <= 8 * THREADS<8>;
  const RowShape shape(few ? 8 : 16, f.channels);
  const auto pieces = uint32_t((f.tokens + args->run - 1) / args->run);
  const auto kernel = kernel_of(*args, vec, few);
  const dim3 grid((uint32_t(f.batch) * pieces + shape.rows - 1) / shape.rows);
  int error = launch("norm_modulate_backward", kernel, grid, shape.block, shape.shared(7), stream, *args, Places(f),
                     Divisor(pieces), pieces);
  for (const PartSums* sums : {&args->dscale, &args->dshift, &args->dgate, &args->dweight, &args->dbias})
    if (!error) error = launch_sum_parts(*sums, stream);
  return error;
}
