// Compiled once for each instruction set, with -DHHATTN_ISA=<name> and its flags; see ISAS in setup.py.
#include "norm_modulate.h"
#include "qk_norm_rope.h"

#define HHATTN_NAME_(isa) #isa
#define HHATTN_NAME(isa) HHATTN_NAME_(isa)

namespace hhattn::HHATTN_ISA {

extern const Kernels kernels;
const Kernels kernels{HHATTN_NAME(HHATTN_ISA), kLanes, &norm_modulate, &norm_rope};

}  // namespace hhattn::HHATTN_ISA
