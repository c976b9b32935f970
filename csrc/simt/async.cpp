// Copies that land later: cp.async, mbarriers, bulk copies. Until then the destination is poisoned and may not be touched.
#include <algorithm>

#include "machine.h"

namespace simt {

// Bytes that are written and not there yet: `direction` 1 when the copy starts, -1 when it lands.
static void set_pending(uint32_t dst, unsigned bytes, int direction, bool async_proxy) {
  if (!machine.options.checks) return;
  for (size_t i = cell_of(dst), end = cell_of(dst + bytes - 1); i <= end; i++) {
    Cell &c = machine.block->cells[i];
    c.pending = uint8_t(c.pending + direction);
    if (direction > 0) continue;
    c.writer = uint16_t(machine.fiber->index);
    c.clock = machine.warp->clock;
    c.async = async_proxy;
  }
}

static void start(const Copy &copy, Site site) {
  if (copy.src_bytes) access(copy.src, copy.src_bytes, Access::read, site, 1);
  void *dst = shared_ptr(copy.dst, site);
  access(dst, copy.bytes, Access::copy, site, 1);
  set_pending(copy.dst, copy.bytes, 1, false);
  memset(dst, POISON, copy.bytes);
}

static void land(const Copy &copy, bool async_proxy) {
  char *dst = static_cast<char *>(shared_ptr(copy.dst));
  memcpy(dst, copy.src, copy.src_bytes);
  memset(dst + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
  set_pending(copy.dst, copy.bytes, -1, async_proxy);
}

static void check_alignment(const char *what, uint32_t shared, const void *global, unsigned align, Site site) {
  if (shared % align) report(site, "misaligned", "%s: shared address %#x is no multiple of %u", what, shared, align);
  if (reinterpret_cast<uintptr_t>(global) % align)
    report(site, "misaligned", "%s: the global address is no multiple of %u", what, align);
}

// ---- cp.async
void cp_async(uint32_t dst, const void *src, unsigned bytes, unsigned src_bytes, Site site) {
  src_bytes = std::min(src_bytes, bytes);
  check_alignment("cp.async", dst, src_bytes ? src : nullptr, bytes, site);
  Copy copy{dst, src, bytes, src_bytes};
  start(copy, site);
  machine.fiber->copies.open.push_back(copy);
}

void cp_async_commit() { machine.fiber->copies.commit(); }

void cp_async_wait(unsigned n, Site) {
  auto &groups = machine.fiber->copies.committed;
  for (; groups.size() > n; groups.pop_front())
    for (const Copy &copy : groups.front()) land(copy, false);
}

void cp_async_wait_all(Site site) {
  cp_async_commit();
  cp_async_wait(0, site);
}

// ---- mbarriers
MBarrier &find_mbarrier(uint32_t bar, const char *what, Site site) {
  auto it = machine.block->mbarriers.find(bar);
  if (it == machine.block->mbarriers.end()) {
    report(site, "mbarrier", "%s at shared address %#x, where no mbarrier was initialised", what, bar);
    stop();
  }
  if (!ordered(it->second.writer, it->second.clock))
    report(site, "race", "%s: nothing orders it after the mbarrier's initialisation by thread %u", what, it->second.writer);
  return it->second;
}

static void publish(MBarrier &m, unsigned thread, uint32_t clock) {
  if (m.threads.empty()) m.threads.resize(machine.threads);
  m.threads[thread] = std::max(m.threads[thread], clock);
}

// What the running thread did and saw is seen by those who see the phase complete; what other lanes of its warp did, only if it
// has met them since.
static void release(MBarrier &m) {
  const Warp &w = *machine.warp;
  const Thread &me = machine.fiber->thread;
  join(m.seen, w.seen);
  if (!w.lane_seen.empty()) join(m.seen, w.lane_seen[me.lane]);
  if (!w.lane_knows.empty()) join(m.threads, w.lane_knows[me.lane]);
  for (unsigned lane = 0; !w.lane_met.empty() && lane < WARP && me.warp * WARP + lane < machine.threads; lane++)
    publish(m, me.warp * WARP + lane, w.lane_met[me.lane][lane]);
  publish(m, machine.fiber->index, w.clock);
  join(m.fenced, w.fenced);
}

static void complete_phase(MBarrier &m) {
  if (m.pending || m.tx) return;
  for (const Copy &copy : m.landing) land(copy, true);
  if (!m.landing.empty()) {
    publish(m, machine.fiber->index, machine.warp->clock++);
    m.landing.clear();
  }
  m.pending = m.count;
  m.phase ^= 1;
  progress();
}

void mbarrier_init(uint32_t bar, unsigned count, Site site) {
  check_alignment("mbarrier.init", bar, nullptr, 8, site);
  access(shared_ptr(bar, site), 8, Access::write, site, 1);
  MBarrier m;
  m.count = m.pending = count;
  m.writer = machine.fiber->index;
  m.clock = machine.warp->clock;
  if (!count) report(site, "mbarrier", "mbarrier.init with a count of 0");
  machine.block->mbarriers[bar] = std::move(m);
}

void mbarrier_inval(uint32_t bar, Site site) {
  MBarrier &m = find_mbarrier(bar, "mbarrier.inval", site);
  if (!m.flying.empty() || !m.landing.empty()) report(site, "mbarrier", "mbarrier.inval while bulk copies are in flight");
  machine.block->mbarriers.erase(bar);
}

static uint64_t arrive(MBarrier &m, unsigned count, Site site) {
  uint64_t state = m.phase;
  if (count > m.pending) {
    report(site, "mbarrier", "%u arrivals where the phase waits for %u more", count, m.pending);
    stop();
  }
  m.pending -= count;
  release(m);
  machine.warp->clock++;
  complete_phase(m);
  return state;
}

uint64_t mbarrier_arrive(uint32_t bar, unsigned count, Site site) {
  return arrive(find_mbarrier(bar, "mbarrier.arrive", site), count, site);
}

void mbarrier_expect_tx(uint32_t bar, unsigned bytes, Site site) { find_mbarrier(bar, "mbarrier.expect_tx", site).tx += bytes; }

uint64_t mbarrier_arrive_expect_tx(uint32_t bar, unsigned bytes, Site site) {
  MBarrier &m = find_mbarrier(bar, "mbarrier.arrive.expect_tx", site);
  m.tx += bytes;
  return arrive(m, 1, site);
}

// cp.async.mbarrier.arrive: here the thread's copies land at once, and it arrives.
void cp_async_mbarrier_arrive(uint32_t bar, bool noinc, Site site) {
  MBarrier &m = find_mbarrier(bar, "cp.async.mbarrier.arrive", site);
  cp_async_wait_all(site);
  if (!noinc) m.pending++;
  arrive(m, 1, site);
}

// Bytes are counted when somebody asks, with a seed perhaps only the next time.
static void let_fly(MBarrier &m) {
  if (m.flying.empty() || (machine.options.seed && draw(2))) return;
  for (const Copy &copy : m.flying) m.tx -= copy.bytes;
  m.landing.insert(m.landing.end(), m.flying.begin(), m.flying.end());
  m.flying.clear();
  complete_phase(m);
}

bool mbarrier_test(uint32_t bar, unsigned parity, Site site) {
  MBarrier &m = find_mbarrier(bar, "mbarrier.test_wait", site);
  let_fly(m);
  if (m.phase == (parity & 1)) {
    yield(site);
    return false;
  }
  acquire(m.seen);
  Warp &w = *machine.warp;
  if (!m.threads.empty()) {
    w.lane_knows.resize(WARP);
    join(w.lane_knows[machine.fiber->thread.lane], m.threads);
  }
  join(w.fenced, m.fenced);
  return true;
}

// ---- bulk copies
void start_bulk(const Copy &copy, MBarrier &m, Site site) {
  start(copy, site);
  m.flying.push_back(copy);
}

void bulk_load(uint32_t dst, const void *src, unsigned bytes, uint32_t bar, Site site) {
  check_alignment("cp.async.bulk", dst, src, 16, site);
  if (bytes % 16) report(site, "misaligned", "cp.async.bulk: %u bytes are no multiple of 16", bytes);
  start_bulk({dst, src, bytes, bytes}, find_mbarrier(bar, "cp.async.bulk", site), site);
}

static void hold(uint32_t address, unsigned bytes, int direction) {
  if (!machine.options.checks) return;
  for (size_t i = cell_of(address), end = cell_of(address + bytes - 1); i <= end; i++)
    machine.block->cells[i].held = uint16_t(machine.block->cells[i].held + direction);
}

void bulk_store(void *dst, uint32_t src, unsigned bytes, Site site) {
  check_alignment("cp.async.bulk", src, dst, 16, site);
  if (bytes % 16) report(site, "misaligned", "cp.async.bulk: %u bytes are no multiple of 16", bytes);
  access(shared_ptr(src, site), bytes, Access::read, site, 1);
  check_proxy(src, bytes, site);
  access(dst, bytes, Access::write, site, 1);
  hold(src, bytes, 1);
  machine.fiber->stores.open.push_back({dst, src, bytes});
}

void bulk_commit() { machine.fiber->stores.commit(); }

void bulk_wait(unsigned n, bool, Site) {
  auto &groups = machine.fiber->stores.committed;
  for (; groups.size() > n; groups.pop_front())
    for (const Store &s : groups.front()) {
      memcpy(s.dst, shared_ptr(s.src), s.bytes);
      hold(s.src, s.bytes, -1);
    }
}

void fence_proxy_async() {
  Warp &w = *machine.warp;
  join(w.fenced, w.seen);
  w.fenced[machine.fiber->thread.warp] = w.clock++;
}

// A thread ends.
void end_async(Fiber &f) {
  if (!f.copies.empty()) report(f.at, "async-not-waited", "the thread ends with cp.async in flight");
  if (!f.stores.empty()) report(f.at, "async-not-waited", "the thread ends with bulk stores that were not waited for");
  const Warp &w = *machine.warp;
  if (!w.open.accumulators.empty() || !w.committed.empty())
    report(f.at, "async-not-waited", "the thread ends with wgmma groups in flight");
}

}  // namespace simt
