"""One VM: its memory, its VCPUs, and the devices that KVM has in the kernel."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE, Bus, VcpuFd
from kvm.backends.software.ioapic import PINS, Ioapic
from kvm.backends.software.lapic import Lapic, send
from kvm.backends.software.memory import Slots
from kvm.backends.software.pic import PicPair
from kvm.backends.software.pit import Pit
from kvm.backends.software.scheduler import Scheduler
from kvm.backends.software.state import Invalid
from kvm.backends.software.vcpu import SoftwareVcpu
from kvm.errors import KvmError
from kvm.x86.structs import ClockData, Irqchip
from kvm.x86.substates import Substate

if TYPE_CHECKING:
    from kvm.backends.software.system import SoftwareSystem

_PIC_LINES = 16
_IOAPIC_CHIP = 2


class SoftwareVm:
    """Implements ``kvm.backends.interface.Vm``, and what the devices need of each other (``lapic.Surroundings``)."""

    exact_log = False

    def __init__(self, system: SoftwareSystem, slice_instructions: int) -> None:
        self.system = system
        self.slots = Slots()
        self.scheduler = Scheduler(slice_instructions)
        self.vcpus = self.scheduler.vcpus
        self.has_irqchip = False
        self.ioapic = Ioapic(self._message)
        self._pics = PicPair(self._pic_changed)
        self._pit = Pit(self.now, self._pit_pulse, self.timers_changed)
        self._jumps = 0
        """By how much setting the clock has moved virtual time, in all."""
        self.ports: frozenset[int] = frozenset()
        """Those that devices of the VM itself answer."""

    # The interface

    def create_irqchip(self) -> None:
        for ioctl in ("KVM_CREATE_IRQCHIP", "KVM_CREATE_PIT2"):
            self._note(ioctl)
        if self.vcpus or self.has_irqchip:
            raise KvmError("KVM_CREATE_IRQCHIP", errno.EINVAL, detail="once, and before the first VCPU")
        self.has_irqchip = True
        self.ports = frozenset((*PicPair.PORTS, *Pit.PORTS))
        self.scheduler.add_timers(self._pit)

    def create_vcpu(self, index: int) -> VcpuFd:
        self._note("KVM_CREATE_VCPU", index)
        if index != len(self.vcpus) or index >= self.system.caps["KVM_CAP_MAX_VCPUS"]:
            raise KvmError("KVM_CREATE_VCPU", errno.EINVAL, vcpu=index, detail="VCPUs are numbered from 0, up to 254")
        vcpu = SoftwareVcpu(self, index)
        with self.scheduler.attention():
            self.vcpus.append(vcpu)
            self.scheduler.add_timers(vcpu.lapic)
        return vcpu

    def set_memory(
        self, slot: int, address: int, memory: mmap.mmap, *, readonly: bool = False, log_dirty: bool = False
    ) -> None:
        self._note("KVM_SET_USER_MEMORY_REGION")
        with self.scheduler.attention():
            if self.slots.set(slot, address, memory, readonly=readonly, log_dirty=log_dirty):
                for vcpu in self.vcpus:
                    vcpu.engine.map(self.slots.layout())

    def dirty_pages(self, slot: int) -> NDArray[np.int64]:
        self._note("KVM_GET_DIRTY_LOG")
        with self.scheduler.attention():
            return self.slots.dirty_pages(slot)

    def copy_pages(
        self,
        to: NDArray[np.uint8],
        to_pages: NDArray[np.int64],
        source: NDArray[np.uint8],
        source_pages: NDArray[np.int64],
    ) -> None:
        to.reshape(-1, PAGE_SIZE)[to_pages] = source.reshape(-1, PAGE_SIZE)[source_pages]
        self.slots.filled(int(to.ctypes.data), to_pages)

    def go_back(self, slot: int, marks: Collection[int], source: NDArray[np.uint8], places: NDArray[np.int64]) -> int:
        self._note("KVM_GET_DIRTY_LOG")
        with self.scheduler.attention():
            count = self.slots.go_back(slot, source, places)
        self.memory_changed()
        return count

    def memory_changed(self) -> None:
        with self.scheduler.attention():
            for vcpu in self.vcpus:
                vcpu.engine.flush_code()

    def irq_line(self, gsi: int, level: bool) -> None:
        self._note("KVM_IRQ_LINE")
        if not self.has_irqchip or not 0 <= gsi < PINS:
            raise KvmError("KVM_IRQ_LINE", errno.ENXIO, detail=f"GSI {gsi}")
        with self.scheduler.attention():
            self._set_line(gsi, level)

    def nmi(self, vcpu: VcpuFd) -> None:
        self._note("KVM_NMI", vcpu.index)
        with self.scheduler.attention():
            self.raise_nmi(vcpu.index)

    def coalesce(self, port: int, size: int) -> bool:
        return False  # an access costs a microsecond here: nothing to gain

    def drain(self, bus: Bus) -> None:
        pass

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        out: list[bytes] = []
        with self.scheduler.attention():
            for row in rows:
                assert row.get is not None, row.name
                function = {
                    "KVM_GET_IRQCHIP": self._get_irqchip,
                    "KVM_GET_PIT2": lambda template: self._pit.save(),
                    "KVM_GET_CLOCK": lambda template: bytes(ClockData(clock=self.now())),
                }[row.get]
                out.append(self.system.move(row, row.get, len(out), None, function, row.template))
        return out

    def put(self, rows: Sequence[Substate], raws: Sequence[bytes]) -> None:
        with self.scheduler.attention():
            for moved, (row, raw) in enumerate(zip(rows, raws, strict=True)):
                assert row.put is not None, row.name
                function = {
                    "KVM_SET_IRQCHIP": self._put_irqchip,
                    "KVM_SET_PIT2": self._pit.load,
                    "KVM_SET_CLOCK": self._put_clock,
                }[row.put]
                self.system.move(row, row.put, moved, None, function, raw)

    def close(self) -> None:
        self.slots.release()

    def _note(self, ioctl: str, vcpu: int | None = None) -> None:
        fault = self.system.note(ioctl, "", vcpu)
        if fault:
            raise KvmError(ioctl, fault, vcpu=vcpu)

    def _get_irqchip(self, template: bytes) -> bytes:
        chip = Irqchip.from_buffer_copy(template)
        raw = self.ioapic.save() if chip.chip_id == _IOAPIC_CHIP else self._pics.save(chip.chip_id)
        return template[:8] + raw.ljust(512, b"\0")

    def _put_irqchip(self, raw: bytes) -> None:
        chip = Irqchip.from_buffer_copy(raw).chip_id
        if chip > _IOAPIC_CHIP:
            raise Invalid(f"chip {chip}")
        if chip == _IOAPIC_CHIP:
            self.ioapic.load(raw[8 : 8 + 216])
        else:
            self._pics.load(chip, raw[8 : 8 + 16])

    def _put_clock(self, raw: bytes) -> None:
        """Set virtual time. The PIT counts in it; local APICs and TSCs go on from where they are."""
        clock = ClockData.from_buffer_copy(raw)
        if clock.flags:
            raise Invalid(f"flags={clock.flags:#x}")
        jump = clock.clock - self.now()
        self.scheduler.set_time(clock.clock)
        self._jumps += jump
        for vcpu in self.vcpus:
            vcpu.lapic.shift(jump)
            vcpu.forget_slot()
        self._pit.schedule()

    # The devices inside

    def port_in(self, port: int, size: int) -> int:
        """A read of one of ``ports``; a wider one reads on in the ports that follow."""
        value = 0
        for at in range(size):
            device = self._device(port + at)
            value |= (0xFF if device is None else device.read(port + at)) << 8 * at
        return value

    def port_out(self, port: int, size: int, value: int) -> None:
        for at in range(size):
            device = self._device(port + at)
            if device is not None:
                device.write(port + at, value >> 8 * at & 0xFF)

    def _device(self, port: int) -> PicPair | Pit | None:
        if port in PicPair.PORTS:
            return self._pics
        return self._pit if port in Pit.PORTS else None

    @property
    def pic_output(self) -> bool:
        """The 8259s ask for an interrupt."""
        return self._pics.output

    def acknowledge_pic(self) -> int:
        return self._pics.acknowledge()

    def _set_line(self, gsi: int, level: bool) -> None:
        if gsi < _PIC_LINES:
            self._pics.set_line(gsi, level)
        self.ioapic.set_line(gsi, level)

    def _pit_pulse(self) -> None:
        self._set_line(0, True)
        self._set_line(0, False)

    def _pic_changed(self) -> None:
        for vcpu in self.vcpus:
            if vcpu.lapic.takes_pic():
                self.interrupt_pending(vcpu.index)

    def _message(self, command: int, destination: int) -> None:
        if command >> 8 & 7 == 7:  # ExtINT: the 8259s', through an I/O APIC's pin
            return
        send(self.apics(), command, destination)

    # What local APICs ask for

    def now(self) -> int:
        return self.scheduler.now()

    def passed(self) -> int:
        """Virtual time that has passed since the VM was made, ns."""
        return self.scheduler.now() - self._jumps

    def timers_changed(self) -> None:
        self.scheduler.timers_changed()

    def apics(self) -> list[Lapic]:
        return [vcpu.lapic for vcpu in self.vcpus]

    def end_of_interrupt(self, vector: int) -> None:
        self.ioapic.end_of_interrupt(vector)

    def interrupt_pending(self, index: int) -> None:
        if index < len(self.vcpus):
            self.vcpus[index].interrupt_pending()
            self.scheduler.cut()

    def raise_nmi(self, index: int) -> None:
        self.vcpus[index].raise_nmi()
        self.scheduler.cut()
