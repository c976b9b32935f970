"""Which mask a layer runs under at a step of the sampler: made anew or used again, sparse or still dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from hhattn.layout import Order, VideoLayout, check_order
from hhattn.masks.block_mask import BlockMask
from hhattn.masks.dynamic.centroid import Clusters, centroid
from hhattn.masks.dynamic.policies import Policy
from hhattn.masks.dynamic.select import Scorer, select


@dataclass(frozen=True)
class Selector:
    """A way to make masks from q and k: the arguments of :func:`select`, to be called later.

    scorer: of :func:`select`, or a :class:`centroid`, which sorts tokens too (its masks take no ``keep``, ``within`` or
        tile order, which are about places in the video).
    policy, block_size, keep, within: as in :func:`select`.
    order, layout: the order of tokens in which blocks are cut; q and k in another order are brought to it, for which
        the layout is needed.
    """

    scorer: Scorer | centroid
    policy: Policy
    block_size: tuple[int, int] = (64, 64)
    keep: BlockMask | None = None
    within: BlockMask | None = None
    order: Order = "raster"
    layout: VideoLayout | None = None

    def __post_init__(self) -> None:
        check_order("order", self.order)
        if isinstance(self.scorer, centroid) and (self.keep or self.within or self.order != "raster"):
            raise ValueError(
                "scorer=centroid sorts tokens, so keep, within and order are accepted only as None, None and 'raster'"
            )

    def __call__(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> BlockMask:
        """The mask of q [B, Sq, H, D] and k [B, Sk, H_kv, D], which are in ``self.order``."""
        if isinstance(self.scorer, centroid):
            raise ValueError("scorer=centroid makes a mask over sorted tokens: use its cluster() and Clusters.select()")
        return select(
            q,
            k,
            self.scorer,
            self.policy,
            block_size=self.block_size,
            scale=scale,
            keep=self.keep,
            within=self.within,
            order=self.order,
            layout=self.layout,
        )

    def with_density(self, density: float) -> Selector:
        """The same with a policy of this density."""
        return replace(self, policy=self.policy.with_density(density))


@dataclass
class _Made:
    """A mask, the step that it was made at, and the clusters that its tokens are sorted by."""

    mask: BlockMask
    step: int
    clusters: Clusters | None = None


@dataclass
class _State:
    """What a layer has seen: tensors of these shapes, this often."""

    shapes: tuple[object, ...]
    calls: int = 0
    made: dict[int, _Made] = field(default_factory=dict)


class SparsityPlan:
    """When a layer is sparse, how sparse, and how long a mask is used before another is made.

    Layers ask it in place of a mask: ``plan.at(layer)`` goes wherever :class:`hhattn.nn.BlockSparseAttention` takes a
    mask, and ``hhattn.swap(model, attention=plan)`` gives every layer its own. Each layer counts its own calls, hence
    knows the step::

        step = calls of this layer so far // calls_per_step      dense while step < dense_steps or layer in dense_layers
        a mask made at step s serves steps s ... s + every - 1

    State is each layer's own and is for tensors of one shape: with others (another video, another resolution) the layer
    starts from step 0 and no mask. A new video of the same shape looks no different from one step more: say
    :meth:`reset` before it, or give ``steps``, after which counting starts over (:func:`hhattn.swap`, which sees the
    noise level, starts over where that begins again). Activation checkpointing calls a layer again in the backward,
    which would count as another step: train under a mask, or without checkpointing.

    Args:
        select: a :class:`Selector`; or a :class:`BlockMask` that is the same at every step; or, under
            :func:`hhattn.swap`, which knows the model's grid, a function from a :class:`hhattn.VideoLayout` and the
            step (with ``every``, the step from which its mask serves) to a :class:`BlockMask`.
        every: steps that a mask is used for.
        dense_steps: the first steps, which decide what the video shows, are dense.
        dense_layers: the first so many layers, or the numbers of layers, that always are.
        density: (layer, step) -> share of blocks in (0, 1], read whenever a mask is made; 1 or more is dense. None
            leaves it to the selector's policy.
        calls_per_step: calls of a layer in one step; 2 where guidance runs the model twice, once for each prompt. Each
            has masks of its own.
        steps: steps of one video.

    Raises ValueError for counts below 1 (``dense_steps`` below 0), or a density without a Selector.
    """

    def __init__(
        self,
        select: Selector | BlockMask | Callable[[VideoLayout, int], BlockMask],
        *,
        every: int = 1,
        dense_steps: int = 0,
        dense_layers: int | Collection[int] = 0,
        density: Callable[[int, int], float] | None = None,
        calls_per_step: int = 1,
        steps: int | None = None,
    ) -> None:
        counts = {"every": every, "calls_per_step": calls_per_step, "steps": 1 if steps is None else steps}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}={count}: accepted is 1 or more")
        if dense_steps < 0:
            raise ValueError(f"dense_steps={dense_steps}: accepted is 0 or more")
        if density is not None and not isinstance(select, Selector):
            raise ValueError("density needs a Selector; a BlockMask has the density it has")
        self.select, self.every, self.dense_steps, self.density = select, every, dense_steps, density
        self.dense_layers = range(dense_layers) if isinstance(dense_layers, int) else frozenset(dense_layers)
        self.calls_per_step, self.steps = calls_per_step, steps
        self._states: dict[tuple[Hashable, int], _State] = {}

    def reset(self) -> None:
        """Forget every mask and count: a new video begins."""
        self._states.clear()

    def forget(self, name: Hashable) -> None:
        """:meth:`reset` of the layers of one ``name``."""
        for key in [key for key in self._states if key[0] == name]:
            del self._states[key]

    def at(self, layer: int, name: Hashable = "") -> LayerPlan:
        """What stands for a mask in layer number ``layer``. Layers of several models share a plan by different
        ``name``."""
        return LayerPlan(self, layer, name)

    @property
    def nbytes(self) -> int:
        """Bytes of the masks that are kept for later steps."""
        return sum(made.mask.nbytes for state in self._states.values() for made in state.made.values())

    @torch._disable_dynamo  # torch.compiler.disable imports the compiler at once: 150 MB for every program
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        name: Hashable = "",
        *,
        scale: float | None = None,
        order: Order | None = None,
    ) -> Tensor:
        """The attention of one call of a layer: q [B, Sq, H, D], k [B, Sk, H_kv, D], v [B, Sk, H_kv, Dv] ->
        [B, Sq, H, Dv]. ``order`` is theirs, None that of the masks. Counts the call, which compiled code can't:
        torch.compile breaks its graph here."""
        from hhattn.ops.attention import attention
        from hhattn.ops.block_sparse_attention import block_sparse_attention

        if not isinstance(self.select, (Selector, BlockMask)):
            raise ValueError(
                "select is a function of a layout and a step, which hhattn.swap calls; it knows the layout"
            )
        state, step, slot = self._count((name, layer), q, k)
        made = state.made.get(slot)
        due = made is None or step - made.step >= self.every
        density = self._density(layer, step) if due else None
        if density is not None and density >= 1:
            return attention(q, k, v, scale=scale)
        if isinstance(self.select, BlockMask):
            return cast(Tensor, block_sparse_attention(q, k, v, self.select, scale=scale, order=order))
        q, k, v, back = _in_order(self.select, order, q, k, v)
        if made is None or due:
            selector = self.select if density is None else self.select.with_density(density)
            made = state.made[slot] = _make(selector, q, k, scale, step, made)
        if made.clusters is not None:
            return made.clusters.attention(q, k, v, made.mask, scale=scale)
        return back(cast(Tensor, block_sparse_attention(q, k, v, made.mask, scale=scale)))

    def _density(self, layer: int, step: int) -> float | None:
        """The share of blocks at a step for which a mask is due; None leaves it to the selector."""
        if step < self.dense_steps or layer in self.dense_layers:
            return 1.0
        return None if self.density is None else self.density(layer, step)

    def _count(self, key: tuple[Hashable, int], q: Tensor, k: Tensor) -> tuple[_State, int, int]:
        """The layer's state, the step and the place in it of this call."""
        shapes = (tuple(q.shape), tuple(k.shape), q.device)
        state = self._states.get(key)
        over = state is not None and self.steps is not None and state.calls >= self.steps * self.calls_per_step
        if state is None or over or state.shapes != shapes:
            state = self._states[key] = _State(shapes)
        step, slot = divmod(state.calls, self.calls_per_step)
        state.calls += 1
        return state, step, slot


@dataclass(frozen=True)
class LayerPlan:
    """One layer's place in a :class:`SparsityPlan`; stands where a mask would."""

    plan: SparsityPlan
    layer: int
    name: Hashable = ""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, order: Order | None = None
    ) -> Tensor:
        """:meth:`SparsityPlan.attend` of this layer."""
        return self.plan.attend(q, k, v, self.layer, self.name, scale=scale, order=order)

    @torch._disable_dynamo
    def count(self, q: Tensor, k: Tensor) -> tuple[int, bool]:
        """Count a call in place of :meth:`attend`, for masks that are made elsewhere: the step from which its mask
        serves, and whether it is dense instead."""
        plan = self.plan
        _, step, _ = plan._count((self.name, self.layer), q, k)
        return step - step % plan.every, plan._density(self.layer, step) is not None


def _make(selector: Selector, q: Tensor, k: Tensor, scale: float | None, step: int, before: _Made | None) -> _Made:
    """The mask of q and k, at a step for which it is due; ``before`` is the one that it takes the place of."""
    if not isinstance(selector.scorer, centroid):
        return _Made(selector(q, k, scale=scale), step)
    clusters = selector.scorer.cluster(q, k, None if before is None else before.clusters)
    return _Made(clusters.select(selector.policy, selector.block_size, scale), step, clusters)


def _in_order(
    selector: Selector, order: Order | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """q, k, v, which are in ``order``, in the selector's; and the way back."""
    if order is None or check_order("order", order) == selector.order:
        return q, k, v, lambda out: out
    layout = selector.layout
    if layout is None:
        raise ValueError(f"blocks are cut in {selector.order} order, and the selector has no layout to convert with")
    if selector.order == "tile":
        return layout.to_tiles(q), layout.to_tiles(k), layout.to_tiles(v), layout.from_tiles
    return layout.from_tiles(q), layout.from_tiles(k), layout.from_tiles(v), layout.to_tiles
