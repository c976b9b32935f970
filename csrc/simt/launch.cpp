// Launches: blocks, fibers, and who runs next.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <set>

#include "machine.h"

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the SIMT emulator switches stacks by hand: x86-64 and aarch64 only"
#endif

namespace simt {

Machine machine;
std::recursive_mutex one_at_a_time;
Thread *self;

// ---- stacks. simt_switch(save, to): keeps what the calling convention says a callee keeps, stores sp, and goes on at `to`.
extern "C" void simt_switch(void **save, void *to);
#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#else
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
#endif

static void run_fiber();

// A stack on which the first switch starts run_fiber.
static void *fresh_stack(Fiber &f) {
  // Stacks that lie alike in their pages fight for the same lines of the first cache: shift each a little.
  char *top = f.stack + STACK_BYTES - 512 - (f.index % 64) * 576;
#if defined(__x86_64__)
  void **sp = reinterpret_cast<void **>(top);
  *--sp = nullptr;  // where run_fiber would return to; keeps rsp 16-aligned after a call
  *--sp = reinterpret_cast<void *>(run_fiber);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
#else
  char *sp = top - 160;
  memset(sp, 0, 160);
  void *entry = reinterpret_cast<void *>(run_fiber);
  memcpy(sp + 88, &entry, sizeof entry);
  return sp;
#endif
}

// ---- who runs
uint32_t draw(uint32_t below) {
  uint64_t &x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return (x >> 32) * below >> 32;
}

void progress() { machine.waited = 0; }

// Static arrays exist once, in the kernel's library: blocks that run interleaved take turns.
static void own_statics(Block &b) {
  Block *&owner = machine.static_owner;
  if (owner == &b || !machine.static_bytes) return;
  if (owner) owner->statics.assign(machine.static_shared, machine.static_shared + machine.static_bytes);
  if (!b.statics.empty()) memcpy(machine.static_shared, b.statics.data(), machine.static_bytes);
  owner = &b;
}

static void make_current(Block &b, Fiber &f) {
  own_statics(b);
  machine.block = &b;
  machine.fiber = &f;
  machine.warp = &b.warps[f.thread.warp];
  machine.warp->last = f.thread.lane;
  self = &f.thread;
}

// A ready lane: drawn, or without a seed the next one in turn.
static unsigned pick_lane(const Warp &w) {
  uint32_t mask = w.ready;
  if (machine.options.seed) {
    for (uint32_t skip = draw(__builtin_popcount(mask)); skip; skip--) mask &= mask - 1;
  } else if (uint32_t later = w.last < 31 ? mask >> (w.last + 1) << (w.last + 1) : 0) {
    mask = later;
  }
  return __builtin_ctz(mask);
}

static void to_scheduler() {
  Fiber *f = machine.fiber;
  simt_switch(&f->sp, machine.host_sp);
}

void leave() {
  Block &b = *machine.block;
  Fiber &f = *machine.fiber;
  Warp &w = *machine.warp;
  bool elsewhere = machine.stopped || !w.ready || (machine.options.seed && draw(8) == 0);
  if (elsewhere) return to_scheduler();
  Fiber &next = b.fibers[f.thread.warp * WARP + pick_lane(w)];
  if (&next == &f) return;
  make_current(b, next);
  simt_switch(&f.sp, next.sp);
}

void yield(Site site) {
  machine.fiber->at = site;
  machine.fiber->waits_for = "a condition it polls";
  if (++machine.waited > 2'000'000) {
    describe_deadlock();
    stop();
  }
  to_scheduler();
}

void stop() {
  machine.stopped = true;
  to_scheduler();
  abort();  // a stopped launch runs no fiber again
}

static void run_fiber() {
  machine.body(machine.params);
  Fiber &f = *machine.fiber;
  end_async(f);
  f.state = State::done;
  machine.warp->ready &= ~(1u << f.thread.lane);
  machine.warp->live &= ~(1u << f.thread.lane);
  machine.block->live--;
  progress();
  complete_waiting();
  to_scheduler();
  abort();
}

// ---- blocks
static char *map_memory(size_t bytes) {
  void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  return static_cast<char *>(p);
}

static std::unique_ptr<Block> make_block() {
  auto b = std::make_unique<Block>();
  b->shared = map_memory(DYNAMIC_BYTES + 4096);
  b->cells.reset(new Cell[SHARED_CELLS]());
  return b;
}

static void give_stacks(Block &b) {
  while (b.fibers.size() < machine.threads) {
    b.fibers.emplace_back();
    char *stack = map_memory(STACK_BYTES + 4096);
    mprotect(stack, 4096, PROT_NONE);  // running over the end stops at once
    b.fibers.back().stack = stack + 4096;
  }
}

static void start_block(Block &b, unsigned linear) {
  const Dim3 g = machine.grid, d = machine.block_dim;
  b.linear = linear;
  b.id = {linear % g.x, linear / g.x % g.y, linear / g.x / g.y};
  b.serial = machine.serial++;
  machine.serials.push_back(linear);
  b.live = machine.threads;
  b.next_warp = 0;
  b.mbarriers.clear();
  for (Barrier &bar : b.barriers) bar = Barrier{};
  b.warps.resize(machine.warps);
  for (unsigned w = 0; w < machine.warps; w++) {
    Warp &warp = b.warps[w];
    uint32_t clock = warp.clock;
    warp = Warp{};
    warp.clock = clock + 1;  // clocks go on from block to block, so that the shadow's old entries lie in the past
    unsigned lanes = std::min(WARP, machine.threads - w * WARP);
    warp.live = warp.ready = lanes == WARP ? ~0u : (1u << lanes) - 1;
    warp.last = WARP - 1;
  }
  b.statics.assign(machine.static_bytes, char(POISON));
  begin_memory(b);
  give_stacks(b);
  for (unsigned t = 0; t < machine.threads; t++) {
    Fiber &f = b.fibers[t];
    f.index = t;
    f.state = State::ready;
    f.copies.clear();
    f.stores.clear();
    f.thread = {{t % d.x, t / d.x % d.y, t / d.x / d.y}, b.id, d, g, t % WARP, t / WARP};
    f.sp = fresh_stack(f);
  }
}

static std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.options.seed)
    for (unsigned i = blocks; i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
  return order;
}

// The next warp with a ready lane, over all resident blocks; null when all wait.
static Warp *pick_warp(Block *&block) {
  const auto &all = machine.resident;
  unsigned first_block = machine.options.seed ? draw(all.size()) : machine.turn++ % all.size();
  for (unsigned i = 0; i < all.size(); i++) {
    block = all[(first_block + i) % all.size()].get();
    unsigned first = machine.options.seed ? draw(machine.warps) : block->next_warp++ % machine.warps;
    for (unsigned j = 0; j < machine.warps; j++) {
      Warp &w = block->warps[(first + j) % machine.warps];
      if (w.ready) return &w;
    }
  }
  return nullptr;
}

static void run_blocks() {
  std::vector<unsigned> order = block_order(machine.grid.x * machine.grid.y * machine.grid.z);
  unsigned limit = std::max(1u, machine.options.resident);
  size_t next = 0;
  while (!machine.stopped && (next < order.size() || !machine.resident.empty())) {
    while (next < order.size() && machine.resident.size() < limit) {
      if (machine.idle.empty()) machine.idle.push_back(make_block());
      machine.resident.push_back(std::move(machine.idle.back()));
      machine.idle.pop_back();
      start_block(*machine.resident.back(), order[next++]);
    }
    Block *block = nullptr;
    Warp *warp = pick_warp(block);
    if (!warp) {
      describe_deadlock();
      machine.stopped = true;
      break;
    }
    Fiber &f = block->fibers[(warp - block->warps.data()) * WARP + pick_lane(*warp)];
    make_current(*block, f);
    simt_switch(&machine.host_sp, f.sp);
    block = machine.block;
    machine.fiber = nullptr;
    if (block->live) continue;
    if (machine.static_owner == block) machine.static_owner = nullptr;
    for (Warp &w : block->warps) flush_trace(w);
    auto done = std::find_if(machine.resident.begin(), machine.resident.end(), [&](auto &b) { return b.get() == block; });
    machine.idle.push_back(std::move(*done));
    machine.resident.erase(done);
  }
  for (auto &b : machine.resident) machine.idle.push_back(std::move(b));  // of a stopped launch
  machine.resident.clear();
}

// The library that holds `image`: its segments may be read by kernels; its thread-local block is static shared memory.
static void find_image(const void *image) {
  machine.image.clear();
  machine.static_shared = nullptr;
  machine.static_bytes = 0;
  if (!image) return;
  dl_iterate_phdr(
      [](dl_phdr_info *info, size_t, void *wanted) {
        auto *tls = static_cast<char *>(info->dlpi_tls_data);
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto &h = info->dlpi_phdr[i];
          if (h.p_type != PT_TLS || !tls || wanted < tls || wanted >= tls + h.p_memsz) continue;
          machine.static_shared = tls;
          machine.static_bytes = (h.p_memsz + 3) / 4 * 4;
          for (int j = 0; j < info->dlpi_phnum; j++) {
            const auto &s = info->dlpi_phdr[j];
            auto *begin = reinterpret_cast<const char *>(info->dlpi_addr + s.p_vaddr);
            if (s.p_type == PT_LOAD) machine.image.emplace_back(begin, begin + s.p_memsz);
          }
          return 1;
        }
        return 0;
      },
      const_cast<void *>(image));
  if (machine.static_bytes <= 16) machine.static_bytes = 0;  // the marker alone: no arrays
}

static bool accept(size_t shared_bytes) {
  const Dim3 g = machine.grid;
  if (machine.threads == 0 || machine.threads > MAX_THREADS)
    report({}, "launch", "a block of %u threads; 1 to %u are possible", machine.threads, MAX_THREADS);
  else if (shared_bytes + machine.static_bytes > SHARED_MAX || machine.static_bytes > 48 << 10)
    report({}, "launch", "%zu bytes of dynamic and %zu of static shared memory; %zu in all, 49152 static, are possible",
           shared_bytes, machine.static_bytes, SHARED_MAX);
  else if (g.y > 65535 || g.z > 65535)
    report({}, "launch", "a grid of (%u, %u, %u); y and z go up to 65535", g.x, g.y, g.z);
  else
    return true;
  return false;
}

}  // namespace simt

using namespace simt;

extern "C" void simt_launch(const char *kernel, Body body, const void *params, const unsigned grid[3], const unsigned block[3],
                            size_t shared_bytes, const void *image) {
  std::lock_guard lock(one_at_a_time);
  Machine &m = machine;
  static std::set<std::string> names;
  m.kernel = names.insert(kernel).first->c_str();
  m.body = body;
  m.params = params;
  m.grid = {grid[0], grid[1], grid[2]};
  m.block_dim = {block[0], block[1], block[2]};
  m.threads = block[0] * block[1] * block[2];
  m.warps = (m.threads + WARP - 1) / WARP;
  m.shared_bytes = shared_bytes;
  m.host_stack = static_cast<const char *>(__builtin_frame_address(0));
  m.stopped = false;
  m.waited = 0;
  m.turn = 0;
  m.first_serial = m.serial;
  m.serials.clear();
  m.random = 0x9e3779b97f4a7c15 * (m.options.seed + 1);
  m.fiber = nullptr;
  m.static_owner = nullptr;
  m.as_warp = m.uncounted = false;  // a launch that was stopped may have left them
  forget_trace();
  find_image(image);
  if (accept(shared_bytes)) run_blocks();
  m.fiber = nullptr;
  m.kernel = "";
}

bool simt::recorded(const void *kernel, const char *name, Dim3 grid, Dim3 block, size_t shared_bytes) {
  std::lock_guard lock(one_at_a_time);
  if (machine.recording) machine.launches.push_back({kernel, name, grid, block, shared_bytes, machine.recorded_tensors});
  return machine.recording;
}

extern "C" void simt_record(int on) {
  std::lock_guard lock(one_at_a_time);
  machine.recording = on != 0;
  machine.recorded_tensors.clear();
  if (on) machine.launches.clear();
}
