// The module hhattn._C. Importing it registers torch.ops.hhattn.*; it holds what Python needs to know about the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of hhattn; importing this registers torch.ops.hhattn.";
  hhattn::kernels();  // an unknown HHATTN_CPU_ISA is refused now, not in the middle of a run
  m.def("cpu_isa", [] { return std::string(hhattn::kernels().isa); }, "The instruction set whose kernels are in use.");
  m.def("cpu_lanes", [] { return hhattn::kernels().lanes; }, "Floats in a vector of the kernels in use.");
  m.def("cpu_isas", &hhattn::isas, "(name, runs on this CPU) of every instruction set built in, narrowest first.");
  m.def("use_cpu_isa", &hhattn::use_isa, pybind11::arg("name"),
        "Use the kernels of one instruction set from now on; '' restores the automatic choice. Raises ValueError.");
}
