// The module hhattn._C_cuda. Importing it registers the CUDA kernels of torch.ops.hhattn_cuda, whose schemas Python defines.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of hhattn; importing this registers them for torch.ops.hhattn_cuda.";
  m.attr("archs") = HH_ARCHS;  // what they are compiled for
}
