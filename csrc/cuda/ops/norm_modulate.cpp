// Bindings of norm_modulate.
#include "../norm_modulate.h"

#include <algorithm>

#include "sums.h"
#include "tensor.h"

namespace hh {
namespace {

Modulation modulation(Call& call, const OptTensor& t, const Tensor& x, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 3, name, " must be [B or 1, F, C]");
  const int64_t tokens = x.size(1), count = t->size(1);
  check_sizes(*t, {t->size(0) == 1 ? 1 : x.size(0), count, x.size(2)}, name);
  STD_TORCH_CHECK(count == tokens || (count > 0 && tokens % count == 0), name, ": its rows must divide the tokens");
  return {call.input(*t, name), step(*t, 0), t->stride(1), count ? std::max<int64_t>(tokens / count, 1) : 1};
}

In channels(Call& call, const OptTensor& t, int64_t n, const char* name) {
  if (!t) return {};
  check_sizes(*t, {n}, name);
  return call.input(*t, name);
}

NormModulateArgs arguments(Call& call, const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& weight,
                           const OptTensor& bias, const OptTensor& residual, const OptTensor& gate, bool layer, double eps) {
  NormModulateArgs a;
  a.x = call.rows(x, "x");
  a.batch = x.size(0);
  a.tokens = x.size(1);
  a.channels = x.size(2);
  a.scale = modulation(call, scale, x, "scale");
  a.shift = modulation(call, shift, x, "shift");
  a.gate = modulation(call, gate, x, "gate");
  a.weight = channels(call, weight, a.channels, "weight");
  a.bias = channels(call, bias, a.channels, "bias");
  a.layer = layer;
  a.eps = static_cast<float>(eps);
  if (residual) {
    check_sizes(*residual, {a.batch, a.tokens, a.channels}, "residual");
    a.residual = call.rows(*residual, "residual");
  }
  return a;
}

std::tuple<Tensor, Tensor> norm_modulate(const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& weight,
                                         const OptTensor& bias, const OptTensor& residual, const OptTensor& gate, bool layer,
                                         double eps) {
  Call call(x);
  NormModulateArgs a = arguments(call, x, scale, shift, weight, bias, residual, gate, layer, eps);
  Tensor y = call.empty(x), r = residual ? call.empty(*residual) : nothing(x);
  if (y.numel() == 0) return {y, r};
  a.y = call.output(y, "y");
  if (residual) a.r = call.output(r, "r");
  HH_CALL(call, hh_cuda_norm_modulate, a);
  return {y, r};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_modulate_backward(
    const Tensor& dy, const OptTensor& dr, const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& weight,
    const OptTensor& bias, const OptTensor& residual, const OptTensor& gate, bool layer, double eps) {
  Call call(x);
  NormModulateBackwardArgs a;
  a.forward = arguments(call, x, scale, shift, weight, bias, residual, gate, layer, eps);
  check_sizes(dy, {x.size(0), x.size(1), x.size(2)}, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy must have x's dtype");
  a.dy = call.rows(dy, "dy");
  STD_TORCH_CHECK(!dr || residual, "dr needs residual");
  if (dr) {
    check_sizes(*dr, {x.size(0), x.size(1), x.size(2)}, "dr");
    STD_TORCH_CHECK(dr->scalar_type() == residual->scalar_type(), "dr must have residual's dtype");
    a.dr = call.rows(*dr, "dr");
  }
  Tensor dx = call.empty(x), dresidual = residual ? call.empty(*residual) : nothing(x);
  a.dx = call.output(dx, "dx");
  if (residual) a.dresidual = call.output(dresidual, "dresidual");
  a.run = run_of(x.size(0) * x.size(1));
  Gradient dscale = Gradient::of_modulation(call, scale, x, a.run, "dscale");
  Gradient dshift = Gradient::of_modulation(call, shift, x, a.run, "dshift");
  Gradient dgate = Gradient::of_modulation(call, gate, x, a.run, "dgate");
  // a piece is of one batch entry
  const int64_t tokens = (x.size(1) + a.run - 1) / a.run * a.run * x.size(0);
  Gradient dweight = Gradient::of_parameter(call, weight, x, tokens, a.run, "dweight");
  Gradient dbias = Gradient::of_parameter(call, bias, x, tokens, a.run, "dbias");
  if (x.numel() > 0) {
    a.dscale = dscale.sums;
    a.dshift = dshift.sums;
    a.dgate = dgate.sums;
    a.dweight = dweight.sums;
    a.dbias = dbias.sums;
    HH_CALL(call, hh_cuda_norm_modulate_backward, a);
  } else {
    for (Gradient* g : {&dscale, &dshift, &dgate, &dweight, &dbias}) torch::stable::zero_(g->out);
  }
  return {dx, dscale.out, dshift.out, dweight.out, dbias.out, dresidual, dgate.out};
}

}  // namespace
}  // namespace hh

STABLE_TORCH_LIBRARY_IMPL(HH_LIBRARY, HH_DEVICE_KEY, m) {
  m.impl("norm_modulate", TORCH_BOX(&hh::norm_modulate));
  m.impl("norm_modulate_backward", TORCH_BOX(&hh::norm_modulate_backward));
}
