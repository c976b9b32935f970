"""setuptools' build backend, asking for torch only where the environment being installed into has none.

Under build isolation pip runs this with the target's own Python, so ``sys.prefix`` names the target's packages: a torch
that is there lends its headers, and nothing is downloaded.
"""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from os import environ
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST_TORCH = (2, 10)


def site_folders() -> list[str]:
    """Where the environment being installed into finds packages: its own folders, and the system's and the user's
    where it sees those. ``sys.path`` doesn't say, as it is the build's own."""
    folders = [sysconfig.get_path(key) for key in ("purelib", "platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    if not config.exists() or re.search(r"(?im)^include-system-site-packages\s*=\s*true", config.read_text()):
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])]
    return folders


def is_usable(torch: Path) -> bool:
    """Whether a folder is a torch of 2.10 or later, with its headers. Read, not imported."""
    version, header = torch / "version.py", torch / "include/torch/csrc/stable/library.h"
    if not (version.exists() and header.exists()):
        return False
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
    return found is not None and tuple(map(int, found.groups())) >= OLDEST_TORCH


def find_torch() -> Path | None:
    """torch's folder in the environment being installed into; None if it has none that is usable."""
    return next((p for folder in site_folders() if is_usable(p := Path(folder, "torch"))), None)


def _torch() -> list[str]:
    return [] if environ.get("HHATTN_NATIVE") == "0" or find_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Requirements of a wheel's build, torch among them where it is missing."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Requirements of an editable build, torch among them where it is missing."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
