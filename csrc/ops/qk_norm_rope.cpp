// Schemas and bindings of qk_norm_rope.
#include "tensor.h"

namespace hhattn {
namespace {

// cos or sin for x [B, S, H, D].
Table table(const OptTensor& t, const Tensor& x, int64_t video, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 4, name, " must be [1 or B, S_video, 1 or H, D]");
  check_sizes(*t, {t->size(0) == 1 ? 1 : x.size(0), video, t->size(2) == 1 ? 1 : x.size(2), x.size(3)}, name);
  return {input(*t, name), step(*t, 0), t->stride(1), step(*t, 2)};
}

// The arguments that q and k share.
NormRope common(const Tensor& q, const Tensor& k, const OptTensor& cos, const OptTensor& sin, int64_t norm, bool across_heads,
                bool interleaved, double eps, int64_t start, const OptTensor& order) {
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
  return a;
}

NormRope arguments(const Tensor& x, const char* name, NormRope a, const OptTensor& cos, const OptTensor& sin,
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
  return a;
}

Tensor norm_rope(const Tensor& x, NormRope a) {
  Tensor y = empty(x);
  a.y = output(y);
  a.stream = bytes_of(y) > kStreamBytes;
  run(kernels().norm_rope, a, x.size(0) * a.tokens, a.heads * a.dim);
  return y;
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const OptTensor& cos, const OptTensor& sin,
                                        const OptTensor& q_weight, const OptTensor& k_weight,
                                        const OptTensor& q_bias, const OptTensor& k_bias, int64_t norm,
                                        bool across_heads, bool interleaved, double eps, int64_t start,
                                        const OptTensor& order) {
  const NormRope a = common(q, k, cos, sin, norm, across_heads, interleaved, eps, start, order);
  return {norm_rope(q, arguments(q, "q", a, cos, sin, q_weight, q_bias)),
          norm_rope(k, arguments(k, "k", a, cos, sin, k_weight, k_bias))};
}

// The gradients of one of q and k, and what they are made of.
struct Gradients {
  Tensor dx, dweight, dbias;
  Sums weight_sums, bias_sums;
  NormRopeGradients to;

  Gradients(const Tensor& dy, const Tensor& x, const NormRope& forward, const OptTensor& weight, const OptTensor& bias)
      : dx(empty(x)), dweight(weight ? empty(*weight) : nothing(x)), dbias(bias ? empty(*bias) : nothing(x)),
        weight_sums(dweight), bias_sums(dbias) {
    check_sizes(dy, {x.size(0), x.size(1), x.size(2), x.size(3)}, "dq or dk");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "the gradient of an output must have the dtype of the output");
    to.forward = forward;
    to.forward.stream = bytes_of(dx) > kStreamBytes;
    to.dy = heads(dy, "dq or dk");
    to.dx = output(dx);
    to.dweight = weight ? weight_sums.data() : nullptr;
    to.dbias = bias ? bias_sums.data() : nullptr;
  }
  void store() {
    weight_sums.store();
    bias_sums.store();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k, const OptTensor& cos, const OptTensor& sin,
    const OptTensor& q_weight, const OptTensor& k_weight, const OptTensor& q_bias, const OptTensor& k_bias, int64_t norm,
    bool across_heads, bool interleaved, double eps, int64_t start, const OptTensor& order, bool tables) {
  const NormRope shared = common(q, k, cos, sin, norm, across_heads, interleaved, eps, start, order);
  STD_TORCH_CHECK(q.size(0) == k.size(0), "q and k must have one batch");
  Gradients dq(grad_q, q, arguments(q, "q", shared, cos, sin, q_weight, q_bias), q_weight, q_bias);
  Gradients dk(grad_k, k, arguments(k, "k", shared, cos, sin, k_weight, k_bias), k_weight, k_bias);
  NormRopeBackward a{dq.to, dk.to};
  a.batches = q.size(0);
  a.piece = kPieceRows;
  Tensor dcos = nothing(q), dsin = nothing(q);
  if (tables && cos) {
    check_sizes(*sin, {cos->size(0), cos->size(1), cos->size(2), cos->size(3)}, "sin");
    dcos = torch::stable::new_zeros(*cos, cos->sizes());
    dsin = torch::stable::new_zeros(*sin, sin->sizes());
    a.dcos = output(dcos);
    a.dsin = output(dsin);
    a.table_width = cos->size(2) * cos->size(3);
    a.table_batch = cos->size(0) == a.batches ? cos->size(1) * a.table_width : 0;
    a.q.table_head = a.k.table_head = cos->size(2) == 1 ? 0 : cos->size(3);
    // the batch entries that share a row of the table belong to one piece
    if (a.table_batch == 0 && a.batches > 0) a.piece = (kPieceRows + a.batches - 1) / a.batches * a.batches;
  }
  int32_t turn = 0;
  if (q_weight || k_weight || q_bias || k_bias) a.turn = &turn;
  const int64_t pieces = q.size(3) ? (a.batches * q.size(1) + a.piece - 1) / a.piece : 0;
  for_each_item(pieces, a.scratch(), [&](int64_t piece, float* scratch) { kernels().norm_rope_backward(a, piece, scratch); });
  dq.store();
  dk.store();
  return {dq.dx, dk.dx, dcos, dsin, dq.dweight, dk.dweight, dq.dbias, dk.dbias};
}

}  // namespace
}  // namespace hhattn

STABLE_TORCH_LIBRARY_FRAGMENT(hhattn, m) {
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, "
      "Tensor? k_bias, int norm, bool across_heads, bool interleaved, float eps, int start, Tensor? order) -> "
      "(Tensor, Tensor)");
  m.def(
      "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor? q_weight, "
      "Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, int norm, bool across_heads, bool interleaved, float eps, int start, "
      "Tensor? order, bool tables) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hhattn, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&hhattn::qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&hhattn::qk_norm_rope_backward));
}
