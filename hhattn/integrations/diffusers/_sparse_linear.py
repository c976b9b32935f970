"""The hybrid of softmax and linear attention in a swapped layer, and the projection that such a layer gains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hhattn
from hhattn.integrations.attention import SparseLinear
from hhattn.integrations.diffusers._attention import MaskedAttention, NoPadding
from hhattn.integrations.swap import Swap
from hhattn.masks import BlockMask, Selector

NAME = "proj_l"


def projection(handle: Swap, path: str, layer: Any, register: bool) -> nn.Linear:
    """The layer's new projection [D, D], zeros, where its other weights are; kept by ``handle``."""
    weight = layer.to_q.weight
    dim = layer.to_q.out_features // layer.heads
    whole = weight.is_floating_point() and weight.element_size() > 1
    dtype = weight.dtype if whole else torch.float32  # quantised, or kept in 8 bits
    device = torch.device("cpu") if weight.is_meta else weight.device  # meta: offloaded
    proj = nn.Linear(dim, dim, device=device, dtype=dtype)
    nn.init.zeros_(proj.weight)
    nn.init.zeros_(proj.bias)
    handle.add_module(path, layer, NAME, proj, register)
    return proj


class SparseLinearAttention:
    """One layer's attention as a :class:`SparseLinear` says. ``critical`` and ``marginal``: masks that don't depend on
    q and k; None: chosen from them, and all that isn't critical."""

    def __init__(
        self,
        given: SparseLinear,
        critical: MaskedAttention | None,
        marginal: MaskedAttention | None,
        proj: nn.Linear,
        padding: NoPadding,
    ) -> None:
        self.given, self.critical, self.marginal, self.proj = given, critical, marginal, proj
        self.selector: Selector | None = None
        if isinstance(given.critical, (int, float)):
            self.selector = Selector(hhattn.masks.mean_pool(), hhattn.masks.top_k(ratio=float(given.critical)))
        elif isinstance(given.critical, Selector):
            self.selector = given.critical
        self._padding = padding

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        self._padding.check(valid)
        marginal = None if self.marginal is None else self.marginal.mask(q.device)
        if self.critical is not None:
            critical = self.critical.mask(q.device)
            return self._attend(q, k, v, critical, marginal, raster=critical.layout is not None)
        assert self.selector is not None
        layout = self.selector.layout if self.selector.order == "tile" else None
        if layout is None:
            return self._attend(q, k, v, self.selector(q, k), marginal)
        q, k, v = (layout.to_tiles(x) for x in (q, k, v))
        return layout.from_tiles(self._attend(q, k, v, self.selector(q, k), marginal))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, critical: BlockMask, marginal: BlockMask | None, raster: bool = False
    ) -> Tensor:
        # offloading moves the layer's own weights, not those that swap keeps
        weight, bias = (x.to(q.device, q.dtype) for x in (self.proj.weight, self.proj.bias))
        out = hhattn.sparse_linear_attention(
            q,
            k,
            v,
            critical,
            marginal,
            proj=weight,
            feature_map=self.given.feature_map,
            eps=self.given.eps,
            order="raster" if raster else None,
        )
        return out + bias
