"""setuptools' build backend, asking for torch only where the environment being installed into has none.

Under build isolation pip runs this with the target's own Python, so ``sysconfig`` names the target's packages: a torch
that is there lends its headers, and nothing is downloaded.
"""

from __future__ import annotations

import os
import sysconfig
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _torch() -> list[str]:
    if os.environ.get("HHATTN_NATIVE") == "0":
        return []
    header = "torch/include/torch/csrc/stable/library.h"
    present = any(os.path.exists(os.path.join(sysconfig.get_path(key), header)) for key in ("purelib", "platlib"))
    return [] if present else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Requirements of a wheel's build, torch among them where it is missing."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Requirements of an editable build, torch among them where it is missing."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
