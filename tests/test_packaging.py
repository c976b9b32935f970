"""Building and installing: what the build asks for, what it leaves behind, and (slow) real installations."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import NATIVE_ISAS

import hhattn
from hhattn import _ext

ROOT = Path(hhattn.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="hhattn is installed without its source tree")


def run(*command: str | Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run([str(c) for c in command], env=env, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_setup_never_imports_torch() -> None:
    for name in ("setup.py", "build_backend.py"):
        assert not re.search(r"^\s*(import|from) torch", (ROOT / name).read_text(), re.MULTILINE)


def test_backend_asks_for_torch_only_where_it_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys, types; sys.path.insert(0, ''); import build_backend\n"
        "if sys.argv[1]: build_backend.sysconfig = types.SimpleNamespace(get_path=lambda key: sys.argv[1])\n"
        "print([r for r in build_backend.get_requires_for_build_wheel() if 'torch' in r],\n"
        "      [r for r in build_backend.get_requires_for_build_editable() if 'torch' in r])"
    )
    source = copy_of_the_source(tmp_path)

    def asked(site_packages: str, **environment: str) -> str:
        env = {**os.environ, **environment}
        command = [sys.executable, "-c", code, site_packages]
        return subprocess.run(command, env=env, cwd=source, capture_output=True, text=True, check=True).stdout

    assert asked("").endswith("[] []\n")
    assert asked(str(tmp_path)).endswith("['torch>=2.10'] ['torch>=2.10']\n")
    assert asked(str(tmp_path), HHATTN_NATIVE="0").endswith("[] []\n")


@pytest.mark.skipif(not NATIVE_ISAS or not shutil.which("nm"), reason="needs the native library and nm")
def test_native_library_uses_only_the_stable_abi() -> None:
    """No C++ symbol of torch is left open: those change from version to version."""
    symbols = run("nm", "-D", "-C", "--undefined-only", _ext.library().__file__)
    assert "aoti_torch_" in symbols
    assert not re.findall(r"\b(?:at|c10|torch)::.*", symbols)


def copy_of_the_source(folder: Path) -> Path:
    """The source tree without what was built in it."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "out", "runs", "*.so", "*.egg-info", "__pycache__", "shared")
    return Path(shutil.copytree(ROOT, folder / "source", ignore=ignore))


@pytest.fixture
def python_with_torch(tmp_path: Path) -> Path:
    """A new environment that has this one's packages, by links, but neither hhattn nor anything that builds it."""
    builder = venv.EnvBuilder(with_pip=True)
    builder.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if re.match(r"(__editable__|_?hhattn|pip|setuptools|pybind11|_distutils|distutils)", entry.name) is None:
            target = site / entry.name
            if not target.exists():
                target.symlink_to(entry)
    return python


def report(python: Path) -> dict[str, dict[str, object]]:
    return json.loads(run(python, "-m", "hhattn.cli", "info", "--json"))


@pytest.mark.slow
def test_install_where_torch_is(tmp_path: Path, python_with_torch: Path) -> None:
    log = run(python_with_torch, "-m", "pip", "install", "--no-deps", "-v", copy_of_the_source(tmp_path))
    assert not re.search(r"(Collecting|Downloading) torch", log)
    assert report(python_with_torch)["ops"]["norm_modulate"]["cpp"] is None
    run(python_with_torch, "-c", "import hhattn.kernels, importlib.util as u; assert u.find_spec('kernels') is None")
    files = run(python_with_torch, "-m", "pip", "show", "-f", "hhattn")
    assert "hhattn/py.typed" in files
    assert "tests/" not in files
    assert all(f"hhattn/video/weights/{p.name}" in files for p in ROOT.glob("hhattn/video/weights/*.safetensors"))


@pytest.mark.slow
def test_editable_install(tmp_path: Path, python_with_torch: Path) -> None:
    source = copy_of_the_source(tmp_path)
    run(python_with_torch, "-m", "pip", "install", "--no-deps", "-e", source)
    assert report(python_with_torch)["ops"]["norm_modulate"]["cpp"] is None
    where = run(
        python_with_torch, "-c", "import hhattn.kernels as k, hhattn; print(hhattn.__file__); print(k.__file__)"
    )
    assert where.split() == [str(source / "hhattn/__init__.py"), str(source / "kernels/__init__.py")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"CC": "no-such", "CXX": "no-such"}, {"HHATTN_NATIVE": "0"}], ids=["none", "off"]
)
def test_install_without_a_compiler(tmp_path: Path, python_with_torch: Path, environment: dict[str, str]) -> None:
    source = copy_of_the_source(tmp_path)
    log = run(python_with_torch, "-m", "pip", "install", "--no-deps", "-v", source, **environment)
    assert "hhattn: installing WITHOUT the native library" in log
    assert "not built" in str(report(python_with_torch)["ops"]["norm_modulate"]["cpp"])
