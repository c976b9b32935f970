// Schemas and bindings of norm_modulate.
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

std::tuple<Tensor, Tensor> norm_modulate(const Tensor& x, const OptTensor& scale, const OptTensor& shift,
                                         const OptTensor& weight, const OptTensor& bias, const OptTensor& residual,
                                         const OptTensor& gate, bool layer, double eps) {
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
  Tensor y = empty(x);
  a.y = output(y);
  Tensor r = residual ? empty(*residual) : torch::stable::new_empty(x, {0});
  if (residual) {
    check_sizes(*residual, {x.size(0), a.tokens, a.channels}, "residual");
    a.residual = rows(*residual, "residual");
    a.r = output(r);
  }
  a.stream = bytes_of(y) + bytes_of(r) > kStreamBytes;
  run(kernels().norm_modulate, a, x.size(0) * a.tokens, a.channels);
  return {y, r};
}

}  // namespace
}  // namespace hhattn

STABLE_TORCH_LIBRARY_FRAGMENT(hhattn, m) {
  m.def(
      "norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? gate, bool layer, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hhattn, CPU, m) { m.impl("norm_modulate", TORCH_BOX(&hhattn::norm_modulate)); }
