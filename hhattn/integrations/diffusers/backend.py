"""hhattn as an attention backend of diffusers: ``model.set_attention_backend("hhattn")``.

diffusers keeps a closed list of backends. :func:`register_backend` adds one to it, which the model's own method and
``diffusers.models.attention_dispatch.attention_backend`` then accept. It serves the models whose processors go through
diffusers' dispatcher, cross-attention included; it sees q, k and v only, so norms, rotation and masks of a grid are
:func:`hhattn.swap`'s.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hhattn

NAME = "hhattn"
TESTED = "0.36 to 0.42"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register_backend() -> None:
    """Make "hhattn" a backend of diffusers in this process; a second call does nothing.

    Raises:
        ImportError: diffusers is not installed.
        RuntimeError: its dispatcher isn't as it was in the releases that this is written for. Nothing is changed then.
    """
    try:
        from diffusers.models import attention_dispatch
    except ImportError as error:
        raise ImportError("register_backend needs diffusers 0.36 or later: pip install 'hhattn[diffusers]'") from error
    names = getattr(attention_dispatch, "AttentionBackendName", None)
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    wanted = ("_member_map_", "_member_names_", "_value2member_map_")
    if not all(hasattr(names, name) for name in wanted) or not hasattr(registry, "register"):
        from diffusers import __version__

        raise RuntimeError(f"diffusers {__version__} has another dispatcher than the releases tested, {TESTED}")
    assert names is not None
    assert registry is not None
    if NAME in names._value2member_map_:
        return
    member: Any = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[NAME] = member
    registry.register(member)(attend)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """What diffusers' dispatcher calls: query [B, Sq, H, D], key, value [B, Sk, H_kv, D] -> [B, Sq, H, D].

    :func:`hhattn.attention`, or torch's SDPA for what that doesn't mean or take: a mask, a causal call of two lengths,
    dropout, other dtypes, no tokens. ``return_lse`` and context parallelism are refused.
    """
    if return_lse:
        raise ValueError("return_lse=True: hhattn's backend accepts False, as diffusers' native one does")
    if _parallel_config is not None:
        raise ValueError("hhattn's backend doesn't run under diffusers' context parallelism")
    plain = attn_mask is None and not dropout_p and query.dtype in DTYPES and key.shape[1] > 0
    if plain and not (is_causal and query.shape[1] != key.shape[1]):
        return hhattn.attention(query, key, value, scale=scale, causal=is_causal)
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # diffusers' meaning: of each batch entry's keys
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)
