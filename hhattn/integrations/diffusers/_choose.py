"""From what swap is given as ``attention`` to what each layer of a model attends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hhattn.integrations.attention import BlockLinear, SparseLinear
from hhattn.integrations.diffusers._attention import (
    Attend,
    DenseAttention,
    MaskedAttention,
    NoPadding,
    PlannedAttention,
    PlannedPattern,
)
from hhattn.integrations.diffusers._calls import Calls, LayoutOf, TextsOf
from hhattn.integrations.diffusers._sparse_linear import SparseLinearAttention, projection
from hhattn.integrations.swap import Swap
from hhattn.masks import BlockMask, Selector, SparsityPlan

ACCEPTED = (
    "'exact', a hhattn.BlockMask, a function from a VideoLayout to one, a hhattn.masks.Selector or SparsityPlan, a "
    "hhattn.integrations.SparseLinear, or a list with one of these for each layer"
)


@dataclass(frozen=True)
class Chosen:
    """What one layer will attend: words for the report, and ``make(path, layer)``, called if the layer is swapped."""

    by: str
    make: Callable[[str, Any], Attend]


def everything(attend: DenseAttention) -> Chosen:
    """Dense attention."""
    return Chosen("hhattn.attention", lambda *_: attend)


def one_each(given: object, layers: int) -> list[Any]:
    """What each of ``layers`` layers is given: the same, or what a list says. ValueError for another length."""
    if not isinstance(given, (list, tuple)):
        return [given] * layers
    if len(given) != layers:
        raise ValueError(
            f"attention is a list of {len(given)}; accepted for this model: one for each of {layers} layers"
        )
    return list(given)


def attention_of(
    handle: Swap,
    model: nn.Module,
    family: str,
    given: object,
    layers: int,
    layout_of: LayoutOf,
    texts_of: TextsOf | None = None,
) -> list[Chosen]:
    """What :func:`hhattn.swap` was given as ``attention``, for each of the softmax self-attention ``layers``.
    ``texts_of`` finds the masks of texts that may have padding."""
    shared: dict[tuple[int, bool], MaskedAttention] = {}
    refusing: dict[str, NoPadding] = {}
    dense, calls = DenseAttention(), Calls(handle, model, layout_of, texts_of)

    def masked(pattern: Any, steps: bool = False) -> MaskedAttention:
        """One for all layers under the same pattern, which so is made once."""
        key = (id(pattern), steps)
        if key not in shared:
            shared[key] = MaskedAttention(pattern, calls, steps)
        return shared[key]

    def no_padding(what: str) -> NoPadding:
        if what not in refusing:
            refusing[what] = NoPadding(what)
            if texts_of is not None:
                handle.add_hook(model, refusing[what].hook(texts_of))
        return refusing[what]

    def sparse_linear(given: SparseLinear) -> Chosen:
        check_arity("critical", given.critical, "layout")
        check_arity("marginal", given.marginal, "layout")
        critical = None if isinstance(given.critical, (int, float, Selector)) else masked(given.critical)
        marginal = None if given.marginal is None else masked(given.marginal)

        def make(path: str, layer: Any) -> Attend:
            proj = projection(handle, path, layer, given.register)
            return SparseLinearAttention(given, critical, marginal, proj, no_padding("SparseLinear"))

        return Chosen("hhattn.sparse_linear_attention", make)

    def choose(given: Any, i: int) -> Chosen:
        if isinstance(given, Selector):
            given = SparsityPlan(given)
        if isinstance(given, SparsityPlan):
            by, plan = "hhattn.block_sparse_attention, as the plan says", given.at(i, calls)
            if isinstance(given.select, Selector):
                return Chosen(by, lambda *_: PlannedAttention(plan, no_padding("SparsityPlan"), calls))
            check_arity("select", given.select, "layout", "step")
            return Chosen(by, lambda *_: PlannedPattern(plan, masked(given.select, steps=True), dense, calls))
        if isinstance(given, SparseLinear):
            return sparse_linear(given)
        if isinstance(given, BlockMask) or callable(given):
            check_arity("attention", given, "layout")
            return Chosen("hhattn.block_sparse_attention", lambda *_: masked(given))
        if isinstance(given, str) and given == "exact":
            return everything(dense)
        raise refusal(given, family, ACCEPTED)

    return [choose(x, i) for i, x in enumerate(one_each(given, layers))]


def check_arity(name: str, given: object, *takes: str) -> None:
    """TypeError for a function that can't be called with these arguments alone, before a model's first call says so."""
    if not callable(given) or isinstance(given, (BlockMask, Selector)):
        return
    try:
        inspect.signature(given).bind(*takes)
    except ValueError:  # a function in C, which has none
        return
    except TypeError as error:
        called = getattr(given, "__name__", type(given).__name__)
        arguments = ", ".join(takes)
        raise TypeError(
            f"{name}={called} can't be called with ({arguments}): {error}; accepted is a function of "
            f"these alone, as in `lambda {arguments}: {called}(layout, ...)`"
        ) from None


def refusal(given: object, family: str, accepted: str) -> Exception:
    """The error for an ``attention`` that a family can't have."""
    if isinstance(given, BlockLinear):
        return ValueError(f"attention={given}; {family}'s is softmax attention; accepted for {family}: {accepted}")
    if isinstance(given, str):
        return ValueError(f"attention={given!r}; accepted for {family}: {accepted}")
    return TypeError(f"attention is a {type(given).__name__}; accepted for {family}: {accepted}")
