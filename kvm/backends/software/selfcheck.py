"""A tiny guest that shows, once a process, that what can't be calibrated works: intercepts, exceptions, modes."""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING

from kvm.backends.interface import Vm
from kvm.backends.software.calibration import VERSION
from kvm.errors import BackendUnavailable
from kvm.x86.structs import Regs, Sregs2
from kvm.x86.substates import vcpu_table

if TYPE_CHECKING:
    from kvm.backends.interface import System

_ORIGIN = 0x1000
_GUEST = bytes.fromhex(
    "0f 20 c0 0c 01 0f 22 c0 24 fe 0f 22 c0"  # into protected mode and back
    "66 b9 77 02 00 00 0f 32 e6 80"  # rdmsr PAT; out 0x80, al
    "0f 0b"  # ud2
    "d9 e8 e6 81"  # the handler, here: fld1; out 0x81, al
    "f4"
)
_HANDLER = _GUEST.index(b"\x0f\x0b") + 2
_EXPECTED = [(0x80, 0x06), (0x81, 0x06)]
_LIMIT = 5.0
"""Seconds; it takes milliseconds."""
_passed = False


class _Ports:
    """Keeps what the guest says, and stops it at its last word."""

    def __init__(self, vm: Vm) -> None:
        self.vcpu = vm.create_vcpu(0)
        self.said: list[tuple[int, int]] = []

    def port_in(self, port: int, size: int) -> int:
        return 0xFF

    def port_out(self, port: int, size: int, value: int) -> None:
        self.said.append((port, value))
        if port == 0x81:
            self.vcpu.kick()

    def mmio_read(self, address: int, size: int) -> int:
        return 0xFF

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.vcpu.kick()


def self_check(system: System) -> None:
    """Run it, the first time. Raises BackendUnavailable if it doesn't do what it should."""
    global _passed
    if _passed:
        return
    rows = vcpu_table(system.caps, system.msr_list()).by_name
    vm = system.create_vm()
    memory = mmap.mmap(-1, 1 << 16)
    memory[_ORIGIN : _ORIGIN + len(_GUEST)] = _GUEST
    memory[6 * 4 : 6 * 4 + 4] = (_ORIGIN + _HANDLER).to_bytes(4, "little")
    vm.set_memory(0, 0, memory)
    bus = _Ports(vm)
    try:
        sregs = Sregs2.from_buffer_copy(bus.vcpu.get([rows["sregs"]])[0])
        sregs.cs.base = sregs.cs.selector = 0
        regs = Regs(rip=_ORIGIN, rsp=0x8000, rflags=2)
        bus.vcpu.put([rows["sregs"], rows["regs"]], [bytes(sregs), bytes(regs)])
        watchdog = threading.Timer(_LIMIT, bus.vcpu.kick)
        watchdog.start()
        ended = bus.vcpu.run(bus)
        watchdog.cancel()
        watchdog.join()
    finally:
        bus.vcpu.close()
        vm.close()
        memory.close()
    if bus.said != _EXPECTED:
        raise BackendUnavailable(
            f"the software backend's self-check failed: its guest said {bus.said} for {_EXPECTED}, then: "
            f"{ended.kind.value} {ended.detail}. "
            f"Install the Unicorn that it knows: pip install --force-reinstall unicorn=={VERSION}"
        )
    _passed = True
