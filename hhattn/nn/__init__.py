"""The ops as modules, and the attention layers built from them."""

from hhattn.nn.block_linear_attention import BlockLinearAttention
from hhattn.nn.block_sparse_attention import BlockSparseAttention
from hhattn.nn.norm_modulate import NormModulate
from hhattn.nn.qk_norm_rope import QKNormRoPE
from hhattn.nn.rope_3d import Rope3D
from hhattn.nn.sparse_linear_attention import SparseLinearAttention
from hhattn.nn.video_sparse_attention import VideoSparseAttention

__all__ = [
    "BlockLinearAttention",
    "BlockSparseAttention",
    "NormModulate",
    "QKNormRoPE",
    "Rope3D",
    "SparseLinearAttention",
    "VideoSparseAttention",
]
