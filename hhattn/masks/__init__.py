"""Which keys each query attends: one object, :class:`BlockMask`, and a builder for each pattern.

Builders are called ``masks.pattern(layout, ..., block_size=(64, 64), order="raster", q_frames=None, k_frames=None)``
on a :class:`hhattn.VideoLayout` and share these arguments:

- ``block_size`` (bq, bk): tokens in a block.
- ``order``: the order of the tokens that the mask's rows and columns stand for. ``"raster"`` is how models hold them.
  ``"tile"`` makes blocks compact boxes of the video, so 3D patterns touch several times fewer of them: build the mask
  with ``order="tile"`` and let ``block_sparse_attention(..., order="raster")`` reorder raster tokens on the way in and
  out.
- ``q_frames``, ``k_frames``: numbers of the frames, in their order, that are there as queries and as keys; default all.
  So a chunk of a long video attends the frames that a cache still holds: the queries' tokens are those of a layout of
  ``len(q_frames)`` frames, in ``order``, while the pattern is that of the frames' true numbers.

Patterns speak of video tokens; text tokens attend and are attended through :func:`text`, :func:`dense` or a ``|`` with
them, where ``text_lens`` gives each batch entry a text of its own length. Masks combine exactly:
``sliding_tile(...) & block_causal(...) | sink(...) | text(...)``. :func:`sliding_tile` and :func:`neighborhood` take a
size for each head; ``BlockMask.cat([...], dim="head")`` gives each head, or batch entry, any pattern.

Every builder works on blocks: a minute of 720p, 220,800 tokens of 240x23x40, takes up to half a second and tens of MB
beside its own lists and bits (radial in tile order and :func:`band` more). Frames whose number of tokens shares few
factors with a block cost many times as much: radial at 240x23x41 in tile order takes 15 s and 1 GB. docs/masks.md shows
each pattern; ``hhattn masks`` draws and measures them.

Masks that follow q and k are made by :func:`select`, a scorer (:class:`mean_pool`, :class:`self_similarity`,
:class:`antidiagonal`, and :class:`centroid`, which sorts tokens too) times a policy (:class:`top_k`, :class:`top_p`,
:class:`threshold`). A :class:`SparsityPlan` says when; :func:`recall` and :func:`quality` measure what a mask loses.
"""

from hhattn.masks.band import band
from hhattn.masks.block_causal import block_causal
from hhattn.masks.block_mask import BlockMask, QLists
from hhattn.masks.dense import dense
from hhattn.masks.dynamic import (
    Clusters,
    LayerPlan,
    Policy,
    Quality,
    Scorer,
    Selector,
    SparsityPlan,
    antidiagonal,
    centroid,
    coarse_attention,
    mean_pool,
    quality,
    recall,
    select,
    self_similarity,
    threshold,
    top_k,
    top_p,
)
from hhattn.masks.frame_window import frame_window
from hhattn.masks.neighborhood import neighborhood
from hhattn.masks.radial import radial
from hhattn.masks.sink import sink
from hhattn.masks.sliding_tile import sliding_tile
from hhattn.masks.spatial import spatial
from hhattn.masks.temporal import temporal
from hhattn.masks.text import text

__all__ = [
    "BlockMask",
    "Clusters",
    "LayerPlan",
    "Policy",
    "QLists",
    "Quality",
    "Scorer",
    "Selector",
    "SparsityPlan",
    "antidiagonal",
    "band",
    "block_causal",
    "centroid",
    "coarse_attention",
    "dense",
    "frame_window",
    "mean_pool",
    "neighborhood",
    "quality",
    "radial",
    "recall",
    "select",
    "self_similarity",
    "sink",
    "sliding_tile",
    "spatial",
    "temporal",
    "text",
    "threshold",
    "top_k",
    "top_p",
]
