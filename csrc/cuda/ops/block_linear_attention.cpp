// Bindings of block_linear_attention's two halves, the chunks' sums and the tokens' outputs, and of their gradients. Every gradient but
// that in what a token holds is one of the forward's kernels with other arguments. The prefix over chunks is torch's own.
#include "../block_linear_attention.h"

#include <algorithm>
#include <vector>

#include "tensor.h"

namespace hh {
namespace {

constexpr int64_t MAX_DIM = 128;
constexpr int64_t ROUND = 64;           // tokens that a block of threads passes at once
constexpr int64_t LEAST = 4 * ROUND;    // of a piece: for fewer, writing its sums would take longer than making them
constexpr int64_t BLOCKS = 1024;        // pieces of all heads, about: several a multiprocessor. More would write more sums

int64_t up(int64_t a, int64_t b) { return a / b + (a % b != 0); }  // for b up to the largest

// Chunks that one launch takes, and the first one's number.
struct Run {
  LinearChunks chunks;
  int64_t place;
};

// Chunks of `length` tokens, or of the lengths listed: runs of equal ones, of which a shorter one may be the last. So no table of
// lengths is sent to the device. `rows`: batch entries times heads.
std::vector<Run> runs_of(int64_t tokens, int64_t rows, int64_t length, const std::vector<int64_t>& listed) {
  int64_t sum = 0, least = length;
  for (const int64_t n : listed) sum += n, least = std::min(least, n);
  STD_TORCH_CHECK(least > 0 && (listed.empty() || sum == tokens), "the chunks' lengths must be positive and sum to S");
  const int64_t most = std::max(LEAST, tokens * rows / BLOCKS);
  std::vector<Run> runs;
  const auto add = [&](int64_t begin, int64_t end, int64_t length, int64_t place) {
    length = std::min(length, end - begin);
    const int64_t pieces = up(length, most), piece = up(up(length, pieces), ROUND) * ROUND;
    runs.push_back({{begin, end, length, up(end - begin, length), pieces, piece}, place});
  };
  if (listed.empty() && tokens > 0) add(0, tokens, length, 0);
  const auto count = static_cast<int64_t>(listed.size());
  for (int64_t i = 0, begin = 0, j; i < count; i = j) {
    for (j = i; j < count && listed[j] == listed[i];) ++j;
    int64_t end = begin + (j - i) * listed[i];
    if (j < count && listed[j] < listed[i]) end += listed[j++];
    add(begin, end, listed[i], i);
    begin = end;
  }
  return runs;
}

int64_t chunks_of(int64_t tokens, int64_t length, const std::vector<int64_t>& listed) {
  return listed.empty() ? std::max<int64_t>(up(tokens, length), 1) : static_cast<int64_t>(listed.size());
}

// `wide`: several are read at once.
const float* floats(Call& call, const OptTensor& t, std::initializer_list<int64_t> sizes, const char* name, bool wide = false) {
  if (!t) return nullptr;
  check_sizes(*t, sizes, name);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(), name, " must be contiguous float32");
  const void* data = call.read(*t, name);
  STD_TORCH_CHECK(!wide || reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " must begin at a multiple of 16 bytes");
  return static_cast<const float*>(data);
}
float* new_floats(Call& call, Tensor& t, const char* name) { return static_cast<float*>(call.write(t, name)); }

// What x [B, S, H, D], k or q, needs of every kernel.
LinearRows rows_of(Call& call, const Tensor& x, const char* name, int64_t v_dim, const OptTensor& gate, const OptTensor& cos,
                   const OptTensor& sin, int64_t phi, int64_t psi) {
  LinearRows r;
  r.x = call.heads(x, name);
  r.batch = x.size(0), r.tokens = x.size(1), r.heads = x.size(2);
  STD_TORCH_CHECK(r.x.in.dtype != DType::f32, name, " must be float16 or bfloat16");
  STD_TORCH_CHECK(x.size(3) <= MAX_DIM && v_dim <= MAX_DIM, "the head dims must be at most ", MAX_DIM);
  STD_TORCH_CHECK(0 <= phi && phi <= 4 && 0 <= psi && psi <= 4, "phi and psi must be 0 (relu) to 4 (softmax)");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin must both be given, or neither");
  r.dim = static_cast<int>(x.size(3)), r.v_dim = static_cast<int>(v_dim);
  r.phi = static_cast<int>(phi), r.psi = static_cast<int>(psi);
  r.cos = floats(call, cos, {r.tokens, r.dim / 2}, "cos", true);
  r.sin = floats(call, sin, {r.tokens, r.dim / 2}, "sin", true);
  r.gate = floats(call, gate, {r.batch, r.tokens, r.heads}, "gate");
  return r;
}

struct How {
  int64_t length;
  const std::vector<int64_t>& listed;
};

// y [B, S, H, Dv], v or dout.
Heads values(Call& call, const LinearRows& r, const Tensor& y, const char* name) {
  check_sizes(y, {r.batch, r.tokens, r.heads, r.v_dim}, name);
  STD_TORCH_CHECK(dtype_of(y, name) == r.x.in.dtype, name, " must have the dtype of the other rows");
  return call.heads(y, name);
}

// Σ gate · R ψ(x) yᵀ and Σ weight · φ(x) of each chunk.
std::tuple<Tensor, Tensor> weighted_sums(Call& call, const LinearRows& rows, const Tensor& x, const Heads& y, const float* weight,
                                         const How& how, const char* kv_name, const char* k_sum_name) {
  LinearSumsArgs a;
  a.rows = rows, a.y = y, a.weight = weight;
  const int64_t count = chunks_of(rows.tokens, how.length, how.listed), lines = rows.batch * rows.heads;
  const auto made = [&](int64_t places, ScalarType type = ScalarType::Float) {
    return std::make_tuple(call.empty(x, {rows.batch, rows.heads, places, rows.dim, rows.v_dim}, type),
                           call.empty(x, {rows.batch, rows.heads, places, rows.dim}, type));
  };
  auto [kv, k_sum] = made(count);
  if (rows.tokens == 0 || kv.numel() == 0) return {torch::stable::zero_(kv), torch::stable::zero_(k_sum)};
  float *kv_data = new_floats(call, kv, kv_name), *k_sum_data = new_floats(call, k_sum, k_sum_name);
  for (const Run& run : runs_of(rows.tokens, lines, how.length, how.listed)) {
    const LinearChunks& c = a.rows.chunks = run.chunks;
    if (c.pieces == 1) {
      a.kv = kv_data, a.k_sum = k_sum_data, a.places = count, a.place = run.place;
      HH_CALL(call, hh_cuda_linear_sums, a);
      continue;
    }
    auto [kv_pieces, k_sum_pieces] = made(c.count * c.pieces);
    a.kv = new_floats(call, kv_pieces, "kv of pieces"), a.k_sum = new_floats(call, k_sum_pieces, "k_sum of pieces");
    a.places = c.count * c.pieces, a.place = 0;
    HH_CALL(call, hh_cuda_linear_sums, a);
    LinearFoldArgs fold{a.kv, kv_data, lines, int64_t{rows.dim} * rows.v_dim, c.count, c.pieces, count, run.place};
    HH_CALL(call, hh_cuda_linear_fold, fold);
    fold.from = a.k_sum, fold.to = k_sum_data, fold.size = rows.dim;
    HH_CALL(call, hh_cuda_linear_fold, fold);
  }
  return {kv, k_sum};
}

// gate · (R ψ(x))ᵀ KV [B, S, H, Dv], divided by φ(x)ᵀ K + eps if there is a K.
Tensor gated_outputs(Call& call, const LinearRows& rows, const Tensor& x, const float* kv, const float* k_sum, const How& how,
                     double eps, const char* name) {
  Tensor out = call.empty(x, {rows.batch, rows.tokens, rows.heads, rows.v_dim}, x.scalar_type());
  if (out.numel() == 0) return out;
  LinearOutputsArgs a;
  a.rows = rows;
  a.kv = kv, a.k_sum = k_sum;
  a.places = chunks_of(rows.tokens, how.length, how.listed);
  a.out = call.output(out, name);
  a.eps = static_cast<float>(eps);
  for (const Run& run : runs_of(rows.tokens, rows.batch * rows.heads, how.length, how.listed)) {
    a.rows.chunks = run.chunks, a.place = run.place;
    HH_CALL(call, hh_cuda_linear_outputs, a);
  }
  return out;
}

// The gradient in x, by what is in `a` already.
Tensor gradients(Call& call, LinearGradientsArgs& a, const Tensor& x, const How& how) {
  const LinearRows& rows = a.rows;
  a.places = chunks_of(rows.tokens, how.length, how.listed);
  Tensor dx = call.empty(x);
  if (x.numel() == 0) return dx;
  a.dx = call.output(dx, "dx");
  for (const Run& run : runs_of(rows.tokens, rows.batch * rows.heads, how.length, how.listed)) {
    a.rows.chunks = run.chunks, a.place = run.place;
    HH_CALL(call, hh_cuda_linear_gradients, a);
  }
  return dx;
}

struct State {
  const float *kv, *k_sum;
};
State state_of(Call& call, const LinearRows& r, const Tensor& kv, const Tensor& k_sum, const How& how, const char* kv_name,
               const char* k_sum_name) {
  const int64_t count = chunks_of(r.tokens, how.length, how.listed);
  return {floats(call, kv, {r.batch, r.heads, count, r.dim, r.v_dim}, kv_name, true),
          floats(call, k_sum, {r.batch, r.heads, count, r.dim}, k_sum_name)};
}

std::tuple<Tensor, Tensor> sums(const Tensor& k, const Tensor& v, const OptTensor& gate, const OptTensor& cos, const OptTensor& sin,
                                int64_t length, const std::vector<int64_t>& listed, int64_t phi, int64_t psi) {
  Call call(k);
  STD_TORCH_CHECK(v.dim() == 4, "v must be [B, S, H, D]");
  const LinearRows rows = rows_of(call, k, "k", v.size(3), gate, cos, sin, phi, psi);
  return weighted_sums(call, rows, k, values(call, rows, v, "v"), nullptr, {length, listed}, "kv", "k_sum");
}

std::tuple<Tensor, Tensor, Tensor> sums_backward(const Tensor& dkv, const Tensor& dk_sum, const Tensor& k, const Tensor& v,
                                                 const OptTensor& gate, const OptTensor& cos, const OptTensor& sin, int64_t length,
                                                 const std::vector<int64_t>& listed, int64_t phi, int64_t psi) {
  Call call(k);
  const How how{length, listed};
  LinearGradientsArgs a;
  STD_TORCH_CHECK(v.dim() == 4, "v must be [B, S, H, D]");
  a.rows = rows_of(call, k, "k", v.size(3), gate, cos, sin, phi, psi);
  const State state = state_of(call, a.rows, dkv, dk_sum, how, "dkv", "dk_sum");
  const Tensor dv = gated_outputs(call, a.rows, k, state.kv, nullptr, how, 0, "dv");
  a.y = values(call, a.rows, v, "v");
  Tensor dgate = gate ? call.empty(*gate) : torch::stable::new_empty(k, {0});
  a.kv = state.kv, a.k_sum = state.k_sum;
  if (gate && dgate.numel()) a.dgate = new_floats(call, dgate, "dgate");
  return {gradients(call, a, k, how), dv, dgate};
}

Tensor outputs(const Tensor& q, const Tensor& kv, const Tensor& k_sum, const OptTensor& cos, const OptTensor& sin, int64_t length,
               const std::vector<int64_t>& listed, int64_t phi, int64_t psi, bool normalize, double eps) {
  Call call(q);
  const How how{length, listed};
  STD_TORCH_CHECK(kv.dim() == 5, "kv must be [B, H, chunks, D, Dv]");
  const LinearRows rows = rows_of(call, q, "q", kv.size(4), std::nullopt, cos, sin, phi, psi);
  const State state = state_of(call, rows, kv, k_sum, how, "kv", "k_sum");
  return gated_outputs(call, rows, q, state.kv, normalize ? state.k_sum : nullptr, how, eps, "out");
}

std::tuple<Tensor, Tensor, Tensor> outputs_backward(const Tensor& dout, const Tensor& q, const Tensor& kv, const Tensor& k_sum,
                                                    const Tensor&, const OptTensor& cos, const OptTensor& sin, int64_t length,
                                                    const std::vector<int64_t>& listed, int64_t phi, int64_t psi, bool normalize,
                                                    double eps) {
  Call call(q);
  const How how{length, listed};
  STD_TORCH_CHECK(kv.dim() == 5, "kv must be [B, H, chunks, D, Dv]");
  LinearGradientsArgs a;
  a.rows = rows_of(call, q, "q", kv.size(4), std::nullopt, cos, sin, phi, psi);
  a.y = values(call, a.rows, dout, "dout");
  const State state = state_of(call, a.rows, kv, k_sum, how, "kv", "k_sum");
  a.kv = state.kv;
  Tensor factor = torch::stable::new_empty(q, {0}), weight = torch::stable::new_empty(q, {0});
  if (normalize) {
    a.k_sum = state.k_sum;
    a.eps = static_cast<float>(eps);
    for (Tensor* t : {&factor, &weight})
      *t = call.empty(q, {a.rows.batch, a.rows.tokens, a.rows.heads}, ScalarType::Float);
    a.factor = new_floats(call, factor, "factor"), a.weight = new_floats(call, weight, "weight");
  }
  const Tensor dq = gradients(call, a, q, how);
  LinearRows rows = a.rows;
  rows.gate = a.factor;
  auto [dkv, dk_sum] = weighted_sums(call, rows, q, a.y, a.weight, how, "dkv", "dk_sum");
  return {dq, dkv, normalize ? dk_sum : torch::stable::zero_(dk_sum)};
}

}  // namespace
}  // namespace hh

STABLE_TORCH_LIBRARY_IMPL(HH_LIBRARY, HH_DEVICE_KEY, m) {
  m.impl("block_linear_sums", TORCH_BOX(&hh::sums));
  m.impl("block_linear_sums_backward", TORCH_BOX(&hh::sums_backward));
  m.impl("block_linear_outputs", TORCH_BOX(&hh::outputs));
  m.impl("block_linear_outputs_backward", TORCH_BOX(&hh::outputs_backward));
}
