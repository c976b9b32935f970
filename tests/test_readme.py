"""The Python in the README and in docs/models.md runs as written, and so do the short examples."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int) -> None:
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {"__name__": "readme"})


@pytest.fixture
def default_backend() -> Iterator[None]:
    """diffusers' default backend, which a model's own method changes for all."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    before = dispatch._AttentionBackendRegistry._active_backend
    yield
    dispatch._AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("default_backend")
def test_blocks_of_models_run_in_turn() -> None:
    names: dict[str, object] = {"__name__": "models"}
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.S)):
        exec(compile(block, f"docs/models.md, block {i}", "exec"), names)


@pytest.mark.parametrize("name", ["swap_sana_video", "swap_wan", "flash_attn_shim", "train_sparse"])
def test_example_runs(name: str) -> None:
    pytest.importorskip("diffusers")
    command = [sys.executable, str(ROOT / f"examples/{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_and_pictures_exist(page: str) -> None:
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#\s]+)\)", path.read_text())
    for target in targets:
        assert target.startswith("http") or (path.parent / target).exists(), target
