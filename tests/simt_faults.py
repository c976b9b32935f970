"""Faults seeded into Triton kernels and into their PTX, and what each has to be caught by."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import hhattn.kernels

KERNELS = Path(hhattn.kernels.__file__).parent
NUMBERS = "numbers"  # not the emulator's reports but the accuracy rule finds it


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``kernels/FILE.py``, where it stands exactly once; or, if ``file`` is empty, the match
    number ``nth`` of the pattern ``old`` in the PTX (-1: every match). ``caught`` is a kind of report, or NUMBERS."""

    what: str
    run: str
    caught: str
    file: str
    old: str
    new: str
    nth: int = 0

    def rewrite(self, kernel: str, ptx: str) -> str:
        """The PTX with the fault; unchanged where there is no match."""
        if not self.file and self.nth < 0:
            return re.sub(self.old, self.new, ptx, flags=re.M)
        found = list(re.finditer(self.old, ptx, re.M))
        if self.file or len(found) <= self.nth:
            return ptx
        match = found[self.nth]
        return ptx[: match.start()] + match.expand(self.new) + ptx[match.end() :]


NORM, ROPE = "norm_modulate", "qk_norm_rope"
SPARSE, SPARSE_BACKWARD = "block_sparse_attention", "block_sparse_attention_backward"
TILES = "block_sparse_attention_tiles"
FAULTS = [
    Fault("row tail off by one", "norm", "global-oob", NORM,
          "    inside = c < channels\n    r = _load(", "    inside = c <= channels\n    r = _load("),
    Fault("store without its mask", "norm", "race", NORM,
          "out.to(y.dtype.element_ty), mask=inside)", "out.to(y.dtype.element_ty))"),
    Fault("frame and token of the modulation swapped", "norm", NUMBERS, NORM,
          "out *= 1.0 + _load(scale, b * scale_batch + s // scale_each * scale_row",
          "out *= 1.0 + _load(scale, b * scale_batch + s % scale_each * scale_row"),
    Fault("one tensor's stride for another", "norm", NUMBERS, NORM,
          "r = _load(x, b * x_batch + s * x_token, c, inside, 0.0)",
          "r = _load(x, b * x_batch + s * residual_token, c, inside, 0.0)"),
    Fault("mean's term missing from the gradient", "norm-backward", NUMBERS, NORM,
          "            d -= tl.sum(u, 0) / channels\n", "            d -= 0.0\n"),
    Fault("stale sum: the last token's instead of all", "norm-backward", NUMBERS, NORM,
          "to_shift += g\n", "to_shift = g\n"),
    Fault("runs overlap by a token", "norm-backward", NUMBERS, NORM,
          "tl.minimum(begin + run, first", "tl.minimum(begin + run + 1, first"),
    Fault("sign of a sine", "rope", NUMBERS, ROPE, "second * cos_b + first * sin_b", "second * cos_b - first * sin_b"),
    Fault("tokens before the table are rotated", "rope", "global-oob", ROPE,
          "        at = s - start\n        rotates = (at >= 0) & (at < video)\n        first,",
          "        at = s - start\n        rotates = at < video\n        first,"),
    Fault("running sum not rescaled", "sparse", NUMBERS, SPARSE,
          "total = total * keep + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    Fault("output not rescaled", "sparse", NUMBERS, SPARSE, "out * keep[:, None]", "out"),
    Fault("stale maximum", "sparse", NUMBERS, SPARSE, "        top = now\n", ""),
    Fault("a bit of each 32 of the mask dropped", "sparse", NUMBERS, TILES,
          "words & (1 << (column % 32)) != 0", "words & (1 << (column % 31)) != 0"),
    Fault("lse in base 2", "sparse", NUMBERS, SPARSE,
          "(top * c + tl.log2(total)) / LOG2_E)", "top * c + tl.log2(total))"),
    Fault("full blocks treated as partial", "sparse", NUMBERS, SPARSE,
          "PRECISION, False, EXACT", "PRECISION, True, EXACT"),
    Fault("partial blocks treated as full", "sparse", NUMBERS, SPARSE,
          "PRECISION, True, EXACT", "PRECISION, False, EXACT"),
    Fault("key tail not bounded", "sparse", "global-oob", SPARSE,
          "limit = tl.minimum(BK - start, k_len - first).to(tl.int32)", "limit = BK - start"),
    Fault("query head for key head", "sparse", "global-oob", SPARSE, "h // group * k_head", "h * k_head"),
    Fault("every head takes the first one's mask", "sparse", NUMBERS, SPARSE, "h * mask_head + i", "i"),
    Fault("query tail stored beyond", "sparse", "global-oob", SPARSE,
          "mask=(m[:, None] < limit) & (dv[None, :] < V_DIM))\n    log", "mask=dv[None, :] < V_DIM)\n    log"),
    Fault("gradient of lse forgotten", "sparse-backward", NUMBERS, SPARSE_BACKWARD, "1) - grad,", "1),"),
    Fault("gradient of k not scaled", "sparse-backward", NUMBERS, SPARSE_BACKWARD, "to_k * scale", "to_k"),
    Fault("one head of a group adds to k and v", "sparse-backward", NUMBERS, SPARSE_BACKWARD,
          "tl.range(0, group, num_stages=1)", "tl.range(0, 1, num_stages=1)"),
    Fault("lse to base e where weights are powers of 2", "sparse-backward", NUMBERS, SPARSE_BACKWARD,
          'float("inf"), total * LOG2_E)', 'float("inf"), total)'),
    Fault("barrier missing before partial sums are read", "norm", "race", "", r"^\s*bar\.sync\s+0;$", ""),
    Fault("barrier missing before a buffer is used again", "norm", "race", "", r"^\s*bar\.sync\s+0;$", "", 1),
    Fault("barrier that half of a warp reaches", "norm", "divergence", "",
          r"^\s*bar\.sync\s+0;$", "mov.u32 %r1, %laneid;\nsetp.lt.u32 %p1, %r1, 16;\n@%p1 bar.sync 0;"),
    Fault("vector load off its alignment", "rope", "misaligned", "",
          r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+) 0 \]", r"\1 4 ]"),
    Fault("shuffle with the wrong lane", "norm", NUMBERS, "", r"(shfl\.sync\.bfly\.b32.*), 16, 31", r"\1, 15, 31"),
    Fault("a copy that is not waited for", "sparse", "async-pending", "", r"^\s*cp\.async\.wait_group\s+0;$", "", 0),
    Fault("wait for all copies but one", "sparse", "async-pending", "",
          r"cp\.async\.wait_group\s+(\d)", r"cp.async.wait_group 3"),
    Fault("barrier missing between a copy and its readers", "sparse", "race", "",
          r"(cp\.async\.wait_group\s+\d+;\s*(?:// end inline asm\s*)?(?:\.loc.*\s*)?)bar\.sync\s+0;", r"\1"),
    Fault("rows of a matrix fragment swapped", "sparse", NUMBERS, "",
          r"(mma\.sync\S+ \{[^}]*\}, \{ %r\d+,)( %r\d+,)( %r\d+,)", r"\1\3\2", -1),
    Fault("operands of the first mma swapped", "sparse", NUMBERS, "",
          r"(mma\.sync\S+ \{[^}]*\}, \{ %r\d+,)( %r\d+,)( %r\d+,)", r"\1\3\2"),
    Fault("shared memory written for wgmma without a fence", "sparse-sm90", "no-proxy-fence", "",
          r"^\s*fence\.proxy\.async\S*;$", "", nth=-1),  # each of them covers all writes before it
    Fault("accumulators read before the wait", "sparse-sm90", "wgmma-pending", "",
          r"^\s*wgmma\.wait_group\.sync\.aligned 0;$", ""),
    Fault("registers handed to wgmma without a fence", "sparse-sm90", "wgmma-no-fence", "",
          r"^\s*wgmma\.fence\.sync\.aligned;$", ""),
    Fault("operand in registers overwritten in flight", "sparse-sm90", "async-source", "",
          r"^(\s*wgmma\.mma_async\S+ \{[^}]*\}, \{ ?(%r\d+),[^;]*;)", r"\1\nmov.b32 \2, 0;"),
    Fault("a row of the outputs never written", "sparse", NUMBERS, SPARSE,
          "mask=(m[:, None] < limit) & (dv[None, :] < V_DIM))\n    log",
          "mask=(m[:, None] < limit - 1) & (dv[None, :] < V_DIM))\n    log"),
]  # fmt: skip

# modules of an op's kernels, each after those that it imports
FAMILIES = {
    NORM: (NORM,),
    ROPE: (ROPE,),
    SPARSE: (TILES, SPARSE_BACKWARD, SPARSE),
}


@contextmanager
def seeded(fault: Fault, folder: Path) -> Iterator[None]:
    """While it is active, the op's kernels have the fault. AssertionError unless ``old`` stands there exactly once."""
    if not fault.file:
        yield
        return
    family = next(names for names in FAMILIES.values() if fault.file in names)
    with mock.patch.dict(sys.modules):
        for stem in family:
            sys.modules.pop(f"hhattn.kernels.{stem}", None)
        for stem in family:
            _imported(stem, fault, folder)
        yield


def _imported(stem: str, fault: Fault, folder: Path) -> ModuleType:
    source = (KERNELS / f"{stem}.py").read_text()
    if stem == fault.file:
        assert source.count(fault.old) == 1, f"{fault.what}: stands {source.count(fault.old)} times in {stem}.py"
        source = source.replace(fault.old, fault.new)
    path = folder / f"{stem}.py"
    path.write_text(source)
    name = f"hhattn.kernels.{stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
