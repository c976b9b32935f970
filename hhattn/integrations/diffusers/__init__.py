"""Attention processors for diffusers' transformers, one module a family. Imported only when such a model is there."""

import hhattn

# Names of hhattn are loaded when first used. A compiler that traces a model's first call can't do that: it runs the
# module in a sandbox, where the op's implementations are registered and lost.
for _op in (
    "attention",
    "block_linear_attention",
    "block_sparse_attention",
    "norm_modulate",
    "qk_norm_rope",
    "rope_3d",
    "sparse_linear_attention",
):
    getattr(hhattn, _op)
