"""The forms of PTX instructions that are translated, modifiers and all: what isn't listed is refused, never computed
without its modifier."""

from __future__ import annotations

import re

from hhattn.simt.ptx import Instruction, Register

_I = r"[us](16|32|64)"
_B = r"b(16|32|64)"
_MEMORY = r"([busf](32|64)|[bus](8|16))"
_CACHE = r"(\.(nc|ca|cg|cs|lu|wb|wt|L1::\w+|L2::\d+B))*"  # hints; a policy is an operand more, and refused by that
_HALF = r"(f16|bf16)(x2)?"
_SUM = rf"{_I}|(rn\.)?(ftz\.)?(sat\.)?f32|(rn\.)?f64|(rn\.)?{_HALF}"
_EXTREME = rf"{_I}|(ftz\.)?(NaN\.)?f32|(NaN\.)?{_HALF}"
_SIGN = rf"s(16|32|64)|(ftz\.)?f32|f64|{_HALF}"
_APPROXIMATE = r"approx\.(ftz\.)?f32"
_ROOT = r"(approx|rn)\.(ftz\.)?f32|rn\.f64"
_JOINED = r"(\.(and|or|xor))?"
_ORDERED = r"(eq|ne|lt|le|gt|ge)"
_OF_FLOATS = r"(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)"
_EIGHT = r"[us](8|16|32|64)"
_TO_WHOLE = r"(rni|rzi|rmi|rpi)"
_MATRICES = r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16"

#: base opcode → what may stand behind it, and how many operands it may have.
FORMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "add": (_SUM, (3,)), "sub": (_SUM, (3,)),
    "mul": (rf"(lo|hi)\.{_I}|wide\.[us](16|32)|(rn\.)?(ftz\.)?(sat\.)?f32|(rn\.)?f64|(rn\.)?{_HALF}", (3,)),
    "mad": (rf"(lo|hi)\.{_I}|wide\.[us](16|32)|rn\.(ftz\.)?(sat\.)?f32|rn\.f64", (4,)),
    "fma": (rf"rn\.(ftz\.)?(sat\.)?f32|rn\.f64|rn\.(relu\.)?{_HALF}", (4,)),
    "neg": (_SIGN, (2,)), "abs": (_SIGN, (2,)), "min": (_EXTREME, (3,)), "max": (_EXTREME, (3,)),
    "div": (rf"{_I}|(full|approx|rn)\.(ftz\.)?f32|rn\.f64", (3,)), "rem": (_I, (3,)),
    "rcp": (_ROOT, (2,)), "sqrt": (_ROOT, (2,)), "rsqrt": (_APPROXIMATE, (2,)), "ex2": (_APPROXIMATE, (2,)),
    "lg2": (_APPROXIMATE, (2,)), "sin": (_APPROXIMATE, (2,)), "cos": (_APPROXIMATE, (2,)),
    "tanh": (rf"approx\.(f32|{_HALF})", (2,)),
    "and": (rf"{_B}|pred", (3,)), "or": (rf"{_B}|pred", (3,)), "xor": (rf"{_B}|pred", (3,)),
    "not": (rf"{_B}|pred", (2,)), "popc": (r"b(32|64)", (2,)), "clz": (r"b(32|64)", (2,)), "brev": (r"b32", (2,)),
    "shl": (_B, (3,)), "shr": (r"[bus](16|32|64)", (3,)), "shf": (r"[lr]\.(wrap|clamp)\.b32", (4,)),
    "bfe": (r"[us]32|u64", (4,)), "bfi": (r"b(32|64)", (5,)), "prmt": (r"b32", (4,)), "lop3": (r"b32", (5,)),
    "setp": (
        rf"(eq|ne){_JOINED}\.{_B}|{_ORDERED}{_JOINED}\.{_I}|(lo|ls|hi|hs){_JOINED}\.u(16|32|64)"
        rf"|{_OF_FLOATS}{_JOINED}(\.ftz)?\.f32|{_OF_FLOATS}{_JOINED}\.(f64|f16|bf16)|{_OF_FLOATS}\.(f16|bf16)x2",
        (3, 4),
    ),
    "selp": (r"[bus](16|32|64)|f(32|64)", (4,)), "mov": (r"[bus](16|32|64)|f(32|64)|pred", (2,)),
    "cvt": (
        rf"{_EIGHT}\.{_EIGHT}|rn\.f(32|64)\.{_EIGHT}|rn\.b?f16\.[us](8|16|32)"
        rf"|{_TO_WHOLE}\.(ftz\.)?(sat\.)?{_EIGHT}\.(b?f16|f32|f64)|{_TO_WHOLE}\.(ftz\.)?f32\.f32"
        r"|(ftz\.)?f32\.b?f16|f64\.(f32|b?f16)|rn\.f32\.f64|(rn|rz)\.(relu\.)?b?f16\.f32|rna\.tf32\.f32"
        r"|rn\.(relu\.)?b?f16x2\.f32",
        (2, 3),
    ),
    "cvta": (r"(to\.)?global\.u64", (2,)),
    "bra": (r"(uni)?", (1,)), "ret": (r"(uni)?", (0,)), "exit": (r"", (0,)),
    "ld": (rf"param\.{_MEMORY}|(global|shared(::cta)?){_CACHE}(\.v[24])?\.{_MEMORY}", (2,)),
    "st": (rf"(global|shared(::cta)?){_CACHE}(\.v[24])?\.{_MEMORY}", (2,)),
    "shfl": (r"sync\.(idx|up|down|bfly)\.b32", (5,)),
    "redux": (r"sync\.(add|min|max)\.[us]32|sync\.(and|or|xor)\.b32", (3,)),
    "vote": (r"sync\.(ballot\.b32|(any|all)\.pred)", (3,)),
    "bar": (r"(cta\.)?(sync|arrive)(\.aligned)?|warp\.sync", (1, 2)),
    "barrier": (r"(cta\.)?(sync|arrive)(\.aligned)?", (1, 2)),
    "mma": (r"sync\.aligned\.m16n8k(16|8|4)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", (4,)),
    "ldmatrix": (_MATRICES, (2,)), "stmatrix": (_MATRICES, (2,)),
    "cp": (
        r"async\.(commit_group|wait_group|wait_all)|async\.c[ag]\.shared(::cta)?\.global(\.L2::\d+B)?", (0, 1, 3, 4)
    ),
    "wgmma": (
        r"(fence|commit_group|wait_group)\.sync\.aligned"
        r"|mma_async\.sync\.aligned\.m64n\d+k(8|16)\.f32\.(bf16|f16|tf32)\.\3",
        (0, 1, 6, 7, 8),
    ),
    "fence": (r"proxy\.async(\.global|\.shared::cta)?|(sc|acq_rel)\.(cta|cluster|gpu|sys)", (0,)),
    "membar": (r"cta|gl|sys", (0,)),
}  # fmt: skip


def check(ins: Instruction) -> None:
    """KeyError unless the instruction is of a listed form, with as many operands and no second result but where one
    is known."""
    form, counts = FORMS[ins.base]
    if not re.fullmatch(form, ".".join(ins.parts[1:])):
        raise KeyError(".".join(ins.parts))
    if len(ins.operands) not in counts:
        raise KeyError(f"{len(ins.operands)} operands")
    if ins.base not in ("setp", "shfl") and any(isinstance(x, Register) and x.second for x in ins.operands):
        raise KeyError("two results")
