"""swap: give a model's layers this package's ops, say what was swapped and what wasn't, and take it all back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from hhattn.layout import VideoLayout
    from hhattn.masks import BlockMask, SparsityPlan

log = logging.getLogger("hhattn")

# model class -> the module that knows its layers, imported when such a model is met
FAMILIES = {
    "CogVideoXTransformer3DModel": "hhattn.integrations.diffusers.cogvideox",
    "HunyuanVideoTransformer3DModel": "hhattn.integrations.diffusers.hunyuan_video",
    "HunyuanVideo15Transformer3DModel": "hhattn.integrations.diffusers.hunyuan_video",
    "LTX2VideoTransformer3DModel": "hhattn.integrations.diffusers.ltx2",
    "LTXVideoTransformer3DModel": "hhattn.integrations.diffusers.ltx",
    "MochiTransformer3DModel": "hhattn.integrations.diffusers.mochi",
    "SanaVideoTransformer3DModel": "hhattn.integrations.diffusers.sana_video",
    "WanTransformer3DModel": "hhattn.integrations.diffusers.wan",
    "WanVACETransformer3DModel": "hhattn.integrations.diffusers.wan",
}


@dataclass(frozen=True)
class Layer:
    """One place of the model: its path, what is computed there, whether it was swapped, and by what or why not."""

    path: str
    part: str
    swapped: bool
    note: str


@dataclass
class Swap:
    """What :func:`swap` did. ``layers`` lists every place it considered; :meth:`undo` restores the model. As a context
    manager it undoes itself at the end of the block."""

    layers: list[Layer] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def left(self, path: str, part: str, why: str) -> None:
        """Record a place that stays as it is."""
        self.layers.append(Layer(path, part, False, why))

    def swapped(self, path: str, part: str, by: str) -> None:
        """Record a place that now runs ``by``."""
        self.layers.append(Layer(path, part, True, by))

    def set_processor(self, path: str, module: Any, processor: object) -> None:
        """Give an attention layer of diffusers another processor, to be taken back by :meth:`undo`."""
        before = module.processor
        # Mochi's attention has no method for it
        put = getattr(module, "set_processor", partial(setattr, module, "processor"))

        def restore() -> None:
            if module.processor is processor:
                put(before)
            else:
                log.warning("hhattn.swap: %s was given another processor since; left as it is", path)

        put(processor)
        self._undo.append(restore)

    def set_forward(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give this module, not its class, another ``forward(self, ...)``, to be taken back by :meth:`undo`."""
        ours, before = MethodType(forward, module), module.__dict__.get("forward")

        def restore() -> None:
            if module.__dict__.get("forward") is ours:
                del module.__dict__["forward"]
                if before is not None:
                    module.__dict__["forward"] = before
            else:
                log.warning("hhattn.swap: %s was given another forward since; left as it is", path)

        module.__dict__["forward"] = ours
        self._undo.append(restore)

    def add_hook(self, module: nn.Module, hook: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call ``hook(module, args, kwargs)`` before the module's forward, until :meth:`undo`."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def undo(self) -> None:
        """Put every layer back as it was: the very objects, so results are the same bits. A second call does nothing. A
        layer that someone else changed in the meantime is left to them, with a warning."""
        while self._undo:
            self._undo.pop()()

    def report(self) -> str:
        """A few lines: how many places of each kind were swapped, by what, and how many were left, and why."""
        counts = Counter((layer.swapped, layer.part, layer.note) for layer in self.layers)
        lines = [
            f"{'swapped' if swapped else 'left':<8} {count:>3} x {part}: {note}"
            for (swapped, part, note), count in sorted(counts.items(), key=lambda item: not item[0][0])
        ]
        return "\n".join(lines)

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _family(model: object) -> str | None:
    """The module that knows ``model``, by the names of its class and of those it derives from."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def _models(model_or_pipeline: object) -> dict[str, nn.Module]:
    """The models to work on, by name: the argument itself, or the known components of a pipeline."""
    if _family(model_or_pipeline):
        return {"": model_or_pipeline}  # type: ignore[dict-item]
    components = getattr(model_or_pipeline, "components", None)
    found = {name: m for name, m in components.items() if _family(m)} if isinstance(components, dict) else {}
    if not found:
        raise ValueError(
            f"model_or_pipeline is a {type(model_or_pipeline).__name__}, which swap doesn't know; accepted: "
            f"{', '.join(FAMILIES)}, or a pipeline that has one of them"
        )
    return found


def swap(
    model_or_pipeline: nn.Module | object,
    attention: str | BlockMask | SparsityPlan | Callable[[VideoLayout], BlockMask] = "exact",
    norms: bool = True,
    rope: bool = True,
) -> Swap:
    """Run the self-attention of a diffusers transformer on this package's ops, with the same result up to rounding.

    Patches these instances, never their classes, and touches no weight. Cross-attention stays as it is.

    Args:
        model_or_pipeline: a transformer of diffusers (Wan, SANA-Video, HunyuanVideo, HunyuanVideo 1.5, CogVideoX,
            LTX-Video, LTX-2, Mochi), or a pipeline with one or more of them.
        attention: "exact": :func:`hhattn.block_linear_attention` for SANA-Video, else :func:`hhattn.attention`. For all
            but SANA-Video also what has :func:`hhattn.block_sparse_attention` attend a part of the pairs:

            - a function from a :class:`hhattn.VideoLayout` to a :class:`hhattn.BlockMask`, called once for each grid
              that the model is given: ``lambda layout: masks.radial(layout) | masks.text(layout)``. The layout knows
              where the model keeps its text; padded texts are taken out of the mask;
            - a :class:`hhattn.BlockMask` over the model's tokens;
            - a :class:`hhattn.masks.SparsityPlan`, which makes masks from q and k as the model runs.
        norms: norm q and k by :func:`hhattn.qk_norm_rope`, and norm, modulate and add up inside the blocks by
            :func:`hhattn.norm_modulate`.
        rope: rotate by :func:`hhattn.qk_norm_rope`. SANA-Video rotates inside its attention: there it can't be False.

    Returns:
        a :class:`Swap`: ``.report()`` says what was swapped and what not, ``.undo()`` restores the model bit for bit.
        It is a context manager too: ``with hhattn.swap(model): ...``.

    Raises:
        ValueError: a model that isn't known, or arguments that it can't have. The model is then unchanged.
    """
    handle = Swap()
    try:
        for name, model in _models(model_or_pipeline).items():
            family = import_module(str(_family(model)))
            family.swap_layers(handle, f"{name}." if name else "", model, attention, norms, rope)
        attention_layers = [layer for layer in handle.layers if layer.part == "self-attention"]
        if attention != "exact" and not any(layer.swapped for layer in attention_layers):
            raise ValueError(f"attention would change nothing: {attention_layers[0].note if attention_layers else ''}")
    except BaseException:
        handle.undo()
        raise
    return handle
