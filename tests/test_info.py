"""hhattn.info and the command line, the native library, and what importing the package needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NATIVE_ISAS
from typer.testing import CliRunner

import hhattn
from hhattn import _ext
from hhattn.cli import app

needs_native = pytest.mark.skipif(not NATIVE_ISAS, reason="the native library is not built")
ROOT = Path(hhattn.__file__).parents[1]


# Packages in BLOCK are as good as not installed.
BLOCKER = """
import sys
class Installed:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        blocked = name in BLOCK or name.split(".")[0] in BLOCK
        return None if blocked else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Installed, sys.meta_path)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_info_lists_every_implementation_with_its_reason() -> None:
    report = hhattn.info()
    assert report["hhattn"] == hhattn.__version__
    assert report["packages"]["torch"]
    for op in ("norm_modulate", "qk_norm_rope", "block_linear_attention", "block_sparse_attention"):
        assert report["ops"][op]["reference"] is None
    assert (report["ops"]["norm_modulate"]["cpp"] is None) == bool(NATIVE_ISAS)
    assert "norm_modulate" in str(report)


@needs_native
def test_info_names_the_instruction_sets() -> None:
    cpu = hhattn.info()["cpu"]
    assert cpu["isa"] in NATIVE_ISAS
    assert [name for name, runs in cpu["built"].items() if runs] == NATIVE_ISAS


def test_command_line() -> None:
    run = CliRunner().invoke(app, ["info", "--json"])
    assert run.exit_code == 0
    assert json.loads(run.stdout)["ops"]["norm_modulate"]["reference"] is None
    assert "norm_modulate" in CliRunner().invoke(app, ["info"]).stdout
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2


def test_generate_without_its_extra_says_so() -> None:
    """One line and exit code 2, and `hhattn info` still works."""
    start = "BLOCK = ('av', 'PIL', 'safetensors')" + BLOCKER + "from hhattn.cli import app\n"
    run = python(start + "app(['generate', '--help'])")
    assert run.returncode == 2, run.stderr
    assert run.stderr.strip().count("\n") == 0
    assert "pip install 'hhattn[video]'" in run.stderr
    run = python(start + "app(['info'])")
    assert run.returncode == 0, run.stderr


def test_public_names_exist() -> None:
    for name in hhattn.__all__:
        assert getattr(hhattn, name) is not None
    assert callable(hhattn.info)  # the function, though a module has the same name
    assert set(dir(hhattn)) == set(hhattn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'; public names: BlockMask"):
        hhattn.no_such_name  # noqa: B018


def test_import_needs_no_optional_package() -> None:
    code = "BLOCK = ('diffusers', 'av', 'PIL', 'safetensors', 'triton', 'flash_attn', 'rich')"
    run = python(code + BLOCKER + "import hhattn\nhhattn.info()\n[getattr(hhattn, n) for n in hhattn.__all__]")
    assert run.returncode == 0, run.stderr


def test_without_the_native_library() -> None:
    code = "BLOCK = ('hhattn._C',)" + BLOCKER
    code += "import hhattn, torch\nprint(hhattn.info()['ops']['norm_modulate']['cpp'])\n"
    run = python(code + "print(hhattn.norm_modulate(torch.ones(1, 1, 4)).sum().item())")
    reason, total = run.stdout.splitlines()
    assert "the native library is not built" in reason
    assert float(total) == pytest.approx(4)


@needs_native
def test_instruction_set_is_capped_by_the_environment() -> None:
    code = "from hhattn import _ext; print(_ext.library().cpu_isa())"
    for isa in NATIVE_ISAS:
        assert python(code, HHATTN_CPU_ISA=isa).stdout.strip() == isa
    wide = [i for i, runs in _ext.library().cpu_isas() if not runs]
    for isa in wide:  # a cap above what the CPU runs changes nothing
        assert python(code, HHATTN_CPU_ISA=isa).stdout.strip() == python(code, HHATTN_CPU_ISA="").stdout.strip()
    run = python("import hhattn; print(hhattn.info()['cpu']['reason'])", HHATTN_CPU_ISA="fast")
    assert "HHATTN_CPU_ISA='fast' is not an instruction set built in; accepted: " in run.stdout


@needs_native
def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast' is not an instruction set built in"):
        _ext.library().use_cpu_isa("fast")
    for isa, runs in _ext.library().cpu_isas():
        if not runs:
            with pytest.raises(ValueError, match=f"this CPU does not run {isa}"):
                _ext.library().use_cpu_isa(isa)
