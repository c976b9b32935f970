// Which instruction sets the kernels are built for, which of them this CPU runs, and which one is in use.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace hhattn {

// Every instruction set built in, narrowest first, and whether this CPU runs it.
std::vector<std::pair<std::string, bool>> isas();

// The kernels in use: the widest this CPU runs, capped by the environment variable HHATTN_CPU_ISA.
const Kernels& kernels();

// Use the kernels of one instruction set from now on; "" restores the choice above. Throws std::invalid_argument for one
// that is not built or that this CPU can't run. Not to be called while an op runs.
void use_isa(const std::string& name);

}  // namespace hhattn
