// Runs GPU kernels on the CPU, thread by thread, and reports what a GPU would do wrong in silence. This header is what a kernel
// sees; ptx.h has the instructions, cuda.h what a .cu source needs. Everything here is implemented in libsimt.so.
//
// A kernel is a function that is called once for each thread, every thread on a stack of its own (a fiber; one OS thread runs them
// all). It tells the runtime of every access to memory that threads share: mem_read before it loads, mem_write instead of storing.
// C++ made from PTX does so explicitly; .cu sources are compiled with -fsanitize=thread, whose hooks the library defines.
//
// Shared memory has addresses as on the GPU, 32 bits: the dynamic part starts at SHARED_BASE, static __shared__ arrays at
// STATIC_BASE. Its bytes, and what asynchronous copies will overwrite, are poisoned with 0xff (NaN in every float type).
//
// What orders memory between threads: barriers (bar.sync, bar.arrive), __syncwarp / bar.warp.sync, mbarriers. Other warp
// collectives (shuffles, votes, mma, ldmatrix) make lanes wait for one another and order nothing, as PTX has it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

constexpr uint32_t SHARED_BASE = 0x400;     // low, since a wgmma descriptor has 18 bits of address
constexpr uint32_t STATIC_BASE = 0x100000;  // beyond what a descriptor reaches: wgmma operands are dynamic
constexpr size_t SHARED_MAX = 227 * 1024;   // of one block on sm_90 and sm_100

// Where in the source: the caller's file and line (set by #line too), or, when file is null, a program counter.
struct Site {
  const char *file;
  uintptr_t line;
  static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, uintptr_t(line)}; }
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Indices of the running thread; changes hands at every switch, so read it anew each time.
struct Thread {
  Dim3 tid, bid, bdim, gdim;
  unsigned lane, warp;  // in its warp; in its block
};
extern Thread *self;

// ---- launch. The body is called once a thread with `params`; returns when every block is done or the launch was stopped by an
// access out of bounds, a .cu source's misaligned one, a deadlock or divergence (see reports). `image` is the address of something thread-local in the kernel's
// library, for its static __shared__ arrays, or null if it has none.
using Body = void (*)(const void *params);
extern "C" void simt_launch(const char *kernel, Body body, const void *params, const unsigned grid[3], const unsigned block[3],
                            size_t shared_bytes, const void *image);

template <class F>
void launch(const char *kernel, Dim3 grid, Dim3 block, size_t shared_bytes, F body, const void *image = nullptr) {
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  simt_launch(kernel, [](const void *f) { (*static_cast<const F *>(f))(); }, &body, g, b, shared_bytes, image);
}

// Whether launches are recorded instead of run (simt_record): host code asks before it launches `kernel`, its __global__ function.
bool recorded(const void *kernel, const char *name, Dim3 grid, Dim3 block, size_t shared_bytes);

// ---- memory. n bytes, a power of two up to 16, must be aligned to n. Pointers are to registered tensors, to shared memory
// (shared_ptr of a 32-bit address) or to the thread's own stack, which is never checked.
void mem_read(const void *p, unsigned n, Site = Site::here());                       // check only: the caller loads
void mem_write(void *p, unsigned n, const void *value, Site = Site::here());         // checks and stores; see below
void mem_atomic(const void *p, unsigned n, Site = Site::here());                     // check only: the caller loads and stores
void *shared_ptr(uint32_t address, Site = Site::here());                             // stops the launch outside of shared memory
uint32_t shared_address(const void *p, Site = Site::here());                         // cvta.to.shared
void *dynamic_shared();                                                              // = shared_ptr(SHARED_BASE)
// Two threads of a block storing the same value to the same place with no order between them is no race: compilers let replicated
// lanes do it. Atomics don't race with one another and order nothing else.

// ---- threads meet
// bar.sync / bar.red id, count (0: all live threads). aligned: every lane of a warp must come from the same place.
void barrier(int id = 0, unsigned count = 0, Site = Site::here());
void barrier_arrive(int id, unsigned count, Site = Site::here());
// Blocks until every live lane of `mask` came to the same collective, then fn runs once for the warp: args[lane] is what that lane
// passed, for the lanes in `mask`. The same `name` pointer means the same collective.
using Collective = void (*)(uint32_t mask, void *const *args);
void collective(Collective fn, uint32_t mask, void *arg, const char *name, Site = Site::here());
void sync_warp(uint32_t mask = 0xffffffffu, Site = Site::here());  // __syncwarp, bar.warp.sync: orders memory
void yield(Site = Site::here());                                   // lets others run; spinning threads must call it

// ---- cp.async: bytes of 4, 8 or 16, of which src_bytes come from src and the rest is zero. Lands when waited for.
void cp_async(uint32_t dst, const void *src, unsigned bytes, unsigned src_bytes, Site = Site::here());
void cp_async_commit();
void cp_async_wait(unsigned n = 0, Site = Site::here());  // until at most n groups of this thread are in flight
void cp_async_wait_all(Site = Site::here());              // those not committed too
void cp_async_mbarrier_arrive(uint32_t bar, bool noinc, Site = Site::here());  // cp.async.mbarrier.arrive[.noinc]

// ---- mbarriers and bulk copies (TMA, one dimension)
void mbarrier_init(uint32_t bar, unsigned count, Site = Site::here());
void mbarrier_inval(uint32_t bar, Site = Site::here());
uint64_t mbarrier_arrive(uint32_t bar, unsigned count = 1, Site = Site::here());       // the state: bit 0 is the phase's parity
uint64_t mbarrier_arrive_expect_tx(uint32_t bar, unsigned bytes, Site = Site::here());
void mbarrier_expect_tx(uint32_t bar, unsigned bytes, Site = Site::here());
bool mbarrier_test(uint32_t bar, unsigned parity, Site = Site::here());               // test_wait / try_wait.parity; yields when false
void bulk_load(uint32_t dst, const void *src, unsigned bytes, uint32_t bar, Site = Site::here());  // global -> shared, completes bar's tx
void bulk_store(void *dst, uint32_t src, unsigned bytes, Site = Site::here());                     // shared -> global, bulk_group
void bulk_commit();
void bulk_wait(unsigned n, bool read_only, Site = Site::here());  // .read: the sources may be overwritten
void fence_proxy_async();                                         // generic writes become visible to wgmma and bulk copies

// ---- TMA: boxes of a tensor of up to 5 dimensions, the first of which is contiguous (tiled mode, no interleaving, steps of 1)
struct alignas(64) TensorMap {  // what CUtensorMap is on a GPU; made by encode_tiled
  const void *base = nullptr;
  uint64_t sizes[5], strides[5];  // elements; bytes, strides[0] those of an element
  uint32_t box[5];                // elements
  uint8_t rank = 0;               // 0: not encoded
  uint8_t swizzle;                // bytes of a row of the pattern: 16 (none), 32, 64, 128
};
// As cuTensorMapEncodeTiled: false where that gives CUDA_ERROR_INVALID_VALUE. strides: those of dimensions 1 and up, bytes.
bool encode_tiled(TensorMap &, unsigned element_bytes, unsigned rank, const void *base, const uint64_t *sizes, const uint64_t *strides,
                  const uint32_t *box, unsigned swizzle);
// cp.async.bulk.tensor, global -> shared: the box whose first element stands at `at`; what lies outside of the tensor comes as 0 and
// counts as bytes of bar's tx like the rest.
void tensor_load(uint32_t dst, const TensorMap &, const int *at, uint32_t bar, Site = Site::here());

// ---- wgmma. D: n / 2 registers of this lane, by address, since they are written when the group is waited for and hold NaN until
// then. a: 4 registers, by address too, since nobody may write them until then, or null and `a_desc` is the descriptor. B always by
// descriptor. Every lane of the warp passes the same.
enum class Element : uint8_t { bf16, f16, tf32 };
struct Wgmma {
  unsigned n;                    // m64 n k16 (16 bit) or k8 (tf32)
  Element type;
  bool accumulate;               // scale-d: false means D = A B
  int scale_a = 1, scale_b = 1;  // 1 or -1
  bool trans_a = false, trans_b = false;  // MN-major operands, 16 bit only
};
void wgmma(const Wgmma &, uint32_t *const *d, const uint32_t *const *a, uint64_t a_desc, uint64_t b_desc, Site = Site::here());
void wgmma_fence(Site = Site::here());
void wgmma_commit(Site = Site::here());
void wgmma_wait(unsigned n, Site = Site::here());
// For translators: a register that some wgmma writes is about to be read or written by another instruction, one that some wgmma
// reads about to be written.
void wgmma_touch(const void *reg, Site = Site::here());
void wgmma_overwrite(const void *reg, Site = Site::here());

// ---- reports and counters, for ptx.h and clients
void report(Site, const char *kind, const char *format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void stop();         // ends the launch; only on a kernel's thread
// A whole warp reads shared memory at once (ldmatrix): `bytes` at address[lane] for the lanes in mask. Checks and counts.
void warp_read(Site, const uint32_t *address, uint32_t mask, unsigned bytes);

}  // namespace simt

// ---- control, from the host. What the pybind11 module (python.cpp) offers is made of these.
extern "C" {
enum SimtAccess { SIMT_READ_ONLY = 0, SIMT_READ_WRITE = 1, SIMT_WRITE_FIRST = 2 };  // WRITE_FIRST: reading it before it was written is reported
void simt_register(const void *p, size_t bytes, const char *name, int access);
void simt_unregister_all();                                // between launches, as memory may be reused
void simt_reset();                                         // tensors, reports and counters
void simt_options(uint64_t seed, int checks, int counters, int resident);  // resident: blocks that run interleaved
void simt_record(int on);  // 1: forget what was recorded; from now on launches are recorded, and no memory is registered
}
