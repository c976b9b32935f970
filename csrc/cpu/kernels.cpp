// Compiled once for each instruction set, with -DHHATTN_ISA=<name> and its flags; see ISAS in setup.py.
#include "block_linear_attention.h"
#include "block_sparse_attention.h"
#include "block_sparse_attention_backward.h"
#include "norm_modulate.h"
#include "norm_modulate_backward.h"
#include "qk_norm_rope.h"
#include "qk_norm_rope_backward.h"
#include "sparse_linear_attention.h"
#include "sparse_linear_attention_backward.h"

#define HHATTN_NAME_(isa) #isa
#define HHATTN_NAME(isa) HHATTN_NAME_(isa)

namespace hhattn::HHATTN_ISA {

extern const Kernels kernels;
const Kernels kernels{HHATTN_NAME(HHATTN_ISA), kLanes, &norm_modulate, &norm_modulate_backward,
                      &norm_rope, &norm_rope_backward, &store_sums,
                      &block_sparse_scratch, &block_sparse_pack, &block_sparse_forward,
                      &block_sparse_backward_scratch, &block_sparse_delta, &block_sparse_backward,
                      &block_sparse_store_dq, &block_linear_scratch, &block_linear_sums,
                      &block_linear_sums_backward, &block_linear_outputs, &block_linear_outputs_backward,
                      &map_rows, &map_rows_backward, &marginal_scratch, &marginal_part_sums,
                      &marginal_weights, &marginal_outputs, &marginal_upstream, &marginal_weights_backward,
                      &marginal_part_queries, &marginal_part_keys, &marginal_gradients};

}  // namespace hhattn::HHATTN_ISA
