// qk_norm_rope backward, of q or of k. With n = norm(x), v = n * weight + bias, g = dy turned back by the angles and u = g * weight:
//   dx = rstd (u - n mean(u n) - mean(u)),    dbias = sum of g,    dweight = sum of g n
//   dcos = sum of dy v,    dsin_a = -sum of dy_a v_b,    dsin_b = sum of dy_b v_a,    over heads, q and k, and a batch that shares them
// A block has a piece of the tokens, as they were written, and sums for weight and bias in registers.
#include "part_sums.cuh"
#include "qk_norm_rope.cuh"

namespace hh {

// What the threads of a block whose heads have norms of their own have summed: of all groups, into parts[piece]. `shared` is for
// GROUP_THREADS / 32 rows of 2 * VEC * lanes floats.
template <class Part, int VEC>
HH_DEVICE void add_groups(Part& sum, float* parts, int64_t piece, const HeadShape& shape, float* shared) {
  const uint32_t lanes = shape.lanes, warp = threadIdx.x / 32, width = 2 * VEC * lanes;
  for (uint32_t by = lanes; by < 32; by *= 2) sum.each([&](float& x) { x += __shfl_xor_sync(0xffffffffu, x, int(by)); });
  __syncthreads();  // the row before may still be read
  if (threadIdx.x % 32 < lanes)
#pragma unroll
    for (int i = 0; i < 2 * VEC; ++i) shared[warp * width + i * lanes + Part::lane(shape)] = sum.v[i / VEC][i % VEC];
  __syncthreads();
  if (threadIdx.x >= lanes) return;
#pragma unroll
  for (int i = 0; i < 2 * VEC; ++i) {
    float& total = sum.v[i / VEC][i % VEC];
    total = 0;
    for (int w = 0; w < GROUP_THREADS / 32; ++w) total += shared[w * width + i * lanes + threadIdx.x];
  }
  sum.store({parts, DType::f32}, piece * shape.dim, shape);
}

template <int VEC, bool VECTORS, bool HALVES, bool ACROSS>
__global__ void __launch_bounds__(THREADS<VEC, ACROSS>)
    norm_rope_pieces(const __grid_constant__ NormRopeBackwardArgs b, HeadShape shape, Divisor by_tokens, uint32_t rows) {
  using Part = HeadPart<VEC, VECTORS, HALVES>;
  DYNAMIC_SHARED(smem);
  auto* partial = reinterpret_cast<float*>(smem);
  const NormRopeArgs& a = b.forward;
  const uint32_t group = threadIdx.x / shape.lanes, at_once = ACROSS ? 1 : GROUP_THREADS / shape.lanes;
  const uint32_t begin = blockIdx.x * uint32_t(b.run), end = min(begin + uint32_t(b.run), rows), heads = uint32_t(a.heads);
  const bool by_head = a.cos.head || a.sin.head;
  const float count = float(ACROSS ? a.heads * a.dim : a.dim);
  Part to_weight, to_bias;
  to_weight.fill(0), to_bias.fill(0);

  for (uint32_t first = begin; first < end; first += at_once) {
    const uint32_t row = ACROSS ? first : first + group;
    const bool in_rows = row < end;
    const Token t = token_of(a, by_tokens, in_rows ? row : 0);
    const uint32_t out = row - t.b * uint32_t(a.tokens);
    const auto load_angles = [&](Part& cos, Part& sin, uint32_t h, bool there) {
      cos.load(a.cos.in, t.b * a.cos.batch + t.at * a.cos.token + h * a.cos.head, shape, there);
      sin.load(a.sin.in, t.b * a.sin.batch + t.at * a.sin.token + h * a.sin.head, shape, there);
    };
    Part cos, sin;
    if (t.rotates && !by_head && !ACROSS) load_angles(cos, sin, 0, in_rows);
    for (uint32_t h = ACROSS ? group : 0; ACROSS || h < heads; ++h) {
      const bool there = in_rows && h < heads;  // all threads come to the sums
      const int64_t affine = ACROSS ? h * a.dim : 0, dy = t.b * b.dy.batch + out * b.dy.token + h * b.dy.head;
      Part x, g, u, other;
      x.template load<true>(a.x.in, t.b * a.x.batch + t.s * a.x.token + h * a.x.head, shape, there);
      g.template load<true>(b.dy.in, dy, shape, there);
      if (t.rotates) {
        if (by_head || ACROSS) load_angles(cos, sin, h, there);
        Part::pairs([&](int ja, int ia, int jb, int ib) {
          const float first = g.v[ja][ia], second = g.v[jb][ib];
          g.v[ja][ia] = first * cos.v[ja][ia] + second * sin.v[jb][ib];
          g.v[jb][ib] = second * cos.v[jb][ib] - first * sin.v[ja][ia];
        });
      }
      u = g;
      if (a.weight.data) {
        other.load(a.weight, affine, shape, there);
        u.each([](float& v, float weight) { v *= weight; }, other);
      }
      if (a.norm != Norm::none) {
        centre<ACROSS>(x, a, shape, count, there, partial);
        float sums[3] = {0, 0, 0};  // of x^2, u x, u
        u.each([&](float& v, float x) { sums[0] += x * x, sums[1] += v * x, sums[2] += v; }, x);
        // where rms has no other barrier, the sums of the token before may still be read
        norm_sums<ACROSS>(sums, shape.lanes, partial + 32 + first % 2 * 96);
        const float rstd = 1.0f / sqrtf(sums[0] / count + a.eps);
        x.each([&](float& v) { v *= rstd; });  // n
        const float slope = rstd * sums[1] / count, mean = a.norm == Norm::layer ? sums[2] / count : 0.0f;
        u.each([&](float& v, float n) { v = rstd * (v - n * slope - mean); }, x);
      }
      if (there) u.store(b.dx, ((int64_t(t.b) * a.tokens + t.s) * a.heads + h) * a.dim, shape);
      to_bias.each([](float& sum, float g) { sum += g; }, g);
      to_weight.each([](float& sum, float g, float n) { sum += g * n; }, g, x);
      if (b.dcos && t.rotates && there) {
        if (a.weight.data) {
          other.load(a.weight, affine, shape);
          x.each([](float& n, float weight) { n *= weight; }, other);
        }
        if (a.bias.data) {
          other.load(a.bias, affine, shape);
          x.each([](float& n, float bias) { n += bias; }, other);  // v
        }
        g.load(b.dy.in, dy, shape);
        u = g;
        u.each([](float& to_cos, float v) { to_cos *= v; }, x);
        const int64_t at = t.b * b.table_batch + h * b.table_head + t.at * b.table_token;
        u.store({b.dcos, DType::f32}, at, shape);
        Part::pairs([&](int ja, int ia, int jb, int ib) {
          u.v[ja][ia] = -g.v[ja][ia] * x.v[jb][ib];
          u.v[jb][ib] = g.v[jb][ib] * x.v[ja][ia];
        });
        u.store({b.dsin, DType::f32}, at, shape);
      }
      if (ACROSS) break;
    }
  }
  if constexpr (ACROSS) {
    const int64_t at = (int64_t(blockIdx.x) * a.heads + group) * a.dim;
    if (b.dweight.parts && group < heads) to_weight.store({b.dweight.parts, DType::f32}, at, shape);
    if (b.dbias.parts && group < heads) to_bias.store({b.dbias.parts, DType::f32}, at, shape);
  } else {
    if (b.dweight.parts) add_groups<Part, VEC>(to_weight, b.dweight.parts, blockIdx.x, shape, partial);
    if (b.dbias.parts) add_groups<Part, VEC>(to_bias, b.dbias.parts, blockIdx.x, shape, partial);
  }
}

}  // namespace hh

extern "C" int hh_cuda_norm_rope_backward(const hh::NormRopeBackwardArgs* args, void* stream) {
  using namespace hh;
  const NormRopeArgs& a = args->forward;
  HeadVectors vectors(a);
  vectors.fit(args->dy);
  vectors.fit(args->dx);
  const auto rows = uint32_t(a.batch * a.tokens);
  int error = with_heads(vectors, a.across_heads, [&]<int VEC, bool VECTORS, bool HALVES, bool ACROSS>() {
    const HeadShape shape(VEC, a.dim);
    const HeadBlock block(shape, a.heads, ACROSS);
    const size_t groups = ACROSS ? 0 : GROUP_THREADS / 32 * 2 * VEC * shape.lanes * sizeof(float);
    return launch("norm_rope_backward", norm_rope_pieces<VEC, VECTORS, HALVES, ACROSS>,
                  dim3(unsigned((rows + args->run - 1) / args->run)), dim3(block.threads), std::max(groups, block.shared(7)), stream,
                  *args, shape, Divisor(a.tokens), rows);
  });
  for (const PartSums* sums : {&args->dweight, &args->dbias})
    if (!error) error = launch_sum_parts(*sums, stream);
  return error;
}

extern "C" int hh_cuda_table_sums(const hh::TableSumsArgs* args, void* stream) {
  const int error = hh::launch_sum_parts(args->dcos, stream);
  return error ? error : hh::launch_sum_parts(args->dsin, stream);
}
