"""Machine code of NVIDIA GPUs (SASS), as `cuobjdump -sass` prints it: instructions, and the loops they stand in.

Loops are the natural loops of the control-flow graph. A backward jump alone is no loop: the compiler moves the waiting
part of a barrier behind the kernel's end, from where it jumps back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_ADDRESS = re.compile(r"(?:^|\s)0x([0-9a-f]+)$")
_COPIES = ("LDGSTS", "UBLKCP", "UTMALDG")  # asynchronous ones
_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT")  # nothing after them is reached, unless they are predicated


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``opcode`` has its modifiers, as in ``HMMA.16816.F32.BF16``; ``shape`` (m, n, k) is that of a
    ``UTCHMMA``, whose opcode doesn't say, and None else, or where it isn't known before the kernel runs."""

    address: int
    predicate: str
    opcode: str
    operands: str
    shape: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch jumps to, or a call that has no return."""
        found = _ADDRESS.search(self.operands) if self.name in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction is never reached from this one."""
        conditional = self.predicate or (self.name == "BRA" and "," in self.operands)
        return not conditional and (self.name == "BRA" or self.name in _ENDS)


@dataclass(frozen=True)
class Loop:
    """A natural loop: the numbers of its instructions, those of loops within it included; ``always`` are those that
    every run executes, whichever way its branches go; ``usual`` are these and what an asynchronous copy needs, as
    copies for the next run are left out by the last one alone."""

    body: frozenset[int]
    always: frozenset[int] = frozenset()
    usual: frozenset[int] = frozenset()

    @property
    def start(self) -> int:
        return min(self.body)


def _matrix_shape(description: int, kind: str) -> tuple[int, int, int]:
    """(m, n, k) by tcgen05's instruction descriptor (PTX ISA, "Instruction descriptor"): n / 8 in bits 17 to 22, m / 16
    in bits 24 to 28; k is 32 bytes of operands: 16 halves or 8 tf32."""
    tf32 = kind == "UTCHMMA" and (description >> 7) & 7 == 2  # the format of A
    k = 32 if kind == "UTCQMMA" else 8 if tf32 else 16
    return ((description >> 24) & 31) * 16, ((description >> 17) & 63) * 8, k


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel, padding at the end left out."""
    instructions: list[Instruction] = []
    constants: dict[str, int] = {}  # uniform registers that the last write before, in the order of addresses, set
    for address, predicate, opcode, operands in _LINE.findall(text):
        shape = None
        if re.match(r"UTC\w*MMA\b", opcode):
            register = re.search(r"idesc\[(UR\d+)\]", operands)
            if register and register[1] in constants:
                shape = _matrix_shape(constants[register[1]], opcode.split(".")[0])
        elif re.match(r"UR\d+\b", operands):
            written = operands.split(",")[0]
            value = re.fullmatch(r"UR\d+, 0x([0-9a-f]+)", operands) if opcode == "UMOV" else None
            constants.pop(written, None)
            if value:
                constants[written] = int(value[1], 16)
        instructions.append(Instruction(int(address, 16), predicate, opcode, operands, shape))
    while instructions and (instructions[-1].name == "NOP" or instructions[-1].target == instructions[-1].address):
        instructions.pop()
    return instructions


def _successors(instructions: list[Instruction]) -> list[list[int]]:
    """Which instructions may follow each. A call is taken to come back, unless it leads to where a branch does too: the
    compiler jumps so now and then. Lanes of a warp are taken not to have parted (BRA.DIV)."""
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    branches = {instruction.target for instruction in instructions if instruction.name == "BRA"}
    edges: list[list[int]] = []
    for i, instruction in enumerate(instructions):
        jumps = instruction.target in branches if instruction.name == "CALL" else ".DIV" not in instruction.opcode
        ends = instruction.ends or (instruction.name == "CALL" and jumps and not instruction.predicate)
        following = [] if ends or i + 1 == len(instructions) else [i + 1]
        if jumps and instruction.target is not None and instruction.target in at:
            following.append(at[instruction.target])
        edges.append(following)
    return edges


def _dominators(edges: list[list[int]]) -> list[int]:
    """The immediate dominator of each instruction, -1 where it is never reached (Cooper, Harvey and Kennedy, "A simple,
    fast dominance algorithm")."""
    order: list[int] = []
    seen = {0}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(edges[0]))]
    while stack:
        node, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(edges[following])))
    rank = {node: i for i, node in enumerate(order)}
    before: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for following in edges[node]:
            before[following].append(node)
    parent = [-1] * len(edges)
    parent[0] = 0
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            common = -1
            for other in before[node]:
                if parent[other] < 0:
                    continue
                while common >= 0 and common != other:
                    if rank[common] < rank[other]:
                        common = parent[common]
                    else:
                        other = parent[other]
                common = other
            if parent[node] != common:
                parent[node], changed = common, True
    return parent


def loops(instructions: list[Instruction]) -> list[Loop]:
    """The natural loops in the order of their first instructions, an outer one before those within it."""
    if not instructions:
        return []
    edges = _successors(instructions)
    parent = _dominators(edges)
    before: list[list[int]] = [[] for _ in edges]
    for i, following in enumerate(edges):
        for j in following:
            before[j].append(i)

    def dominates(head: int, node: int) -> bool:
        while node != head and node != parent[node]:
            node = parent[node]
        return node == head

    bodies: dict[int, set[int]] = {}
    ends: dict[int, set[int]] = {}  # where a loop jumps back
    for i, following in enumerate(edges):
        for head in following:
            if parent[i] < 0 or not dominates(head, i):
                continue
            body = bodies.setdefault(head, {head})
            ends.setdefault(head, set()).add(i)
            stack = [i]
            while stack:
                node = stack.pop()
                if node not in body and parent[node] >= 0:
                    body.add(node)
                    stack.extend(before[node])

    def on_every_way(head: int, end: int) -> set[int]:
        passed = {end}
        while end != head:
            end = parent[end]
            passed.add(end)
        return passed

    def with_copies(head: int, body: set[int], always: frozenset[int]) -> frozenset[int]:
        usual = set(always)
        for i in sorted(body - always):
            if instructions[i].name in _COPIES:
                usual |= on_every_way(head, i)
                while edges[i] == [i + 1] and before[i + 1] == [i]:  # to the end of its straight line
                    i += 1
                    usual.add(i)
        return frozenset(usual & body)

    found = []
    for head, body in bodies.items():
        always = frozenset.intersection(*(frozenset(on_every_way(head, end)) for end in ends[head]))
        found.append(Loop(frozenset(body), always, with_copies(head, body, always)))
    return sorted(found, key=lambda loop: (loop.start, -len(loop.body)))


def reached(instructions: list[Instruction]) -> list[bool]:
    """Whether each instruction can be reached without a call. What can't is a subroutine of a rare case: a division of
    numbers beyond 32 bits, a reciprocal of a denormal."""
    return [parent >= 0 for parent in _dominators(_successors(instructions))]


def is_tensor(instruction: Instruction) -> bool:
    """Whether it is a matrix product on the tensor cores."""
    return bool(re.fullmatch(r"[HIQOB]MMA|[HIQ]GMMA|UTC\w*MMA", instruction.name))


def hot_loops(instructions: list[Instruction]) -> list[Loop]:
    """The loops that the time goes to: the innermost ones with matrix products, or else, in a kernel without any, the
    innermost ones that load or store. Loops that merely wait for a barrier are neither."""
    every = loops(instructions)
    for matters in (is_tensor, lambda instruction: instruction.name in ("LDG", "STG", "LDGSTS")):
        chosen = [loop for loop in every if any(matters(instructions[i]) for i in loop.body)]
        if chosen:
            return [loop for loop in chosen if not any(other.body < loop.body for other in chosen)]
    return []
