"""PTX to C++ that the emulator (csrc/simt) runs, one statement an instruction.

A register becomes a variable that holds its bits, ``%r7`` → ``uint32_t r7``, all of them ones (NaN as a float) until it
is written; an instruction reads them as the type it
names and writes bits back. What involves other threads or memory is a call of an instruction twin (csrc/simt/ptx.h), so
every access is checked there, out of line. ``#line`` gives each statement the line of the Triton source that its
``.loc`` names: reports speak of that. Approximate instructions (ex2.approx, div.full, …) are computed in full float32
precision, and ``.ftz`` flushes as a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable

from hhattn.simt import _memory_ops
from hhattn.simt._forms import check
from hhattn.simt._values import BITS, Values
from hhattn.simt.ptx import Instruction, Kernel, Label, Operand, PtxError, Register, Symbol, Vector, parse

Emit = Callable[[Values, Instruction], str]

# base opcode → the result, of operands {0}, {1}, ... read as the instruction's type
_FLOAT = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "fma": "tr::fma({0}, {1}, {2})",
    "mad": "tr::fma({0}, {1}, {2})", "neg": "-{0}", "abs": "tr::abs({0})", "min": "simt::ptx::fmin({0}, {1})",
    "max": "simt::ptx::fmax({0}, {1})", "div": "{0} / {1}", "rcp": "1 / {0}", "sqrt": "tr::sqrt({0})",
    "rsqrt": "simt::ptx::rsqrt_approx({0})", "ex2": "simt::ptx::ex2_approx({0})", "lg2": "simt::ptx::lg2_approx({0})",
    "sin": "simt::ptx::sin_approx({0})", "cos": "simt::ptx::cos_approx({0})", "tanh": "simt::ptx::tanh_approx({0})",
}  # fmt: skip
_INTEGER = {
    "sub": "{0} - {1}", "add": "{0} + {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
    "not": "~{0}", "neg": "-{0}", "abs": "tr::abs({0})", "min": "tr::min({0}, {1})", "max": "tr::max({0}, {1})",
    "div": "tr::div({0}, {1})", "rem": "tr::rem({0}, {1})", "popc": "tr::popc({0})", "clz": "tr::clz({0})",
    "brev": "tr::brev({0})",
}  # fmt: skip
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_COMPARE = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
# what compares true where a number is missing: the opposite, negated
_UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2"}


def _arithmetic(v: Values, ins: Instruction) -> str:
    type_ = ins.type
    if type_ not in _FLOATS:
        return v.set(ins.operands[0], type_, _INTEGER[ins.base].format(*(v.get(x, type_) for x in ins.operands[1:])))
    table, ftz = _FLOAT[ins.base], "ftz" in ins.parts
    if "NaN" in ins.parts:
        table = table.replace("(", "_nan(", 1)
    scalar = type_.removesuffix("x2")
    read: Callable[[str, str, bool], str] = v.read
    if ins.base == "fma" and scalar in ("f16", "bf16"):  # of bits, since fma in float would round twice
        table = f"simt::from_{scalar}(simt::ptx::fma_{scalar}({{0}}, {{1}}, {{2}}))"
        read = lambda bits, type_, ftz: bits  # noqa: E731
    if type_ != scalar:
        raw = [v.bits(x) for x in ins.operands[1:]]
        halves = (table.format(*(read(f"tr::half{i}({x})", scalar, ftz) for x in raw)) for i in (0, 1))
        low, high = (v.written(v.finish(ins, e), scalar, ftz) for e in halves)
        return f"{v.name(ins.operands[0])} = tr::pack({low}, {high});"
    value = table.format(*(read(v.bits(x), type_, ftz) for x in ins.operands[1:]))
    return v.set(ins.operands[0], type_, v.finish(ins, value), ftz)


def _negation(v: Values, ins: Instruction) -> str:
    if ins.type == "pred":
        return f"{v.name(ins.operands[0])} = !{v.get(ins.operands[1], 'pred')};"
    return _arithmetic(v, ins)


def _multiply(v: Values, ins: Instruction) -> str:
    """mul and mad: .lo, .hi or .wide of integers."""
    type_ = ins.type
    if type_ in _FLOATS:
        return _arithmetic(v, ins)
    d, a, b, *c = ins.operands
    how = ins.parts[1]
    product = f"tr::mul_{how}({v.get(a, type_)}, {v.get(b, type_)})"
    result = type_[0] + str(2 * BITS[type_]) if how == "wide" else type_
    return v.set(d, result, f"{product} + {v.get(c[0], result)}" if c else product)


def _shift(v: Values, ins: Instruction) -> str:
    d, a, n = ins.operands
    return v.set(d, ins.type, f"tr::{ins.base}({v.get(a, ins.type)}, {v.get(n, 'u32')})")


def _setp(v: Values, ins: Instruction) -> str:
    """``p|q``: q is the opposite of p; of pairs of 16-bit floats, p is the result of the lower and q of the upper."""
    type_, ftz = ins.type, "ftz" in ins.parts
    d, a, b, *c = ins.operands
    second = d.second if isinstance(d, Register) else ""
    if type_.endswith("x2"):
        if not second or c:
            raise KeyError("one result" if not second else ins.parts[2])
        half = [[v.read(f"tr::half{i}(uint32_t({v.bits(x)}))", type_[:-2]) for x in (a, b)] for i in (0, 1)]
        return f"{v.name(d)} = {_comparison(ins, *half[0])}; {second} = {_comparison(ins, *half[1])};"
    value = _comparison(ins, v.get(a, type_, ftz), v.get(b, type_, ftz))
    joined = f" { ({'and': '&', 'or': '|', 'xor': '^'}[ins.parts[2]]) } {v.get(c[0], 'pred')}" if c else ""
    opposite = f" {second} = (!({value})){joined};" if second else ""
    return f"{v.name(d)} = ({value}){joined};{opposite}"


def _comparison(ins: Instruction, x: str, y: str) -> str:
    how, type_ = ins.parts[1], ins.type
    if how in _COMPARE:
        value = f"{x} {_COMPARE[how]} {y}"
        if how == "ne" and type_ in _FLOATS:
            value = f"tr::numbers({x}, {y}) && {value}"
    elif how in _UNSIGNED_COMPARE:
        value = f"{x} {_UNSIGNED_COMPARE[how]} {y}"
    elif how in _UNORDERED:
        opposite = f"{x} {_UNORDERED[how]} {y}"
        value = f"!({opposite})" if how != "equ" else f"!(tr::numbers({x}, {y}) && {opposite})"
    elif how in ("num", "nan"):
        value = f"{'' if how == 'num' else '!'}tr::numbers({x}, {y})"
    else:
        raise KeyError(how)
    return value


def _selp(v: Values, ins: Instruction) -> str:
    d, a, b, p = ins.operands
    return f"{v.name(d)} = {v.get(p, 'pred')} ? {v.raw(a, ins.type)} : {v.raw(b, ins.type)};"


def _mov(v: Values, ins: Instruction) -> str:
    """Between registers, or a wide one and its parts."""
    d, a = ins.operands
    if isinstance(d, Vector):
        each = BITS[ins.type] // len(d.items)
        whole = v.raw(a, ins.type)
        return " ".join(
            f"{v.name(x)} = tr::piece<uint{each}_t>({whole}, {i * each});"
            for i, x in enumerate(d.items)
            if x != Symbol("_")
        )
    if isinstance(a, Vector):
        each = BITS[ins.type] // len(a.items)
        whole = " | ".join(
            f"uint{BITS[ins.type]}_t({v.raw(x, f'b{each}')}) << {i * each}" for i, x in enumerate(a.items)
        )
        return f"{v.name(d)} = {whole};"
    if ins.type == "pred":
        return f"{v.name(d)} = {v.get(a, 'pred')};"
    return f"{v.name(d)} = {v.raw(a, ins.type)};"


def _cvt(v: Values, ins: Instruction) -> str:
    """From parts[-1] to parts[-2]; two sources make a packed pair, the first its upper half."""
    to, of = ins.parts[-2:]
    ftz = "ftz" in ins.parts
    if ins.parts[1:3] == ("rna", "tf32") or to == "tf32":
        if ins.parts[1] != "rna":
            raise KeyError(ins.parts[1])
        return f"{v.name(ins.operands[0])} = simt::to_tf32({v.get(ins.operands[1], 'f32')});"
    if to.endswith("x2"):
        d, high, low = ins.operands
        parts = [v.written(v.finish(ins, v.get(x, of, ftz)), to[:-2]) for x in (low, high)]
        return f"{v.name(d)} = tr::pack({', '.join(parts)});"
    d, a = ins.operands
    value = v.get(a, of, ftz)
    if of in _FLOATS and to not in _FLOATS:
        rounding = next(x for x in ins.parts if x in ("rni", "rzi", "rmi", "rpi"))
        return v.set(d, to, f"tr::to_integer<{v.ctype(to)}>(tr::{rounding}({value}))")
    if of in _FLOATS and (rounding := next((x for x in ins.parts if x in ("rni", "rzi", "rmi", "rpi")), "")):
        value = f"tr::{rounding}({value})"
    elif "sat" in ins.parts:
        raise KeyError("sat")
    if "rz" in ins.parts and to in ("f16", "bf16"):
        return f"{v.name(d)} = simt::to_{to}({v.finish(ins, value)}, simt::Round::zero);"
    if to in ("f16", "bf16") and of not in _FLOATS:
        value = f"tr::to_odd({value})"
    return v.set(d, to, v.finish(ins, value), ftz)


def _bits(v: Values, ins: Instruction) -> str:
    """A twin of bits: ``d = simt::ptx::name(a, b, ...)``, positions and selectors being 32 bits wide."""
    name = f"{ins.base}_{ins.type}" if ins.base in ("bfe", "bfi") else ins.base
    count = {"bfe": 1, "bfi": 2}.get(ins.base, len(ins.operands))
    values = (v.raw(x, ins.type if i < count else "b32") for i, x in enumerate(ins.operands[1:]))
    return f"{v.name(ins.operands[0])} = simt::ptx::{name}({', '.join(values)});"


def _funnel(v: Values, ins: Instruction) -> str:
    d, *sources = ins.operands
    values = ", ".join(v.raw(x, "b32") for x in sources)
    wraps = {"wrap": "true", "clamp": "false"}[ins.parts[2]]
    return f"{v.name(d)} = simt::ptx::shf_{ins.parts[1]}({values}, {wraps});"


def _branch(v: Values, ins: Instruction) -> str:
    target = ins.operands[0]
    if not isinstance(target, Symbol):
        raise KeyError("indirect")
    return f"goto {v.label(target.name)};"


_TABLE: dict[str, Emit] = {
    **dict.fromkeys([*_FLOAT, *_INTEGER], _arithmetic),
    "mul": _multiply, "mad": _multiply, "shl": _shift, "shr": _shift, "setp": _setp, "selp": _selp, "mov": _mov,
    "cvt": _cvt, "bfe": _bits, "bfi": _bits, "prmt": _bits, "lop3": _bits, "shf": _funnel,
    "not": _negation, "bra": _branch, "ret": lambda v, ins: "return;", "exit": lambda v, ins: "return;",
    "cvta": lambda v, ins: f"{v.name(ins.operands[0])} = {v.raw(ins.operands[1], 'b64')};",
    **_memory_ops.TABLE,
}  # fmt: skip
for _name in ("and", "or", "xor"):  # of predicates too
    _TABLE[_name] = _arithmetic


def _accumulators(kernel: Kernel) -> set[str]:
    """Registers that some wgmma writes when its group is waited for."""
    body = [item for item in kernel.body if isinstance(item, Instruction)]
    vectors = [ins.operands[0] for ins in body if ins.parts[:2] == ("wgmma", "mma_async")]
    return {x.name for d in vectors if isinstance(d, Vector) for x in d.items if isinstance(x, Register)}


def _inputs(kernel: Kernel) -> set[str]:
    """Registers that some wgmma reads A from, until its group is waited for."""
    body = [item for item in kernel.body if isinstance(item, Instruction)]
    vectors = [ins.operands[1] for ins in body if ins.parts[:2] == ("wgmma", "mma_async")]
    return {x.name for a in vectors if isinstance(a, Vector) for x in a.items if isinstance(x, Register)}


def _named(operands: tuple[Operand, ...]) -> set[str]:
    """Registers among operands."""
    flat = [x for o in operands for x in (o.items if isinstance(o, Vector) else (o,))]
    return {x.name for x in flat if isinstance(x, Register)}


_NO_RESULT = {"st", "stmatrix", "bar", "barrier", "cp", "bra", "ret", "exit", "fence", "membar", "wgmma"}


def _statement(v: Values, kernel: Kernel, ins: Instruction, pending: set[str], inputs: set[str]) -> str:
    try:
        check(ins)
        code = _TABLE[ins.base](v, ins)
    except (KeyError, ValueError, StopIteration, AttributeError, TypeError) as e:
        raise PtxError(
            f"{kernel.name}, {ins.at.file}:{ins.at.line}: no translation of the PTX instruction {ins.text!r} "
            f"({type(e).__name__}: {e})"
        ) from e
    if pending and ins.base != "wgmma":
        touched = sorted(pending & _named(ins.operands))
        code = " ".join([*(f"simt::wgmma_touch(&{name});" for name in touched), code])
    if inputs and ins.base not in _NO_RESULT:
        written = sorted(inputs & _named(ins.operands[:1]))
        code = " ".join([*(f"simt::wgmma_overwrite(&{name});" for name in written), code])
    if ins.guard is None:
        return code if code.endswith(";") and code.count(";") == 1 else f"{{ {code} }}"
    return f"if ({'!' if ins.negated else ''}{ins.guard.name}) {{ {code} }}"


def translate(text: str) -> str:
    """The C++ of the kernel in the PTX ``text``: a function ``simt_kernel(params)`` that one thread runs, its
    parameters at 8 bytes each. PtxError names an instruction that has no translation."""
    kernel = parse(text)
    v, pending, inputs = Values(kernel), _accumulators(kernel), _inputs(kernel)
    out = ['#include "translated.h"', 'extern "C" void simt_kernel(const void *params) {']
    for type_, prefix, count in kernel.registers:
        out += [f"{v.storage(type_)} {prefix}{i} = {v.storage(type_)}(-1);" for i in range(count)]
    for item in kernel.body:
        if isinstance(item, Label):
            out.append(f"{v.label(item.name)}:;")
        else:
            out.append(f'#line {item.at.line} "{item.at.file}"')
            out.append(_statement(v, kernel, item, pending, inputs))
    return "\n".join([*out, "}", ""])
