"""Load the native library ``hhattn._C``, and explain it when there is none.

Importing ``hhattn._C`` registers ``torch.ops.hhattn.*``. A missing or unusable library is no error: the other
implementations run, and :func:`why_missing` says what went wrong.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # the native library finds libtorch's symbols in the process, so torch comes first

# What the library has to define; each has a backward beside it.
OPERATORS = (
    "block_linear_outputs",
    "block_linear_sums",
    "block_sparse_attention",
    "norm_modulate",
    "qk_norm_rope",
    "sparse_linear_marginal",
)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("hhattn._C")
    except ModuleNotFoundError as error:
        if error.name != "hhattn._C":
            return None, f"the native library is broken: {error}"
        return None, (
            "the native library is not built (no C++ compiler or one that failed when hhattn was installed, which "
            "`pip install -v` shows, or HHATTN_NATIVE=0)"
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return None, f"the native library could not be loaded: {error}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.hhattn, f"{name}_backward")]
    if missing:
        return None, (
            f"the native library was built from older sources, without {', '.join(missing)}: install hhattn anew "
            "(`make setup` in a checkout)"
        )
    return module, None


_module, _reason = _load()


def why_missing() -> str | None:
    """None when the native library is loaded, else the reason why it is not."""
    return _reason


def library() -> ModuleType:
    """The module ``hhattn._C``. Raises RuntimeError with the reason when it is not loaded."""
    if _module is None:
        raise RuntimeError(f"hhattn: {_reason}")
    return _module
