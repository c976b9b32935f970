// The ops as torch knows them: schemas, tensors turned into pointers and strides, work shared among threads. Written
// against torch's stable ABI, so that one build serves every later torch, and the only file that knows torch.
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>

#include "cpu/isa.h"

namespace hhattn {
namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// Least floats worth a thread of their own.
constexpr int64_t kGrain = 32768;

DType dtype_of(const Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

void check_sizes(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == sizes.begin()[d];
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

In input(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1, name, ": the last dim must be contiguous");
  return {t.const_data_ptr(), dtype_of(t, name)};
}

// An affine parameter of n channels.
In channels(const OptTensor& t, int64_t n, const char* name) {
  if (!t) return {};
  check_sizes(*t, {n}, name);
  return input(*t, name);
}

// A stride that does not move where the size is 1, so that a broadcast dim needs no copy.
int64_t step(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

Rows rows(const Tensor& t, const char* name) { return {input(t, name), t.stride(0), t.stride(1)}; }

Modulation modulation(const OptTensor& t, const Tensor& x, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 3, name, " must be [B or 1, F, C]");
  const int64_t tokens = x.size(1), count = t->size(1);
  check_sizes(*t, {t->size(0) == 1 ? 1 : x.size(0), count, x.size(2)}, name);
  STD_TORCH_CHECK(count == tokens || (count > 0 && tokens % count == 0), name, ": its rows must divide the tokens");
  return {input(*t, name), step(*t, 0), t->stride(1), count ? std::max<int64_t>(tokens / count, 1) : 1};
}

Tensor empty(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

Out output(Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t, "output")}; }

// kernel(args, begin, end, scratch) over `count` rows of `width` floats, in parallel.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args, int64_t count, int64_t width) {
  if (count == 0 || width == 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(kGrain / width, 1), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[args.scratch()]);
    kernel(args, begin, end, scratch.get());
  });
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
  run(kernels().norm_modulate, a, x.size(0) * a.tokens, a.channels);
  return {y, r};
}

// cos or sin for x [B, S, H, D].
Table table(const OptTensor& t, const Tensor& x, int64_t video, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 4, name, " must be [1 or B, S_video, 1 or H, D]");
  check_sizes(*t, {t->size(0) == 1 ? 1 : x.size(0), video, t->size(2) == 1 ? 1 : x.size(2), x.size(3)}, name);
  return {input(*t, name), step(*t, 0), t->stride(1), step(*t, 2)};
}

Tensor norm_rope(const Tensor& x, const char* name, NormRope a, const OptTensor& cos, const OptTensor& sin,
                 const OptTensor& weight, const OptTensor& bias) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [B, S, H, D]");
  a.cos = table(cos, x, a.video, "cos");
  a.sin = table(sin, x, a.video, "sin");
  a.x = input(x, name);
  a.batch = x.stride(0);
  a.token = x.stride(1);
  a.head = x.stride(2);
  a.tokens = x.size(1);
  a.heads = x.size(2);
  a.dim = x.size(3);
  const int64_t affine = a.across_heads ? a.heads * a.dim : a.dim;
  a.weight = channels(weight, affine, "weight");
  a.bias = channels(bias, affine, "bias");
  Tensor y = empty(x);
  a.y = output(y);
  run(kernels().norm_rope, a, x.size(0) * a.tokens, a.heads * a.dim);
  return y;
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const OptTensor& cos, const OptTensor& sin,
                                        const OptTensor& q_weight, const OptTensor& k_weight,
                                        const OptTensor& q_bias, const OptTensor& k_bias, int64_t norm,
                                        bool across_heads, bool interleaved, double eps, int64_t start,
                                        const OptTensor& order) {
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "norm must be 0 (none), 1 (rms) or 2 (layer)");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(1) == k.size(1), "q and k must be [B, S, H, D] with one S");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin must both be given, or neither");
  STD_TORCH_CHECK(!order || (order->scalar_type() == torch::headeronly::ScalarType::Long && order->is_contiguous() &&
                             order->numel() == q.size(1)),
                  "order must be contiguous int64 [S]");
  NormRope a;
  a.norm = static_cast<Norm>(norm);
  a.across_heads = across_heads;
  a.interleaved = interleaved;
  a.eps = static_cast<float>(eps);
  a.start = start;
  a.video = cos ? cos->size(1) : 0;
  a.order = order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr;
  STD_TORCH_CHECK(start >= 0 && start + a.video <= q.size(1), "start is out of range");
  return {norm_rope(q, "q", a, cos, sin, q_weight, q_bias), norm_rope(k, "k", a, cos, sin, k_weight, k_bias)};
}

}  // namespace

std::vector<std::string> op_names() { return {"norm_modulate", "qk_norm_rope"}; }

}  // namespace hhattn

STABLE_TORCH_LIBRARY(hhattn, m) {
  m.def(
      "norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? gate, bool layer, float eps) -> (Tensor, Tensor)");
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, "
      "Tensor? k_bias, int norm, bool across_heads, bool interleaved, float eps, int start, Tensor? order) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hhattn, CPU, m) {
  m.impl("norm_modulate", TORCH_BOX(&hhattn::norm_modulate));
  m.impl("qk_norm_rope", TORCH_BOX(&hhattn::qk_norm_rope));
}
