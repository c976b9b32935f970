#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace hhattn {

#define HHATTN_DECLARE(isa) \
  namespace isa {           \
  extern const Kernels kernels; \
  }
#if defined(__x86_64__)
HHATTN_DECLARE(baseline)
HHATTN_DECLARE(avx2x16)
HHATTN_DECLARE(avx2)
HHATTN_DECLARE(avx512)
#elif defined(__aarch64__)
HHATTN_DECLARE(neon)
#else
HHATTN_DECLARE(baseline)
#endif

namespace {

struct Isa {
  const Kernels* kernels;
  bool runs;
  // Built to test 16-lane code on an AVX2 CPU, so never chosen unless asked for.
  bool only_on_request;
};

std::vector<Isa> detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return {{&baseline::kernels, true, false},
          {&avx2x16::kernels, has_avx2, true},
          {&avx2::kernels, has_avx2, false},
          {&avx512::kernels, has_avx512, false}};
#elif defined(__aarch64__)
  return {{&neon::kernels, true, false}};
#else
  return {{&baseline::kernels, true, false}};
#endif
}

const std::vector<Isa>& table() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

std::string names() {
  std::string out;
  for (const Isa& isa : table()) out += (out.empty() ? "" : ", ") + std::string(isa.kernels->isa);
  return out;
}

const Kernels* choose() {
  const char* environment = std::getenv("HHATTN_CPU_ISA");
  const std::string cap = environment ? environment : "";
  const Kernels* best = nullptr;
  for (const Isa& isa : table()) {
    const bool named = cap == isa.kernels->isa;
    if (isa.runs && (named || !isa.only_on_request)) best = isa.kernels;
    if (named) return best;
  }
  if (cap.empty()) return best;
  throw std::invalid_argument("HHATTN_CPU_ISA='" + cap + "' is not an instruction set built in; accepted: " + names());
}

const Kernels*& active() {
  static const Kernels* kernels = choose();
  return kernels;
}

}  // namespace

std::vector<std::pair<std::string, bool>> isas() {
  std::vector<std::pair<std::string, bool>> out;
  for (const Isa& isa : table()) out.emplace_back(isa.kernels->isa, isa.runs);
  return out;
}

const Kernels& kernels() { return *active(); }

void use_isa(const std::string& name) {
  if (name.empty()) {
    active() = choose();
    return;
  }
  for (const Isa& isa : table()) {
    if (name != isa.kernels->isa) continue;
    if (!isa.runs) throw std::invalid_argument("this CPU does not run " + name);
    active() = isa.kernels;
    return;
  }
  throw std::invalid_argument("'" + name + "' is not an instruction set built in; accepted: " + names());
}

}  // namespace hhattn
