"""The interface that every backend implements, at the level of KVM's own file descriptors.

System → Vm → VcpuFd, as /dev/kvm gives them out. State moves only as raw KVM structs in batches of table rows.
Features are asked by capability, never by a backend's name.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvm.errors import SubstateError
from kvm.x86.structs import CpuidEntry
from kvm.x86.substates import Substate

PAGE_SIZE = 4096

T = TypeVar("T", covariant=True)


class Bus(Protocol):
    """The guest's port and MMIO space, called on VCPU threads. ``size`` is 1, 2, 4 (MMIO also 8) bytes.

    Never raises and never blocks on a VCPU; what nobody claims reads as ones.
    """

    def port_in(self, port: int, size: int) -> int: ...
    def port_out(self, port: int, size: int, value: int) -> None: ...
    def mmio_read(self, address: int, size: int) -> int: ...
    def mmio_write(self, address: int, size: int, value: int) -> None: ...


class ExitKind(Enum):
    """Why ``run`` came back to the machine."""

    KICKED = "kicked"
    """Somebody wants the thread's attention; any pending I/O has been completed."""
    DEBUG = "debug"
    """Single step done, or a breakpoint."""
    SHUTDOWN = "shutdown"
    """A triple fault."""
    INTERNAL_ERROR = "internal error"
    """KVM can't go on, mostly an instruction that it can't emulate; RIP stands on it."""
    FAIL_ENTRY = "failed entry"
    """The processor refused the guest's state."""
    SYSTEM_EVENT = "system event"
    """The guest asked for a shutdown or reset through a paravirtual interface."""
    UNKNOWN = "unknown exit"


@dataclass(frozen=True, slots=True)
class Exit:
    """One return of ``run``. ``code`` is the suberror, hardware reason, DR6 or event type, by kind."""

    kind: ExitKind
    code: int = 0
    insn: bytes = b""
    """The instruction bytes that KVM stopped at, where it tells them (INTERNAL_ERROR, suberror 1)."""
    detail: str = ""
    """One line for a person."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a VCPU's registers were at one moment, published by its own thread; never synchronises anything.

    ``time_ns`` is CLOCK_MONOTONIC. The bytes are struct kvm_regs, kvm_sregs (not sregs2) and kvm_vcpu_events.
    ``sequence`` counts the VCPU's samples from 1.
    """

    sequence: int
    time_ns: int
    regs: bytes
    sregs: bytes
    events: bytes


@dataclass(frozen=True, slots=True)
class IoctlTrace:
    """One ioctl as a backend made it, for those who ask for a trace. ``substate`` is empty for others than get/put."""

    ioctl: str
    substate: str
    vcpu: int | None
    thread: int
    """threading.get_ident() of the thread that made it."""


class Awaited(Protocol):
    """What one thread can wait for."""

    def wait(self, timeout: float | None = None) -> bool:
        """Until it's there, True, or so many seconds are over, False."""


class Bell(Awaited, Protocol):
    """Wakes the one thread that waits for it. What was rung before the wait counts; twice may count as once."""

    def ring(self) -> None:
        """Any thread; never blocks."""

    def catch_up(self) -> None:
        """Make what was handed over so far (``Batch.hand``): the thread that waits here, before it does what it was
        asked for later. Who handed it over may have given up since."""


class Batch(Protocol[T]):
    """Gets or puts on one VCPU that are ready to be made, once.

    ``began_ns`` (CLOCK_MONOTONIC) and ``microseconds``: when they were made, and how long that took. These and the
    outcome are good until the next gets, or puts, of the same rows are asked for.
    """

    @property
    def began_ns(self) -> int: ...

    @property
    def microseconds(self) -> float: ...

    def make(self) -> None:
        """Make them: the VCPU's own thread."""

    def hand(self, bell: Bell) -> Awaited | None:
        """Have the thread that waits at this bell make them where it stands, without the interpreter's turn to it; what
        can be waited for then. None where that can't be had. Keep the batch until then. Any thread; never blocks."""

    def outcome(self) -> T:
        """What came of it, when it's made. Raises SubstateError. Any thread."""


class VcpuFd(Protocol):
    """One VCPU. All but ``bell``, ``getting``, ``putting``, ``kick``, ``request_sample``, ``sample``, ``waiting``
    belong to the bound thread."""

    @property
    def index(self) -> int: ...

    def bell(self) -> Bell:
        """A new one, to hand work over by. Any thread."""

    def bind(self) -> None:
        """Make the calling thread the owner; calls from any other thread raise AssertionError from now on."""

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        """Read these substates in this order, one batch. Raises SubstateError."""

    def put(self, rows: Sequence[Substate], raws: Sequence[bytes]) -> tuple[SubstateError, ...]:
        """Write these substates in this order, one batch. Raises SubstateError; its ``moved`` counts those written.

        A ``tolerated`` row's failure doesn't stop the batch: it's returned, or stands in the error's ``tolerated``.
        """

    def getting(self, rows: tuple[Substate, ...]) -> Batch[list[bytes]]:
        """A ``get`` to be made by the VCPU's thread. Any thread, one at a time."""

    def putting(self, rows: tuple[Substate, ...], raws: Sequence[bytes]) -> Batch[tuple[SubstateError, ...]]:
        """A ``put`` to be made by the VCPU's thread. Any thread, one at a time.

        Raises SubstateError for a struct of a wrong size.
        """

    def run(self, bus: Bus) -> Exit:
        """Run the guest, serving port I/O and MMIO through ``bus``, until the machine must know of something."""

    def kvmclock_ctrl(self) -> None:
        """Before the run that follows a pause: tell a guest with kvmclock that it was stopped, so that its watchdog
        doesn't take the time for a lockup (KVM_KVMCLOCK_CTRL). Nothing where there is no kvmclock. Raises KvmError.
        """

    def kick(self) -> None:
        """Make ``run`` return KICKED soon, or at once if it isn't entered yet. Any thread; never blocks."""

    def clear_kick(self) -> None:
        """Forget kicks made so far. The owner calls it *before* it looks at its mailbox."""

    def request_sample(self) -> None:
        """Ask the running VCPU to publish a sample soon, without leaving ``run``. Any thread; never blocks."""

    def sample(self) -> Sample | None:
        """The newest sample that the running VCPU has published (on request, and each time ``run`` returns)."""

    def waiting(self) -> bool | None:
        """Is the VCPU, inside ``run``, blocked in HLT or wait-for-SIPI? None where that isn't known. Any thread."""

    def close(self) -> None: ...


class Vm(Protocol):
    """One virtual machine."""

    exact_log: bool
    """Does ``dirty_pages`` tell of every write, while the guest runs too? Or of what differs from the last call's."""

    def create_irqchip(self) -> None:
        """The 8259 pair, the I/O APIC, the PIT (with port 0x61) and a local APIC for every VCPU; before the VCPUs."""

    def create_vcpu(self, index: int) -> VcpuFd: ...

    def set_memory(
        self, slot: int, address: int, memory: mmap.mmap, *, readonly: bool = False, log_dirty: bool = False
    ) -> None:
        """Put host memory, a private mapping, at a guest-physical address (both page-aligned), or change that slot."""

    def dirty_pages(self, slot: int) -> NDArray[np.int64]:
        """The slot's page numbers (ascending, from 0) that the guest wrote since the last call; forgets them."""

    def copy_pages(
        self,
        to: NDArray[np.uint8],
        to_pages: NDArray[np.int64],
        source: NDArray[np.uint8],
        source_pages: NDArray[np.int64],
    ) -> None:
        """``to[to_pages] = source[source_pages]`` for arrays of 4096-byte pages, as fast as this backend can."""

    def go_back(self, slot: int, marks: Collection[int], source: NDArray[np.uint8], places: NDArray[np.int64]) -> int:
        """Take the slot's dirty pages, as ``dirty_pages`` does, and give them, and those that ``marks`` numbers, what
        they are to hold: ``source[places[page]]``. How many that were. All VCPUs stopped."""

    def memory_changed(self) -> None:
        """The host has written guest memory: drop what was derived from it (translated code). All VCPUs stopped."""

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set an interrupt line of the 8259s and the I/O APIC. Any thread."""

    def nmi(self, vcpu: VcpuFd) -> None:
        """Queue an NMI; on that VCPU's thread."""

    def coalesce(self, port: int, size: int) -> bool:
        """Let writes to this port gather in a ring without an exit each; False where that isn't possible."""

    def drain(self, bus: Bus) -> None:
        """Hand the gathered writes to the bus, in order. Any thread, one at a time; ``run`` does it by itself."""

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        """Read machine substates (irqchips, PIT, clock). Raises SubstateError."""

    def put(self, rows: Sequence[Substate], raws: Sequence[bytes]) -> None:
        """Write machine substates. Raises SubstateError."""

    def close(self) -> None:
        """Free everything; the VCPUs must be closed. Guest memory stays the caller's."""


class System(Protocol):
    """What /dev/kvm itself answers."""

    trace: list[IoctlTrace] | None
    """Set to a list, every ioctl from then on is appended to it."""

    @property
    def name(self) -> str:
        """For a person to read; no code asks it."""

    @property
    def caps(self) -> Mapping[str, int]:
        """Capability names (``KVM_CAP_…``) to their values, 0 where lacking."""

    def msr_list(self) -> tuple[int, ...]:
        """The MSRs that can be read and put back, of those that KVM_GET_MSR_INDEX_LIST names. Raises KvmError."""

    def cpuid(self) -> list[CpuidEntry]:
        """What this backend can offer to guests, its own broken features already masked."""

    def create_vm(self) -> Vm: ...

    def close(self) -> None: ...
