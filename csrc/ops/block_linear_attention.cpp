// Schemas and bindings of block_linear_attention's two halves, the chunks' sums and the tokens' outputs, and their gradients.
// The prefix over chunks between them is made of torch's own operations.
#include <algorithm>
#include <vector>

#include "tensor.h"

namespace hhattn {
namespace {

// Tokens taken at once by a thread: few enough that the rotary tables' rows, which every head reads, stay in the cache.
constexpr int64_t kPiece = 1024;

// Chunks of `length` tokens, the last may be shorter; or, if there are any, of the lengths listed. No tokens are one empty chunk.
struct Chunks {
  int64_t tokens, length;
  const std::vector<int64_t>& listed;

  int64_t count() const {
    return listed.empty() ? std::max<int64_t>((tokens + length - 1) / length, 1) : static_cast<int64_t>(listed.size());
  }
};

Chunks chunks_of(const Tensor& x, int64_t length, const std::vector<int64_t>& listed) {
  STD_TORCH_CHECK(x.dim() == 4, "tokens must be [B, S, H, D]");
  int64_t sum = 0;
  for (const int64_t n : listed) sum += n;
  STD_TORCH_CHECK(listed.empty() ? length > 0 : sum == x.size(1), "the chunks' lengths must be positive and sum to S");
  return {x.size(1), length, listed};
}

struct Piece {
  int64_t chunk, begin, end;
  int32_t rank;
};

std::vector<Piece> pieces_of(const Chunks& chunks) {
  std::vector<Piece> pieces;
  for (int64_t chunk = 0, begin = 0, end; chunk < chunks.count(); ++chunk, begin = end) {
    end = chunks.listed.empty() ? std::min(begin + chunks.length, chunks.tokens) : begin + chunks.listed[chunk];
    int32_t rank = 0;
    for (int64_t at = begin; at < end; at += kPiece) pieces.push_back({chunk, at, std::min(at + kPiece, end), rank++});
  }
  return pieces;
}

// Heads taken at once, at most: rows of half a page that lie side by side, and matrices that fit the second cache.
int64_t group_of(int64_t heads, const LinearMaps& maps) {
  return std::clamp<int64_t>(512 / std::max<int64_t>({maps.dim, maps.v_dim, 1}), 1, std::max<int64_t>(heads, 1));
}

// f(piece, place, scratch) in parallel for every piece of every batch entry and group of heads; place counts (b, h, chunk), and is
// the first head's. Groups come first, so that they follow one another through the same rows of the rotary tables, and pieces of
// a chunk in order. Groups are smaller than `group` where threads would have nothing to do; a head's sums don't depend on it.
template <class F>
void for_pieces(int64_t batch, int64_t heads, const Chunks& chunks, const LinearMaps& maps, int64_t group, const F& f) {
  const std::vector<Piece> pieces = pieces_of(chunks);
  const int64_t count = static_cast<int64_t>(pieces.size()), chunk_count = chunks.count();
  const int64_t enough = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  group = std::clamp<int64_t>(batch * count * heads / enough, 1, group);
  const int64_t groups = (heads + group - 1) / group;
  std::vector<int32_t> turns(batch * heads * chunk_count, 0);
  for_each_item(batch * count * groups, kernels().block_linear_scratch(maps, group), [&](int64_t item, float* scratch) {
    const int64_t h = item % groups * group, b = item / groups / count;
    const Piece& p = pieces[item / groups % count];
    const int64_t place = (b * heads + h) * chunk_count + p.chunk;
    const LinearPiece piece{b, h, std::min(group, heads - h), p.begin, p.end, chunk_count, p.rank, &turns[place]};
    f(piece, place, scratch);
  });
}

FeatureMap feature_map(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 4, "phi and psi must be 0 (relu), 1 (identity), 2 (elu1), 3 (relu2), 4 (softmax)");
  return static_cast<FeatureMap>(number);
}

LinearMaps linear_maps(const OptTensor& cos, const OptTensor& sin, int64_t phi, int64_t psi, int64_t tokens, int64_t dim,
                       int64_t v_dim) {
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin must both be given, or neither");
  STD_TORCH_CHECK(dim <= 256 && v_dim <= 256, "the head dim must be at most 256");
  LinearMaps m;
  m.phi = feature_map(phi);
  m.psi = feature_map(psi);
  m.dim = dim;
  m.v_dim = v_dim;
  if (cos) {
    check_sizes(*cos, {tokens, dim}, "cos");
    check_sizes(*sin, {tokens, dim}, "sin");
    m.cos = {input(*cos, "cos"), 0, cos->stride(0), 0};
    m.sin = {input(*sin, "sin"), 0, sin->stride(0), 0};
  }
  return m;
}

const float* floats(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  check_sizes(t, sizes, name);
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_contiguous(), name,
                  " must be contiguous float32");
  return static_cast<const float*>(t.const_data_ptr());
}

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor new_floats(const Tensor& like, const std::vector<int64_t>& sizes, bool zeros = false) {
  using torch::headeronly::ScalarType;
  return zeros ? torch::stable::new_zeros(like, sizes, ScalarType::Float)
               : new_tensor(like, sizes, ScalarType::Float);
}

LinearSums sums_of(const Tensor& k, const Tensor& v, const OptTensor& gate, const OptTensor& cos, const OptTensor& sin,
                   int64_t phi, int64_t psi) {
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "k and v must be [B, S, H, D]");
  check_sizes(v, {k.size(0), k.size(1), k.size(2), v.size(3)}, "v");
  LinearSums a;
  a.maps = linear_maps(cos, sin, phi, psi, k.size(1), k.size(3), v.size(3));
  a.k = heads(k, "k");
  a.v = heads(v, "v");
  a.tokens = k.size(1);
  a.heads = k.size(2);
  a.gate = gate ? floats(*gate, {k.size(0), a.tokens, a.heads}, "gate") : nullptr;
  return a;
}

std::tuple<Tensor, Tensor> sums(const Tensor& k, const Tensor& v, const OptTensor& gate, const OptTensor& cos,
                                const OptTensor& sin, int64_t length, const std::vector<int64_t>& listed, int64_t phi, int64_t psi) {
  const LinearSums a = sums_of(k, v, gate, cos, sin, phi, psi);
  const Chunks chunks = chunks_of(k, length, listed);
  const int64_t size = a.maps.dim * a.maps.v_dim;
  const bool none = a.tokens == 0;  // nobody writes the sums
  Tensor kv = new_floats(k, {k.size(0), a.heads, chunks.count(), a.maps.dim, a.maps.v_dim}, none);
  Tensor k_sum = new_floats(k, {k.size(0), a.heads, chunks.count(), a.maps.dim}, none);
  for_pieces(k.size(0), a.heads, chunks, a.maps, group_of(a.heads, a.maps), [&](const LinearPiece& p, int64_t place, float* scratch) {
    kernels().block_linear_sums(a, p, floats(kv) + place * size, floats(k_sum) + place * a.maps.dim, scratch);
  });
  return {kv, k_sum};
}

std::tuple<Tensor, Tensor, Tensor> sums_backward(const Tensor& dkv, const Tensor& dk_sum, const Tensor& k, const Tensor& v,
                                                 const OptTensor& gate, const OptTensor& cos, const OptTensor& sin,
                                                 int64_t length, const std::vector<int64_t>& listed, int64_t phi, int64_t psi) {
  LinearSumsBackward g;
  g.forward = sums_of(k, v, gate, cos, sin, phi, psi);
  const LinearSums& a = g.forward;
  const Chunks chunks = chunks_of(k, length, listed);
  const int64_t size = a.maps.dim * a.maps.v_dim;
  const float* dkv_data = floats(dkv, {k.size(0), a.heads, chunks.count(), a.maps.dim, a.maps.v_dim}, "dkv");
  const float* dk_sum_data = floats(dk_sum, {k.size(0), a.heads, chunks.count(), a.maps.dim}, "dk_sum");
  Tensor dk = empty(k), dv = empty(v);
  Tensor dgate = gate ? empty(*gate) : torch::stable::new_empty(k, {0});
  g.dk = output(dk);
  g.dv = output(dv);
  g.dgate = gate ? floats(dgate) : nullptr;
  for_pieces(k.size(0), a.heads, chunks, a.maps, 1, [&](const LinearPiece& p, int64_t place, float* scratch) {
    kernels().block_linear_sums_backward(g, p, dkv_data + place * size, dk_sum_data + place * a.maps.dim, scratch);
  });
  return {dk, dv, dgate};
}

LinearOutputs outputs_of(const Tensor& q, const Tensor& kv, const OptTensor& cos, const OptTensor& sin, int64_t phi,
                         int64_t psi, bool normalize, double eps) {
  STD_TORCH_CHECK(q.dim() == 4 && kv.dim() == 5, "q must be [B, S, H, D], kv [B, H, chunks, D, Dv]");
  LinearOutputs a;
  a.maps = linear_maps(cos, sin, phi, psi, q.size(1), q.size(3), kv.size(4));
  a.q = heads(q, "q");
  a.tokens = q.size(1);
  a.heads = q.size(2);
  a.normalize = normalize;
  a.eps = static_cast<float>(eps);
  return a;
}

Tensor outputs(const Tensor& q, const Tensor& kv, const Tensor& k_sum, const OptTensor& cos, const OptTensor& sin,
               int64_t length, const std::vector<int64_t>& listed, int64_t phi, int64_t psi, bool normalize, double eps) {
  LinearOutputs a = outputs_of(q, kv, cos, sin, phi, psi, normalize, eps);
  const Chunks chunks = chunks_of(q, length, listed);
  const int64_t size = a.maps.dim * a.maps.v_dim;
  const float* kv_data = floats(kv, {q.size(0), a.heads, chunks.count(), a.maps.dim, a.maps.v_dim}, "kv");
  const float* k_sum_data = floats(k_sum, {q.size(0), a.heads, chunks.count(), a.maps.dim}, "k_sum");
  Tensor out = new_tensor(q, {q.size(0), a.tokens, a.heads, a.maps.v_dim});
  a.out = output(out);
  a.stream = bytes_of(out) > kStreamBytes;
  for_pieces(q.size(0), a.heads, chunks, a.maps, group_of(a.heads, a.maps), [&](const LinearPiece& p, int64_t place, float* scratch) {
    kernels().block_linear_outputs(a, p, kv_data + place * size, k_sum_data + place * a.maps.dim, scratch);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> outputs_backward(const Tensor& dout, const Tensor& q, const Tensor& kv,
                                                    const Tensor& k_sum, const Tensor& out, const OptTensor& cos,
                                                    const OptTensor& sin, int64_t length, const std::vector<int64_t>& listed, int64_t phi,
                                                    int64_t psi, bool normalize, double eps) {
  LinearOutputsBackward g;
  g.forward = outputs_of(q, kv, cos, sin, phi, psi, normalize, eps);
  LinearOutputs& a = g.forward;
  const Chunks chunks = chunks_of(q, length, listed);
  const int64_t size = a.maps.dim * a.maps.v_dim;
  const float* kv_data = floats(kv, {q.size(0), a.heads, chunks.count(), a.maps.dim, a.maps.v_dim}, "kv");
  const float* k_sum_data = floats(k_sum, {q.size(0), a.heads, chunks.count(), a.maps.dim}, "k_sum");
  check_sizes(dout, {q.size(0), a.tokens, a.heads, a.maps.v_dim}, "dout");
  check_sizes(out, {q.size(0), a.tokens, a.heads, a.maps.v_dim}, "out");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  a.out = {const_cast<void*>(out.const_data_ptr()), dtype_of(out, "out")};
  g.dout = heads(dout, "dout");
  Tensor dq = empty(q);
  Tensor dkv = new_floats(kv, {q.size(0), a.heads, chunks.count(), a.maps.dim, a.maps.v_dim}, a.tokens == 0);
  Tensor dk_sum = new_floats(kv, {q.size(0), a.heads, chunks.count(), a.maps.dim}, a.tokens == 0);
  g.dq = output(dq);
  for_pieces(q.size(0), a.heads, chunks, a.maps, 1, [&](const LinearPiece& p, int64_t place, float* scratch) {
    kernels().block_linear_outputs_backward(g, p, kv_data + place * size, k_sum_data + place * a.maps.dim,
                                            floats(dkv) + place * size, floats(dk_sum) + place * a.maps.dim, scratch);
  });
  return {dq, dkv, dk_sum};
}

}  // namespace
}  // namespace hhattn

STABLE_TORCH_LIBRARY_FRAGMENT(hhattn, m) {
  m.def(
      "block_linear_sums(Tensor k, Tensor v, Tensor? gate, Tensor? cos, Tensor? sin, SymInt length, int[] listed, int phi, int psi) -> "
      "(Tensor, Tensor)");
  m.def(
      "block_linear_sums_backward(Tensor dkv, Tensor dk_sum, Tensor k, Tensor v, Tensor? gate, Tensor? cos, Tensor? sin, "
      "SymInt length, int[] listed, int phi, int psi) -> (Tensor, Tensor, Tensor)");
  m.def(
      "block_linear_outputs(Tensor q, Tensor kv, Tensor k_sum, Tensor? cos, Tensor? sin, SymInt length, int[] listed, int phi, int psi, "
      "bool normalize, float eps) -> Tensor");
  m.def(
      "block_linear_outputs_backward(Tensor dout, Tensor q, Tensor kv, Tensor k_sum, Tensor out, Tensor? cos, Tensor? sin, "
      "SymInt length, int[] listed, int phi, int psi, bool normalize, float eps) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hhattn, CPU, m) {
  m.impl("block_linear_sums", TORCH_BOX(&hhattn::sums));
  m.impl("block_linear_sums_backward", TORCH_BOX(&hhattn::sums_backward));
  m.impl("block_linear_outputs", TORCH_BOX(&hhattn::outputs));
  m.impl("block_linear_outputs_backward", TORCH_BOX(&hhattn::outputs_backward));
}
