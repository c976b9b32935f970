"""Parts that the families share: what may be replaced, and the norms of a block as arguments of the fused op."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hhattn.integrations.diffusers._attention import Attend
from hhattn.integrations.diffusers._choose import Chosen
from hhattn.integrations.diffusers._qk import affine, record_norms
from hhattn.integrations.swap import Swap, has_own_forward

LAYER_NORMS = ("LayerNorm", "FP32LayerNorm", "Identity")
RMS_NORMS = ("RMSNorm",)


class Processor:
    """What the processors of swapped layers have: what they attend, and whether the norms of q and k and their rotation
    are fused; and what diffusers sets on every processor of a model: an attention backend, which is
    :func:`hhattn.swap`'s here (its report says so), and the settings of context parallelism, which are refused."""

    _attention_backend: Any = None

    def __init__(self, attend: Attend, fuse_norms: bool = True, fuse_rope: bool = True) -> None:
        self.attend, self.fuse_norms, self.fuse_rope = attend, fuse_norms, fuse_rope

    @property
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: object) -> None:
        if config is not None:
            raise ValueError(
                "a swapped model can't run under diffusers' context parallelism, whose ranks would each attend their "
                "own tokens alone: undo() the swap first"
            )


def why_not_swapped(processor: Any, kind: type) -> str | None:
    """None where ``processor`` is exactly a ``kind`` and attends alone, so that another may stand in for it."""
    if type(processor) is not kind:
        return f"its processor is a {type(processor).__name__}"
    if getattr(processor, "_parallel_config", None) is not None:
        return "it runs under diffusers' context parallelism"
    return None


def argument(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a forward was given as ``name``, by name or at its place; None where it was given neither."""
    return kwargs[name] if name in kwargs else args[place] if len(args) > place else None


def swap_attention(
    handle: Swap,
    path: str,
    attn: Any,
    kind: type,
    make: Callable[[Attend, bool], object],
    attends: Chosen,
    norms: bool,
    rope: bool,
    part: str = "self-attention",
) -> None:
    """Give the self-attention at ``path`` the processor ``make(attends, fuse_norms)`` in place of its own ``kind``, and
    write down what became of it (as ``part``), of the norms of its q and k and of their rotation."""
    if why := why_not_swapped(attn.processor, kind):
        handle.left(path, part, why)
        return
    fuse_norms = record_norms(handle, path, attn, norms)
    handle.set_processor(path, attn, make(attends.make(path, attn), fuse_norms))
    handle.swapped(path, part, attends.by)
    if rope:
        handle.swapped(path, "rope", "hhattn.qk_norm_rope")
    else:
        handle.left(path, "rope", "rope=False")


def refuse_cross_attention(family: str, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None) -> None:
    """ValueError where a self-attention layer is given a second sequence or a mask: neither is ignored."""
    if encoder_hidden_states is not None or attention_mask is not None:
        name = "attention_mask" if encoder_hidden_states is None else "encoder_hidden_states"
        raise ValueError(
            f"{name} must be None: this processor is for {family}'s self-attention; its mask is a BlockMask"
        )


def why_not_fused(
    block: nn.Module, kind: str, arguments: tuple[str, ...], norms: tuple[nn.Module, ...], kinds: tuple[str, ...]
) -> str | None:
    """None where ``block`` is exactly a ``kind``, its forward takes ``arguments`` and its ``norms`` are ``kinds``."""
    if type(block).__name__ != kind:
        return f"the block is a {type(block).__name__}"
    if not has_own_forward(block):
        return "someone replaced the block's forward"
    if tuple(inspect.signature(type(block).forward).parameters) != ("self", *arguments):
        return "this release of diffusers calls the block with other arguments"
    other = [type(norm).__name__ for norm in norms if type(norm).__name__ not in kinds]
    return f"a norm is a {other[0]}" if other else None


def swap_forward(
    handle: Swap,
    path: str,
    block: Any,
    forward: Callable[..., Any],
    norms: bool,
    kind: str,
    names: tuple[str, ...],
    kinds: tuple[str, ...] = LAYER_NORMS,
) -> None:
    """Give ``block`` the fused ``forward`` if it is what ``forward`` was written for; written down either way.

    ``names`` are its norms' places, dots and all, ``kinds`` the classes that they may have."""
    arguments = tuple(inspect.signature(forward).parameters)[1:]
    why = "norms=False"
    if norms:
        why = why_not_fused(block, kind, arguments, tuple(block.get_submodule(n) for n in names), kinds) or ""
    if not why:
        handle.set_forward(path, block, forward)
        handle.swapped(path, "block norms", "hhattn.norm_modulate")
    else:
        handle.left(path, "block norms", why)


def layer_norm(norm: Any) -> dict[str, Any]:
    """The arguments of :func:`hhattn.norm_modulate` that make it this LayerNorm."""
    weight, bias = affine(norm)
    return {"norm": "layer", "eps": norm.eps, "weight": weight, "bias": bias}


def rms_norm(norm: Any) -> dict[str, Any]:
    """The arguments of :func:`hhattn.norm_modulate` that make it this RMSNorm."""
    weight, bias = affine(norm)
    return {"norm": "rms", "eps": norm.eps, "weight": weight, "bias": bias}
