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
import torch
from conftest import NATIVE_ISAS

import hhattn
from hhattn import _ext

ROOT = Path(hhattn.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="hhattn is installed without its source tree")


def run(*command: str | Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HHATTN_NATIVE")} | environment
    done = subprocess.run([str(c) for c in command], env=env, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_setup_never_imports_torch() -> None:
    for name in ("setup.py", "build_backend.py"):
        assert not re.search(r"^\s*(import|from) torch", (ROOT / name).read_text(), re.MULTILINE)


def test_backend_asks_for_torch_only_where_it_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, ''); import build_backend\n"
        "if site := sys.argv[1]: build_backend.site_folders = lambda: [site]\n"
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
    for version, missing in (("2.9.1+cu130", "'torch>=2.10'"), ("2.10.0a0", ""), ("3.0.0", "")):
        pretend_torch(tmp_path, version)
        assert asked(str(tmp_path)).endswith(f"[{missing}] [{missing}]\n"), version


def pretend_torch(site: Path, version: str) -> None:
    """What the build reads of a torch."""
    header = site / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.touch()
    (site / "torch/version.py").write_text(f"__all__ = ['__version__']\n__version__ = '{version}'\n")


@pytest.mark.parametrize("sees", [True, False])
def test_backend_finds_the_systems_torch_where_it_is_seen(tmp_path: Path, sees: bool) -> None:
    venv.EnvBuilder(system_site_packages=sees).create(tmp_path / "venv")
    code = (
        "import sys; sys.modules['setuptools'] = sys.modules['setuptools.build_meta'] = type(sys)('setuptools')\n"
        "sys.modules['setuptools'].build_meta = None; sys.path.insert(0, sys.argv[1]); sys.base_prefix = sys.argv[2]\n"
        "import build_backend; print(build_backend.find_torch())"
    )
    site = tmp_path / f"base/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    pretend_torch(site, "2.13.0")
    found = run(tmp_path / "venv/bin/python", "-c", code, ROOT, tmp_path / "base", PYTHONUSERBASE=str(tmp_path))
    assert found.strip() == (str(site / "torch") if sees else "None")


def build(source: Path, **environment: str) -> tuple[int, str]:
    env = {k: v for k, v in os.environ.items() if k != "HHATTN_NATIVE"} | environment
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_compiler_that_fails_leaves_pure_python(tmp_path: Path) -> None:
    """With its last words, and no library; where the library is demanded, that is an error."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\nfor i in $(seq 30); do echo note $i >&2; done; echo 'error: no such rune' >&2; exit 3"
    )
    compiler.chmod(0o755)
    source = copy_of_the_source(tmp_path)
    for native, expected in (("", 0), ("1", 1)):
        code, log = build(source, CXX=str(compiler), HHATTN_NATIVE=native)
        assert code == expected, log
        reason = log[log.index("HHATTN_NATIVE=1, but" if native else "installing WITHOUT the native library") :]
        assert f"{compiler} failed with exit code 3" in reason
        assert "error: no such rune" in reason
        assert "note 30\n" in reason
        assert "note 5\n" not in reason
    assert not list(source.rglob("*.so"))


def test_a_torch_that_is_too_old_leaves_pure_python(tmp_path: Path) -> None:
    source, site = copy_of_the_source(tmp_path), tmp_path / "site"
    pretend_torch(site, "2.9.1")
    (site / "torch/__init__.py").touch()
    backend = source / "build_backend.py"
    backend.write_text(backend.read_text() + "\n\nsite_folders = lambda: []\n")
    code, log = build(source, PYTHONPATH=str(site))
    assert code == 0, log
    assert "WITHOUT the native library: torch >= 2.10 was not found" in log


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_another_torch_is_installed_where_it_is_asked_for(tmp_path: Path) -> None:
    """Its stamp holds the value, so asking for the same again does nothing; not asking keeps what is there."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "build_backend.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / ".venv").mkdir()

    def plan(*args: str) -> str:
        env = {k: v for k, v in os.environ.items() if k != "TORCH" and not k.startswith("MAKE")}
        command = ["make", "-n", "setup", *args]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    assert 'install --disable-pip-version-check  "torch==' in plan()
    (tmp_path / ".venv/.torch").write_text("torch==2.13.0\n")
    (tmp_path / ".venv/.everything").touch()
    assert "pip" not in plan()
    assert "pip" not in plan("TORCH=torch==2.13.0")
    other = plan("TORCH=torch")
    assert '--force-reinstall "torch"' in other
    assert "echo 'torch' > .venv/.torch" in other
    assert "pip install --disable-pip-version-check -e" in other, "hhattn is built again, against the new one"


def test_the_native_library_is_there_where_it_is_demanded() -> None:
    if os.environ.get("HHATTN_NATIVE") == "1":
        assert _ext.why_missing() is None


@pytest.mark.skipif(not NATIVE_ISAS, reason="needs the native library")
def test_a_library_that_lacks_an_operator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update of the sources without a build: the rest of the package works, and says what to do."""
    names = [n.removeprefix("hhattn::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("hhattn::")]
    native = {name.removesuffix("_backward") for name in names if "_reference" not in name}
    assert native == set(_ext.OPERATORS)
    monkeypatch.setattr(_ext, "OPERATORS", (*_ext.OPERATORS, "one_more"))
    module, reason = _ext._load()
    assert module is None
    assert reason
    assert "without one_more" in reason
    assert "make setup" in reason


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
