// Bindings of qk_norm_rope.
#include "../qk_norm_rope.h"

#include <algorithm>

#include "sums.h"
#include "tensor.h"

namespace hh {
namespace {

// The arguments that q and k share.
struct How {
  const OptTensor &cos, &sin;
  int64_t norm;
  bool across_heads, interleaved;
  double eps;
  int64_t start;
  const OptTensor& order;
};

// cos or sin for x [B, S, H, D].
Table table(Call& call, const OptTensor& t, const Tensor& x, int64_t video, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 4, name, " must be [1 or B, S_video, 1 or H, D]");
  check_sizes(*t, {t->size(0) == 1 ? 1 : x.size(0), video, t->size(2) == 1 ? 1 : x.size(2), x.size(3)}, name);
  return {call.input(*t, name), step(*t, 0), t->stride(1), step(*t, 2)};
}

In channels(Call& call, const OptTensor& t, int64_t n, const char* name) {
  if (!t) return {};
  check_sizes(*t, {n}, name);
  return call.input(*t, name);
}

NormRopeArgs arguments(Call& call, const Tensor& x, const char* name, const How& how, const OptTensor& weight, const OptTensor& bias) {
  STD_TORCH_CHECK(how.norm >= 0 && how.norm <= 2, "norm must be 0 (none), 1 (rms) or 2 (layer)");
  STD_TORCH_CHECK(how.cos.has_value() == how.sin.has_value(), "cos and sin must both be given, or neither");
  NormRopeArgs a;
  a.x = call.heads(x, name);
  a.batch = x.size(0);
  a.tokens = x.size(1);
  a.heads = x.size(2);
  a.dim = x.size(3);
  STD_TORCH_CHECK(a.dim <= 256, name, " must have up to 256 channels a head");
  if (how.order) {
    STD_TORCH_CHECK(how.order->scalar_type() == ScalarType::Long && how.order->is_contiguous() && how.order->numel() == a.tokens,
                    "order must be contiguous int64 [S]");
    a.order = static_cast<const int64_t*>(call.read(*how.order, "order"));
  }
  a.norm = static_cast<Norm>(how.norm);
  a.across_heads = how.across_heads;
  a.interleaved = how.interleaved;
  a.eps = static_cast<float>(how.eps);
  a.start = how.start;
  a.video = how.cos ? how.cos->size(1) : 0;
  STD_TORCH_CHECK(a.start >= 0 && a.start + a.video <= a.tokens, "start is out of range");
  STD_TORCH_CHECK(!how.cos || a.dim % 2 == 0, "rotary pairs need an even number of channels");
  a.cos = table(call, how.cos, x, a.video, "cos");
  a.sin = table(call, how.sin, x, a.video, "sin");
  const int64_t affine = a.across_heads ? a.heads * a.dim : a.dim;
  a.weight = channels(call, weight, affine, "weight");
  a.bias = channels(call, bias, affine, "bias");
  return a;
}

void check_pair(const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3),
                  "q and k must be [B, S, H, D] with one B, S and D");
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const OptTensor& cos, const OptTensor& sin,
                                        const OptTensor& q_weight, const OptTensor& k_weight, const OptTensor& q_bias,
                                        const OptTensor& k_bias, int64_t norm, bool across_heads, bool interleaved, double eps,
                                        int64_t start, const OptTensor& order) {
  check_pair(q, k);
  const How how{cos, sin, norm, across_heads, interleaved, eps, start, order};
  const auto one = [&](const Tensor& x, const char* name, const OptTensor& weight, const OptTensor& bias) {
    Call call(x);
    NormRopeArgs a = arguments(call, x, name, how, weight, bias);
    Tensor y = call.empty(x);
    if (y.numel() == 0) return y;
    a.y = call.output(y, "y");
    HH_CALL(call, hh_cuda_norm_rope, a);
    return y;
  };
  Tensor y_q = one(q, "q", q_weight, q_bias), y_k = one(k, "k", k_weight, k_bias);
  return {y_q, y_k};
}

// What q and k add to the gradient of cos or sin: float32, from each head and batch entry; where heads have rows of their own there
// is one sum for each of them, else one for each row. Entries of q and k lie side by side.
struct TableSums {
  Tensor out;
  OptTensor terms;
  PartSums sums;
  bool by_head = false;
  int64_t heads = 0;

  TableSums(Call& call, const Tensor& t, const Tensor& q, const Tensor& k, const char* name) : out(call.empty(t)) {
    by_head = t.size(2) != 1;
    heads = by_head ? 2 : q.size(2) + k.size(2);  // that an entry of the batch sums over
    sums.entries = q.size(0) * heads;
    sums.summed = t.size(0) == q.size(0) ? heads : sums.entries;
    sums.rows = t.size(1) * t.size(2);
    sums.channels = t.size(3);
    if (out.numel() == 0) return;
    terms = call.empty(q, {sums.entries, sums.rows, sums.channels}, ScalarType::Float);
    sums.out = call.output(out, name);
    sums.whole = static_cast<float*>(call.write(*terms, name));
  }
  // Of q (first = 0) or k: where its heads' rows begin, and the steps between them.
  float* fill(NormRopeBackwardArgs& a, int64_t first) const {
    a.table_batch = heads * sums.rows * sums.channels;
    a.table_head = by_head ? sums.channels : sums.rows * sums.channels;
    a.table_token = by_head ? a.forward.heads * sums.channels : sums.channels;
    return sums.whole ? sums.whole + first * sums.rows * sums.channels : nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k, const OptTensor& cos, const OptTensor& sin,
    const OptTensor& q_weight, const OptTensor& k_weight, const OptTensor& q_bias, const OptTensor& k_bias, int64_t norm,
    bool across_heads, bool interleaved, double eps, int64_t start, const OptTensor& order, bool tables) {
  check_pair(q, k);
  const How how{cos, sin, norm, across_heads, interleaved, eps, start, order};
  Call call(q);
  std::optional<TableSums> dcos, dsin;
  if (tables && cos) {
    check_sizes(*sin, {cos->size(0), cos->size(1), cos->size(2), cos->size(3)}, "sin");
    dcos.emplace(call, *cos, q, k, "dcos");
    dsin.emplace(call, *sin, q, k, "dsin");
  }
  const auto one = [&](const Tensor& dy, const Tensor& x, const char* name, const OptTensor& weight, const OptTensor& bias,
                       int64_t first) {
    NormRopeBackwardArgs a;
    a.forward = arguments(call, x, name, how, weight, bias);
    check_sizes(dy, {x.size(0), x.size(1), x.size(2), x.size(3)}, "dq or dk");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "the gradient of an output must have the dtype of the output");
    a.dy = call.heads(dy, "dy");
    Tensor dx = call.empty(x);
    a.dx = call.output(dx, "dx");
    const int64_t rows = x.size(0) * x.size(1);
    a.run = run_of(rows);
    Gradient dweight = Gradient::of_parameter(call, weight, x, rows, a.run, "dweight");
    Gradient dbias = Gradient::of_parameter(call, bias, x, rows, a.run, "dbias");
    if (dcos) {
      a.dcos = dcos->fill(a, first);
      a.dsin = dsin->fill(a, first);
    }
    if (x.numel() > 0) {
      a.dweight = dweight.sums;
      a.dbias = dbias.sums;
      HH_CALL(call, hh_cuda_norm_rope_backward, a);
    } else {
      torch::stable::zero_(dweight.out);
      torch::stable::zero_(dbias.out);
    }
    return std::tuple<Tensor, Tensor, Tensor>(dx, dweight.out, dbias.out);
  };
  auto [dq, dq_weight, dq_bias] = one(grad_q, q, "q", q_weight, q_bias, 0);
  auto [dk, dk_weight, dk_bias] = one(grad_k, k, "k", k_weight, k_bias, dcos && dcos->by_head ? 1 : q.size(2));
  if (dcos) {
    if (q.numel() > 0)
      HH_CALL(call, hh_cuda_table_sums, (TableSumsArgs{dcos->sums, dsin->sums}));
    else
      for (auto* t : {&dcos->out, &dsin->out}) torch::stable::zero_(*t);
  }
  return {dq, dk, dcos ? dcos->out : nothing(q), dsin ? dsin->out : nothing(q), dq_weight, dk_weight, dq_bias, dk_bias};
}

}  // namespace
}  // namespace hh

STABLE_TORCH_LIBRARY_IMPL(HH_LIBRARY, HH_DEVICE_KEY, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&hh::qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&hh::qk_norm_rope_backward));
}
