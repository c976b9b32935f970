// The emulated machine: what the runtime's files share. Kernels never see this.
//
// A launch has resident blocks; a block has warps and fibers (threads). Order between accesses is decided by vector clocks, one
// entry a warp: an access by thread t at clock k of its warp happened before what warp w does now if k <= w.seen[warp of t].
#pragma once
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "simt.h"

namespace simt {

constexpr unsigned WARP = 32, MAX_WARPS = 32, MAX_THREADS = 1024;
constexpr size_t DYNAMIC_BYTES = 256 << 10, STATIC_BYTES = 64 << 10;
constexpr size_t DYNAMIC_CELLS = DYNAMIC_BYTES / 4, SHARED_CELLS = DYNAMIC_CELLS + STATIC_BYTES / 4;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr uint8_t POISON = 0xff;

using Clocks = std::array<uint32_t, MAX_WARPS>;

inline void join(Clocks &into, const Clocks &from) {
  for (unsigned i = 0; i < MAX_WARPS; i++) into[i] = into[i] > from[i] ? into[i] : from[i];
}

// ---- asynchronous work of a thread or warp
struct Copy {  // global -> shared in flight; src_bytes are copied, the rest is zero
  uint32_t dst;
  const void *src;
  unsigned bytes, src_bytes;
};
struct Store {  // shared -> global in flight
  void *dst;
  uint32_t src;
  unsigned bytes;
};
template <class T>
struct Groups {  // what was issued and not committed, and committed groups, oldest first
  std::vector<T> open;
  std::deque<std::vector<T>> committed;
  bool empty() const { return open.empty() && committed.empty(); }
  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  void clear() {
    open.clear();
    committed.clear();
  }
};

struct Accumulator {  // one lane's D while wgmmas into it are in flight
  std::vector<uint32_t *> registers;
  std::vector<float> values;
  unsigned users = 0;  // groups in flight that write it
};
struct WgmmaGroup {
  std::vector<std::pair<unsigned, uint32_t *>> accumulators;  // lane, first register
  std::vector<std::pair<unsigned, const uint32_t *>> sources;  // lane, register of A: nobody may write it
  std::vector<uint32_t> operands;                             // cells held: nobody may write them
};

// ---- threads
enum class State : uint8_t { ready, in_collective, at_barrier, done };

struct Fiber {
  void *sp = nullptr;
  char *stack = nullptr;
  Thread thread;
  unsigned index = 0;  // in the block
  State state = State::ready;
  const char *waits_for = "";
  Site at{};
  Groups<Copy> copies;
  Groups<Store> stores;
};

struct Warp {
  uint32_t live = 0, ready = 0, arrived = 0;  // masks of lanes; arrived: waiting in a collective
  unsigned last = 0;                          // lane that ran last
  struct Arrival {
    Collective fn;
    uint32_t mask;
    void *arg;
    const char *name;
    bool orders, aligned;
  } arrivals[WARP];
  uint32_t clock = 1;
  Clocks seen{}, fenced{};  // fenced: generic writes up to there have passed a proxy fence
  // What some lanes see beyond `seen`, empty if none does: by [lane][warp], who waited for an mbarrier; by [lane][other lane of this
  // warp], who met in a __syncwarp of a part of the warp.
  std::vector<Clocks> lane_seen, lane_met;
  std::vector<std::vector<uint32_t>> lane_knows;  // by [lane][thread]: what single threads' arrivals at an mbarrier published
  std::map<std::pair<unsigned, uint32_t *>, Accumulator> accumulators;
  std::map<std::pair<unsigned, const uint32_t *>, unsigned> sources;  // uses in flight of A's registers
  WgmmaGroup open;
  std::deque<WgmmaGroup> committed;
  bool wgmma_fenced = false;
};

struct Barrier {
  std::vector<unsigned> waiting;  // threads
  unsigned arrived = 0, count = 0;
  Clocks seen{}, fenced{};
};

struct MBarrier {
  unsigned count = 0, pending = 0;
  long tx = 0;
  unsigned phase = 0;
  unsigned writer = 0;  // thread and clock of its initialisation
  uint32_t clock = 0;
  Clocks seen{}, fenced{};
  std::vector<uint32_t> threads;  // clocks up to which single threads published what they did, empty if none has
  std::vector<Copy> flying, landing;  // bulk copies whose bytes haven't been counted yet; those that have
};

// ---- shared memory's shadow, a cell for each 4 bytes. Masks have a bit a byte.
// Neighbours may share a cell: `older` keeps the bytes that the last write left to the one before it.
struct Older {
  uint32_t clock;
  uint16_t writer;
  uint8_t wrote, atomic;
};
struct Cell {
  uint32_t clock;            // of the last write
  uint16_t writer;           // its thread
  uint8_t init : 4, wrote : 4;  // bytes ever written; bytes of the last write
  Older older;
  uint8_t pending;           // asynchronous copies in flight into it
  uint16_t held;             // asynchronous reads in flight: wgmma, bulk stores
  uint8_t atomic, async;     // the last write was atomic; came through the async proxy
};

struct Reads {  // the last reads by a warp, of each half of the cell: clock << 8 | lane (32: several) << 2 | bytes
  uint32_t half[2];
};

struct Block {
  Dim3 id;
  unsigned linear = 0;
  uint32_t serial = 0;  // of all blocks that ever ran
  unsigned live = 0, next_warp = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::map<uint32_t, MBarrier> mbarriers;
  char *shared = nullptr;               // the dynamic arena, DYNAMIC_BYTES and a guard
  std::vector<char> statics;            // the static arrays, while another block runs
  std::unique_ptr<Cell[]> cells;
  std::vector<Reads> reads;             // [cell][warp]
};

// ---- global memory
struct GlobalCell {
  uint32_t write_block, write_clock, read_block, read_clock;  // blocks by serial
  uint16_t writer, reader;
  uint8_t init : 4, wrote : 4, read : 4, several : 4;         // several: blocks have read it
  uint8_t atomic;
  // the write whose bytes the last one left; the reader of the same block that the last one didn't come after
  uint8_t older_wrote : 4, other_read : 4;
  uint16_t older_writer, other_reader;
  uint32_t older_block, older_clock, other_clock;
};
struct Tensor {
  char *begin, *end;
  std::string name;
  int access;
  GlobalCell *cells;  // null for read-only tensors
};

// ---- what is observed
struct Report {
  std::string kind, message, kernel, file;
  uintptr_t line;  // or a program counter when file is empty
  Dim3 block;
  int thread;  // -1: no thread's
  long count;
};
struct Counter {  // of one instruction: requests of warps, the passes or sectors they took, the fewest possible
  long requests = 0, lanes = 0, cost = 0, minimum = 0;
};
struct CounterKey {
  const char *kernel;  // interned, as machine.kernel is
  Site site;
  unsigned bytes;
  bool global, write;
  auto tie() const { return std::make_tuple(kernel, site.file, site.line, bytes, global, write); }
  bool operator<(const CounterKey &other) const { return tie() < other.tie(); }
};

struct Recorded {  // a launch that wasn't run, and the memory it was given
  const void *kernel;
  std::string name;
  Dim3 grid, block;
  size_t shared_bytes;
  std::vector<std::pair<std::string, size_t>> tensors;
};

struct Options {
  uint64_t seed = 0;
  bool checks = true, counters = false;
  unsigned resident = 1;
};

struct Machine {
  Options options;
  uint64_t random = 1;
  // the launch
  const char *kernel = "";  // one pointer for each name
  Dim3 grid, block_dim;
  unsigned threads = 0, warps = 0;
  size_t shared_bytes = 0, static_bytes = 0;
  char *static_shared = nullptr;
  const char *host_stack = nullptr;
  bool stopped = false;
  uint32_t first_serial = 1, serial = 1;
  std::vector<unsigned> serials;  // linear index of each block of the launch, by serial
  std::vector<std::unique_ptr<Block>> resident, idle;
  unsigned long waited = 0;  // yields since something moved
  unsigned turn = 0;         // which resident block is next
  Body body = nullptr;
  const void *params = nullptr;
  void *host_sp = nullptr;
  // who runs
  Block *block = nullptr, *static_owner = nullptr;
  Fiber *fiber = nullptr;
  Warp *warp = nullptr;
  bool as_warp = false;    // the access is the whole warp's, no single lane's
  bool uncounted = false;  // the access is counted elsewhere

  std::vector<Tensor> tensors;
  Tensor *last_tensor = nullptr;
  std::vector<Report> reports;
  std::map<CounterKey, Counter> counters;
  bool recording = false;
  std::vector<Recorded> launches;
  std::vector<std::pair<std::string, size_t>> recorded_tensors;
  std::vector<std::pair<const char *, const char *>> image;  // the kernel's library: its constants may be read
};
extern Machine machine;
extern std::recursive_mutex one_at_a_time;  // who launches, or touches tensors, options or what was observed

inline unsigned warp_of(unsigned thread) { return thread / WARP; }
inline void join(std::vector<uint32_t> &into, const std::vector<uint32_t> &from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = into[i] > from[i] ? into[i] : from[i];
}
// Does the running lane see it, though not all of its warp do?
inline bool seen_by_lane(unsigned thread, uint32_t clock) {
  const Warp &w = *machine.warp;
  const Thread &me = machine.fiber->thread;
  if (!w.lane_seen.empty() && clock <= w.lane_seen[me.lane][warp_of(thread)]) return true;
  if (!w.lane_met.empty() && warp_of(thread) == me.warp && clock <= w.lane_met[me.lane][thread % WARP]) return true;
  return !w.lane_knows.empty() && thread < w.lane_knows[me.lane].size() && clock <= w.lane_knows[me.lane][thread];
}
// Did what `thread` did at `clock` happen before what the running thread does now?
inline bool ordered(unsigned thread, uint32_t clock) {
  return thread == machine.fiber->index || clock <= machine.warp->seen[warp_of(thread)] || seen_by_lane(thread, clock);
}

// launch.cpp
uint32_t draw(uint32_t below);
void leave();  // the running fiber gives way: to a ready lane of its warp, or to the scheduler
void progress();
// sync.cpp
void acquire(const Clocks &);  // the running lane sees this from now on
void aligned_collective(Collective, void *arg, const char *name, Site);  // of the whole warp, which must come from one place
void complete_waiting();  // after a thread ended: what waited for it alone goes on
void describe_deadlock();
// memory.cpp
enum class Access : uint8_t { read, write, atomic, copy };  // copy: the write of an asynchronous copy, that lands later
void access(const void *p, size_t bytes, Access, Site, size_t align, const void *value = nullptr);
size_t cell_of(uint32_t address);
void begin_memory(Block &);
void note_reads(const std::vector<uint32_t> &cells);
void check_proxy(uint32_t address, size_t bytes, Site);  // before the async proxy reads
// async.cpp
void start_bulk(const Copy &, MBarrier &, Site);
MBarrier &find_mbarrier(uint32_t bar, const char *what, Site);
void end_async(Fiber &);
bool wgmma_register(const void *p);  // is it a register that a wgmma in flight writes?
bool wgmma_source(const void *p);    // or one that it reads?
// counters.cpp
void trace(Site, const void *p, unsigned bytes, bool global, bool write);
void count_shared(Site, const uint32_t *address, uint32_t mask, unsigned bytes, bool write);
void flush_trace(Warp &);
void forget_trace();

}  // namespace simt
