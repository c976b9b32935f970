// Memory that threads share: registered tensors and the block's shared memory, each with a shadow that knows who wrote and read what
// and when.
#include <algorithm>
#include <cstdlib>

#include "machine.h"

namespace simt {

// ---- shared memory's addresses
static char *static_at(uint32_t offset) { return machine.static_shared + offset; }

void *dynamic_shared() { return machine.block->shared; }

void *shared_ptr(uint32_t address, Site site) {
  if (address - SHARED_BASE <= machine.shared_bytes) return machine.block->shared + (address - SHARED_BASE);
  if (address - STATIC_BASE <= machine.static_bytes) return static_at(address - STATIC_BASE);
  report(site, "shared-oob", "shared address %#x: dynamic shared memory is %#x to %#zx", address, SHARED_BASE,
         SHARED_BASE + machine.shared_bytes);
  stop();
}

uint32_t shared_address(const void *p, Site site) {
  auto *c = static_cast<const char *>(p);
  if (c >= machine.block->shared && c <= machine.block->shared + machine.shared_bytes)
    return SHARED_BASE + uint32_t(c - machine.block->shared);
  if (machine.static_shared && c >= machine.static_shared && c <= machine.static_shared + machine.static_bytes)
    return STATIC_BASE + uint32_t(c - machine.static_shared);
  report(site, "shared-oob", "a pointer that is not to shared memory was converted to a shared address");
  stop();
}

size_t cell_of(uint32_t address) {
  return address < STATIC_BASE ? (address - SHARED_BASE) / 4 : DYNAMIC_CELLS + (address - STATIC_BASE) / 4;
}

void begin_memory(Block &b) {
  memset(b.shared, POISON, machine.shared_bytes);
  memset(b.cells.get(), 0, (machine.shared_bytes + 3) / 4 * sizeof(Cell));
  memset(b.cells.get() + DYNAMIC_CELLS, 0, machine.static_bytes / 4 * sizeof(Cell));
  // entries are of the past once all clocks have gone up; but not where the layout by warps changed, or clocks grow out of 22 bits
  size_t wanted = size_t(machine.warps) * SHARED_CELLS;
  uint32_t clock = 0;
  for (const Warp &w : b.warps) clock = std::max(clock, w.clock);
  if (b.reads.size() != wanted || clock > 1u << 21) {
    b.reads.assign(wanted, Reads{});
    clock = 1;
  }
  for (Warp &w : b.warps) {
    w.seen.fill(clock);
    w.fenced.fill(clock);
    w.clock = clock + 1;
  }
}

// ---- who was it
static void race(Site site, const char *space, const std::string &where, const char *what, unsigned other) {
  report(site, "race", "%s%s: %s thread %u with nothing that orders them between", space, where.c_str(), what, other);
}

static std::string plus(size_t offset) { return "+" + std::to_string(offset); }

// ---- shared memory, cell by cell. `mask`: the bytes of the cell that are touched.
struct Toucher {
  Block &block = *machine.block;
  Warp &warp = *machine.warp;
  uint16_t thread = machine.as_warp ? 0xffff : uint16_t(machine.fiber->index);  // the warp is another than each of its lanes
  unsigned warp_index = machine.fiber->thread.warp, lane = machine.as_warp ? WARP : machine.fiber->thread.lane;
  Site site;
};

static std::string shared_name(size_t cell) {
  return cell < DYNAMIC_CELLS ? plus(cell * 4) : " (static)" + plus((cell - DYNAMIC_CELLS) * 4);
}

// Has another thread written these bytes, unordered? `atomic`: this is an atomic too, and those don't race.
static const uint16_t *by_other(const Cell &c, unsigned mask, const Toucher &me, bool atomic = false) {
  if (c.wrote & mask && c.writer != me.thread && !(atomic && c.atomic) && c.clock > me.warp.seen[warp_of(c.writer)] &&
      !seen_by_lane(c.writer, c.clock))
    return &c.writer;
  const Older &o = c.older;
  if (__builtin_expect(o.wrote & mask, 0) && o.writer != me.thread && !(atomic && o.atomic) &&
      o.clock > me.warp.seen[warp_of(o.writer)] && !seen_by_lane(o.writer, o.clock))
    return &o.writer;
  return nullptr;
}

static void note_read(const Toucher &me, size_t index, unsigned mask) {
  Reads &reads = me.block.reads[index * machine.warps + me.warp_index];
  for (unsigned h = 0; h < 2; h++) {
    if (!(mask >> 2 * h & 3)) continue;
    uint32_t &last = reads.half[h];
    unsigned lane = me.lane, bytes = mask >> 2 * h & 3, before = last >> 2 & 63;
    if (last >> 8 > me.warp.seen[me.warp_index] && (before == lane || last & bytes)) {  // the last read may go on unordered
      if (before != lane) lane = WARP;
      if (last >> 8 == me.warp.clock) bytes |= last & 3;
    }
    last = me.warp.clock << 8 | lane << 2 | bytes;
  }
}

static void read_cell(Toucher &me, size_t index, unsigned mask) {
  Cell &c = me.block.cells[index];
  if (__builtin_expect(c.pending, 0))
    report(me.site, "async-pending", "shared%s: read while an asynchronous copy into it is in flight", shared_name(index).c_str());
  else if (__builtin_expect((c.init & mask) != mask, 0))
    report(me.site, "uninitialized", "shared%s: read, and never written", shared_name(index).c_str());
  if (auto *other = by_other(c, mask, me); __builtin_expect(other != nullptr, 0))
    race(me.site, "shared", shared_name(index), "read after a write by", *other);
  note_read(me, index, mask);
}

// A wgmma of the running warp may have read these cells until now.
void note_reads(const std::vector<uint32_t> &cells) {
  machine.as_warp = true;
  const Toucher me{.site = {}};
  machine.as_warp = false;
  for (uint32_t cell : cells) note_read(me, cell, 15);
}

// Of several readers it isn't known who: one that the lane has met stands for all.
static bool seen_by_some_lane(unsigned warp, uint32_t clock) {
  if (machine.warp->lane_seen.empty() && machine.warp->lane_met.empty() && machine.warp->lane_knows.empty()) return false;
  for (unsigned lane = 0; lane < WARP; lane++)
    if (seen_by_lane(warp * WARP + lane, clock)) return true;
  return false;
}

static void check_readers(const Toucher &me, size_t index, unsigned mask) {
  const Reads *reads = &me.block.reads[index * machine.warps];
  for (unsigned w = 0; w < machine.warps; w++)
    for (unsigned h = 0; h < 2; h++) {
      uint32_t r = reads[w].half[h];
      if (__builtin_expect(r >> 8 <= me.warp.seen[w] || !(r & mask >> 2 * h & 3), 1)) continue;
      unsigned lane = r >> 2 & 63;
      if (w == me.warp_index && lane == me.lane) continue;
      if (lane < WARP ? seen_by_lane(w * WARP + lane, r >> 8) : seen_by_some_lane(w, r >> 8)) continue;
      return race(me.site, "shared", shared_name(index), "written after a read by", w * WARP + (lane == WARP ? me.lane ^ 1 : lane));
    }
}

static void write_cell(Toucher &me, size_t index, unsigned mask, Access kind, bool benign) {
  Cell &c = me.block.cells[index];
  if (__builtin_expect(c.pending, 0))
    report(me.site, "async-pending", "shared%s: written while an asynchronous copy into it is in flight", shared_name(index).c_str());
  if (__builtin_expect(c.held, 0))
    report(me.site, "async-source", "shared%s: written while a wgmma or bulk store that reads it is in flight", shared_name(index).c_str());
  const bool atomic = kind == Access::atomic;
  if (auto *other = benign ? nullptr : by_other(c, mask, me, atomic); __builtin_expect(other != nullptr, 0))
    race(me.site, "shared", shared_name(index), "written after a write by", *other);
  if (!(atomic && c.atomic)) check_readers(me, index, mask);
  bool more = c.writer == me.thread && c.clock == me.warp.clock;
  if (unsigned left = c.wrote & ~mask; left && !more)
    c.older = {c.clock, c.writer, uint8_t(left), c.atomic};
  else
    c.older.wrote &= uint8_t(~mask);
  c.wrote = more ? c.wrote | mask : mask;
  c.init |= mask;
  c.writer = me.thread;
  c.clock = me.warp.clock;
  c.atomic = atomic;
  c.async = 0;
}

static unsigned byte_mask(size_t offset, size_t begin, size_t end) {  // of the cell at `offset`
  unsigned from = begin > offset ? unsigned(begin - offset) : 0, to = unsigned(std::min<size_t>(end - offset, 4));
  return ((1u << to) - 1) & ~((1u << from) - 1);
}

static void touch_shared(size_t first_cell, size_t offset, size_t bytes, Access kind, Site site, bool benign) {
  Toucher me{.site = site};
  size_t end = offset + bytes;
  for (size_t o = offset & ~size_t(3); o < end; o += 4) {
    unsigned mask = byte_mask(o, offset, end);
    if (kind == Access::read)
      read_cell(me, first_cell + o / 4, mask);
    else
      write_cell(me, first_cell + o / 4, mask, kind, benign);
  }
}

void check_proxy(uint32_t address, size_t bytes, Site site) {
  if (!machine.options.checks) return;
  for (size_t i = cell_of(address), end = cell_of(address + uint32_t(bytes) - 1); i <= end; i++) {
    const Cell &c = machine.block->cells[i];
    const auto &fenced = machine.warp->fenced;
    bool older = c.older.wrote && c.older.clock > fenced[warp_of(c.older.writer)];
    if (!c.init || c.async || (c.clock <= fenced[warp_of(c.writer)] && !older)) continue;
    return report(site, "no-proxy-fence",
                  "shared%s: written by thread %u the ordinary way and read by the async proxy, with no fence.proxy.async between",
                  shared_name(i).c_str(), older ? c.older.writer : c.writer);
  }
}

// ---- global memory
static Tensor *tensor_of(const char *p) {
  Tensor *t = machine.last_tensor;
  if (t && p >= t->begin && p < t->end) return t;
  for (Tensor &each : machine.tensors)
    if (p >= each.begin && p < each.end) return machine.last_tensor = &each;
  return nullptr;
}

static bool in_launch(uint32_t serial) { return serial >= machine.first_serial; }
static unsigned linear(uint32_t serial) { return machine.serials[serial - machine.first_serial]; }

// A write by `block` or, in this block, `thread` came before this access.
static void after_write(const Tensor &t, size_t offset, uint32_t block, unsigned thread, uint32_t clock, const char *now, Site site,
                        bool benign) {
  if (!in_launch(block)) return;
  if (block != machine.block->serial)  // whatever the value: no compiler replicates a block
    report(site, "race", "%s+%zu: %s after a write by block %u of the same launch", t.name.c_str(), offset, now, linear(block));
  else if (!benign && !ordered(thread, clock))
    race(site, t.name.c_str(), plus(offset), (now + std::string(" after a write by")).c_str(), thread);
}

static void read_global(const Tensor &t, GlobalCell &c, size_t offset, unsigned mask, Site site) {
  const Block &b = *machine.block;
  if (t.access == SIMT_WRITE_FIRST && (c.init & mask) != mask)
    report(site, "uninitialized", "%s+%zu: read, and never written", t.name.c_str(), offset);
  if (c.wrote & mask) after_write(t, offset, c.write_block, c.writer, c.write_clock, "read", site, false);
  if (c.older_wrote & mask) after_write(t, offset, c.older_block, c.older_writer, c.older_clock, "read", site, false);
  if (c.read_block != b.serial) {
    c.other_read = 0;
  } else if (c.reader == machine.fiber->index) {
    if (c.read_clock == machine.warp->clock) mask |= c.read;
  } else if (!ordered(c.reader, c.read_clock)) {  // two stand for all unordered readers: a writer is at most one of them
    c.other_read = c.read;
    c.other_reader = c.reader;
    c.other_clock = c.read_clock;
  }
  c.several = in_launch(c.read_block) && (c.several || c.read_block != b.serial);
  c.read_block = b.serial;
  c.read_clock = machine.warp->clock;
  c.reader = uint16_t(machine.fiber->index);
  c.read = mask & 15;
}

static void write_global(const Tensor &t, GlobalCell &c, size_t offset, unsigned mask, Access kind, Site site, bool benign) {
  const Block &b = *machine.block;
  bool atomic = kind == Access::atomic;
  if (c.wrote & mask && !(atomic && c.atomic))
    after_write(t, offset, c.write_block, c.writer, c.write_clock, "written", site, benign);
  if (c.older_wrote & mask && !(atomic && c.atomic))
    after_write(t, offset, c.older_block, c.older_writer, c.older_clock, "written", site, benign);
  if (c.read_block == b.serial && c.other_read & mask && !ordered(c.other_reader, c.other_clock))
    race(site, t.name.c_str(), plus(offset), "written after a read by", c.other_reader);
  if (in_launch(c.read_block) && c.read & mask) {
    if (c.several || c.read_block != b.serial)
      report(site, "race", "%s+%zu: written after a read by block %u of the same launch", t.name.c_str(), offset, linear(c.read_block));
    else if (!ordered(c.reader, c.read_clock))
      race(site, t.name.c_str(), plus(offset), "written after a read by", c.reader);
  }
  bool more = c.write_block == b.serial && c.writer == machine.fiber->index && c.write_clock == machine.warp->clock;
  if (unsigned left = c.wrote & ~mask; left && !more) {
    c.older_wrote = left & 15;
    c.older_block = c.write_block;
    c.older_writer = c.writer;
    c.older_clock = c.write_clock;
  } else {
    c.older_wrote = c.older_wrote & ~mask & 15;
  }
  c.wrote = more ? c.wrote | mask : mask;
  c.init |= mask;
  c.write_block = b.serial;
  c.write_clock = machine.warp->clock;
  c.writer = uint16_t(machine.fiber->index);
  c.atomic = atomic;
}

static void touch_global(const Tensor &t, size_t offset, size_t bytes, Access kind, Site site, bool benign) {
  if (!t.cells) return;
  for (size_t o = offset & ~size_t(3), end = offset + bytes; o < end; o += 4) {
    unsigned mask = byte_mask(o, offset, end);
    if (kind == Access::read)
      read_global(t, t.cells[o / 4], o, mask, site);
    else
      write_global(t, t.cells[o / 4], o, mask, kind, site, benign);
  }
}

static void outside(const char *p, size_t bytes, Access kind, Site site) {
  const Tensor *nearest = nullptr;
  long distance = 0;
  for (const Tensor &t : machine.tensors) {
    long d = p < t.begin ? p - t.begin : p - t.end;
    if (!nearest || labs(d) < labs(distance)) nearest = &t, distance = d;
  }
  const char *what = kind == Access::read ? "read" : "write";
  if (nearest)
    report(site, "global-oob", "%zu-byte %s in no tensor: %ld bytes %s %s (%zu bytes)", bytes, what, labs(distance),
           distance < 0 ? "before" : "past the end of", nearest->name.c_str(), size_t(nearest->end - nearest->begin));
  else
    report(site, "global-oob", "%zu-byte %s at %p: no tensor is registered", bytes, what, static_cast<const void *>(p));
  stop();
}

// ---- every access comes here
static bool touch_if_shared(const char *p, size_t bytes, Access kind, Site site, bool benign) {
  size_t size, offset = size_t(p - machine.block->shared), first = 0;
  if (offset < DYNAMIC_BYTES) {
    size = machine.shared_bytes;
  } else if (machine.static_shared && (offset = size_t(p - machine.static_shared)) < machine.static_bytes) {
    size = machine.static_bytes, first = DYNAMIC_CELLS;
  } else {
    return false;
  }
  if (offset + bytes > size) {
    report(site, "shared-oob", "shared+%zu: %zu bytes, where the launch gave %zu", offset, bytes, size);
    stop();
  }
  touch_shared(first, offset, bytes, kind, site, benign);
  if (machine.options.counters && !machine.uncounted && kind != Access::copy)
    trace(site, reinterpret_cast<char *>(offset), unsigned(bytes), false, kind != Access::read);
  return true;
}

void access(const void *pointer, size_t bytes, Access kind, Site site, size_t align, const void *value) {
  if (!machine.fiber || !machine.options.checks) return;
  auto *p = static_cast<const char *>(pointer);
  if (size_t(p - machine.fiber->stack) < STACK_BYTES) {
    if (!machine.warp->accumulators.empty() && wgmma_register(p)) wgmma_touch(p, site);
    if (kind != Access::read && !machine.warp->sources.empty()) wgmma_overwrite(p, site);
    return;
  }
  if (size_t(p - machine.host_stack) < size_t(1) << 20) return;  // what the launching code captured
  if (__builtin_expect(align > 1 && reinterpret_cast<uintptr_t>(p) & (align - 1), 0))
    report(site, "misaligned", "%zu-byte access at an address that is %zu beyond a multiple of %zu", bytes,
           size_t(reinterpret_cast<uintptr_t>(p) & (align - 1)), align);
  Tensor *t = nullptr;
  if (size_t(p - machine.block->shared) < DYNAMIC_BYTES || !(t = tensor_of(p))) {
    bool benign = value && size_t(p - machine.block->shared) + bytes <= machine.shared_bytes && !memcmp(p, value, bytes);
    if (touch_if_shared(p, bytes, kind, site, benign)) return;
    for (auto [begin, end] : machine.image)
      if (p >= begin && p < end) return;
    return outside(p, bytes, kind, site);
  }
  if (p + bytes > t->end) {
    report(site, "global-oob", "%s+%zu: %zu bytes, past its end at %zu", t->name.c_str(), size_t(p - t->begin), bytes,
           size_t(t->end - t->begin));
    stop();
  }
  if (kind != Access::read && t->access == SIMT_READ_ONLY) {
    report(site, "read-only", "%s+%zu: written, and registered as read-only", t->name.c_str(), size_t(p - t->begin));
    stop();
  }
  touch_global(*t, size_t(p - t->begin), bytes, kind, site, value && !memcmp(p, value, bytes));
  if (machine.options.counters) trace(site, p, unsigned(bytes), true, kind != Access::read);
}

void warp_read(Site site, const uint32_t *address, uint32_t mask, unsigned bytes) {
  machine.as_warp = machine.uncounted = true;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const uint32_t a = address[__builtin_ctz(rest)];
    access(shared_ptr(a, site), bytes, Access::read, site, bytes);
  }
  machine.as_warp = machine.uncounted = false;
  if (machine.options.counters) count_shared(site, address, mask, bytes, false);
}

void mem_read(const void *p, unsigned n, Site site) { access(p, n, Access::read, site, n); }

void mem_write(void *p, unsigned n, const void *value, Site site) {
  access(p, n, Access::write, site, n, value);
  memcpy(p, value, n);
  progress();
}

void mem_atomic(const void *p, unsigned n, Site site) { access(p, n, Access::atomic, site, n); }

}  // namespace simt

using namespace simt;

extern "C" {
void simt_register(const void *p, size_t bytes, const char *name, int kind) {
  std::lock_guard lock(one_at_a_time);
  if (!bytes) return;
  if (machine.recording) {
    machine.recorded_tensors.emplace_back(name, bytes);
    return;
  }
  auto *begin = static_cast<char *>(const_cast<void *>(p));
  for (Tensor &t : machine.tensors) {  // the same memory twice is one tensor
    if (t.begin != begin || t.end != begin + bytes) continue;
    t.name += std::string("/") + name;
    if (kind != SIMT_READ_ONLY && !t.cells) t.cells = static_cast<GlobalCell *>(calloc((bytes + 3) / 4, sizeof(GlobalCell)));
    if (kind == SIMT_READ_WRITE || t.access == SIMT_READ_ONLY) t.access = kind;
    return;
  }
  auto *cells = kind == SIMT_READ_ONLY ? nullptr : static_cast<GlobalCell *>(calloc((bytes + 3) / 4, sizeof(GlobalCell)));
  if (kind == SIMT_WRITE_FIRST) memset(begin, POISON, bytes);
  machine.tensors.push_back({begin, begin + bytes, name, kind, cells});
  machine.last_tensor = nullptr;
}

void simt_unregister_all() {
  std::lock_guard lock(one_at_a_time);
  for (Tensor &t : machine.tensors) free(t.cells);
  machine.tensors.clear();
  machine.recorded_tensors.clear();
  machine.last_tensor = nullptr;
}
}
