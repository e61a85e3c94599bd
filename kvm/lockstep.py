"""One guest on two backends, instruction by instruction, until something differs.

Both machines have the same CPUID and start equal. Their VCPUs take one step each in turn, in the same order on both,
with interrupts blocked while they step; one that waits (in HLT, for INIT or SIPI) is passed over. After each step that
VCPU's general and system registers are compared, after each window all registers of all VCPUs and the memory. A window
that ends with a difference is gone through again from its checkpoint, with everything compared at each step.

What can't be equal is the reference's for both, and counted: the TABLES below say what that is, and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvm.backends.interface import PAGE_SIZE, Exit, ExitKind, System
from kvm.boot.image import BootImage
from kvm.machine import Machine, MachineConfig
from kvm.snapshot.state import Checkpoint, MachineState
from kvm.x86 import compare, decode, gates, layout, paging
from kvm.x86.compare import Values
from kvm.x86.disasm import MAX_INSTRUCTION, disassemble
from kvm.x86.operands import operands
from kvm.x86.structs import (
    GENERAL_REGISTERS,
    MP_STATE_HALTED,
    MP_STATE_INIT_RECEIVED,
    MP_STATE_RUNNABLE,
    MP_STATE_UNINITIALIZED,
    CpuidEntry,
    MpState,
    Regs,
    Sregs,
)

WINDOW = 1000
"""Steps between two comparisons of everything."""
PATIENCE = 50
"""Tries at a step before its VCPU counts as stuck: Machine.step gives up after 0.1 s, which a busy host can take."""
CATCH_UP = 4096
"""Steps that the other may be behind. KVM's step over an instruction that faults doesn't end at the handler's first
instruction: its emulator's ends one behind it, a processor's where the handler returns to, as the delivery clears TF
(SDM vol. 3A, 6.12.1.3). PVM's step over IRETD ends behind the next instruction."""

WORDS = 4
"""Of memory that differs: so many are named."""

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
    **dict.fromkeys(("aam", "aad"), _OF | _AF | _CF),
}
"""Flags that the SDM leaves undefined after an instruction: processors differ in them."""
UNDEFINED_IF_ZERO = frozenset(("bsf", "bsr"))
"""Instructions whose result the SDM leaves undefined if ZF is set after them."""

FAR_TRANSFERS = frozenset(("ljmp", "lcall", "retf", "retfq", "iret", "iretd", "iretq"))
"""Instructions that load CS from a descriptor, whose accessed bit a processor sets in memory; the emulator doesn't."""

TIME_AND_CHANCE = frozenset(("rdtsc", "rdtscp", "rdrand", "rdseed"))
"""Instructions whose result is the host's."""
HOST_MSRS = frozenset((0x10, 0x6E0, 0x8B, 0xCE, 0x179, 0x1A0))
"""MSRs that are a clock (TSC, TSC_DEADLINE), or describe the host's processor: UCODE_REV, PLATFORM_INFO, MCG_CAP,
MISC_ENABLE (which says whether there are PEBS and BTS)."""
CLOCK_PORTS: Mapping[int, int] = {0x40: 0xFF, 0x41: 0xFF, 0x42: 0xFF, 0x61: 0x30, 0x71: 0xFF}
"""Bits of ports that time moves: the PIT's counters; its output and the refresh toggle (SeaBIOS measures the processor
by them); the CMOS's data while a register of its clock is selected."""
CLOCK_REGISTERS = frozenset((0x390, *range(0x200, 0x280, 0x10)))
"""Registers of the local APIC that time moves: the timer's current count, and which interrupts have arrived."""
EXIT_PORTS = range(0xF4, 0xF8)
"""isa-debug-exit."""
RESET_PORTS = (0x64, 0x92, 0xCF9)
"""Keyboard controller, system control port A, chipset: a write may have the machine's supervisor reset it."""

_CMOS_DATA = 0x71
_ACCESS_RIGHTS, _ACCESSED = 5, 0x1
"""The byte of a descriptor with the type, and its lowest bit."""
_ACCESSED_DIRTY = 0x60
"""Bits that a processor may set in page tables before it has to."""
_NEEDS_ANOTHER = (MP_STATE_UNINITIALIZED, MP_STATE_INIT_RECEIVED)
"""MP states that only an INIT or SIPI ends."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first one, found after ``step`` steps. ``values``: name → (the reference's, the other's), all of ``vcpu``;
    none if the step itself ended differently. ``text`` is the instruction, ``where`` its RIP.
    """

    step: int
    vcpu: int
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
def pair(reference: System, other: System, image: BootImage, config: MachineConfig) -> Iterator[Lockstep]:
    """Two machines with the image in them, ready to step. Raises ConfigError, KvmError."""
    for system in (reference, other):
        config.check(system.caps)
    offered = common_cpuid(reference.cpuid(), other.cpuid())
    first: Any = SameCpuid(reference, offered)
    second: Any = SameCpuid(other, offered)
    with Machine(first, image, config) as one, Machine(second, image, config) as two:
        yield Lockstep(one, two)


_Position = tuple[Outcome, int, frozenset[int]]
"""Where a window begins: so far, the VCPU that stepped last, those that are halted."""


class Lockstep:
    """``reference`` is believed where there's nothing to compare: KVM, as a rule."""

    def __init__(self, reference: Machine, other: Machine) -> None:
        self._machines = reference, other
        self._memory = reference.memory.peek, other.memory.peek
        self._outcome = Outcome()
        self._last = -1
        """The VCPU that took the last step."""
        self._halted: frozenset[int] = frozenset()
        self._waiting: frozenset[int] = frozenset()
        """The halted ones, and those that need an INIT or SIPI."""
        self._shut_down: int | None = None
        """A VCPU that can't go on, on either: what that leaves in its registers is the processor's own affair."""
        self._sent = False
        """A local APIC was written to, perhaps with an INIT or SIPI for another VCPU, or the machine was reset."""
        self._stopped: Callable[[], bool] = lambda: False

    def run(
        self,
        count: int,
        progress: Callable[[int], None] = lambda steps: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Step ``count`` instructions, all VCPUs' together, or up to the first difference, or until the guest can't be
        stepped any more, or until ``stopped``, which is asked at every step, says so.
        """
        self._stopped = stopped
        outcome = self._outcome
        start = self._checkpoints()
        while outcome.steps < count and not outcome.ended:
            before = replace(outcome, taken=Counter(outcome.taken)), self._last, self._halted
            together = self._steps(min(outcome.steps + WINDOW, count), each_time=False)
            if not together and not stopped():  # but they were before the last step: compare them there
                steps, ended = outcome.steps - 1, outcome.ended
                outcome = self._go_back(start, before)
                self._steps(steps, each_time=False)
                outcome.ended = outcome.ended or ended
            if stopped():
                outcome.ended = outcome.ended or "stopped"
                break
            end = self._checkpoints()
            if outcome.difference is None and (differing := self._all_differences([each.state for each in end]))[1]:
                self._forget(end)
                steps = outcome.steps
                outcome = self._go_back(start, before)
                self._steps(steps, each_time=True)
                if outcome.difference is None:  # it came from a value of time or chance, which now was another
                    self._found(*differing, 0, f"one of the last {WINDOW} instructions, and none when stepped again")
                end = self._checkpoints()
            self._forget(start)
            start = end
            progress(outcome.steps)
        self._forget(start)
        return outcome

    def _go_back(self, start: Sequence[Checkpoint], before: _Position) -> Outcome:
        """To where a window began."""
        outcome, self._last, self._halted = before
        self._outcome = replace(outcome, taken=Counter(outcome.taken))
        self._shut_down = None
        self._restore(start)
        return self._outcome

    def _checkpoints(self) -> list[Checkpoint]:
        """Where a window ends and the next begins, and who waits there."""
        checkpoints = [machine.checkpoint() for machine in self._machines]
        self._restore(checkpoints)
        return checkpoints

    def _restore(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Also right after they were taken: an INIT must find its VCPU's state in the kernel, as a copy that owns it
        would hide at the next look what became of it.
        """
        for machine, checkpoint in zip(self._machines, checkpoints, strict=True):
            machine.restore(checkpoint)
        states = [MpState.from_buffer_copy(vcpu["mp_state"]).mp_state for vcpu in checkpoints[0].state.vcpus]
        without = frozenset(vcpu for vcpu, state in enumerate(states) if state in _NEEDS_ANOTHER)
        self._halted -= without
        self._waiting = self._halted | without

    def _forget(self, checkpoints: Sequence[Checkpoint]) -> None:
        for machine, checkpoint in zip(self._machines, checkpoints, strict=True):
            machine.forget(checkpoint)

    def _steps(self, end: int, *, each_time: bool) -> bool:
        """Step up to ``end``, or to a step after which somebody else may have to be stepped. False if the machines
        don't stand at the same place in the end, so that nothing can be compared.
        """
        outcome = self._outcome
        self._sent = False
        while outcome.steps < end and not outcome.ended and not self._sent:
            vcpu = self._next()
            if vcpu is None:
                outcome.ended = "the guest waits, and no interrupt comes while it is stepped"
                break
            before = self._registers(0, vcpu)
            code = self._code(before)
            ended = [self._step_over(machine, vcpu, code) for machine in self._machines]
            if self._stopped():
                outcome.ended = "stopped"
                return False
            outcome.steps += 1
            self._last = vcpu
            if ended[0].kind is ExitKind.INTERNAL_ERROR and ended[1].kind is ExitKind.DEBUG:
                outcome.ended = f"VCPU {vcpu}, {code.text}: this host's KVM can't emulate it"
                return False
            if (kinds := _kinds(ended)) is not None:
                outcome.ended = f"VCPU {vcpu}, {code.text}: {kinds}"
                self._shut_down = vcpu
                if ended[0].kind is not ended[1].kind:
                    self._found(vcpu, {}, before.rip, f"{code.text}: {kinds}")
                break
            self._effects(vcpu, code, before)
            mine, theirs = self._registers(0, vcpu), self._registers(1, vcpu)
            if mine.rip != theirs.rip and not before.cpl and theirs.cpl:
                outcome.ended = f"VCPU {vcpu}, {code.text}: this host's KVM doesn't step at CPL {theirs.cpl}"
                return False
            values = self._compared(vcpu, code, before, (mine, theirs))
            if each_time and not values:
                vcpu, values = self._all_differences(self._states())
            if values and self._stopped():
                outcome.ended = "stopped"
                return False
            if values:
                self._found(vcpu, values, before.rip, code.text)
        return True

    def _effects(self, vcpu: int, code: _Code, before: _Registers) -> None:
        """What this step means for the next ones."""
        if code.name == "hlt" and not before.cpl:
            self._halted |= {vcpu}
            self._waiting |= {vcpu}
        if code.name == "out" and _port(code, before) in EXIT_PORTS:
            self._outcome.ended = "the guest ended itself"
        if code.name == "out" and _port(code, before) in RESET_PORTS:
            for machine in self._machines:
                machine.settle()
            if None in (machine.came_from for machine in self._machines):  # no checkpoint any more, but a reset
                self._halted = frozenset()
                self._sent = True
        if layout.LAPIC in (page for page, _, written in self._accesses(code, before) if written):
            self._sent = True
        if code.name in FAR_TRANSFERS:
            self._mark_accessed(self._registers(0, vcpu))

    def _mark_accessed(self, at: _Registers) -> None:
        """Have the descriptor of CS be accessed in both memories, if it is in the reference's."""
        place = self._physical(at, at.sregs.gdt.base + (at.sregs.cs.selector & ~7) + _ACCESS_RIGHTS)
        mine, theirs = (b"" if place is None else read(place, 1) for read in self._memory)
        if place is not None and mine != theirs and mine[0] == theirs[0] | _ACCESSED:
            self._machines[1].write_memory(place, mine)
            self._outcome.taken["the accessed bit of a code segment's descriptor"] += 1

    def _states(self) -> list[MachineState]:
        """Everything, read between two steps of a window; given back at once, for the reason of ``_restore``."""
        states = [machine.save() for machine in self._machines]
        for machine, state in zip(self._machines, states, strict=True):
            machine.load(state)
        return states

    def _next(self) -> int | None:
        """Whose turn it is."""
        vcpus = len(self._machines[0].vcpus)
        turns = ((self._last + distance) % vcpus for distance in range(1, vcpus + 1))
        return next((vcpu for vcpu in turns if vcpu not in self._waiting), None)

    def _step_over(self, machine: Machine, vcpu: int, code: _Code) -> Exit:
        """One instruction; a repeated one as a whole: the backends differ in how much of it is a step."""
        while True:
            for _ in range(PATIENCE):
                (ended,) = machine.step(vcpu)
                if ended.kind is not ExitKind.KICKED or self._stopped():
                    break
            stepped = ended.kind is ExitKind.DEBUG and not self._stopped()
            if not (code.repeated and stepped and Regs.from_buffer_copy(machine.view(vcpu).regs).rip == code.rip):
                return ended

    def _compared(self, vcpu: int, code: _Code, before: _Registers, after: tuple[_Registers, _Registers]) -> Values:
        """What differs after this step, without what can't be equal: that is now."""
        mine, theirs = after
        values = _differences(mine, theirs)
        if "rip" in values and (code.name.startswith("iret") or self._in_handler(theirs)):
            self._outcome.taken["KVM's step over an exception or IRET went on"] += 1
            for _ in range(CATCH_UP):
                before, code = theirs, self._code(theirs)
                ended = self._step_over(self._machines[1], vcpu, code)
                self._effects(vcpu, code, before)
                theirs = self._registers(1, vcpu)
                values = _differences(mine, theirs)
                if "rip" not in values or ended.kind is not ExitKind.DEBUG or vcpu in self._waiting or self._stopped():
                    break
        if not values or not (why := self._not_comparable(code, before, mine, values)):
            return values
        self._outcome.taken[why] += 1
        believed, corrected = (1, 0) if code.name == "cpuid" else (0, 1)
        for name, both in values.items():
            self._machines[corrected].edit(vcpu, name, both[believed])
        return {}

    def _in_handler(self, at: _Registers) -> bool:
        """Does this VCPU stand at the first instruction of an exception's handler?"""
        return (at.sregs.cs.selector & ~3, at.rip) in (
            (selector & ~3, rip) for selector, rip in gates.handlers(at.sregs, lambda *place: self._read(0, at, *place))
        )

    def _not_comparable(self, code: _Code, before: _Registers, mine: _Registers, values: Values) -> str:
        """Why these differences are none; empty if they are."""
        if not values.keys() <= {*GENERAL_REGISTERS, "rflags"}:
            return ""
        name = code.name
        flags = values["rflags"][0] ^ values["rflags"][1] if "rflags" in values else 0
        if not flags & ~UNDEFINED_FLAGS.get(name, 0):
            if values.keys() == {"rflags"}:
                return "flags that are undefined after the instruction"
            if name in UNDEFINED_IF_ZERO and mine.regs.rflags & _ZF:
                return "a result that is undefined, as the operand is 0"
        if name in TIME_AND_CHANCE:
            return "time or chance"
        if name == "cpuid":
            return "CPUID, to which a host adds (what was offered, for both)"
        if name == "rdmsr" and before.regs.rcx & 0xFFFFFFFF in HOST_MSRS:
            return "an MSR that is a clock, or describes the processor"
        if name == "in" and values.keys() == {"rax"} and self._is_clock(_port(code, before), values["rax"]):
            return "a port that is a clock"
        if any(
            page == layout.LAPIC and offset & ~0xF in CLOCK_REGISTERS
            for page, offset, _ in self._accesses(code, before)
        ):
            return "a register of the local APIC that is a clock"
        return ""

    def _is_clock(self, port: int, values: tuple[int, int]) -> bool:
        if port == _CMOS_DATA and not self._machines[0].board.cmos.shows_time:
            return False
        return not (values[0] ^ values[1]) & ~CLOCK_PORTS.get(port, 0)

    def _found(self, vcpu: int, values: Values, where: int, text: str) -> None:
        if vcpu != self._last:
            text += f", by VCPU {self._last}"
        self._outcome.difference = Difference(self._outcome.steps, vcpu, where, text, values)
        self._outcome.ended = "different"

    # What the machines hold

    def _registers(self, which: int, vcpu: int) -> _Registers:
        view = self._machines[which].view(vcpu)
        return _Registers(Regs.from_buffer_copy(view.regs), Sregs.from_buffer_copy(view.sregs))

    def _code(self, at: _Registers) -> _Code:
        bits = decode.mode(at.sregs, at.regs.rflags).bits
        raw = self._read(0, at, decode.linear_rip(at.sregs, at.rip, at.regs.rflags), MAX_INSTRUCTION)
        text = disassemble(raw, at.rip, bits)[0].text if raw else "(no code there)"
        return _Code(at.rip, bits, raw, text)

    def _read(self, which: int, at: _Registers, linear: int, size: int) -> bytes:
        """A machine's memory at a linear address, as far as it is mapped and there."""
        raw = b""
        while len(raw) < size:
            address = linear + len(raw)
            physical = self._physical(at, address)
            piece = min(size - len(raw), PAGE_SIZE - address % PAGE_SIZE)
            found = b"" if physical is None else self._memory[which](physical, piece)
            if not found:
                break
            raw += found
        return raw

    def _physical(self, at: _Registers, linear: int) -> int | None:
        return paging.translate(at.sregs, linear, self._memory[0])

    def _accesses(self, code: _Code, before: _Registers) -> Iterator[tuple[int, int, bool]]:
        """The physical page, the offset in it, and whether it is written, of each memory operand that is mapped."""
        for operand in operands(code.raw, code.rip, code.bits):
            physical = self._physical(before, operand.address(before.regs, before.sregs))
            if physical is not None:
                yield physical & -PAGE_SIZE, physical % PAGE_SIZE, operand.written

    def _all_differences(self, states: Sequence[MachineState]) -> tuple[int, Values]:
        """Of the first VCPU that differs; if none does, of the memory, by the VCPU that stepped last."""
        for vcpu, (one, two) in enumerate(zip(*(state.vcpus for state in states), strict=True)):
            if vcpu == self._shut_down:
                continue
            values = _differences(self._registers(0, vcpu), self._registers(1, vcpu))
            values |= compare.others(one, two, HOST_MSRS)
            kinds = tuple(MpState.from_buffer_copy(each["mp_state"]).mp_state for each in (one, two))
            # Whether a VCPU stays in HLT is a matter of interrupts, and they are one of time.
            if kinds[0] != kinds[1] and not set(kinds) <= {MP_STATE_RUNNABLE, MP_STATE_HALTED}:
                values["mp_state"] = kinds[0], kinds[1]
            if values:
                return vcpu, values
        return self._last, self._memory_differences()

    def _memory_differences(self) -> Values:
        """Differing 64-bit words, the first few, by their address; not A and D bits of page tables."""
        found: Values = {}
        tables: frozenset[int] | None = None
        for one, two in zip(*(machine.memory.ram for machine in self._machines), strict=True):
            words = [region.pages.reshape(-1).view(np.uint64) for region in (one, two)]
            for at in np.flatnonzero(words[0] ^ words[1]):
                address, values = one.address + int(at) * 8, (int(words[0][at]), int(words[1][at]))
                if not (values[0] ^ values[1]) & ~_ACCESSED_DIRTY:
                    tables = self._tables() if tables is None else tables
                    if address & -PAGE_SIZE in tables:
                        continue
                found[f"memory[{address:#x}]"] = values
                if len(found) == WORDS:
                    return found
        return found

    def _tables(self) -> frozenset[int]:
        """The pages of all VCPUs' page tables."""
        every = (self._registers(0, vcpu).sregs for vcpu in range(len(self._machines[0].vcpus)))
        return frozenset().union(*(paging.tables(sregs, self._memory[0]) for sregs in every))


@dataclass(frozen=True, slots=True)
class _Registers:
    regs: Regs
    sregs: Sregs

    @property
    def rip(self) -> int:
        return self.regs.rip

    @property
    def cpl(self) -> int:
        return decode.cpl(self.sregs, self.regs.rflags)


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


def _differences(mine: _Registers, theirs: _Registers) -> Values:
    return compare.regs(mine.regs, theirs.regs) | compare.sregs(mine.sregs, theirs.sregs)


def _port(code: _Code, at: _Registers) -> int:
    """The port of an IN or OUT."""
    operands = code.text.partition(" ")[2].split(", ")
    named = operands[0] if code.name == "out" else operands[-1]
    return at.regs.rdx & 0xFFFF if named == "dx" else int(named, 0)


def _kinds(ended: Sequence[Exit]) -> str | None:
    """How the steps ended, unless both did as steps do."""
    kinds = [each.kind for each in ended]
    if kinds == [ExitKind.DEBUG, ExitKind.DEBUG]:
        return None
    words = ["waits" if kind is ExitKind.KICKED else kind.value for kind in kinds]
    return words[0] if words[0] == words[1] else f"{words[0]} (reference), {words[1]} (other)"
