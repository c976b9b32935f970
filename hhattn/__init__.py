"""hhattn: attention kernels for long videos, and everything needed to use them.

Every public name is listed in :data:`__all__` and loaded when first used, so that importing the package needs neither
the native library nor any optional dependency.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hhattn.info import info

if TYPE_CHECKING:
    from hhattn import masks, nn
    from hhattn._dispatch import use_impl
    from hhattn.integrations.swap import swap
    from hhattn.layout import VideoLayout
    from hhattn.masks import BlockMask
    from hhattn.ops.attention import attention
    from hhattn.ops.block_linear_attention import LinearAttentionState, block_linear_attention
    from hhattn.ops.block_sparse_attention import block_sparse_attention
    from hhattn.ops.norm_modulate import norm_modulate
    from hhattn.ops.qk_norm_rope import qk_norm_rope
    from hhattn.ops.rope_3d import rope_3d
    from hhattn.ops.sparse_linear_attention import sparse_linear_attention

__version__ = "0.1.0"

_HOME = {
    "BlockMask": "hhattn.masks",
    "LinearAttentionState": "hhattn.ops.block_linear_attention",
    "VideoLayout": "hhattn.layout",
    "attention": "hhattn.ops.attention",
    "block_linear_attention": "hhattn.ops.block_linear_attention",
    "block_sparse_attention": "hhattn.ops.block_sparse_attention",
    "norm_modulate": "hhattn.ops.norm_modulate",
    "qk_norm_rope": "hhattn.ops.qk_norm_rope",
    "rope_3d": "hhattn.ops.rope_3d",
    "sparse_linear_attention": "hhattn.ops.sparse_linear_attention",
    "swap": "hhattn.integrations",
    "use_impl": "hhattn._dispatch",
}
_SUBPACKAGES = ("masks", "nn")

__all__ = [
    "BlockMask",
    "LinearAttentionState",
    "VideoLayout",
    "__version__",
    "attention",
    "block_linear_attention",
    "block_sparse_attention",
    "info",
    "masks",
    "nn",
    "norm_modulate",
    "qk_norm_rope",
    "rope_3d",
    "sparse_linear_attention",
    "swap",
    "use_impl",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"hhattn.{name}")
    else:
        raise AttributeError(f"module 'hhattn' has no attribute {name!r}; public names: {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
