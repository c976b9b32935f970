"""Putting the ops into models that exist. None of the libraries they come from is imported before it is needed."""

from hhattn.integrations.attention import BlockLinear, SparseLinear
from hhattn.integrations.swap import Swap, swap

__all__ = ["BlockLinear", "SparseLinear", "Swap", "swap"]
