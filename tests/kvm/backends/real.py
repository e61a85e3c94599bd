"""A bare VM on /dev/kvm for the backend's own tests: a few bytes of real-mode code, no machine around it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from kvm.backends.interface import Exit
from kvm.backends.kernel.system import KernelSystem
from kvm.backends.kernel.vcpu import KernelVcpuFd
from kvm.host_memory import anonymous
from kvm.x86.structs import Regs, Sregs, Sregs2, pack_cpuid
from kvm.x86.substates import vcpu_table

ORIGIN = 0x1000
MEMORY = 0x10000
"""Bytes of RAM from address 0. All above is MMIO."""
LIMIT = 20.0
"""Seconds after which something is stuck; nothing here takes more than milliseconds."""

STOP = bytes.fromhex("e6 f4 eb fe")
"""out 0xf4, al; jmp $: the Recorder kicks the VCPU on that port."""
DS_MMIO = bytes.fromhex("b8 00 a0 8e d8")
"""mov ax, 0xa000; mov ds, ax: DS on an address that has no memory."""


def until(condition: Callable[[], bool]) -> None:
    """Look again until it holds; fails after LIMIT."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.0005)


class Recorder:
    """A bus that writes down what it served. A write to port 0xf4 kicks ``vcpu``."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []
        self.reads: dict[int, int] = {}
        self.vcpu: KernelVcpuFd | None = None
        self.on_read: Callable[[], None] = lambda: None

    def port_in(self, port: int, size: int) -> int:
        return self._read("in", port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        if port == 0xF4:
            assert self.vcpu
            self.vcpu.kick()
        else:
            self.seen.append(("out", port, size, value))

    def mmio_read(self, address: int, size: int) -> int:
        return self._read("read", address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.seen.append(("write", address, size, value))

    def _read(self, kind: str, at: int, size: int) -> int:
        self.on_read()
        value = self.reads.get(at, -1)
        self.seen.append((kind, at, size, value))
        return value


class Guest:
    """A VM with ``vcpus`` VCPUs, the first about to execute ``code`` at ORIGIN in real mode with flat segments."""

    def __init__(self, system: KernelSystem, code: bytes, *, vcpus: int = 1, coalesce: tuple[int, ...] = ()) -> None:
        self.system = system
        self.vm = system.create_vm()
        self.vm.create_irqchip()
        self.memory = anonymous(MEMORY)
        self.memory[ORIGIN : ORIGIN + len(code)] = code
        self.vm.set_memory(0, 0, self.memory)
        for port in coalesce:
            assert self.vm.coalesce(port, 1)
        self.vcpus = [self.vm.create_vcpu(index) for index in range(vcpus)]
        self.vcpu = self.vcpus[0]
        self.table = vcpu_table(system.caps, system.msr_list())
        self.bus = Recorder()
        self.bus.vcpu = self.vcpu
        cpuid = pack_cpuid(system.cpuid())
        for vcpu in self.vcpus:
            vcpu.put([self.table.by_name["cpuid"]], [cpuid])
        sregs = self.sregs()
        for name in ("cs", "ds", "es", "ss"):
            segment = getattr(sregs, name)
            segment.base = segment.selector = 0
        self.put("sregs", bytes(sregs))
        self.put("regs", bytes(Regs(rip=ORIGIN, rflags=2, rsp=0x8000)))

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.memory.close()

    def get(self, name: str) -> bytes:
        return self.vcpu.get([self.table.by_name[name]])[0]

    def put(self, name: str, raw: bytes) -> None:
        self.vcpu.put([self.table.by_name[name]], [raw])

    def regs(self) -> Regs:
        return Regs.from_buffer_copy(self.get("regs"))

    def sregs(self) -> Sregs | Sregs2:
        struct = self.table.by_name["sregs"].struct
        assert struct is Sregs or struct is Sregs2
        return struct.from_buffer_copy(self.get("sregs"))

    def run(self) -> Exit:
        """On this thread, as far as the guest goes by itself."""
        self.vcpu.clear_kick()
        return self.vcpu.run(self.bus)


class Running:
    """A VCPU that runs on a thread of its own; leaving the block kicks it."""

    def __init__(self, guest: Guest, vcpu: KernelVcpuFd | None = None) -> None:
        self.guest = guest
        self.vcpu = vcpu or guest.vcpu
        self._ended: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.vcpu.bind()
        self._ended.put(self.vcpu.run(self.guest.bus))

    def __enter__(self) -> Running:
        self.vcpu.clear_kick()
        self._thread.start()
        return self

    def ended(self) -> Exit:
        return self._ended.get(timeout=LIMIT)

    def __exit__(self, *_: object) -> None:
        self.vcpu.kick()
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the VCPU didn't hear its kick"
        self.vcpu.bind()
