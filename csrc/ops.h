#pragma once

#include <string>
#include <vector>

namespace hhattn {

// Names of the ops that ops.cpp registers under torch.ops.hhattn.
std::vector<std::string> op_names();

}  // namespace hhattn
