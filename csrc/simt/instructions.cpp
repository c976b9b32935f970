// The instructions of ptx.h that a whole warp does together.
#include "machine.h"
#include "ptx.h"

namespace simt::ptx {

static void need_whole_warp(uint32_t mask, const char *what, Site site) {
  if (mask == 0xffffffff) return;
  report(site, "divergence", "%s needs every lane of the warp; %08x came", what, mask);
  stop();
}

// ---- ldmatrix, stmatrix
struct MatrixArg {
  uint32_t *r;
  uint32_t address;
  unsigned count;
  bool trans;
  Site site;
};

// The place of a lane's register in an 8x8 matrix: two neighbours of a row, or of a column when transposed.
static unsigned place(unsigned lane, unsigned half, bool trans) {
  unsigned row = lane / 4, column = lane % 4 * 2 + half;
  return trans ? column * 8 + row : row * 8 + column;
}

static uint32_t addresses(void *const *args, uint32_t *out) {
  for (unsigned lane = 0; lane < WARP; lane++) out[lane] = static_cast<MatrixArg *>(args[lane])->address;
  unsigned count = static_cast<MatrixArg *>(args[0])->count;
  return count == 4 ? ~0u : (1u << 8 * count) - 1;
}

static void load_matrices(uint32_t mask, void *const *args) {
  auto &x0 = *static_cast<MatrixArg *>(args[0]);
  need_whole_warp(mask, "ldmatrix", x0.site);
  uint32_t address[WARP], rows = addresses(args, address);
  warp_read(x0.site, address, rows, 16);
  uint16_t matrix[4][64];
  for (unsigned i = 0; i < 8 * x0.count; i++) memcpy(&matrix[i / 8][i % 8 * 8], shared_ptr(address[i], x0.site), 16);
  for (unsigned lane = 0; lane < WARP; lane++)
    for (unsigned m = 0; m < x0.count; m++)
      static_cast<MatrixArg *>(args[lane])->r[m] =
          matrix[m][place(lane, 0, x0.trans)] | uint32_t(matrix[m][place(lane, 1, x0.trans)]) << 16;
}

void ldmatrix(uint32_t *r, unsigned count, bool trans, uint32_t address, Site site) {
  MatrixArg x{r, address, count, trans, site};
  aligned_collective(load_matrices, &x, trans ? "ldmatrix.trans" : "ldmatrix", site);
}

static void gather_rows(uint32_t mask, void *const *args) {  // each lane gets the row that it stores
  auto &x0 = *static_cast<MatrixArg *>(args[0]);
  need_whole_warp(mask, "stmatrix", x0.site);
  uint16_t matrix[4][64];
  for (unsigned lane = 0; lane < WARP; lane++)
    for (unsigned m = 0; m < x0.count; m++)
      for (unsigned half = 0; half < 2; half++)
        matrix[m][place(lane, half, x0.trans)] = uint16_t(static_cast<MatrixArg *>(args[lane])->r[m] >> 16 * half);
  for (unsigned i = 0; i < 8 * x0.count; i++) memcpy(static_cast<MatrixArg *>(args[i])->r, &matrix[i / 8][i % 8 * 8], 16);
}

void stmatrix(uint32_t address, const uint32_t *r, unsigned count, bool trans, Site site) {
  uint32_t row[4] = {};
  std::copy(r, r + count, row);
  MatrixArg x{row, address, count, trans, site};
  aligned_collective(gather_rows, &x, trans ? "stmatrix.trans" : "stmatrix", site);
  if (self->lane < 8 * count) mem_write(shared_ptr(address, site), 16, row, site);
}

// ---- mma.sync
struct MmaArg {
  uint32_t *d;
  const uint32_t *a, *b, *c;
  Mma kind;
  Site site;
};

static bool is_tf32(Mma m) { return m == Mma::tf32_k8 || m == Mma::tf32_k4; }
static bool is_bf16(Mma m) { return m == Mma::bf16_k16 || m == Mma::bf16_k8; }
static bool f16_sums(Mma m) { return m == Mma::f16_k16_f16 || m == Mma::f16_k8_f16; }
static unsigned depth(Mma m) {
  if (is_tf32(m)) return m == Mma::tf32_k8 ? 8 : 4;
  return m == Mma::bf16_k8 || m == Mma::f16_k8 || m == Mma::f16_k8_f16 ? 8 : 16;
}

// Two elements of 16 bits, or one of tf32, of a register to consecutive places `step` apart.
static void spread(uint32_t bits, Mma kind, float *out, size_t step) {
  if (is_tf32(kind)) {
    out[0] = from_tf32(bits);
    return;
  }
  out[0] = is_bf16(kind) ? from_bf16(uint16_t(bits)) : from_f16(uint16_t(bits));
  out[step] = is_bf16(kind) ? from_bf16(uint16_t(bits >> 16)) : from_f16(uint16_t(bits >> 16));
}

static float sum_in(const MmaArg &x, unsigned i) {
  return f16_sums(x.kind) ? from_f16(uint16_t(x.c[i / 2] >> 16 * (i % 2))) : bits_to_float(x.c[i]);
}

static void multiply(uint32_t mask, void *const *args) {
  auto &x0 = *static_cast<MmaArg *>(args[0]);
  need_whole_warp(mask, "mma.sync", x0.site);
  const unsigned k_size = depth(x0.kind), per = is_tf32(x0.kind) ? 1 : 2;  // elements of a register
  alignas(64) float a[16][16], b[16][8], c[16][8];
  for (unsigned lane = 0; lane < WARP; lane++) {
    auto &x = *static_cast<MmaArg *>(args[lane]);
    unsigned row = lane / 4, column = lane % 4;
    for (unsigned k = 0, i = 0; k < k_size; k += 4 * per, i++) {
      spread(x.a[2 * i], x.kind, &a[row][k + column * per], 1);
      spread(x.a[2 * i + 1], x.kind, &a[row + 8][k + column * per], 1);
      spread(x.b[i], x.kind, &b[k + column * per][row], 8);
    }
    for (unsigned i = 0; i < 4; i++) c[row + i / 2 * 8][column * 2 + i % 2] = sum_in(x, i);
  }
  for (unsigned r = 0; r < 16; r++)
    for (unsigned k = 0; k < k_size; k++)
      for (unsigned j = 0; j < 8; j++) c[r][j] += a[r][k] * b[k][j];
  for (unsigned lane = 0; lane < WARP; lane++) {
    auto &x = *static_cast<MmaArg *>(args[lane]);
    for (unsigned i = 0; i < 4; i += 2) {
      const float *pair = &c[lane / 4 + i / 2 * 8][lane % 4 * 2];
      if (f16_sums(x.kind))
        x.d[i / 2] = pack_f16(pair[1], pair[0]);
      else
        x.d[i] = float_to_bits(pair[0]), x.d[i + 1] = float_to_bits(pair[1]);
    }
  }
}

void mma(Mma kind, uint32_t *d, const uint32_t *a, const uint32_t *b, const uint32_t *c, Site site) {
  static constexpr const char *NAMES[] = {"mma.k16.bf16", "mma.k8.bf16", "mma.k16.f16",     "mma.k8.f16",
                                          "mma.k8.tf32",  "mma.k4.tf32", "mma.k16.f16.f16", "mma.k8.f16.f16"};
  MmaArg x{d, a, b, c, kind, site};
  aligned_collective(multiply, &x, NAMES[int(kind)], site);
}

// ---- shuffles and votes
struct LaneArg {
  uint32_t value, source, out;
  Site site;
  Redux op;
};

static void exchange(uint32_t mask, void *const *args) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    unsigned lane = unsigned(__builtin_ctz(rest));
    auto &x = *static_cast<LaneArg *>(args[lane]);
    if (mask >> x.source & 1) {
      x.out = static_cast<LaneArg *>(args[x.source])->value;
    } else {
      report(x.site, "mask", "shfl.sync: lane %u reads lane %u, which takes no part (mask %08x)", lane, x.source, mask);
      x.out = 0xffffffff;
    }
  }
}

uint32_t shfl(Shfl mode, uint32_t value, uint32_t b, uint32_t c, uint32_t mask, bool *in_range, Site site) {
  static constexpr const char *NAMES[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
  const int lane = int(self->lane), by = int(b & 31), clamp = int(c & 31), segment = int(c >> 8 & 31);
  const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  int source = lane;
  bool ok = true;
  switch (mode) {
    case Shfl::idx: source = first | (by & ~segment), ok = source <= last; break;
    case Shfl::up: source = lane - by, ok = source >= last; break;
    case Shfl::down: source = lane + by, ok = source <= last; break;
    case Shfl::bfly: source = lane ^ by, ok = source <= last; break;
  }
  LaneArg x{value, uint32_t(ok ? source : lane), 0, site, Redux::add};
  collective(exchange, mask, &x, NAMES[int(mode)], site);
  if (in_range) *in_range = ok;
  return x.out;
}

static void ballot(uint32_t mask, void *const *args) {
  uint32_t out = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    if (static_cast<LaneArg *>(args[__builtin_ctz(rest)])->value) out |= rest & -rest;
  for (uint32_t rest = mask; rest; rest &= rest - 1) static_cast<LaneArg *>(args[__builtin_ctz(rest)])->out = out;
}

uint32_t vote_ballot(bool p, uint32_t mask, Site site) {
  LaneArg x{p, 0, 0, site, Redux::add};
  collective(ballot, mask, &x, "vote.ballot", site);
  return x.out;
}

static uint32_t combine(Redux op, uint32_t a, uint32_t b) {
  switch (op) {
    case Redux::add: return a + b;
    case Redux::min_s32: return uint32_t(std::min(int32_t(a), int32_t(b)));
    case Redux::max_s32: return uint32_t(std::max(int32_t(a), int32_t(b)));
    case Redux::min_u32: return std::min(a, b);
    case Redux::max_u32: return std::max(a, b);
    case Redux::and_: return a & b;
    case Redux::or_: return a | b;
    case Redux::xor_: return a ^ b;
  }
  return 0;
}

static void reduce(uint32_t mask, void *const *args) {
  uint32_t rest = mask, out = static_cast<LaneArg *>(args[__builtin_ctz(rest)])->value;
  Redux op = static_cast<LaneArg *>(args[__builtin_ctz(rest)])->op;
  for (rest &= rest - 1; rest; rest &= rest - 1) out = combine(op, out, static_cast<LaneArg *>(args[__builtin_ctz(rest)])->value);
  for (rest = mask; rest; rest &= rest - 1) static_cast<LaneArg *>(args[__builtin_ctz(rest)])->out = out;
}

uint32_t redux(Redux op, uint32_t value, uint32_t mask, Site site) {
  static constexpr const char *NAMES[] = {"redux.add",     "redux.min.s32", "redux.max.s32", "redux.min.u32",
                                          "redux.max.u32", "redux.and",     "redux.or",      "redux.xor"};
  LaneArg x{value, 0, 0, site, op};
  collective(reduce, mask, &x, NAMES[int(op)], site);
  return x.out;
}

bool elect(uint32_t mask, uint32_t *leader, Site site) {
  collective(nullptr, mask, nullptr, "elect", site);
  unsigned lowest = unsigned(__builtin_ctz(mask));
  if (leader) *leader = lowest;
  return self->lane == lowest;
}

// ---- fused multiply-add of 16-bit floats, rounded once: the product is exact in double, and so is rounding to odd before the last
template <class From, class To>
static uint16_t fma_once(uint16_t a, uint16_t b, uint16_t c, From from, To to) {
  double product = double(from(a)) * double(from(b)), addend = double(from(c)), sum = product + addend;
  double rest = std::fabs(product) >= std::fabs(addend) ? addend - (sum - product) : product - (sum - addend);
  float f = float(sum);
  double missing = (sum - double(f)) + rest;  // what float lost: keep its sign in the last bit
  uint32_t bits = float_to_bits(f);
  if (missing != 0 && std::isfinite(f) && !(bits & 1)) {
    bool up = (missing > 0) == (f >= 0);
    bits = f == 0 ? float_to_bits(float(std::copysign(1e-45, missing))) : up ? bits | 1 : bits - 1;
  }
  return to(bits_to_float(bits), Round::nearest);
}

uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) { return fma_once(a, b, c, from_bf16, to_bf16); }
uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c) { return fma_once(a, b, c, from_f16, to_f16); }

}  // namespace simt::ptx
