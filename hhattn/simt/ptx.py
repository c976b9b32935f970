"""PTX as Triton writes it, read into typed instructions.

The grammar is that of NVIDIA's PTX ISA, section "Syntax", as far as LLVM's NVPTX back end and Triton's inline assembly
use it: one ``.entry``, registers declared by ``.reg .b32 %r<N>``, an instruction a line. Anything else is an error that
names the kernel and the line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class PtxError(ValueError):
    """PTX that can't be read or translated: says what, in which kernel, at which line of the PTX and of the source."""


@dataclass(frozen=True)
class Register:
    """``%r12``: ``name`` is "r12". Special registers keep their dot: "tid.x". ``%p1|%p2``, the two results of one
    instruction: ``second`` is "p2"."""

    name: str
    second: str = ""


@dataclass(frozen=True)
class Immediate:
    """A number as it stands in the text: an integer, or the bits of a float with ``bits`` of them."""

    value: int
    bits: int | None = None  # 32 for 0f…, 64 for 0d…; None for an integer


@dataclass(frozen=True)
class Symbol:
    """A name: a parameter, a variable in shared memory, a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Location:
    """Where an instruction comes from."""

    file: str
    line: int


@dataclass(frozen=True)
class Instruction:
    """``@!p op.mod.type a, b, c;``: ``parts`` is the opcode split at its dots."""

    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    at: Location
    text: str

    @property
    def base(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]


@dataclass(frozen=True)
class Label:
    name: str


@dataclass
class Kernel:
    """One entry: parameters as (type, name), registers as (type, prefix, count), and its body."""

    name: str
    params: list[tuple[str, str]]
    registers: list[tuple[str, str, int]] = field(default_factory=list)
    body: list[Instruction | Label] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)  # names of dynamic shared memory


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.S)
_PARAM = re.compile(r"\.param\s+\.(\w+)[^\[\]]*?([\w$]+)")
_REG = re.compile(r"\.reg\s+\.(\w+)\s+%(\w+?)<(\d+)>;")
_INSTRUCTION = re.compile(r"(?:@(!?)%(\w+)\s+)?([a-z][\w.:]*)\s*(.*?)\s*;", re.S)
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")


def _number(text: str) -> int:
    return int(text.rstrip("U"), 0)


def split(text: str) -> list[str]:
    """Operands at the commas outside braces and brackets."""
    out, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*out, rest] if rest else out


def operand(text: str) -> Operand:
    """One operand; ValueError if it is none."""
    if text.startswith("{"):
        return Vector(tuple(operand(x) for x in split(text[1:-1])))
    if text.startswith("["):
        inner = split(text[1:-1])
        if len(inner) != 1:
            raise ValueError(text)
        base, _, offset = inner[0].partition("+")
        return Address(operand(base.strip()), _number(offset.strip()) if offset else 0)  # type: ignore[arg-type]
    if text.startswith("0f"):
        return Immediate(int(text[2:], 16), 32)
    if text.startswith("0d"):
        return Immediate(int(text[2:], 16), 64)
    if _NUMBER.fullmatch(text):
        return Immediate(_number(text))
    if re.fullmatch(r"%[\w.]+(?:\|%\w+)?", text):
        name, _, second = text[1:].partition("|%")
        return Register(name, second)
    if re.fullmatch(r"[\w$]+", text):
        return Symbol(text)
    raise ValueError(text)


def _closing(kernel: str, text: str, begin: int) -> int:
    """Where the brace at ``begin`` is closed; scopes of inline assembly open and close inside."""
    depth = 0
    for found in re.finditer(r"//[^\n]*|[{}]", text[begin:]):
        depth += (found[0] == "{") - (found[0] == "}")
        if depth == 0 and found[0] == "}":
            return begin + found.start()
    raise PtxError(f"{kernel}: the body's braces don't match")


def _statements(body: str) -> list[str]:
    """Lines of a body; lines that an instruction goes on over are joined."""
    out: list[str] = []
    pending = ""
    for raw in body.split("\n"):
        line = raw.split("//")[0].strip()
        if not line:
            continue
        pending = f"{pending} {line}".strip()
        if (
            pending.startswith(".loc")
            or pending.endswith((";", ":", "{", "}"))
            or re.match(r"\.(b8|b32|b64)\b", pending)
        ):
            out.append(pending)
            pending = ""
    return out


def parse(text: str) -> Kernel:
    """The kernel in ``text``. PtxError for what is not understood."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    entry = _ENTRY.search(text)
    if entry is None:
        raise PtxError("no .entry in the PTX")
    kernel = Kernel(entry[1], [])
    for param in split(re.sub(r"//[^\n]*", "", entry[2]).replace("\n", " ")):
        if not (found := _PARAM.fullmatch(param)):  # an array, which takes more than 8 bytes
            raise PtxError(f"{kernel.name}: can't read the parameter {param!r}")
        kernel.params.append((found[1], found[2]))
    kernel.shared = set(re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\];", text))
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
    begin = text.index("{", entry.end())
    end = _closing(kernel.name, text, begin)
    at = Location("?", 1)
    for statement in _statements(text[begin + 1 : end]):
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", statement):
            if int(found[2]):  # line 0: made up by the compiler; it belongs to what stands before it
                at = Location(files.get(found[1], "?"), int(found[2]))
        elif found := _REG.match(statement):
            kernel.registers.append((found[1], found[2], int(found[3])))
        elif re.fullmatch(r"[$\w]+:", statement):
            kernel.body.append(Label(statement[:-1]))
        elif statement not in ("{", "}") and not statement.startswith(".pragma"):
            kernel.body.append(_instruction(kernel, statement, at))
    return kernel


def _instruction(kernel: Kernel, statement: str, at: Location) -> Instruction:
    found = _INSTRUCTION.fullmatch(statement)
    try:
        if not found:
            raise ValueError(statement)
        operands = tuple(operand(x) for x in split(found[4]))
    except ValueError as e:
        raise PtxError(f"{kernel.name}, {at.file}:{at.line}: can't read the PTX {statement!r} (at {e})") from None
    guard = Register(found[2]) if found[2] else None
    return Instruction(tuple(found[3].split(".")), operands, guard, found[1] == "!", at, statement)
