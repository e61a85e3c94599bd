"""What a person types to set a register: ``rip=0x1000``, ``cs.base = 4096``."""

from __future__ import annotations

from difflib import get_close_matches

from kvm.errors import ConfigError
from kvm.x86 import registers
from kvm.x86.structs import Regs, Sregs
from widgets.line_pane import cut

SHOWN_NAMES = 12
LONGEST = 32
"""Of what was typed, an error quotes so much."""


def words(text: str) -> list[str]:
    """What Tab completes this to."""
    return [f"{name}=" for name in registers.WIDTHS if f"{name}=".startswith(text.lower())]


def parse(text: str) -> tuple[str, int]:
    """The register and its new value. Raises ConfigError."""
    name, equals, value = (part.strip().lower() for part in text.partition("="))
    if not name:
        raise ConfigError("Which register? Write rip=0x1000, for example.")
    if name not in registers.WIDTHS:
        raise ConfigError(_unknown(name))
    if not equals:
        raise ConfigError(f"{name} needs a value: {name}=0x1000")
    number = _number(name, value)
    registers.check(name, number)
    return name, number


def help_line(text: str, regs: bytes, sregs: bytes, *, running: bool) -> str:
    """While it is being typed: names that begin so, what the register holds, what it would hold."""
    name, equals, value = (part.strip().lower() for part in text.partition("="))
    if not name:
        return "register = value, hexadecimal after 0x: rip=0x1000"
    if not equals and name not in registers.WIDTHS:
        names = [known for known in registers.WIDTHS if known.startswith(name)]
        more = " …" if len(names) > SHOWN_NAMES else ""
        return "  ".join(names[:SHOWN_NAMES]) + more if names else _unknown(name)
    try:
        if not value and name in registers.WIDTHS:
            return f"{name}, {registers.WIDTHS[name]} bits, is {_held(name, regs, sregs)}"
        _, number = parse(text)
    except ConfigError as error:
        return str(error)
    pauses = "Enter pauses the guest; " if running else ""
    return f"{pauses}{name} {_held(name, regs, sregs)} → {_digits(name, number)}"


def _number(name: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        int(text, 16)
    except ValueError:
        raise ConfigError(
            f"{cut(text, LONGEST)!r} is no value for {name}: write a whole number, 4096 or 0x1000."
        ) from None
    digits = cut(text, LONGEST)
    raise ConfigError(f"{digits!r}: hexadecimal needs its 0x, {name}=0x{digits}")


def _unknown(name: str) -> str:
    near = [known for known in registers.WIDTHS if known.startswith(f"{name}.")]
    near = near or get_close_matches(name, registers.WIDTHS)
    instead = f"There is {', '.join(near)}." if near else "Tab shows the names."
    return f"There is no register {cut(name, LONGEST)!r}. {instead}"


def _held(name: str, regs: bytes, sregs: bytes) -> str:
    if not regs or not sregs:
        return "not known"
    value = registers.value(name, Regs.from_buffer_copy(regs), Sregs.from_buffer_copy(sregs))
    return _digits(name, value)


def _digits(name: str, value: int) -> str:
    return f"{value:0{registers.WIDTHS[name] // 4}x}"
