// The module _simt: the emulator's control for Python. hhattn/simt/runtime.py builds and wraps it.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;
using namespace simt;

// Where: (file, line), or for a program counter (library, offset in it) with `is_pc`.
static py::tuple place(const char *file, uintptr_t line) {
  if (file && *file) return py::make_tuple(file, line, false);
  Dl_info info;
  if (line && dladdr(reinterpret_cast<void *>(line), &info) && info.dli_fname)
    return py::make_tuple(info.dli_fname, line - reinterpret_cast<uintptr_t>(info.dli_fbase), true);
  return py::make_tuple("", 0, false);
}

// Held while Python looks; waits without the interpreter's lock, which who holds it may be waiting for.
struct Gate {
  Gate() {
    py::gil_scoped_release release;
    one_at_a_time.lock();
  }
  ~Gate() { one_at_a_time.unlock(); }
};

static py::list reports() {
  Gate gate;
  py::list out;
  for (const Report &r : machine.reports) {
    py::dict d;
    d["kind"] = r.kind;
    d["message"] = r.message;
    d["kernel"] = r.kernel;
    d["place"] = place(r.file.c_str(), r.line);
    d["block"] = py::make_tuple(r.block.x, r.block.y, r.block.z);
    d["thread"] = r.thread;
    d["count"] = r.count;
    out.append(d);
  }
  return out;
}

static py::list counters() {
  Gate gate;
  py::list out;
  for (const auto &[key, c] : machine.counters) {
    py::dict d;
    d["kernel"] = key.kernel;
    d["place"] = place(key.site.file, key.site.line);
    d["space"] = key.global ? "global" : "shared";
    d["write"] = key.write;
    d["bytes"] = key.bytes;
    d["requests"] = c.requests;
    d["lanes"] = c.lanes;
    d["cost"] = c.cost;
    d["minimum"] = c.minimum;
    out.append(d);
  }
  return out;
}

static py::list launches() {
  Gate gate;
  py::list out;
  for (const Recorded &r : machine.launches) {
    out.append(py::make_tuple(place(nullptr, reinterpret_cast<uintptr_t>(r.kernel)), r.name,
                              py::make_tuple(r.grid.x, r.grid.y, r.grid.z), py::make_tuple(r.block.x, r.block.y, r.block.z),
                              r.shared_bytes, r.tensors));
  }
  return out;
}

static void launch_body(const std::string &kernel, uintptr_t body, py::bytes params, std::array<unsigned, 3> grid,
                        std::array<unsigned, 3> block, size_t shared_bytes) {
  std::string bytes = params;  // aligned for any parameter, as operator new's memory is
  bytes.reserve(64);
  py::gil_scoped_release release;
  simt_launch(kernel.c_str(), reinterpret_cast<Body>(body), bytes.data(), grid.data(), block.data(), shared_bytes, nullptr);
}

PYBIND11_MODULE(_simt, m) {
  m.doc() = "The SIMT emulator: GPU kernels run on the CPU, thread by thread.";
  m.def(
      "register",
      [](uintptr_t pointer, size_t bytes, const std::string &name, int access) {
        simt_register(reinterpret_cast<void *>(pointer), bytes, name.c_str(), access);
      },
      py::arg("pointer"), py::arg("bytes"), py::arg("name"), py::arg("access"),
      py::call_guard<py::gil_scoped_release>(),
      "Memory that kernels may touch; access 0: read only, 1: read and write, 2: written before it is read (poisoned now).");
  m.def("unregister_all", &simt_unregister_all, py::call_guard<py::gil_scoped_release>(), "Forget all memory.");
  m.def("reset", &simt_reset, py::call_guard<py::gil_scoped_release>(), "Forget memory, reports and counters.");
  m.def(
      "options",
      [](uint64_t seed, bool checks, bool counters, int resident) { simt_options(seed, checks, counters, resident); },
      py::arg("seed") = 0, py::arg("checks") = true, py::arg("counters") = false, py::arg("resident") = 1,
      py::call_guard<py::gil_scoped_release>(),
      "seed: of the schedule, 0 is the plain order; resident: blocks that run interleaved.");
  m.def("launch", &launch_body, py::arg("kernel"), py::arg("body"), py::arg("params"), py::arg("grid"), py::arg("block"),
        py::arg("shared_bytes") = 0, "Run a kernel: `body` is the address of a simt::Body, `params` what it gets.");
  m.def("reports", &reports, "What was found so far.");
  m.def("counters", &counters, "Requests and their cost by instruction.");
  m.def(
      "record", [](bool on) { simt_record(on); }, py::arg("on"), py::call_guard<py::gil_scoped_release>(),
      "Launches of CUDA sources are recorded from now on, or run again.");
  m.def("launches", &launches, "Recorded ones: where the kernel's code is, what the source calls it, grid, block, shared bytes, tensors.");
}
