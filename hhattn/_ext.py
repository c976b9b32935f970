"""Load the native library ``hhattn._C``, and explain it when there is none.

Importing ``hhattn._C`` registers ``torch.ops.hhattn.*``. A missing or unusable library is no error: the other
implementations run, and :func:`why_missing` says what went wrong.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  the native library finds libtorch's symbols in the process, so torch comes first


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("hhattn._C"), None
    except ModuleNotFoundError as error:
        if error.name != "hhattn._C":
            return None, f"the native library is broken: {error}"
        return None, (
            "the native library is not built (no C++ compiler or one that failed when hhattn was installed, which "
            "`pip install -v` shows, or HHATTN_NATIVE=0)"
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return None, f"the native library could not be loaded: {error}"


_module, _reason = _load()


def why_missing() -> str | None:
    """None when the native library is loaded, else the reason why it is not."""
    return _reason


def library() -> ModuleType:
    """The module ``hhattn._C``. Raises RuntimeError with the reason when it is not loaded."""
    if _module is None:
        raise RuntimeError(f"hhattn: {_reason}")
    return _module
