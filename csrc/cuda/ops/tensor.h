// What every binding of CUDA kernels needs: tensors turned into pointers and strides, and launchers called. Written against torch's
// stable ABI. A binding is one file, csrc/cuda/ops/<op>.cpp, compiled twice: with HH_EMULATED for CPU tensors, whose kernels the
// emulator runs (hhattn/simt/cuda.py), and without for a GPU's. It registers its operators once:
//   STABLE_TORCH_LIBRARY_IMPL(HH_LIBRARY, HH_DEVICE_KEY, m) { m.impl("norm_modulate", TORCH_BOX(&hh::norm_modulate)); }
// Schemas are defined in Python (hhattn/ops/_cuda.py), the same for every implementation.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "../../checks.h"
#include "../args.h"

#ifdef HH_EMULATED
#include "simt.h"
#define HH_LIBRARY hhattn_cuda_emulated
#define HH_DEVICE_KEY CPU
extern "C" {
// Set by hhattn/simt/cuda.py: where a launcher is (null: nowhere, and Python knows why), and the architecture that is played.
[[gnu::used]] inline void* (*hh_find_launcher)(const char* name) = nullptr;
[[gnu::used]] inline int hh_arch = 80;
}
#else
#include <cuda_runtime_api.h>
// A CUDA torch has it; its header declares it for torch's own build only.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#define HH_LIBRARY hhattn_cuda
#define HH_DEVICE_KEY CUDA
#endif

namespace hh {

using torch::headeronly::ScalarType;
using hhattn::check_shapes, hhattn::check_sizes, hhattn::dtype_of, hhattn::MaskTensors, hhattn::step;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// A tensor that may be missing, as outputs of an operator can't: it is empty then.
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// One operator call: what its kernels may touch, on which stream, on the device of `x`.
class Call {
 public:
#ifdef HH_EMULATED
  explicit Call(const Tensor&) { simt_unregister_all(); }
  ~Call() { simt_unregister_all(); }
#else
  // The runtime that is linked in here has a current device of its own, which torch's guard doesn't set.
  explicit Call(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(cudaSetDevice(device_) == cudaSuccess, "device ", device_, " can't be used");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  }
#endif
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Memory that kernels only read. Any dtype; strides may be any.
  const void* read(const Tensor& t, [[maybe_unused]] const char* name) {
#ifdef HH_EMULATED
    int64_t extent = t.numel() ? 1 : 0;
    for (int64_t d = 0; extent && d < t.dim(); ++d) extent += (t.size(d) - 1) * t.stride(d);
    simt_register(t.const_data_ptr(), extent * t.element_size(), name, SIMT_READ_ONLY);
    if (nowhere(t)) return NOWHERE;
#endif
    return t.const_data_ptr();
  }

  // t, or a copy of it if it doesn't begin at a multiple of 16 bytes: a view of memory that isn't torch's, most often.
  Tensor aligned(const Tensor& t) {
    if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0) return t;
    return copies_.emplace_back(torch::stable::clone(t));
  }

  // Contiguous memory that kernels write before they read it.
  void* write(Tensor& t, [[maybe_unused]] const char* name) {
#ifdef HH_EMULATED
    simt_register(t.mutable_data_ptr(), t.numel() * t.element_size(), name, SIMT_WRITE_FIRST);
    if (nowhere(t)) return NOWHERE;
#endif
    return t.mutable_data_ptr();
  }

  // A floating-point argument whose last dim is contiguous; none if there is none.
  In input(const Tensor& t, const char* name) {
    const int64_t last = t.dim() - 1;
    STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1 || t.numel() == 0, name, ": the last dim must be contiguous");
    return {read(t, name), dtype_of(t, name)};
  }
  In input(const OptTensor& t, const char* name) { return t ? input(*t, name) : In{}; }
  Out output(Tensor& t, const char* name) { return {write(t, name), dtype_of(t, name)}; }

  // [B, S, C] and [B, S, H, D].
  Rows rows(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3, name, " must have 3 dims");
    return {input(t, name), t.stride(0), t.stride(1)};
  }
  Heads heads(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 4, name, " must be [B, S, H, D]");
    return {input(t, name), t.stride(0), t.stride(1), t.stride(2)};
  }

  // A contiguous tensor of the same device for an output or scratch; hand it to write() or output().
  Tensor empty(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }
  Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
  }

  // The architecture, 80 for sm_80, and its multiprocessors.
  int arch() const {
#ifdef HH_EMULATED
    return hh_arch;
#else
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
#endif
  }
  int multiprocessors() const {
#ifdef HH_EMULATED
    return 4;
#else
    return attribute(cudaDevAttrMultiProcessorCount);
#endif
  }

  // HH_CALL's and HH_TRY's.
  template <class Args>
  bool run(int (*launcher)(const Args*, void*), const Args& args, const char* name, int not_taken = 0) {
    STD_TORCH_CHECK(launcher, name, ": the emulator has no such launcher, or could not build it");
    const int error = launcher(&args, stream);
    if (error && error == not_taken) return false;
#ifdef HH_EMULATED
    STD_TORCH_CHECK(error == 0, name, " failed with ", error);
#else
    STD_TORCH_CHECK(error == 0, name, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
#endif
    return true;
  }

 private:
  void* stream = nullptr;
  std::vector<Tensor> copies_;
#ifdef HH_EMULATED
  // Meta tensors have elements and no address; launches for them are recorded, not run, and must be those of tensors that are there.
  static inline void* const NOWHERE = reinterpret_cast<void*>(uintptr_t(1) << 40);
  static bool nowhere(const Tensor& t) { return t.numel() > 0 && !t.const_data_ptr(); }
#else
  int attribute(cudaDeviceAttr what) const {
    int value = 0;
    cudaDeviceGetAttribute(&value, what, device_);
    return value;
  }
  int device_ = 0;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// HH_CALL(call, hh_cuda_norm_modulate, args): calls the launcher, and throws what went wrong. HH_TRY(call, launcher, args, NOT_TAKEN):
// the same, or false if the launcher returns NOT_TAKEN.
#ifdef HH_EMULATED
#define HH_TRY(call, launcher, args, ...) \
  (call).run(reinterpret_cast<decltype(&launcher)>(hh_find_launcher ? hh_find_launcher(#launcher) : nullptr), args, #launcher __VA_OPT__(, ) __VA_ARGS__)
#else
#define HH_TRY(call, launcher, args, ...) (call).run(&launcher, args, #launcher __VA_OPT__(, ) __VA_ARGS__)
#endif
#define HH_CALL(call, launcher, args) HH_TRY(call, launcher, args)

}  // namespace hh
