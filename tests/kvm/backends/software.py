"""A bare VM on the software backend for its own tests: GNU as source in, one of three modes, no machine around it."""

from __future__ import annotations

import functools
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from kvm.backends.interface import Exit
from kvm.backends.software.system import SoftwareSystem
from kvm.backends.software.vcpu import SoftwareVcpu
from kvm.host_memory import anonymous
from kvm.x86.structs import (
    MP_STATE_RUNNABLE,
    GuestDebug,
    MpState,
    Regs,
    Segment,
    Sregs2,
    VcpuEvents,
    pack_cpuid,
    pack_msrs,
    unpack_msrs,
)
from kvm.x86.substates import machine_table, vcpu_table
from tests.guests.assemble import BinutilsMissing, assemble

ORIGIN, HANDLER, STUBS, IDT, GDT, TSS = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x5800
STACK, RSP0, IST1, USER_STACK = 0x8000, 0xA000, 0xB000, 0xC000
TABLES = 0x10000
MEMORY = 2 << 20
"""Bytes of RAM from address 0."""
LIMIT = 30.0
"""Seconds after which a guest hangs; none takes more than a few."""

CODE64, DATA, USER32, USER_DATA, USER64, TASK, CODE32, DATA32 = 8, 0x10, 0x1B, 0x23, 0x2B, 0x30, 0x40, 0x48
_WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17)
_STOP = bytes.fromhex("e6 f4 eb fe")
"""out %al, $0xf4; jmp . — the handler of tests that bring none of their own."""


@functools.cache
def code(source: str) -> bytes:
    """The bytes of this source, for ORIGIN; ``.org HANDLER`` begins the handler of all vectors."""
    symbols = f".set HANDLER, {HANDLER - ORIGIN}\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.S"
        path.write_text(f"{symbols}.globl _start\n_start:\n{source}\n")
        try:
            return assemble(path, base=ORIGIN, format="bin")
        except BinutilsMissing as missing:
            pytest.skip(str(missing))


class Bus:
    """Writes down what it serves. A write to port 0xf4 stops the guest."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.seen: list[tuple[str, int, int, int]] = []
        self.reads: dict[int, int] = {}
        self.hooks: dict[int, Callable[[int], None]] = {0xF4: lambda value: stop()}

    def port_in(self, port: int, size: int) -> int:
        return self._read("in", port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        if port in self.hooks:
            self.hooks[port](value)
        else:
            self.seen.append(("out", port, size, value))

    def mmio_read(self, address: int, size: int) -> int:
        return self._read("read", address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.seen.append(("write", address, size, value))

    def _read(self, kind: str, at: int, size: int) -> int:
        value = self.reads.get(at, (1 << 8 * size) - 1)
        self.seen.append((kind, at, size, value))
        return value

    def values(self, port: int) -> list[int]:
        """What the guest wrote to this port."""
        return [value for kind, at, _, value in self.seen if kind == "out" and at == port]


def _descriptor(base: int, limit: int, access: int, flags: int) -> int:
    return (
        limit & 0xFFFF | (base & 0xFFFFFF) << 16 | access << 40 | (limit >> 16) << 48 | flags << 52 | base >> 24 << 56
    )


_GDT = (
    0,
    _descriptor(0, 0xFFFFF, 0x9B, 0xA),  # 0x08 kernel code, 64 bits
    _descriptor(0, 0xFFFFF, 0x93, 0xC),  # 0x10 kernel data
    _descriptor(0, 0xFFFFF, 0xFB, 0xC),  # 0x18 user code, 32 bits
    _descriptor(0, 0xFFFFF, 0xF3, 0xC),  # 0x20 user data
    _descriptor(0, 0xFFFFF, 0xFB, 0xA),  # 0x28 user code, 64 bits
    _descriptor(TSS, 0x67, 0x8B, 0),  # 0x30 task, 16 bytes
    0,
    _descriptor(0, 0xFFFFF, 0x9B, 0xC),  # 0x40 kernel code, 32 bits
    _descriptor(0, 0xFFFFF, 0x93, 0xC),  # 0x48 kernel data, 32 bits
    0,
)


def _segment(selector: int, **more: int) -> Segment:
    return Segment(limit=0xFFFFFFFF, selector=selector, present=1, s=1, g=1, dpl=selector & 3, **more)


class Guest:
    """``vcpus`` VCPUs; the first is about to execute ``source`` at ORIGIN in "real", "protected" or "long" mode.

    In protected and long mode every vector has a gate (DPL 3), whose stub pushes an error code where there is none,
    and the vector, and goes to HANDLER. Long mode maps the first GiB 1:1, open to CPL 3.
    """

    def __init__(
        self, source: str = "nop", mode: str = "real", *, vcpus: int = 1, slice: int = 1000, irqchip: bool = True
    ) -> None:
        self.system = SoftwareSystem(slice_instructions=slice)
        self.vm = self.system.create_vm()
        if irqchip:
            self.vm.create_irqchip()
        self.memory = anonymous(MEMORY)
        self.vm.set_memory(0, 0, self.memory)
        self.table = vcpu_table(self.system.caps, self.system.msr_list())
        self.machine_rows = machine_table(self.system.caps)
        self.vcpus: list[SoftwareVcpu] = [self.vm.create_vcpu(index) for index in range(vcpus)]  # type: ignore[misc]
        self.bus = Bus(self.stop)
        self.write(HANDLER, _STOP)
        self.write(ORIGIN, code(source))
        self.mode = mode
        for vcpu in self.vcpus:
            self.put(vcpu.index, cpuid=pack_cpuid(self.system.cpuid()))
        self.enter(0)

    # Set-up

    def enter(self, vcpu: int) -> None:
        """Make this VCPU begin ``source`` in the guest's mode."""
        sregs = self.sregs(vcpu)
        {"real": self._real, "protected": self._protected, "long": self._long}[self.mode](sregs)
        self.put(
            vcpu,
            sregs=sregs,
            regs=Regs(rip=ORIGIN, rsp=STACK - vcpu * 0x400, rflags=2),
            mp_state=MpState(MP_STATE_RUNNABLE),
        )

    def _real(self, sregs: Sregs2) -> None:
        sregs.cs.selector = sregs.cs.base = 0

    def _tables(self, sregs: Sregs2, wide: bool) -> None:
        self.write(GDT, struct.pack(f"<{len(_GDT)}Q", *_GDT))
        for vector in range(256):
            stub = STUBS + vector * 16
            body = b"" if vector in _WITH_ERROR_CODE else b"\x6a\x00"
            body += b"\x68" + struct.pack("<I", vector)
            jump = struct.pack("<i", HANDLER - (stub + len(body) + 5))
            self.write(stub, body + b"\xe9" + jump)
            self.gate(vector, wide=wide)
        sregs.gdt.base, sregs.gdt.limit = GDT, len(_GDT) * 8 - 1
        sregs.idt.base, sregs.idt.limit = IDT, 256 * (16 if wide else 8) - 1
        sregs.tr = Segment(base=TSS, limit=0x67, selector=TASK, type=0xB, present=1)
        if wide:
            self.write(TSS, struct.pack("<I3Q", 0, RSP0, 0, 0))
            self.write(TSS + 36, struct.pack("<Q", IST1))
        else:
            self.write(TSS + 4, struct.pack("<II", RSP0, DATA32))
        self.write(TSS + 102, struct.pack("<H", 0x68))  # no I/O bitmap: it would begin past the limit

    def gate(self, vector: int, *, wide: bool = True, stack: int = 0, kind: int = 0x8E, selector: int = 0) -> None:
        """An interrupt gate to the vector's stub, DPL 3 unless ``kind`` says other."""
        stub, access = STUBS + vector * 16, kind | (0x60 if kind == 0x8E else 0)
        selector = selector or (CODE64 if wide else CODE32)
        low = struct.pack("<HHBBH", stub & 0xFFFF, selector, stack, access, stub >> 16)
        self.write(IDT + vector * (16 if wide else 8), low + bytes(8 if wide else 0))

    def _protected(self, sregs: Sregs2) -> None:
        self._tables(sregs, wide=False)
        sregs.cs = _segment(CODE32, type=0xB, db=1)
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = _segment(DATA32, type=3, db=1)
        sregs.cr0 = 0x11

    def _long(self, sregs: Sregs2) -> None:
        self._tables(sregs, wide=True)
        self.write(TABLES, struct.pack("<Q", TABLES + 0x1007))
        self.write(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2007))
        self.write(TABLES + 0x2000, struct.pack("<512Q", *(page << 21 | 0x87 for page in range(512))))
        sregs.cs = _segment(CODE64, type=0xB, l=1)
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = _segment(DATA, type=3, db=1)
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8001_0011, TABLES, 0x620, 0xD01

    # State

    def get(self, vcpu: int, name: str) -> bytes:
        return self.vcpus[vcpu].get([self.table.by_name[name]])[0]

    def put(self, vcpu: int, **rows: object) -> None:
        self.vcpus[vcpu].put([self.table.by_name[name] for name in rows], [bytes(value) for value in rows.values()])  # type: ignore[call-overload]

    def regs(self, vcpu: int = 0) -> Regs:
        return Regs.from_buffer_copy(self.get(vcpu, "regs"))

    def sregs(self, vcpu: int = 0) -> Sregs2:
        return Sregs2.from_buffer_copy(self.get(vcpu, "sregs"))

    def events(self, vcpu: int = 0) -> VcpuEvents:
        return VcpuEvents.from_buffer_copy(self.get(vcpu, "events"))

    def mp_state(self, vcpu: int = 0) -> int:
        return MpState.from_buffer_copy(self.get(vcpu, "mp_state")).mp_state

    def msrs(self, vcpu: int = 0) -> dict[int, int]:
        return unpack_msrs(self.get(vcpu, "msrs"))

    def put_msrs(self, values: dict[int, int], vcpu: int = 0) -> None:
        self.put(vcpu, msrs=pack_msrs(values))

    def debug(self, control: int, *addresses: int, vcpu: int = 0) -> None:
        """KVM_SET_GUEST_DEBUG with breakpoints at these linear addresses."""
        new = GuestDebug(control=control)
        for number, address in enumerate(addresses):
            new.debugreg[number] = address
            new.debugreg[7] |= 2 << 2 * number
        self.put(vcpu, guest_debug=new)

    def read(self, address: int, size: int) -> bytes:
        return self.memory[address : address + size]

    def write(self, address: int, data: bytes) -> None:
        self.memory[address : address + len(data)] = data
        self.vm.memory_changed()

    def u32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little")

    def u64(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def frame(self, count: int, size: int = 8) -> list[int]:
        """The topmost values of the stack: in a handler the vector, the error code, then what the CPU pushed."""
        raw = self.read(self.regs().rsp, count * size)
        return [int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw), size)]

    # Running

    def stop(self) -> None:
        """Kick every VCPU."""
        for vcpu in self.vcpus:
            vcpu.kick()

    def run(self, vcpus: Iterable[int] | None = None) -> list[Exit]:
        """Run these VCPUs (all), each on its own thread, until the guest stops itself; how each came back."""
        chosen = [self.vcpus[index] for index in vcpus] if vcpus is not None else self.vcpus
        exits: dict[int, Exit] = {}

        def work(vcpu: SoftwareVcpu) -> None:
            exits[vcpu.index] = vcpu.run(self.bus)

        for vcpu in chosen:
            vcpu.clear_kick()
        threads = [threading.Thread(target=work, args=(vcpu,), daemon=True) for vcpu in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
            if thread.is_alive():
                where = [hex(self.vm.vcpus[vcpu.index].cpu.rip) for vcpu in chosen]  # type: ignore[attr-defined]
                self.stop()
                pytest.fail(f"the guest hangs at {where}; it said {self.bus.seen[-8:]}")
        return [exits[vcpu.index] for vcpu in chosen]

    def step(self, vcpu: int = 0) -> Exit:
        """Run one VCPU, which is to come back by itself."""
        self.vcpus[vcpu].clear_kick()
        return self.vcpus[vcpu].run(self.bus)

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.memory.close()
