// qk_norm_rope forward, of q or of k: a head is read once and written once, in between it stays in registers.
#include "qk_norm_rope.cuh"

namespace hh {

template <int VEC, bool VECTORS, bool HALVES, bool ACROSS>
__global__ void __launch_bounds__(THREADS<VEC, ACROSS>)
    norm_rope_tokens(const __grid_constant__ NormRopeArgs a, HeadShape shape, Divisor by_tokens, uint32_t rows) {
  using Part = HeadPart<VEC, VECTORS, HALVES>;
  DYNAMIC_SHARED(smem);
  auto* partial = reinterpret_cast<float*>(smem);
  const uint32_t group = threadIdx.x / shape.lanes;
  const uint32_t row = ACROSS ? blockIdx.x : blockIdx.x * (GROUP_THREADS / shape.lanes) + group;
  const bool in_rows = row < rows;
  const Token t = token_of(a, by_tokens, in_rows ? row : 0);
  const bool by_head = a.cos.head || a.sin.head;
  const float count = float(ACROSS ? a.heads * a.dim : a.dim);
  const auto load_angles = [&](Part& cos, Part& sin, uint32_t h, bool there) {
    cos.load(a.cos.in, t.b * a.cos.batch + t.at * a.cos.token + h * a.cos.head, shape, there);
    sin.load(a.sin.in, t.b * a.sin.batch + t.at * a.sin.token + h * a.sin.head, shape, there);
  };
  Part cos, sin;
  if (t.rotates && !by_head && !ACROSS) load_angles(cos, sin, 0, in_rows);

  const auto heads = uint32_t(a.heads);
  for (uint32_t h = ACROSS ? group : 0; ACROSS || h < heads; ++h) {
    const bool there = in_rows && h < heads;  // all threads come to the sums
    Part x, other;
    x.template load<true>(a.x.in, t.b * a.x.batch + t.s * a.x.token + h * a.x.head, shape, there);
    if (a.norm != Norm::none) {
      centre<ACROSS>(x, a, shape, count, there, partial);
      float squares[1] = {0};
      x.each([&](float& v) { squares[0] += v * v; });
      norm_sums<ACROSS>(squares, shape.lanes, partial + 32);
      const float rstd = 1.0f / sqrtf(squares[0] / count + a.eps);
      x.each([&](float& v) { v *= rstd; });
    }
    const int64_t affine = ACROSS ? h * a.dim : 0;
    if (a.weight.data) {
      other.load(a.weight, affine, shape, there);
      x.each([](float& v, float weight) { v *= weight; }, other);
    }
    if (a.bias.data) {
      other.load(a.bias, affine, shape, there);
      x.each([](float& v, float bias) { v += bias; }, other);
    }
    if (t.rotates) {
      if (by_head || ACROSS) load_angles(cos, sin, h, there);
      Part::pairs([&](int ja, int ia, int jb, int ib) {
        const float first = x.v[ja][ia], second = x.v[jb][ib];
        x.v[ja][ia] = first * cos.v[ja][ia] - second * sin.v[ja][ia];
        x.v[jb][ib] = second * cos.v[jb][ib] + first * sin.v[jb][ib];
      });
    }
    if (there) x.store(a.y, (int64_t(row) * a.heads + h) * a.dim, shape);
    if (ACROSS) break;
  }
}

}  // namespace hh

extern "C" int hh_cuda_norm_rope(const hh::NormRopeArgs* args, void* stream) {
  using namespace hh;
  HeadVectors vectors(*args);
  vectors.fit(args->y);
  const auto rows = uint32_t(args->batch * args->tokens);
  return with_heads(vectors, args->across_heads, [&]<int VEC, bool VECTORS, bool HALVES, bool ACROSS>() {
    const HeadShape shape(VEC, args->dim);
    const HeadBlock block(shape, args->heads, ACROSS);
    return launch("norm_rope", norm_rope_tokens<VEC, VECTORS, HALVES, ACROSS>, dim3((rows + block.tokens - 1) / block.tokens),
                  dim3(block.threads), block.shared(2), stream, *args, shape, Divisor(args->tokens), rows);
  });
}
