// What norm_modulate's forward and backward share: which row a thread works on, and its norm.
#pragma once
#include "norm_modulate.h"
#include "rows.cuh"

namespace hh {

struct Place {
  uint32_t row, b, s;  // of B * S; batch entry and token
};

// Divisions by what is known at launch only.
struct Places {
  uint32_t rows, tokens;
  Divisor by_tokens, by_scale, by_shift, by_gate;

  explicit Places(const NormModulateArgs& a)
      : rows(uint32_t(a.batch * a.tokens)), tokens(uint32_t(a.tokens)), by_tokens(a.tokens), by_scale(a.scale.each),
        by_shift(a.shift.each), by_gate(a.gate.each) {}

  HH_DEVICE Place place() const { return place(blockIdx.x * blockDim.y + threadIdx.y); }
  HH_DEVICE Place place(uint32_t row) const {
    const uint32_t b = by_tokens(row);
    return {row, b, row - b * tokens};
  }
  // Where the row of modulation begins that serves a token.
  HH_DEVICE int64_t scale(const Modulation& m, Place p) const { return p.b * m.batch + by_scale(p.s) * m.row; }
  HH_DEVICE int64_t shift(const Modulation& m, Place p) const { return p.b * m.batch + by_shift(p.s) * m.row; }
  HH_DEVICE int64_t gate(const Modulation& m, Place p) const { return p.b * m.batch + by_gate(p.s) * m.row; }
};

// Takes the mean from r; what lies beyond the row stays 0.
template <int VEC, int VECS>
HH_DEVICE void centre(Row<VEC, VECS>& r, uint32_t channels, float* partial) {
  float sum = 0;
  r.each([&](float& x) { sum += x; });
  const float mean = row_sum(sum, partial) / float(channels);
#pragma unroll
  for (int j = 0; j < VECS; ++j)
#pragma unroll
    for (int i = 0; i < VEC; ++i) r.v[j][i] = r.channel(j) < channels ? r.v[j][i] - mean : 0.0f;
}

HH_DEVICE float reciprocal_deviation(float sum_of_squares, const NormModulateArgs& a) {
  return 1.0f / sqrtf(sum_of_squares / float(a.channels) + a.eps);
}

// The widest vectors that the inputs allow.
inline Vectors fitting(const NormModulateArgs& a) {
  Vectors v(a.channels);
  v.fit(a.x.in.data, a.x.in.dtype, {a.x.batch, a.x.token}, true);
  v.fit(a.residual.in.data, a.residual.in.dtype, {a.residual.batch, a.residual.token}, true);
  for (const Modulation* m : {&a.scale, &a.shift, &a.gate}) v.fit(m->in.data, m->in.dtype, {m->batch, m->row}, false);
  for (const In* p : {&a.weight, &a.bias}) v.fit(p->data, p->dtype, {}, false);
  return v;
}

}  // namespace hh
