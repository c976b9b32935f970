"""Which pointers a kernel stores through: all others are registered as read-only."""

from __future__ import annotations

from hhattn.simt.ptx import Address, Instruction, Kernel, Operand, Register, Symbol, Vector

_KEEPS_ADDRESS = {"add", "sub", "mov", "selp", "cvta", "mad", "min", "max"}


def _sources(x: Operand) -> list[str]:
    if isinstance(x, Register):
        return [x.name]
    if isinstance(x, Vector):
        return [name for item in x.items for name in _sources(item)]
    return _sources(x.base) if isinstance(x, Address) else []


def stored(kernel: Kernel) -> set[int]:
    """Indices of the parameters that some global store's address may be made of, whatever way the kernel takes."""
    numbers = {name: i for i, (type_, name) in enumerate(kernel.params) if type_ in ("u64", "b64")}
    body = [item for item in kernel.body if isinstance(item, Instruction)]
    origins: dict[str, set[int]] = {}
    edges: list[tuple[str, list[str]]] = []
    for ins in body:
        if ins.parts[:2] == ("ld", "param"):
            d, a = ins.operands
            if isinstance(a, Address) and isinstance(a.base, Symbol) and a.base.name in numbers:
                origins.setdefault(_sources(d)[0], set()).add(numbers[a.base.name])
        elif ins.base in _KEEPS_ADDRESS and isinstance(ins.operands[0], Register):
            edges.append((ins.operands[0].name, [name for x in ins.operands[1:] for name in _sources(x)]))
    changed = True
    while changed:
        changed = False
        for to, of in edges:
            have = origins.setdefault(to, set())
            before = len(have)
            have.update(*(origins.get(name, set()) for name in of))
            changed = changed or len(have) != before
    writes = [ins for ins in body if ins.parts[:2] == ("st", "global") or ins.base in ("atom", "red")]
    where = [x for ins in writes for x in ins.operands if isinstance(x, Address)]
    return set().union(*(origins.get(name, set()) for x in where for name in _sources(x)))
