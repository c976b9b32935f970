"""swap: give a model's layers this package's ops, say what was swapped and what wasn't, and take it all back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hhattn.integrations.attention import BlockLinear, SparseLinear
    from hhattn.layout import VideoLayout
    from hhattn.masks import BlockMask, Selector, SparsityPlan

    Attention: TypeAlias = (
        str | BlockMask | Callable[[VideoLayout], BlockMask] | Selector | SparsityPlan | SparseLinear | BlockLinear
    )

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

WRAPPED = "_old_forward"  # where accelerate keeps the forward that its hooks call


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` runs its class's forward, be it inside accelerate's hooks."""
    now = module.__dict__.get(WRAPPED, module.__dict__.get("forward"))
    return now is None or (getattr(now, "__func__", None) is type(module).forward and now.__self__ is module)


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
    manager it undoes itself at the end of the block.

    ``added`` are the layers that the swap brought along, by path: the projections of a
    :class:`hhattn.integrations.SparseLinear`. They are here, not in the model: train :meth:`parameters`, save
    :meth:`state_dict`. They outlive :meth:`undo`."""

    layers: list[Layer] = field(default_factory=list)
    added: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    _undo: list[Callable[[], bool]] = field(default_factory=list, repr=False)
    _last: list[Callable[[], object]] = field(default_factory=list, repr=False)
    _processors: list[object] = field(default_factory=list, repr=False)

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

        def restore() -> bool:
            if module.processor is not processor:
                log.warning("hhattn.swap: %s was given another processor since; left as it is", path)
                return False
            put(before)
            return True

        put(processor)
        self._processors.append(processor)
        self._undo.append(restore)

    def set_forward(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give this module, not its class, another ``forward(self, ...)``, to be taken back by :meth:`undo`. Where
        accelerate's hooks wrap the forward, before or after this, it is the one inside."""
        place = WRAPPED if WRAPPED in module.__dict__ else "forward"
        ours, before = MethodType(forward, module), module.__dict__.get(place)

        def restore() -> bool:
            now = next((name for name in (WRAPPED, "forward") if module.__dict__.get(name) is ours), None)
            if now is None:
                log.warning("hhattn.swap: %s was given another forward since; left as it is", path)
                return False
            if now == "forward" and before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__[now] = before or MethodType(type(module).forward, module)
            return True

        module.__dict__[place] = ours
        self._undo.append(restore)

    def add_hook(
        self,
        module: nn.Module,
        before: Callable[[Any, tuple[Any, ...], dict[str, Any]], None],
        after: Callable[..., None] | None = None,
    ) -> None:
        """As long as a layer is swapped, call ``before(module, args, kwargs)`` before the module's forward, and
        ``after(module, args, output)`` behind it, whether or not it fails."""
        self.on_undo(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        if after is not None:
            self.on_undo(module.register_forward_hook(after, always_call=True).remove)

    def on_undo(self, last: Callable[[], None]) -> None:
        """Call ``last`` when :meth:`undo` has put all layers back."""
        self._last.append(last)

    def forbid_copies(self, model: nn.Module) -> None:
        """Have pickle and deepcopy of the model refused until :meth:`undo`: nothing could undo the copy's swap."""

        def refuse() -> None:
            raise TypeError(
                f"a swapped {type(model).__name__} can't be pickled or copied: undo() the swap first, or use "
                "state_dict() or save_pretrained(), which are the model's own"
            )

        model.__dict__["__getstate__"] = refuse
        self.on_undo(lambda: model.__dict__.pop("__getstate__", None))

    def add_module(self, path: str, owner: nn.Module, name: str, module: nn.Module, register: bool) -> None:
        """Keep a new layer of the module at ``path``; ``register``: as a part of that module too, until undone."""
        self.added[f"{path}.{name}"] = module
        if not register:
            return
        if hasattr(owner, name):
            raise ValueError(f"register=True: {path} has a {name} already")
        owner.register_module(name, module)

        def restore() -> bool:
            if getattr(owner, name, None) is module:
                delattr(owner, name)
            return True

        self._undo.append(restore)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of ``added``, for an optimizer."""
        for module in self.added.values():
            yield from module.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of ``added``, by path."""
        return {f"{path}.{name}": x for path, m in self.added.items() for name, x in m.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take all weights of ``added`` from what :meth:`state_dict` gave. ValueError for other names."""
        missing, more = self.state_dict().keys() - state.keys(), state.keys() - self.state_dict().keys()
        if missing or more:
            raise ValueError(f"state doesn't have {sorted(missing)[:3]}; it has {sorted(more)[:3]}, which isn't here")
        for path, module in self.added.items():
            module.load_state_dict({name: state[f"{path}.{name}"] for name in module.state_dict()})

    def undo(self) -> None:
        """Put every layer back as it was: the very objects, so results are the same bits. A layer that someone else
        changed in the meantime is left to them, with a warning, and put back by another call of this once they have
        undone theirs. When nothing is left to do, a call does nothing."""
        self._undo = [restore for restore in reversed(self._undo) if not restore()][::-1]
        while self._last and not self._undo:
            self._last.pop()()

    def report(self) -> str:
        """A few lines: how many places of each kind were swapped, by what, and how many were left, and why."""
        counts = Counter((layer.swapped, layer.part, layer.note) for layer in self.layers)
        lines = [
            f"{'swapped' if swapped else 'left':<8} {count:>3} x {part}: {note}"
            for (swapped, part, note), count in sorted(counts.items(), key=lambda item: not item[0][0])
        ]
        ignored = Counter(str(backend) for p in self._processors if (backend := getattr(p, "_attention_backend", None)))
        lines += [f"ignored  {n:>3} x attention backend {name}: hhattn attends here" for name, n in ignored.items()]
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


def _unwrapped(model: Any) -> Any:
    """The model inside torch.compile's, PEFT's or a distributed wrapper."""
    while _family(model) is None and isinstance(model, nn.Module):
        base = getattr(model, "get_base_model", None)
        inner = base() if callable(base) else getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _models(model_or_pipeline: object) -> dict[str, nn.Module]:
    """The models to work on, by name: the argument itself, or the known components of a pipeline."""
    model = _unwrapped(model_or_pipeline)
    if _family(model):
        return {"": model}
    components = getattr(model_or_pipeline, "components", None)
    found = {name: _unwrapped(m) for name, m in components.items()} if isinstance(components, dict) else {}
    found = {name: model for name, model in found.items() if _family(model)}
    if not found:
        raise ValueError(
            f"model_or_pipeline is a {type(model_or_pipeline).__name__}, which swap doesn't know; accepted: "
            f"{', '.join(FAMILIES)}, or a pipeline that has one of them"
        )
    return found


def swap(
    model_or_pipeline: nn.Module | object,
    attention: Attention | Sequence[Attention] = "exact",
    norms: bool = True,
    rope: bool = True,
) -> Swap:
    """Run the self-attention of a diffusers transformer on this package's ops, with the same result up to rounding.

    Patches these instances, never their classes, and touches no weight. Cross-attention stays as it is.

    Args:
        model_or_pipeline: a transformer of diffusers (Wan, SANA-Video, HunyuanVideo, HunyuanVideo 1.5, CogVideoX,
            LTX-Video, LTX-2, Mochi), or a pipeline with one or more of them.
        attention: "exact": :func:`hhattn.block_linear_attention` for SANA-Video, else :func:`hhattn.attention`. For all
            but SANA-Video also what attends a part of the pairs:

            - a function from a :class:`hhattn.VideoLayout` to a :class:`hhattn.BlockMask`, called once for each grid
              that the model is given: ``lambda layout: masks.radial(layout) | masks.text(layout)``. The layout knows
              where the model keeps its text; padded texts are taken out of the mask;
            - a :class:`hhattn.BlockMask` over the model's tokens;
            - a :class:`hhattn.masks.Selector`, which makes a mask from q and k at every call, or a
              :class:`hhattn.masks.SparsityPlan`, which says when one is made, or a pattern used, step by step;
            - a :class:`hhattn.integrations.SparseLinear`: linear attention for the pairs that a mask leaves out.

            For SANA-Video also a :class:`hhattn.integrations.BlockLinear`: chunks of frames that see the past alone. A
            list has one of all these for each self-attention layer, in the model's order (Wan VACE's control blocks
            and HunyuanVideo's blocks of one stream come last).
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
            if any(p.dtype == torch.float64 for p in model.parameters()):
                raise ValueError(f"{name or 'the model'} is float64; accepted are float32, bfloat16 and float16")
            family = import_module(str(_family(model)))
            handle.forbid_copies(model)
            family.swap_layers(handle, f"{name}." if name else "", model, attention, norms, rope)
        attention_layers = [layer for layer in handle.layers if layer.part == "self-attention"]
        if attention != "exact" and not any(layer.swapped for layer in attention_layers):
            raise ValueError(f"attention would change nothing: {attention_layers[0].note if attention_layers else ''}")
    except BaseException:
        handle.undo()
        raise
    return handle
