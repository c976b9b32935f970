// Small kernels, each with a fault that `Bug` turns on and that the emulator has to report; without it, nothing.
#pragma once
#define RUN(kernel, grid, block, shared, ...)                      \
  if (bug)                                                         \
    LAUNCH(kernel<true>, grid, block, shared, __VA_ARGS__);        \
  else                                                             \
    LAUNCH(kernel<false>, grid, block, shared, __VA_ARGS__)
#define KERNEL template <bool Bug> __global__ void
#define ENTRY extern "C" void
