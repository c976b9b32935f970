// Threads meet: barriers of a block, collectives of a warp; and what it looks like when they never do.
#include <algorithm>

#include "machine.h"

namespace simt {

static void wait(State state, const char *what, Site site) {
  Fiber &f = *machine.fiber;
  f.state = state;
  f.waits_for = what;
  f.at = site;
  machine.warp->ready &= ~(1u << f.thread.lane);
}

static void wake(Block &b, unsigned thread) {
  Fiber &f = b.fibers[thread];
  f.state = State::ready;
  b.warps[warp_of(thread)].ready |= 1u << f.thread.lane;
}

// ---- barriers
static bool same_site(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || (a.file && b.file && !strcmp(a.file, b.file)));
}

// bar.sync is for whole warps: lanes of one that come from different places are undefined behaviour.
static void check_convergence(Block &b, const Barrier &bar) {
  const Fiber *first[MAX_WARPS] = {};
  for (unsigned t : bar.waiting) {
    const Fiber &f = b.fibers[t], *&other = first[warp_of(t)];
    if (!other) other = &f;
    if (!same_site(other->at, f.at))
      return report(f.at, "divergence", "threads %u and %u of one warp wait at different barriers (the other at line %zu)", f.index,
                    other->index, size_t(other->at.line));
  }
}

static void release(Block &b, Barrier &bar) {
  check_convergence(b, bar);
  uint32_t warps = 0;
  for (unsigned t : bar.waiting) {
    warps |= 1u << warp_of(t);
    wake(b, t);
  }
  for (; warps; warps &= warps - 1) {
    Warp &w = b.warps[__builtin_ctz(warps)];
    join(w.seen, bar.seen);
    join(w.fenced, bar.fenced);
    w.clock++;
    flush_trace(w);
  }
  bar.waiting.clear();
  bar.arrived = bar.count = 0;
  bar.seen = bar.fenced = Clocks{};
  progress();
}

// Everybody came: `count` threads, or with 0 all that live.
static bool complete(const Block &b, const Barrier &bar) {
  return bar.arrived && bar.arrived >= (bar.count ? bar.count : b.live);
}

// `lanes` of the running warp come, with what it did until now.
static bool arrive(int id, unsigned count, unsigned lanes, Site site, const char *what) {
  if (id < 0 || id > 15) {
    report(site, "barrier", "barrier %d; there are 16", id);
    stop();
  }
  Barrier &bar = machine.block->barriers[id];
  if (count % WARP) report(site, "barrier", "%s %d: a count of %u is no multiple of 32", what, id, count);
  if (bar.arrived && bar.count != count)
    report(site, "barrier", "%s %d: count %u, where others came with %u", what, id, count, bar.count);
  bar.count = count;
  bar.arrived += lanes;
  Warp &w = *machine.warp;
  join(bar.seen, w.seen);
  const unsigned lane = machine.fiber->thread.lane;
  if (!w.lane_seen.empty()) join(bar.seen, w.lane_seen[lane]);
  if (!w.lane_knows.empty())  // a barrier knows warps only: what one thread published counts for its warp from here on
    for (unsigned t = 0; t < w.lane_knows[lane].size(); t++) bar.seen[warp_of(t)] = std::max(bar.seen[warp_of(t)], w.lane_knows[lane][t]);
  join(bar.fenced, w.fenced);
  uint32_t &own = bar.seen[machine.fiber->thread.warp];
  own = std::max(own, w.clock);
  return complete(*machine.block, bar);
}

void barrier(int id, unsigned count, Site site) {
  bool done = arrive(id, count, 1, site, "bar.sync");
  Barrier &bar = machine.block->barriers[id];
  bar.waiting.push_back(machine.fiber->index);
  wait(State::at_barrier, "a barrier", site);
  if (done) release(*machine.block, bar);
  if (!done || machine.options.seed) leave();
}

// ---- collectives
// The lanes that a collective of `mask` waits for, if all came; else 0.
static uint32_t all_arrived(const Warp &w, uint32_t mask) {
  uint32_t need = mask & w.live;
  return (w.arrived & need) == need ? need : 0;
}

void acquire(const Clocks &clocks) {
  Warp &w = *machine.warp;
  if (w.lane_seen.empty()) w.lane_seen.resize(WARP);
  join(w.lane_seen[machine.fiber->thread.lane], clocks);
  Clocks all;  // what every lane sees, the warp does
  all.fill(~0u);
  for (uint32_t rest = w.live; rest; rest &= rest - 1)
    for (unsigned i = 0; i < MAX_WARPS; i++) all[i] = std::min(all[i], w.lane_seen[__builtin_ctz(rest)][i]);
  join(w.seen, all);
}

// These lanes met where memory is ordered. If it's all that live, the warp sees what any of them did; else only they do.
static void order_lanes(Warp &w, uint32_t lanes, unsigned index) {
  Clocks seen{}, met{};
  std::vector<uint32_t> knows;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    unsigned lane = __builtin_ctz(rest);
    if (!w.lane_knows.empty()) join(knows, w.lane_knows[lane]);
    if (!w.lane_seen.empty()) join(seen, w.lane_seen[lane]);
    if (!w.lane_met.empty()) join(met, w.lane_met[lane]);
    met[lane] = w.clock;
  }
  for (uint32_t rest = knows.empty() ? 0 : lanes; rest; rest &= rest - 1) w.lane_knows[__builtin_ctz(rest)] = knows;
  if (lanes == w.live) {
    join(w.seen, seen);
    w.seen[index] = w.clock;
  } else {
    if (w.lane_met.empty()) w.lane_met.resize(WARP);
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      join(w.lane_met[__builtin_ctz(rest)], met);
      if (!w.lane_seen.empty()) join(w.lane_seen[__builtin_ctz(rest)], seen);
    }
  }
  w.clock++;
}

static void finish_collective(Block &b, Warp &w, uint32_t lanes, const Warp::Arrival &by) {
  const unsigned first = unsigned(&w - b.warps.data()) * WARP;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const Warp::Arrival &other = w.arrivals[__builtin_ctz(rest)];
    const Fiber &f = b.fibers[first + __builtin_ctz(rest)];
    if (by.aligned && !same_site(f.at, machine.fiber->at)) {
      report(machine.fiber->at, "divergence", "lanes of one warp come to %s in different places (thread %u at line %zu)", by.name,
             f.index, size_t(f.at.line));
      stop();
    }
    if (other.name == by.name && other.mask == by.mask) continue;
    report(machine.fiber->at, "divergence", "lanes of one warp meet in different collectives: %s of mask %08x and %s of %08x",
           by.name, by.mask, other.name, other.mask);
    stop();
  }
  if (by.fn) {
    void *args[WARP];
    for (unsigned lane = 0; lane < WARP; lane++) args[lane] = w.arrivals[lane].arg;
    by.fn(lanes, args);
  }
  w.arrived &= ~lanes;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) b.fibers[first + __builtin_ctz(rest)].state = State::ready;
  w.ready |= lanes;
  if (by.orders) order_lanes(w, lanes, first / WARP);
  if (machine.options.counters) flush_trace(w);
}

static void meet(Collective fn, uint32_t mask, void *arg, const char *name, bool orders, Site site, bool aligned = false) {
  Warp &w = *machine.warp;
  unsigned lane = machine.fiber->thread.lane;
  if (!(mask >> lane & 1)) report(site, "mask", "%s: lane %u is not in its own mask %08x", name, lane, mask);
  mask |= 1u << lane;
  w.arrivals[lane] = {fn, mask, arg, name, orders, aligned};
  w.arrived |= 1u << lane;
  wait(State::in_collective, name, site);
  uint32_t lanes = all_arrived(w, mask);
  if (lanes) finish_collective(*machine.block, w, lanes, w.arrivals[lane]);
  if (!lanes || machine.options.seed) leave();
}

void collective(Collective fn, uint32_t mask, void *arg, const char *name, Site site) { meet(fn, mask, arg, name, false, site); }

void aligned_collective(Collective fn, void *arg, const char *name, Site site) { meet(fn, 0xffffffff, arg, name, false, site, true); }

struct ArriveArg {
  int id;
  unsigned count;
  Site site;
};

static void arrive_together(uint32_t lanes, void *const *args) {
  const ArriveArg x = *static_cast<ArriveArg *>(args[__builtin_ctz(lanes)]);
  bool done = arrive(x.id, x.count, unsigned(__builtin_popcount(lanes)), x.site, "bar.arrive");
  machine.warp->clock++;  // what follows isn't covered
  if (done) release(*machine.block, machine.block->barriers[x.id]);
}

// The whole warp at once: a lane that went on alone would publish, through the others' arrivals, what it does after its own.
void barrier_arrive(int id, unsigned count, Site site) {
  ArriveArg x{id, count, site};
  aligned_collective(arrive_together, &x, "bar.arrive", site);
}

void sync_warp(uint32_t mask, Site site) { meet(nullptr, mask, nullptr, "bar.warp.sync", true, site); }

void complete_waiting() {
  Block &b = *machine.block;
  Warp &w = *machine.warp;
  for (uint32_t rest = w.arrived; rest; rest &= (rest - 1) & w.arrived) {
    const Warp::Arrival by = w.arrivals[__builtin_ctz(rest)];
    if (uint32_t lanes = all_arrived(w, by.mask)) finish_collective(b, w, lanes, by);
  }
  for (Barrier &bar : b.barriers)
    if (!bar.count && complete(b, bar)) release(b, bar);
}

// ---- nobody can go on
// Within one warp that is divergence: lanes wait for one another in different places.
static bool diverged(const Block &b) {
  for (unsigned w = 0; w < b.warps.size(); w++) {
    unsigned states = 0;
    for (unsigned lane = 0; lane < WARP; lane++)
      if (b.warps[w].live >> lane & 1) states |= 1u << unsigned(b.fibers[w * WARP + lane].state);
    if (states & states - 1) return true;
  }
  return false;
}

void describe_deadlock() {
  for (auto &b : machine.resident) {
    std::string who;
    unsigned named = 0;
    Site last{};
    const Fiber *culprit = nullptr;
    for (unsigned t = 0; t < machine.threads && named < 3; t++) {
      const Fiber &f = b->fibers[t];
      if (f.state == State::done || same_site(f.at, last)) continue;
      last = f.at;
      if (!culprit) culprit = &f;
      who += (named++ ? "; thread " : "thread ") + std::to_string(t) + " for " + f.waits_for;
      if (f.at.file) who += " at line " + std::to_string(f.at.line);
    }
    if (!culprit) continue;
    machine.fiber = b->fibers.data() + culprit->index;
    machine.block = b.get();
    report(culprit->at, diverged(*b) ? "divergence" : "deadlock", "%u threads of the block wait for ever: %s", b->live, who.c_str());
    return;
  }
}

}  // namespace simt
