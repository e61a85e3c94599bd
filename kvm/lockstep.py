"""One guest on two backends, instruction by instruction, until something differs.

Both machines have one VCPU and the same CPUID, start equal and take one step each in turn, with interrupts blocked
while they step. After each step the registers are compared, after each window the memory; a window that ends with
different memory is gone through again from its checkpoint, with the memory compared at each step.

What can't be equal is the reference's for both, and counted: the TABLES below say what that is, and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvm.backends.interface import PAGE_SIZE, Exit, ExitKind, System
from kvm.boot.image import BootImage
from kvm.errors import MemoryAccessError
from kvm.machine import Machine, MachineConfig
from kvm.x86 import decode, layout, paging
from kvm.x86.disasm import MAX_INSTRUCTION, disassemble
from kvm.x86.structs import GENERAL_REGISTERS, SEGMENT_REGISTERS, CpuidEntry, Regs, Sregs

WINDOW = 1000
"""Steps between two comparisons of the whole memory."""
REPEAT_LIMIT = 1 << 20
"""Steps that one repeated string instruction may take: a backend may stop after each turn, or after many."""

CATCH_UP = 64
"""Steps that the other may be behind. KVM's emulator forgets that it is stepping when an instruction ends in an exit to
user space for a write ("FIXME: return into emulator if single-stepping", x86.c): its step is then the next one's."""

_CF, _PF, _AF, _ZF, _SF, _OF = 1, 4, 0x10, 0x40, 0x80, 0x800
_ALL = _CF | _PF | _AF | _ZF | _SF | _OF
UNDEFINED_FLAGS: Mapping[str, int] = {
    **dict.fromkeys(("and", "or", "xor", "test"), _AF),
    **dict.fromkeys(("shl", "sal", "shr", "sar", "shld", "shrd"), _AF | _OF | _CF),
    **dict.fromkeys(("rol", "ror", "rcl", "rcr"), _OF),
    **dict.fromkeys(("mul", "imul"), _SF | _ZF | _AF | _PF),
    **dict.fromkeys(("div", "idiv"), _ALL),
    **dict.fromkeys(("bsf", "bsr"), _ALL & ~_ZF),
    **dict.fromkeys(("bt", "bts", "btr", "btc"), _OF | _SF | _AF | _PF),
    **dict.fromkeys(("aaa", "aas"), _OF | _SF | _ZF | _PF),
    **dict.fromkeys(("daa", "das"), _OF),
}
"""Flags that the SDM leaves undefined after an instruction: processors differ in them."""

TIME_AND_CHANCE = frozenset(("rdtsc", "rdtscp", "rdrand", "rdseed"))
"""Instructions whose result is the host's."""
CLOCK_MSRS = frozenset((0x10, 0x6E0, 0xE7, 0xE8, 0x1B, 0x8B, 0x1A0, *range(0x200, 0x300)))
"""MSRs that RDMSR may find different: clocks, and what describes the processor."""
CLOCK_PORTS = frozenset((0x40, 0x41, 0x42, 0x61, 0x70, 0x71))
"""The PIT's counters and the CMOS clock."""
EXIT_PORTS = range(0xF4, 0xF8)
"""isa-debug-exit."""
DEVICE_PAGES = frozenset((layout.LAPIC, layout.IOAPIC))
"""Pages with counters and versions in them: the local APIC's and the I/O APIC's."""

_IGNORED_FLAGS = 1 << 8 | 1 << 16  # TF and RF belong to the stepping
_ACCESSED_DIRTY = 0x60
_SEGMENT_FIELDS = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "unusable")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_MEMORY_OPERAND = 3  # capstone's X86_OP_MEM


@dataclass(frozen=True, slots=True)
class Difference:
    """The first one. ``values``: name → (the reference's, the other's); ``where`` is RIP, ``text`` the instruction."""

    step: int
    where: int
    text: str
    values: Mapping[str, tuple[int, int]]


@dataclass(slots=True)
class Outcome:
    """``ended`` says why there were no more steps; ``taken`` counts what was the reference's for both, by reason."""

    steps: int = 0
    ended: str = ""
    difference: Difference | None = None
    taken: Counter[str] = field(default_factory=Counter)


_FEATURES = {
    (0x1, 0): ("ecx", "edx"),
    (0x7, 0): ("ebx", "ecx", "edx"),
    (0x80000001, 0): ("ecx", "edx"),
}  # fmt: skip
"""CPUID leaves that are feature bits, by function and index."""


def common_cpuid(reference: list[CpuidEntry], other: list[CpuidEntry]) -> list[CpuidEntry]:
    """The other's CPUID with only those features that the reference has too: what both can give to their guests."""
    has = {(entry.function, entry.index): entry for entry in reference}
    common = [CpuidEntry.from_buffer_copy(entry) for entry in other]
    for entry in common:
        for register in _FEATURES.get((entry.function, entry.index), ()):
            theirs = has.get((entry.function, entry.index), CpuidEntry())
            setattr(entry, register, getattr(entry, register) & getattr(theirs, register))
    return common


class SameCpuid:
    """A system that offers this CPUID instead of its own."""

    def __init__(self, system: System, offered: list[CpuidEntry]) -> None:
        self._system = system
        self._offered = offered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system, name)

    def cpuid(self) -> list[CpuidEntry]:
        return list(self._offered)


@contextmanager
def pair(reference: System, other: System, image: BootImage, memory: int) -> Iterator[Lockstep]:
    """Two machines with the image in them, ready to step. Raises ConfigError, KvmError."""
    config = MachineConfig(vcpus=1, memory=memory)
    offered = common_cpuid(reference.cpuid(), other.cpuid())
    first: Any = SameCpuid(reference, offered)
    second: Any = SameCpuid(other, offered)
    with Machine(first, image, config) as one, Machine(second, image, config) as two:
        yield Lockstep(one, two)


class Lockstep:
    """``reference`` is believed where there's nothing to compare: KVM, as a rule."""

    def __init__(self, reference: Machine, other: Machine) -> None:
        self._machines = reference, other
        self._outcome = Outcome()

    def run(self, count: int, progress: Callable[[int], None] = lambda steps: None) -> Outcome:
        """Step ``count`` instructions, or up to the first difference, or until the guest can't be stepped any more."""
        outcome = self._outcome
        while outcome.steps < count and not outcome.ended:
            checkpoints = [machine.checkpoint() for machine in self._machines]
            start = outcome.steps
            self._steps(min(start + WINDOW, count), each_time=False)
            if outcome.difference is None and self._memory_differences():
                for machine, checkpoint in zip(self._machines, checkpoints, strict=True):
                    machine.restore(checkpoint)
                outcome.steps, end, outcome.ended = start, outcome.steps, ""
                self._steps(end, each_time=True)
                if outcome.difference is None:  # it came from a value of time or chance, which now was another
                    self._found(outcome.steps, "a window of so many steps", self._memory_differences())
            for machine, checkpoint in zip(self._machines, checkpoints, strict=True):
                machine.forget(checkpoint)
            progress(outcome.steps)
        return outcome

    def _steps(self, end: int, *, each_time: bool) -> None:
        outcome = self._outcome
        while outcome.steps < end and not outcome.ended:
            before = self._registers(0)
            code = self._code(before)
            ended = self._step_both(code)
            outcome.steps += 1
            mine, theirs = self._registers(0), self._registers(1)
            if (kinds := _kinds(ended)) is not None:
                outcome.ended = f"{code.text}: {kinds}"
                if ended[0].kind is not ended[1].kind:
                    self._found(before.rip, code.text, {kinds: (0, 1)})
                return
            values = _differences(mine, theirs)
            if "rip" in values and self._writes_to_a_device(code, before):
                values = self._catch_up(mine, values)
            if values and (why := self._not_comparable(code, before, values)):
                outcome.taken[why] += 1
                believed, corrected = (1, 0) if code.name == "cpuid" else (0, 1)
                for name, pair_ in values.items():
                    self._machines[corrected].edit(0, name, pair_[believed])
                values = {}
            if each_time:
                values |= self._memory_differences()
            if values:
                self._found(before.rip, code.text, values)
                return
            if code.name == "hlt":
                outcome.ended = "the guest waits for an interrupt (hlt), and none comes while it is stepped"
            if code.name == "out" and _port(code, before) in EXIT_PORTS:
                outcome.ended = "the guest ended itself"

    def _catch_up(self, mine: _Registers, values: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The differences that are left when the other has gone on to where KVM's step has ended."""
        for _ in range(CATCH_UP):
            self._machines[1].step(0)
            left = _differences(mine, self._registers(1))
            if not left:
                self._outcome.taken["KVM's step over a write to a device went on"] += 1
                return {}
            if "rip" not in left:
                return left
        return values

    def _writes_to_a_device(self, code: _Code, before: _Registers) -> bool:
        return code.name.startswith("out") or any(
            self._page(address, before) in DEVICE_PAGES for address in _operands(code, before)
        )

    def _page(self, linear: int, at: _Registers) -> int | None:
        """The physical page of a linear address; None if it isn't mapped."""
        try:
            return self._physical(linear, at.sregs) & -PAGE_SIZE
        except (MemoryAccessError, LookupError):
            return None

    def _found(self, where: int, text: str, values: Mapping[str, tuple[int, int]]) -> None:
        self._outcome.difference = Difference(self._outcome.steps, where, text, values)
        self._outcome.ended = "different"

    def _step_both(self, code: _Code) -> tuple[Exit, Exit]:
        first, second = (self._step_over(machine, code) for machine in self._machines)
        return first, second

    def _step_over(self, machine: Machine, code: _Code) -> Exit:
        """One instruction; a repeated one as a whole: the backends differ in how much of it is a step."""
        (ended,) = machine.step(0)
        if code.repeated:
            start = code.rip
            for _ in range(REPEAT_LIMIT):
                if ended.kind is not ExitKind.DEBUG or Regs.from_buffer_copy(machine.view(0).regs).rip != start:
                    break
                (ended,) = machine.step(0)
        return ended

    def _registers(self, which: int) -> _Registers:
        view = self._machines[which].view(0)
        return _Registers(Regs.from_buffer_copy(view.regs), Sregs.from_buffer_copy(view.sregs))

    def _code(self, at: _Registers) -> _Code:
        regs, sregs = at.regs, at.sregs
        linear = decode.linear_rip(sregs, regs.rip, regs.rflags)
        bits = decode.mode(sregs, regs.rflags).bits
        raw = b""
        while len(raw) < MAX_INSTRUCTION:
            address = linear + len(raw)
            size = min(MAX_INSTRUCTION - len(raw), PAGE_SIZE - address % PAGE_SIZE)
            try:
                raw += self._machines[0].read_memory(self._physical(address, sregs), size)
            except (MemoryAccessError, LookupError):
                break
        text = disassemble(raw, regs.rip, bits)[0].text if raw else "(no code there)"
        return _Code(regs.rip, bits, raw, text)

    def _physical(self, linear: int, sregs: Sregs) -> int:
        found = paging.translate(sregs, linear, self._machines[0].read_memory)
        if found is None:
            raise LookupError(linear)
        return found

    def _not_comparable(self, code: _Code, before: _Registers, values: Mapping[str, tuple[int, int]]) -> str:
        """Why these differences are none; empty if they are."""
        name = code.name
        undefined = UNDEFINED_FLAGS.get(name, 0)
        if values.keys() == {"rflags"} and not (values["rflags"][0] ^ values["rflags"][1]) & ~undefined:
            return "flags that are undefined after the instruction"
        if not values.keys() <= {*GENERAL_REGISTERS, "rflags"}:
            return ""
        if name in TIME_AND_CHANCE:
            return "time or chance"
        if name == "cpuid":
            return "CPUID, to which a host adds (what was offered, for both)"
        if name == "rdmsr" and before.regs.rcx & 0xFFFFFFFF in CLOCK_MSRS:
            return "an MSR that is a clock, or describes the processor"
        if name == "in" and _port(code, before) in CLOCK_PORTS:
            return "a port that is a clock"
        if any(self._page(address, before) in DEVICE_PAGES for address in _operands(code, before)):
            return "a register of an interrupt controller"
        return ""

    def _memory_differences(self) -> dict[str, tuple[int, int]]:
        """Differing 64-bit words, the first few, by their address; A and D bits of page tables may come early."""
        found: dict[str, tuple[int, int]] = {}
        mine, theirs = (machine.memory.ram for machine in self._machines)
        for one, two in zip(mine, theirs, strict=True):
            words = [region.pages.reshape(-1).view(np.uint64) for region in (one, two)]
            differing = np.flatnonzero((words[0] ^ words[1]) & np.uint64(~_ACCESSED_DIRTY & (1 << 64) - 1))
            for at in differing[:4]:
                found[f"memory[{one.address + int(at) * 8:#x}]"] = int(words[0][at]), int(words[1][at])
        return found


@dataclass(frozen=True, slots=True)
class _Registers:
    regs: Regs
    sregs: Sregs

    @property
    def rip(self) -> int:
        return self.regs.rip


@dataclass(frozen=True, slots=True)
class _Code:
    rip: int
    bits: int
    raw: bytes
    text: str

    @property
    def repeated(self) -> bool:
        return self.text.startswith("rep")

    @property
    def name(self) -> str:
        """The mnemonic, without its prefixes."""
        words = self.text.split()
        return words[1] if len(words) > 1 and (self.repeated or words[0] == "lock") else words[0]


def _port(code: _Code, at: _Registers) -> int:
    """The port of an IN or OUT."""
    operands = code.text.partition(" ")[2].split(", ")
    named = operands[0] if code.name == "out" else operands[-1]
    return at.regs.rdx & 0xFFFF if named == "dx" else int(named, 0)


def _kinds(ended: tuple[Exit, Exit]) -> str | None:
    """How the steps ended, unless both did as steps do."""
    kinds = [each.kind for each in ended]
    if kinds == [ExitKind.DEBUG, ExitKind.DEBUG]:
        return None
    words = ["waits" if kind is ExitKind.KICKED else kind.value for kind in kinds]
    return words[0] if words[0] == words[1] else f"{words[0]} (reference), {words[1]} (other)"


def _differences(mine: _Registers, theirs: _Registers) -> dict[str, tuple[int, int]]:
    pairs = {name: (getattr(mine.regs, name), getattr(theirs.regs, name)) for name in (*GENERAL_REGISTERS, "rip")}
    pairs["rflags"] = mine.regs.rflags & ~_IGNORED_FLAGS, theirs.regs.rflags & ~_IGNORED_FLAGS
    one, two = mine.sregs, theirs.sregs
    pairs |= {name: (getattr(one, name), getattr(two, name)) for name in _CONTROL}
    for name in ("gdt", "idt"):
        for part in ("base", "limit"):
            pairs[f"{name}.{part}"] = getattr(getattr(one, name), part), getattr(getattr(two, name), part)
    for name in SEGMENT_REGISTERS:
        segments = getattr(one, name), getattr(two, name)
        if all(segment.unusable for segment in segments):
            continue  # an unusable segment's attributes mean nothing
        for part in _SEGMENT_FIELDS:
            pairs[f"{name}.{part}"] = getattr(segments[0], part), getattr(segments[1], part)
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


def _operands(code: _Code, at: _Registers) -> Iterator[int]:
    """Linear addresses of the instruction's memory operands (flat segments)."""
    import capstone  # here, as in disasm: the first step pays for it

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    engine = capstone.Cs(capstone.CS_ARCH_X86, modes[code.bits])
    engine.detail = True
    for instruction in engine.disasm(code.raw, code.rip, 1):
        for operand in instruction.operands:
            if operand.type == _MEMORY_OPERAND:
                base, index = (
                    _value(instruction.reg_name(number), instruction, at)
                    for number in (operand.mem.base, operand.mem.index)
                )
                yield base + index * operand.mem.scale + operand.mem.disp & (1 << 64) - 1


def _value(name: str | None, instruction: Any, at: _Registers) -> int:
    if not name:
        return 0
    if name in ("rip", "eip"):
        return int(instruction.address + instruction.size)
    wide = {"e": "r" + name[1:]}.get(name[0], name).removesuffix("d")
    return int(getattr(at.regs, wide, 0)) & ((1 << 32) - 1 if name[0] == "e" or name[-1] == "d" else (1 << 64) - 1)
