// Schemas and bindings of norm_modulate.
#include <numeric>

#include "tensor.h"

namespace hhattn {
namespace {

Rows rows(const Tensor& t, const char* name) { return {input(t, name), t.stride(0), t.stride(1)}; }

Modulation modulation(const OptTensor& t, const Tensor& x, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 3, name, " must be [B or 1, F, C]");
  const int64_t tokens = x.size(1), count = t->size(1);
  check_sizes(*t, {t->size(0) == 1 ? 1 : x.size(0), count, x.size(2)}, name);
  STD_TORCH_CHECK(count == tokens || (count > 0 && tokens % count == 0), name, ": its rows must divide the tokens");
  return {input(*t, name), step(*t, 0), t->stride(1), count ? std::max<int64_t>(tokens / count, 1) : 1};
}

NormModulate arguments(const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& weight,
                       const OptTensor& bias, const OptTensor& residual, const OptTensor& gate, bool layer, double eps) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, S, C]");
  NormModulate a;
  a.tokens = x.size(1);
  a.channels = x.size(2);
  a.x = rows(x, "x");
  a.scale = modulation(scale, x, "scale");
  a.shift = modulation(shift, x, "shift");
  a.gate = modulation(gate, x, "gate");
  a.weight = channels(weight, a.channels, "weight");
  a.bias = channels(bias, a.channels, "bias");
  a.layer = layer;
  a.eps = static_cast<float>(eps);
  if (residual) {
    check_sizes(*residual, {x.size(0), a.tokens, a.channels}, "residual");
    a.residual = rows(*residual, "residual");
  }
  return a;
}

std::tuple<Tensor, Tensor> norm_modulate(const Tensor& x, const OptTensor& scale, const OptTensor& shift,
                                         const OptTensor& weight, const OptTensor& bias, const OptTensor& residual,
                                         const OptTensor& gate, bool layer, double eps) {
  NormModulate a = arguments(x, scale, shift, weight, bias, residual, gate, layer, eps);
  Tensor y = empty(x), r = residual ? empty(*residual) : nothing(x);
  a.y = output(y);
  if (residual) a.r = output(r);
  a.stream = bytes_of(y) + bytes_of(r) > kStreamBytes;
  run(kernels().norm_modulate, a, x.size(0) * a.tokens, a.channels);
  return {y, r};
}

// Rows a piece: whole runs of the tokens that short rows of modulation serve, so that their gradients need no sums.
int64_t piece_of(const NormModulate& a) {
  int64_t run = 1;
  for (const Modulation* m : {&a.scale, &a.shift, &a.gate}) {
    if (m->in.data && m->tokens_per_row <= kPieceRows) run = std::lcm(run, m->tokens_per_row);
  }
  return run > 4 * kPieceRows ? kPieceRows : (kPieceRows + run - 1) / run * run;
}

// The gradient of a modulation, and what it is made of.
struct Gradient {
  Tensor out;
  Sums sums;
  ModulationGradient to;

  Gradient(const OptTensor& m, const Modulation& in, const Tensor& x, int64_t piece) : out(nothing(x)) {
    if (!m) return;
    out = new_tensor(*m, m->sizes());
    const bool shared = m->size(0) != x.size(0) || piece % in.tokens_per_row != 0 || x.size(1) == 0;
    if (shared) sums = Sums(out);
    to = {output(out), sums.data(), m->size(0) == x.size(0) ? m->size(1) : 0, in.tokens_per_row};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_modulate_backward(
    const Tensor& dy, const OptTensor& dr, const Tensor& x, const OptTensor& scale, const OptTensor& shift,
    const OptTensor& weight, const OptTensor& bias, const OptTensor& residual, const OptTensor& gate, bool layer, double eps) {
  NormModulateBackward a;
  a.forward = arguments(x, scale, shift, weight, bias, residual, gate, layer, eps);
  check_sizes(dy, {x.size(0), x.size(1), x.size(2)}, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy must have x's dtype");
  a.dy = rows(dy, "dy");
  STD_TORCH_CHECK(!dr || residual, "dr needs residual");
  if (dr) {
    check_sizes(*dr, {x.size(0), x.size(1), x.size(2)}, "dr");
    STD_TORCH_CHECK(dr->scalar_type() == residual->scalar_type(), "dr must have residual's dtype");
    a.dr = rows(*dr, "dr");
  }
  Tensor dx = empty(x), dresidual = residual ? empty(*residual) : nothing(x);
  a.dx = output(dx);
  if (residual) a.dresidual = output(dresidual);
  a.forward.stream = bytes_of(dx) + bytes_of(dresidual) > kStreamBytes;
  a.rows = x.size(0) * x.size(1);
  a.piece = piece_of(a.forward);
  Gradient dscale(scale, a.forward.scale, x, a.piece), dshift(shift, a.forward.shift, x, a.piece);
  Gradient dgate(gate, a.forward.gate, x, a.piece);
  a.dscale = dscale.to;
  a.dshift = dshift.to;
  a.dgate = dgate.to;
  Tensor dweight = weight ? empty(*weight) : nothing(x), dbias = bias ? empty(*bias) : nothing(x);
  Sums weight_sums(dweight), bias_sums(dbias);
  a.dweight = weight ? weight_sums.data() : nullptr;
  a.dbias = bias ? bias_sums.data() : nullptr;
  int32_t turn = 0;
  if (weight || bias || a.dscale.sums || a.dshift.sums || a.dgate.sums) a.turn = &turn;

  const int64_t pieces = a.forward.channels ? (a.rows + a.piece - 1) / a.piece : 0;
  for_each_item(pieces, a.scratch(), [&](int64_t piece, float* scratch) { kernels().norm_modulate_backward(a, piece, scratch); });
  for (Sums* sums : {&dscale.sums, &dshift.sums, &dgate.sums, &weight_sums, &bias_sums}) sums->store();
  return {dx, dscale.out, dshift.out, dweight, dbias, dresidual, dgate.out};
}

}  // namespace
}  // namespace hhattn

STABLE_TORCH_LIBRARY_FRAGMENT(hhattn, m) {
  m.def(
      "norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? gate, bool layer, float eps) -> (Tensor, Tensor)");
  m.def(
      "norm_modulate_backward(Tensor dy, Tensor? dr, Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor? gate, bool layer, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hhattn, CPU, m) {
  m.impl("norm_modulate", TORCH_BOX(&hhattn::norm_modulate));
  m.impl("norm_modulate_backward", TORCH_BOX(&hhattn::norm_modulate_backward));
}
