// wgmma: computed when issued, delivered when waited for. Until then its accumulators hold NaN and nobody may write its operands,
// in shared memory or in registers.
#include <algorithm>

#include "machine.h"
#include "numbers.h"

namespace simt {

// ---- operands in shared memory, by descriptor (PTX ISA, "Matrix descriptor")
struct Operand {
  uint32_t start, leading, stride;  // bytes
  unsigned width;                   // of a swizzled row, bytes; 16: not swizzled

  explicit Operand(uint64_t d)
      : start(uint32_t(d & 0x3fff) << 4), leading(uint32_t(d >> 16 & 0x3fff) << 4), stride(uint32_t(d >> 32 & 0x3fff) << 4) {
    static constexpr unsigned WIDTHS[] = {16, 128, 64, 32};
    width = WIDTHS[d >> 62];
  }

  // Address of 16 bytes: `chunk` along the contiguous dimension, `line` along the other.
  uint32_t address(unsigned line, unsigned chunk, bool mn_major) const {
    unsigned chunks = width / 16;
    uint32_t a = start + line % 8 * width + chunk % chunks * 16;
    // K-major lines are rows of M or N: eights of them are `stride` apart, and chunks beyond the width `leading`.
    // MN-major lines are k: eights of them are `stride` apart (`leading` when not swizzled, where the roles are exchanged).
    bool exchanged = mn_major && chunks == 1;
    a += line / 8 * (exchanged ? leading : stride) + chunk / chunks * (exchanged ? stride : leading);
    return a ^ ((a >> 7 & (chunks - 1)) << 4);
  }
};

static float element(const char *chunk, unsigned i, Element type) {
  if (type == Element::tf32) {
    uint32_t bits;
    memcpy(&bits, chunk + 4 * i, 4);
    return from_tf32(bits);
  }
  uint16_t bits;
  memcpy(&bits, chunk + 2 * i, 2);
  return type == Element::bf16 ? from_bf16(bits) : from_f16(bits);
}

// out[k][first .. first + rows), reading 16 bytes at a time; the cells join `held`.
static void load(const Operand &op, unsigned first, unsigned rows, Element type, bool mn_major, float *out, size_t pitch,
                 std::vector<uint32_t> &held, Site site) {
  const unsigned per_chunk = type == Element::tf32 ? 4 : 8, depth = type == Element::tf32 ? 8 : 16;
  const unsigned lines = mn_major ? depth : rows, chunks = (mn_major ? rows : depth) / per_chunk;
  for (unsigned line = 0; line < lines; line++)
    for (unsigned c = 0; c < chunks; c++) {
      uint32_t a = mn_major ? op.address(line, first / per_chunk + c, true) : op.address(first + line, c, false);
      auto *chunk = static_cast<const char *>(shared_ptr(a, site));
      access(chunk, 16, Access::read, site, 16);
      check_proxy(a, 16, site);
      for (unsigned i = 0; machine.options.checks && i < 4; i++) held.push_back(uint32_t(cell_of(a)) + i);
      for (unsigned i = 0; i < per_chunk; i++) {
        unsigned row = mn_major ? c * per_chunk + i : line, k = mn_major ? line : c * per_chunk + i;
        out[k * pitch + row] = element(chunk, i, type);
      }
    }
}

// A's registers hold 16 rows as mma.sync's do.
static void unpack(unsigned lane, const uint32_t *const *a, Element type, float (*out)[16]) {
  unsigned row = lane / 4, column = lane % 4;
  for (unsigned i = 0; i < 4; i++) {
    unsigned r = row + i % 2 * 8;
    if (type == Element::tf32) {
      out[column + i / 2 * 4][r] = from_tf32(*a[i]);
      continue;
    }
    for (unsigned half = 0; half < 2; half++) {
      auto bits = uint16_t(*a[i] >> 16 * half);
      out[column * 2 + half + i / 2 * 8][r] = type == Element::bf16 ? from_bf16(bits) : from_f16(bits);
    }
  }
}

// ---- the instruction
struct WgmmaArg {
  const Wgmma *op;
  uint32_t *const *d;
  const uint32_t *const *a;
  uint64_t a_desc, b_desc;
  Site site;
};

// This lane's accumulator: one that is in flight, or the registers' values, which are poisoned from now on.
static Accumulator &accumulator(Warp &w, unsigned lane, const WgmmaArg &x) {
  auto [it, fresh] = w.accumulators.try_emplace({lane, x.d[0]});
  Accumulator &acc = it->second;
  unsigned count = x.op->n / 2;
  if (fresh) {
    acc.registers.assign(x.d, x.d + count);
    for (uint32_t *r : acc.registers) {
      acc.values.push_back(bits_to_float(*r));
      *r = 0xffffffff;
    }
    if (!w.wgmma_fenced && lane == 0)
      report(x.site, "wgmma-no-fence", "wgmma.mma_async on registers that no wgmma.fence has handed over");
  } else if (!std::equal(acc.registers.begin(), acc.registers.end(), x.d, x.d + count)) {
    report(x.site, "wgmma-pending", "its accumulators overlap those of a wgmma in flight and are not the same");
    stop();
  }
  bool listed = false;
  for (auto &key : w.open.accumulators) listed |= key == it->first;
  if (!listed) {
    w.open.accumulators.push_back(it->first);
    acc.users++;
  }
  return acc;
}

static void multiply(uint32_t mask, void *const *args) {
  auto &x0 = *static_cast<WgmmaArg *>(args[0]);
  if (mask != 0xffffffff) {
    report(x0.site, "divergence", "wgmma needs every lane of the warp; %08x came", mask);
    stop();
  }
  const Wgmma &op = *x0.op;
  Warp &w = *machine.warp;
  const unsigned depth = op.type == Element::tf32 ? 8 : 16, n = op.n;
  float a[16][16];
  static float b[16 * 256];
  size_t held = w.open.operands.size();
  machine.as_warp = true;
  if (x0.a)
    for (unsigned lane = 0; lane < WARP; lane++) {
      auto *registers = static_cast<WgmmaArg *>(args[lane])->a;
      unpack(lane, registers, op.type, a);
      for (unsigned i = 0; i < 4; i++) {
        w.open.sources.emplace_back(lane, registers[i]);
        w.sources[w.open.sources.back()]++;
      }
    }
  else
    load(Operand(x0.a_desc), machine.fiber->thread.warp % 4 * 16, 16, op.type, op.trans_a, a[0], 16, w.open.operands, x0.site);
  load(Operand(x0.b_desc), 0, n, op.type, op.trans_b, b, 256, w.open.operands, x0.site);
  machine.as_warp = false;
  for (; held < w.open.operands.size(); held++) machine.block->cells[w.open.operands[held]].held++;

  static float c[16][256];
  const float sign = float(op.scale_a * op.scale_b);
  memset(c, 0, sizeof c);
  for (unsigned r = 0; r < 16; r++)
    for (unsigned k = 0; k < depth; k++)
      for (unsigned j = 0; j < n; j++) c[r][j] += a[k][r] * b[k * 256 + j];
  for (unsigned lane = 0; lane < WARP; lane++) {
    Accumulator &acc = accumulator(w, lane, *static_cast<WgmmaArg *>(args[lane]));
    for (unsigned i = 0; i < n / 2; i++) {
      float product = sign * c[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
      acc.values[i] = op.accumulate ? acc.values[i] + product : product;
    }
  }
}

void wgmma(const Wgmma &op, uint32_t *const *d, const uint32_t *const *a, uint64_t a_desc, uint64_t b_desc, Site site) {
  WgmmaArg x{&op, d, a, a_desc, b_desc, site};
  aligned_collective(multiply, &x, "wgmma.mma_async", site);
}

void wgmma_fence(Site site) {
  aligned_collective([](uint32_t, void *const *) { machine.warp->wgmma_fenced = true; }, nullptr, "wgmma.fence", site);
}

static void commit(uint32_t, void *const *) {
  Warp &w = *machine.warp;
  w.committed.push_back(std::move(w.open));
  w.open = {};
}

void wgmma_commit(Site site) { aligned_collective(commit, nullptr, "wgmma.commit_group", site); }

static void deliver(Warp &w, const WgmmaGroup &group) {
  for (auto &key : group.accumulators) {
    auto it = w.accumulators.find(key);
    Accumulator &acc = it->second;
    if (--acc.users) continue;
    for (size_t i = 0; i < acc.registers.size(); i++) *acc.registers[i] = float_to_bits(acc.values[i]);
    w.accumulators.erase(it);
  }
  for (auto &key : group.sources)
    if (auto it = w.sources.find(key); !--it->second) w.sources.erase(it);
  for (uint32_t cell : group.operands) machine.block->cells[cell].held--;
  note_reads(group.operands);
}

static void wait(uint32_t, void *const *args) {
  Warp &w = *machine.warp;
  for (unsigned n = *static_cast<unsigned *>(args[0]); w.committed.size() > n; w.committed.pop_front()) deliver(w, w.committed.front());
  w.wgmma_fenced = false;
}

void wgmma_wait(unsigned n, Site site) { aligned_collective(wait, &n, "wgmma.wait_group", site); }

bool wgmma_register(const void *p) {
  const unsigned lane = machine.fiber->thread.lane;
  auto &all = machine.warp->accumulators;
  for (auto it = all.lower_bound({lane, nullptr}); it != all.end() && it->first.first == lane; ++it)
    for (uint32_t *r : it->second.registers)
      if (r == p) return true;
  return false;
}

void wgmma_touch(const void *reg, Site site) {
  if (!machine.warp->accumulators.empty() && wgmma_register(reg))
    report(site, "wgmma-pending", "an accumulator is used while the wgmma that writes it is in flight (no wgmma.wait_group)");
}

bool wgmma_source(const void *p) {
  return machine.warp->sources.count({machine.fiber->thread.lane, static_cast<const uint32_t *>(p)});
}

void wgmma_overwrite(const void *reg, Site site) {
  if (!machine.warp->sources.empty() && wgmma_source(reg))
    report(site, "async-source", "a register of A is written while the wgmma that reads it is in flight (no wgmma.wait_group)");
}

}  // namespace simt
