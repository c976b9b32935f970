"""How the operands of PTX read and write as C++: registers hold bits, instructions give them types."""

from __future__ import annotations

from hhattn.simt.ptx import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol, Vector

BITS = {
    f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64) if not (kind == "f" and bits == 8)
} | {"pred": 1, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32}  # fmt: skip
_SPECIAL = {
    "laneid": "simt::self->lane",
    "warpid": "simt::self->warp",
    **{f"tid.{x}": f"simt::self->tid.{x}" for x in "xyz"},
    **{f"ntid.{x}": f"simt::self->bdim.{x}" for x in "xyz"},
    **{f"ctaid.{x}": f"simt::self->bid.{x}" for x in "xyz"},
    **{f"nctaid.{x}": f"simt::self->gdim.{x}" for x in "xyz"},
}


class Values:
    """Operands of one kernel as C++ expressions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._types = {prefix: type_ for type_, prefix, _ in kernel.registers}
        self._params = {name: (i, type_) for i, (type_, name) in enumerate(kernel.params)}

    def type(self, x: Register) -> str:
        """What a register is declared as."""
        return self._types[x.name.rstrip("0123456789")]

    @staticmethod
    def storage(type_: str) -> str:
        """The C++ type of a register."""
        return "bool" if type_ == "pred" else f"uint{BITS[type_]}_t"

    @staticmethod
    def ctype(type_: str) -> str:
        """The C++ type that an integer is computed in."""
        return "bool" if type_ == "pred" else f"{'' if type_[0] == 's' else 'u'}int{BITS[type_]}_t"

    @staticmethod
    def label(name: str) -> str:
        return name.replace("$", "")

    @staticmethod
    def name(x: Operand) -> str:
        """The variable that is a destination."""
        if not isinstance(x, Register) or x.name in _SPECIAL:
            raise ValueError(f"{x} is no register to write to")
        return x.name

    def bits(self, x: Operand) -> str:
        """An operand's bits, as wide as they stand."""
        if isinstance(x, Register):
            return _SPECIAL.get(x.name, x.name)
        if isinstance(x, Immediate):
            return f"0x{x.value:x}u" if x.bits == 32 else f"0x{x.value:x}ull" if x.bits else f"{x.value}ll"
        if isinstance(x, Symbol) and x.name in self.kernel.shared:
            return "simt::SHARED_BASE"
        raise ValueError(f"{x} is no value")

    def raw(self, x: Operand, type_: str) -> str:
        """An operand's bits, as wide as ``type_``."""
        return f"{self.storage(type_)}({self.bits(x)})"

    @staticmethod
    def read(bits: str, type_: str, ftz: bool = False) -> str:
        """Bits as a value of ``type_``; 16-bit floats as float."""
        if type_ in ("f32", "tf32"):
            return f"tr::{'ftz' if ftz else 'f32'}({bits})"
        if type_ == "f64":
            return f"tr::f64({bits})"
        if type_ in ("f16", "bf16"):
            return f"simt::from_{type_}(uint16_t({bits}))"
        return f"{Values.ctype(type_)}({bits})"

    def get(self, x: Operand, type_: str, ftz: bool = False) -> str:
        if type_ == "pred" and isinstance(x, Immediate):
            return "true" if x.value else "false"
        return self.read(self.bits(x), type_, ftz)

    @staticmethod
    def written(value: str, type_: str, ftz: bool = False) -> str:
        """A value of ``type_`` as bits."""
        if type_ in ("f32", "tf32"):
            return f"tr::{'flushed' if ftz else 'bits'}(float({value}))"
        if type_ == "f64":
            return f"tr::bits(double({value}))"
        if type_ in ("f16", "bf16"):
            return f"simt::to_{type_}({value})"
        return f"{Values.ctype(type_)}({value})"

    def set(self, d: Operand, type_: str, value: str, ftz: bool = False) -> str:
        return f"{self.name(d)} = {self.written(value, type_, ftz)};"

    @staticmethod
    def finish(ins: Instruction, value: str) -> str:
        """The modifiers that act on a result: ``.relu`` and ``.sat``."""
        if "relu" in ins.parts:
            value = f"simt::ptx::relu({value})"
        if "sat" in ins.parts:
            value = f"tr::saturate({value})"
        return value

    def list(self, x: Operand) -> list[str]:
        """The bits of a vector, or of one operand."""
        return [self.bits(item) for item in (x.items if isinstance(x, Vector) else (x,))]

    def address(self, x: Operand) -> str:
        """Where ``[base + offset]`` points: bits of 32 or 64."""
        if not isinstance(x, Address):
            raise ValueError(f"{x} is no address")
        return f"{self.bits(x.base)} + {x.offset}" if x.offset else self.bits(x.base)

    def param(self, x: Operand) -> int:
        """Which parameter an address in parameter space is."""
        if not isinstance(x, Address) or not isinstance(x.base, Symbol) or x.offset:
            raise ValueError(f"{x} is no parameter")
        return self._params[x.base.name][0]
