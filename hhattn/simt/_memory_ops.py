"""Translation of what involves memory or other threads: calls of the runtime or of instruction twins."""

from __future__ import annotations

from collections.abc import Callable

from hhattn.simt._values import BITS, Values
from hhattn.simt.ptx import Immediate, Instruction, Operand, Register, Vector


def _pointer(v: Values, ins: Instruction, address: int) -> str:
    """The host pointer of the operand that is an address."""
    where = v.address(ins.operands[address])
    return f"simt::shared_ptr({where})" if ins.parts[1].startswith("shared") else f"tr::global({where})"


def _as_many(ins: Instruction, x: Operand) -> tuple[Operand, ...]:
    """The registers of a load or store: as many as its ``.v2`` or ``.v4`` says."""
    items = x.items if isinstance(x, Vector) else (x,)
    if len(items) != next((int(p[1]) for p in ins.parts if p in ("v2", "v4")), 1):
        raise ValueError(f"{len(items)} registers")
    return items


def _load(v: Values, ins: Instruction) -> str:
    """A register wider than what is loaded takes it sign-extended where the type is signed."""
    d, a = ins.operands
    if ins.parts[1] == "param":
        return f"{v.name(d)} = tr::param<{v.ctype(ins.type)}>(params, {v.param(a)});"
    if not ins.parts[1].startswith(("global", "shared")):
        raise KeyError(ins.parts[1])
    into = _as_many(ins, d)
    moves = " ".join(f"{v.name(x)} = V[{i}];" for i, x in enumerate(into))
    return f"{v.ctype(ins.type)} V[{len(into)}]; tr::load(V, {_pointer(v, ins, 1)}); {moves}"


def _store(v: Values, ins: Instruction) -> str:
    if not ins.parts[1].startswith(("global", "shared")):
        raise KeyError(ins.parts[1])
    values = [v.bits(x) for x in _as_many(ins, ins.operands[1])]
    width = f"uint{BITS[ins.type]}_t"
    listed = ", ".join(f"{width}({x})" for x in values)
    return f"const {width} V[] = {{{listed}}}; tr::store(V, {_pointer(v, ins, 0)});"


def _shuffle(v: Values, ins: Instruction) -> str:
    """shfl.sync.MODE.b32 d, a, b, c, mask; ``d|p``: p says whether the lane that was asked is there."""
    d, a, b, c, mask = ins.operands
    second = f", &{d.second}" if isinstance(d, Register) and d.second else ""
    arguments = ", ".join(v.raw(x, "b32") for x in (a, b, c, mask))
    return f"{v.name(d)} = simt::ptx::shfl(simt::ptx::Shfl::{ins.parts[2]}, {arguments}{second});"


def _redux(v: Values, ins: Instruction) -> str:
    """redux.sync.OP.TYPE d, value, mask."""
    d, value, mask = ins.operands
    kind = ins.parts[2]
    name = {"min": f"min_{ins.type}", "max": f"max_{ins.type}", "add": "add"}.get(kind, f"{kind}_")
    if ins.type not in ("s32", "u32", "b32"):
        raise KeyError(ins.type)
    call = f"simt::ptx::redux(simt::ptx::Redux::{name}, {v.raw(value, 'b32')}, {v.raw(mask, 'b32')})"
    return f"{v.name(d)} = {call};"


def _vote(v: Values, ins: Instruction) -> str:
    """vote.sync.MODE d, p, mask."""
    d, p, mask = ins.operands
    kind = {"ballot": "ballot", "any": "any", "all": "all"}[ins.parts[2]]
    return f"{v.name(d)} = simt::ptx::vote_{kind}({v.get(p, 'pred')}, {v.raw(mask, 'b32')});"


def _barrier(v: Values, ins: Instruction) -> str:
    if ins.parts[:2] == ("bar", "warp"):
        return f"simt::sync_warp({v.raw(ins.operands[0], 'b32')});"
    parts = [x for x in ins.parts[1:] if x not in ("aligned", "cta")]
    arguments = ", ".join(v.raw(x, "b32") for x in ins.operands)
    return {"sync": f"simt::barrier({arguments});", "arrive": f"simt::barrier_arrive({arguments});"}[parts[0]]


def _mma(v: Values, ins: Instruction) -> str:
    """mma.sync.aligned.mMnNkK.row.col.D.A.B.C."""
    shape, rows, columns, *types = ins.parts[3:]
    size, _, depth = shape.partition("k")
    known = types[0] == types[3] == "f32" and types[1] == types[2] and types[1] in ("bf16", "f16", "tf32")
    if (size, rows, columns) != ("m16n8", "row", "col") or not known:
        raise KeyError(".".join(ins.parts[3:]))
    d, a, b, c = (v.list(x) for x in ins.operands)
    words = int(depth) // (4 if types[1] == "tf32" else 8)
    if [len(x) for x in (d, a, b, c)] != [4, 2 * words, words, 4]:
        raise ValueError("fragments of another size")
    fragments = f"uint32_t A[] = {{{', '.join(a)}}}, B[] = {{{', '.join(b)}}}, C[] = {{{', '.join(c)}}};"
    call = f"simt::ptx::mma(simt::ptx::Mma::{types[1]}_k{depth}, C, A, B, C);"
    return " ".join([fragments, call, *(f"{x} = C[{i}];" for i, x in enumerate(d))])


def _matrix(v: Values, ins: Instruction) -> str:
    """ldmatrix and stmatrix of 1, 2 or 4 matrices of 8 x 8."""
    loads = ins.base == "ldmatrix"
    fragment, address = ins.operands if loads else reversed(ins.operands)
    registers = v.list(fragment)
    how = f"{len(registers)}, {'true' if 'trans' in ins.parts else 'false'}"
    if f"x{len(registers)}" not in ins.parts:
        raise ValueError(f"{len(registers)} registers")
    if loads:
        moves = " ".join(f"{x} = V[{i}];" for i, x in enumerate(registers))
        return f"uint32_t V[{len(registers)}]; simt::ptx::ldmatrix(V, {how}, {v.address(address)}); {moves}"
    return f"const uint32_t V[] = {{{', '.join(registers)}}}; simt::ptx::stmatrix({v.address(address)}, V, {how});"


def _copy(v: Values, ins: Instruction) -> str:
    """cp.async and its groups."""
    kind = ins.parts[2]
    if kind == "commit_group":
        return "simt::cp_async_commit();"
    if kind == "wait_group":
        return f"simt::cp_async_wait({v.raw(ins.operands[0], 'b32')});"
    if kind == "wait_all":
        return "simt::cp_async_wait_all();"
    if kind not in ("ca", "cg"):
        raise KeyError(kind)
    to, of, size, *some = ins.operands
    if any(isinstance(x, Register) and v.type(x) != "b32" for x in some):
        raise ValueError("an operand that is no src-size")
    used = v.raw(some[0] if some else size, "b32")
    return f"simt::cp_async({v.address(to)}, tr::global({v.address(of)}), {v.raw(size, 'b32')}, {used});"


def _wgmma(v: Values, ins: Instruction) -> str:
    kind = ins.parts[1]
    if kind == "fence":
        return "simt::wgmma_fence();"
    if kind == "commit_group":
        return "simt::wgmma_commit();"
    if kind == "wait_group":
        return f"simt::wgmma_wait({v.raw(ins.operands[0], 'b32')});"
    shape, d_type, a_type, b_type = ins.parts[4:8]
    if kind != "mma_async" or d_type != "f32" or a_type != b_type:
        raise KeyError(".".join(ins.parts[1:]))
    d, a, b, accumulate, scale_a, scale_b, *trans = ins.operands
    registers = isinstance(a, Vector)
    flags = [x.value if isinstance(x, Immediate) else None for x in (scale_a, scale_b, *trans)]
    trans_a, trans_b = ([0, 0, *flags[2:]])[-2:] if not registers else (0, flags[2] if trans else 0)
    setting = (
        f"{{{shape.partition('n')[2].partition('k')[0]}u, simt::Element::{a_type}, {v.get(accumulate, 'pred')}, "
        f"{flags[0]}, {flags[1]}, {bool(trans_a):d} != 0, {bool(trans_b):d} != 0}}"
    )
    into = ", ".join(f"&{x}" for x in v.list(d))
    read = ", ".join(f"&{v.name(x)}" for x in a.items) if isinstance(a, Vector) else ""
    source = f"const uint32_t *const A[] = {{{read}}}; " if registers else ""
    descriptor = "0" if registers else v.raw(a, "b64")
    return (
        f"uint32_t *const D[] = {{{into}}}; {source}const simt::Wgmma how{setting}; "
        f"simt::wgmma(how, D, {'A' if registers else 'nullptr'}, {descriptor}, {v.raw(b, 'b64')});"
    )


def _fence(v: Values, ins: Instruction) -> str:
    """Of the asynchronous proxy; others order what already is in order here."""
    return "simt::fence_proxy_async();" if ins.parts[1:3] == ("proxy", "async") else ";"


TABLE: dict[str, Callable[[Values, Instruction], str]] = {
    "ld": _load,
    "st": _store,
    "shfl": _shuffle,
    "redux": _redux,
    "vote": _vote,
    "bar": _barrier,
    "barrier": _barrier,
    "mma": _mma,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
    "cp": _copy,
    "wgmma": _wgmma,
    "fence": _fence,
    "membar": lambda v, ins: ";",
}
