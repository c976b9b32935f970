// .cu sources are compiled with -fsanitize=thread,alignment and linked against these instead of the sanitizers' runtimes, so that
// every load and store is seen with no change of source. Stores of a value that is there already can't be told from others.
#include "machine.h"

using simt::access;
using simt::Access;
using simt::Site;

static void hook(void *p, size_t n, Access kind, size_t align, void *pc) {
  if (!simt::machine.fiber) return;
  auto *c = static_cast<char *>(p), *indices = reinterpret_cast<char *>(simt::self);
  if (p == &simt::self || (c >= indices && c < indices + sizeof(simt::Thread))) return;  // threadIdx and the like
  access(p, n, kind, Site{nullptr, reinterpret_cast<uintptr_t>(pc) - 1}, align);
  if (kind == Access::write) simt::progress();
}

#define SIMT_HOOKS(n)                                                                                                     \
  void __tsan_read##n(void *p) { hook(p, n, Access::read, n, __builtin_return_address(0)); }                              \
  void __tsan_write##n(void *p) { hook(p, n, Access::write, n, __builtin_return_address(0)); }                            \
  void __tsan_unaligned_read##n(void *p) { hook(p, n, Access::read, 1, __builtin_return_address(0)); }                    \
  void __tsan_unaligned_write##n(void *p) { hook(p, n, Access::write, 1, __builtin_return_address(0)); }                  \
  void __tsan_volatile_read##n(void *p) { hook(p, n, Access::read, n, __builtin_return_address(0)); }                     \
  void __tsan_volatile_write##n(void *p) { hook(p, n, Access::write, n, __builtin_return_address(0)); }

struct Misalignment {  // as the compiler lays it out for the alignment sanitizer
  struct {
    const char *file;
    uint32_t line, column;
  } at;
  void *type;
  unsigned char log_align, kind;
};

extern "C" {
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void *p, size_t n) { hook(p, n, Access::read, 1, __builtin_return_address(0)); }
void __tsan_write_range(void *p, size_t n) { hook(p, n, Access::write, 1, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}

void __ubsan_handle_type_mismatch_v1(Misalignment *d, uintptr_t p) {
  if (!simt::machine.fiber) return;
  simt::report(Site{d->at.file, d->at.line}, "misaligned", "address %#zx is no multiple of %d", size_t(p), 1 << d->log_align);
  simt::stop();  // as on a GPU; and the host's own vector instructions may not survive the access
}
}
