// Reports, each once with a count; counters of shared-memory passes and global sectors.
#include <cstdarg>
#include <cstdio>

#include <algorithm>

#include "machine.h"

namespace simt {

constexpr size_t MAX_REPORTS = 1000;

void report(Site site, const char *kind, const char *format, ...) {
  std::string file = site.file ? site.file : "";
  for (Report &r : machine.reports)
    if (r.kind == kind && r.line == site.line && r.file == file && r.kernel == machine.kernel) {
      r.count++;
      return;
    }
  if (machine.reports.size() >= MAX_REPORTS) return;
  char message[512];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  bool inside = machine.fiber && machine.block;
  machine.reports.push_back({kind, message, machine.kernel, file, site.line, inside ? machine.block->id : Dim3{0, 0, 0},
                             inside ? int(machine.fiber->index) : -1, 1});
}

// ---- counters. Lanes run one after another: the k-th time that each lane of a warp executes an instruction since they last met is
// taken for one request of the warp.
struct Trace {
  std::vector<uint64_t> lanes[WARP];
};
static std::map<const Warp *, std::map<CounterKey, Trace>> traces;

void forget_trace() { traces.clear(); }

void trace(Site site, const void *p, unsigned bytes, bool global, bool write) {
  CounterKey key{machine.kernel, site, bytes, global, write};
  traces[machine.warp][key].lanes[machine.fiber->thread.lane].push_back(reinterpret_cast<uintptr_t>(p));
}

// Passes over the 32 banks of 4 bytes: lanes share a pass if they touch different banks or the same word. 8- and 16-byte accesses go by
// half and quarter warps.
static long passes(const uint64_t *address, uint32_t mask, unsigned bytes) {
  unsigned group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  long total = 0;
  for (unsigned first = 0; first < WARP; first += group) {
    std::vector<uint64_t> words[32];
    size_t most = 0;
    for (unsigned lane = first; lane < first + group; lane++)
      for (unsigned o = 0; mask >> lane & 1 && o < bytes; o += 4) {
        uint64_t word = (address[lane] + o) / 4;
        auto &bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max(most, bank.size());
      }
    total += long(most);
  }
  return total;
}

// 32-byte sectors that the lanes touch.
static long sectors(const uint64_t *address, uint32_t mask, unsigned bytes) {
  std::vector<uint64_t> all;
  for (; mask; mask &= mask - 1) {
    uint64_t a = address[__builtin_ctz(mask)];
    for (uint64_t s = a / 32; s <= (a + bytes - 1) / 32; s++) all.push_back(s);
  }
  std::sort(all.begin(), all.end());
  return long(std::unique(all.begin(), all.end()) - all.begin());
}

static void count(const CounterKey &key, const uint64_t *address, uint32_t mask) {
  Counter &c = machine.counters[key];
  long lanes = __builtin_popcount(mask);
  unsigned group = key.bytes <= 4 ? 32 : key.bytes == 8 ? 16 : 8;
  c.requests++;
  c.lanes += lanes;
  c.cost += key.global ? sectors(address, mask, key.bytes) : passes(address, mask, key.bytes);
  c.minimum += key.global ? (lanes * key.bytes + 31) / 32 : (lanes + group - 1) / group;
}

void count_shared(Site site, const uint32_t *address, uint32_t mask, unsigned bytes, bool write) {
  uint64_t wide[WARP];
  std::copy(address, address + WARP, wide);
  count({machine.kernel, site, bytes, false, write}, wide, mask);
}

void flush_trace(Warp &w) {
  auto it = traces.find(&w);
  if (it == traces.end()) return;
  for (auto &[key, trace] : it->second)
    for (size_t k = 0;; k++) {
      uint64_t address[WARP];
      uint32_t mask = 0;
      for (unsigned lane = 0; lane < WARP; lane++)
        if (trace.lanes[lane].size() > k) address[lane] = trace.lanes[lane][k], mask |= 1u << lane;
      if (!mask) break;
      count(key, address, mask);
    }
  traces.erase(it);
}

}  // namespace simt

using namespace simt;

extern "C" {
void simt_reset() {
  std::lock_guard lock(one_at_a_time);
  simt_unregister_all();
  machine.reports.clear();
  machine.counters.clear();
  forget_trace();
}

void simt_options(uint64_t seed, int checks, int counters, int resident) {
  std::lock_guard lock(one_at_a_time);
  machine.options = {seed, checks != 0, counters != 0, unsigned(std::max(1, resident))};
}
}
