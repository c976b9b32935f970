"""How setup.py decides about the library of CUDA kernels, with pretended compilers: none is run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="hhattn is installed without its source tree")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of CUDA 13 that knows two architectures; its runtime is where conda has it."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    (home / "lib/libcudart_static.a").touch()
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--dryrun) echo '#$ TOP={home}' >&2;;\n"
        "--list-gpu-code) echo sm_80; echo sm_90a;;\n"
        "--version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;\nesac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    for name in ("HHATTN_CUDA", "HHATTN_CUDA_ARCHS", "HHATTN_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def script(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """setup.py's names."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return runpy.run_path(str(ROOT / "setup.py"))


def torch_of(folder: Path, cuda: str) -> Path:
    torch = folder / "torch"
    (torch / "lib").mkdir(parents=True)
    (torch / "lib/libtorch_cuda.so").touch()
    (torch / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\n")
    return torch


@pytest.mark.parametrize(("cuda", "fits"), [("'13.0'", True), ("'13.2'", True), ("'12.8'", False)])
def test_toolkit_and_torch_are_of_one_major_version(
    script: dict[str, Any], tmp_path: Path, cuda: str, fits: bool
) -> None:
    reason = script["why_no_cuda"](torch_of(tmp_path, cuda))
    if fits:
        assert reason is None
    else:
        assert reason == "nvcc is CUDA 13's and torch CUDA 12's; set CUDA_HOME to a toolkit of CUDA 12"


def test_a_torch_without_cuda_is_of_no_version(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HHATTN_CUDA", "1")
    assert script["why_no_cuda"](torch_of(tmp_path, "None")) is None


def test_the_static_runtime_is_found_where_conda_has_it(script: dict[str, Any], home: Path) -> None:
    assert script["cuda_libraries"]() == [str(home / "lib")]


@pytest.mark.parametrize("sanitize", ["", "address"])
def test_the_library_is_built_again_for_other_architectures(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sanitize: str
) -> None:
    """And not for the same; checked code is linked with what checks it."""
    monkeypatch.setenv("HHATTN_SANITIZE", sanitize)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = runpy.run_path(str(ROOT / "setup.py"))
    built = []

    def link(self: build_ext, ext: Extension) -> None:
        built.append(ext.extra_link_args)
        Path(self.get_ext_fullpath(ext.name)).write_text("a library")

    monkeypatch.setattr(build_ext, "build_extension", link)
    command = script["BuildNative"](Distribution({"name": "hhattn"}))
    command.ensure_finalized()
    command.build_temp = str(tmp_path)
    command.compiler = type("Compiler", (), {})()
    monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / f"{name}.so"))

    torch = torch_of(tmp_path, "'13.0'")

    def build(archs: str) -> int:
        monkeypatch.setenv("HHATTN_CUDA_ARCHS", archs)
        built.clear()
        ext = Extension(script["CUDA_LIBRARY"], sources=[], depends=[str(home / "bin/nvcc")])
        command.build(ext, lambda torch: [], torch)
        return len(built)

    assert [build("80"), build("80"), build("80 90a"), build(""), build("90a")] == [1, 0, 1, 0, 1]
    build("80")
    assert built == [[f"-fsanitize={sanitize}"] if sanitize else []]
