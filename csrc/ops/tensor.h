// What every file of ops needs: tensors turned into pointers and strides, work shared among threads. Written against torch's
// stable ABI, so that one build serves every later torch; only checks.h and the files beside this one know torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "../cpu/isa.h"

namespace hhattn {

using OptTensor = std::optional<Tensor>;

inline In input(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1 || t.numel() == 0, name, ": the last dim must be contiguous");
  return {t.const_data_ptr(), dtype_of(t, name)};
}

inline Out output(Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t, "output")}; }

// A tensor [B, S, H, D].
inline Heads heads(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must be [B, S, H, D]");
  return {input(t, name), t.stride(0), t.stride(1), t.stride(2)};
}

// Large memory is asked for anew each time, and its pages are made when first written: 4 KB at a time that takes longer than
// the work of a kernel that memory bounds (15 of 19 ms for a copy of 38 MB, measured), 2 MB at a time a fraction of it.
inline void use_large_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLarge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLarge - 1) & ~(kLarge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kLarge - 1);
  if (end > begin + kLarge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
#endif
}

// A tensor that the op writes.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  use_large_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

inline Tensor empty(const Tensor& like) { return new_tensor(like, like.sizes()); }

// Outputs of more bytes are written past the cache, which would hold little of them afterwards.
inline constexpr int64_t kStreamBytes = int64_t{1} << 24;

inline int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

// A tensor that may be missing, as outputs of an operator can't: it is empty then.
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// Sums that become the gradient `out`, and the gradient; where there is no such argument, neither.
class Sums {
 public:
  Sums() = default;
  explicit Sums(Tensor& out)
      : out_(output(out)), count_(out.numel()),
        sums_(torch::stable::new_zeros(out, {count_}, torch::headeronly::ScalarType::Double)) {}
  double* data() { return sums_ ? static_cast<double*>(sums_->mutable_data_ptr()) : nullptr; }
  void store() {
    if (count_ > 0) kernels().store_sums(data(), count_, out_);
  }

 private:
  Out out_;
  int64_t count_ = 0;
  OptTensor sums_;
};

// Rows of a piece of a backward pass: enough that its sums cost little beside it, few enough that threads share the work evenly
// and float32 sums over it are as exact as pairwise ones. Never by the number of threads: sums would change with it.
inline constexpr int64_t kPieceRows = 64;

// An affine parameter of n channels.
inline In channels(const OptTensor& t, int64_t n, const char* name) {
  if (!t) return {};
  check_sizes(*t, {n}, name);
  return input(*t, name);
}

// Least floats worth a thread of their own.
inline constexpr int64_t kGrain = 32768;

// Scratch for one thread, on a cache line's edge.
struct FreeScratch {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<float[], FreeScratch>;
inline Scratch make_scratch(int64_t floats) {
  void* data = ::operator new[](floats * sizeof(float), std::align_val_t(64));
  use_large_pages(data, floats * sizeof(float));
  return Scratch(static_cast<float*>(data));
}

// f(begin, end) in parallel over [begin, end), each part at least `grain` long. ThreadSanitizer doesn't see how OpenMP's threads
// wait for one another, and is told.
template <class F>
void parallel(int64_t begin, int64_t end, int64_t grain, const F& f) {
#if defined(__SANITIZE_THREAD__)
  static char forked, joined;  // not on the stack: finding them there would be a read before the acquire
  const auto body = [&](int64_t from, int64_t to) {
    __tsan_acquire(&forked);
    f(from, to);
    __tsan_release(&joined);
  };
  __tsan_release(&forked);
  torch::stable::parallel_for(begin, end, grain, body);
  __tsan_acquire(&joined);
#else
  torch::stable::parallel_for(begin, end, grain, f);
#endif
}

// f(item, scratch) for every item of [0, count), each thread taking the next one that is left: pieces of uneven cost balance.
// Items begin in ascending order.
template <class F>
void for_each_item(int64_t count, int64_t scratch_floats, const F& f) {
  if (count == 0) return;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  parallel(0, threads, 1, [&](int64_t, int64_t) {
    const Scratch scratch = make_scratch(scratch_floats);
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(item, scratch.get());
  });
}

// kernel(args, begin, end, scratch) over `count` rows of `width` floats, in parallel.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args, int64_t count, int64_t width) {
  if (count == 0 || width == 0) return;
  parallel(0, count, std::max<int64_t>(kGrain / width, 1), [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(args.scratch());
    kernel(args, begin, end, scratch.get());
  });
}

}  // namespace hhattn
