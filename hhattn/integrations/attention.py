"""What :func:`hhattn.swap` can be given as ``attention`` that is more than a mask: settings of the hybrid and of linear
attention in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hhattn.layout import VideoLayout
from hhattn.masks import BlockMask, Selector, centroid
from hhattn.ops._check import one_of
from hhattn.ops.sparse_linear_attention import FEATURE_MAPS

Pattern = BlockMask | Callable[[VideoLayout], BlockMask]


@dataclass(frozen=True)
class SparseLinear:
    """SLA in place of softmax self-attention: :func:`hhattn.sparse_linear_attention`, softmax over the critical pairs,
    linear attention over the marginal ones, through a projection a layer that is learned.

    The projections (``proj_l``, an nn.Linear over the head dim, named as in the paper's published code) begin at zeros:
    before training, or weights of your own, the model attends its critical pairs and no others. They are the
    :class:`hhattn.integrations.Swap`'s: ``swapped.parameters()``, ``swapped.state_dict()``,
    ``swapped.load_state_dict(...)``. The model's own parameters and state_dict don't have them, unless ``register``.

    Args:
        critical: a share in (0, 1] of the blocks of 64x64 tokens, chosen at every call by their means' scores, as in
            the paper; or a :class:`hhattn.masks.Selector`; or a mask, or a function from a
            :class:`hhattn.VideoLayout` to one, called once for each grid that the model is given.
        marginal: likewise a mask or a function; None is every pair that isn't critical. Every pair
            (``hhattn.masks.dense``) is what the paper's published code sums over.
        feature_map, eps: as in :func:`hhattn.sparse_linear_attention`.
        register: make the projections parts of the model's attention layers, under the name ``proj_l``, so that its
            own parameters() and state_dict() have them, until ``undo()``.

    Raises ValueError for a share outside (0, 1], a scorer that sorts tokens or an unknown feature map, TypeError for
    other types.

    Source: SLA (Zhang et al., 2025, arXiv:2509.24006).
    """

    critical: float | Selector | Pattern
    marginal: Pattern | None = None
    feature_map: str = "softmax"
    eps: float = 1e-15
    register: bool = False

    def __post_init__(self) -> None:
        given = self.critical
        if isinstance(given, Selector) and isinstance(given.scorer, centroid):
            raise ValueError("critical=Selector(centroid(...)) sorts tokens; accepted are the other scorers")
        if isinstance(given, (int, float)) and not 0 < given <= 1:
            raise ValueError(f"critical={given}: accepted is a share of the blocks in (0, 1]")
        one_of("feature_map", self.feature_map, FEATURE_MAPS)
        for name, value, more in (("critical", given, (int, float)), ("marginal", self.marginal, (type(None),))):
            if not (isinstance(value, (BlockMask, *more)) or callable(value)) or isinstance(value, bool):
                raise TypeError(f"{name} is a {type(value).__name__}; accepted: a mask, or a function that makes one")


@dataclass(frozen=True)
class BlockLinear:
    """Block-causal linear attention in place of SANA-Video's bidirectional one: a token attends its own chunk of
    ``frames`` latent frames and every chunk before, as LongSANA is trained to (arXiv:2509.24695).

    It is the attention alone: the convolution over time in SANA-Video's feed-forward still sees a frame ahead.
    :class:`hhattn.integrations.diffusers.long_sana.LongSana` generates chunk by chunk. Raises ValueError below 1.
    """

    frames: int

    def __post_init__(self) -> None:
        if not isinstance(self.frames, int) or self.frames < 1:
            raise ValueError(f"frames={self.frames!r}: accepted is a number of latent frames, 1 or more")
