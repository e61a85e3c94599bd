"""The 8259 pair, as QEMU and KVM model it (struct kvm_pic_state is each one's state)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_U8 = ctypes.c_uint8


class PicState(ctypes.LittleEndianStructure):
    """``struct kvm_pic_state``, 16 bytes."""

    _fields_ = [
        (name, _U8)
        for name in (
            "last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll", "special_mask",
            "init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode", "init4", "elcr", "elcr_mask",
        )
    ]  # fmt: skip
    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int


_CASCADE = 2
_ELCR_MASKS = (0xF8, 0xDE)


class _Pic:
    def __init__(self, elcr_mask: int, master: bool) -> None:
        self.state = PicState(elcr_mask=elcr_mask)
        self.master = master

    def set_line(self, irq: int, level: bool) -> None:
        state, bit = self.state, 1 << irq
        if state.elcr & bit:
            state.irr = state.irr | bit if level else state.irr & ~bit
            state.last_irr = state.last_irr | bit if level else state.last_irr & ~bit
        elif level:
            if not state.last_irr & bit:
                state.irr |= bit
            state.last_irr |= bit
        else:
            state.last_irr &= ~bit

    def _priority(self, mask: int) -> int:
        for priority in range(8):
            if mask >> (priority + self.state.priority_add & 7) & 1:
                return priority
        return 8

    def request(self) -> int | None:
        """The line that the chip asks to have served, if any."""
        state = self.state
        priority = self._priority(state.irr & ~state.imr)
        served = state.isr
        if state.special_mask:
            served &= ~state.imr
        if state.special_fully_nested_mode and self.master:
            served &= ~(1 << _CASCADE)
        if priority == 8 or priority >= self._priority(served):
            return None
        return priority + state.priority_add & 7

    def acknowledge(self, irq: int) -> None:
        state, bit = self.state, 1 << irq
        if state.auto_eoi:
            if state.rotate_on_auto_eoi:
                state.priority_add = irq + 1 & 7
        else:
            state.isr |= bit
        if not state.elcr & bit:
            state.irr &= ~bit

    def reset(self) -> None:
        """ICW1 starts the initialisation; level-triggered requests and the ELCR stay."""
        old = self.state
        self.state = PicState(last_irr=old.last_irr & old.elcr, irr=old.irr & old.elcr, elcr=old.elcr)
        self.state.elcr_mask = old.elcr_mask

    def write(self, offset: int, value: int) -> None:
        if offset == 0:
            self._command(value)
        elif self.state.init_state == 0:
            self.state.imr = value
        else:
            self._initialise(value)

    def _command(self, value: int) -> None:
        if value & 0x10:
            self.reset()
            self.state.init_state = 1
            self.state.init4 = value & 1
        elif value & 0x08:
            state = self.state
            state.poll = value >> 2 & 1
            if value & 2:
                state.read_reg_select = value & 1
            if value & 0x40:
                state.special_mask = value >> 5 & 1
        else:
            self._end_of_interrupt(value >> 5, value & 7)

    def _end_of_interrupt(self, operation: int, level: int) -> None:
        state = self.state
        if operation in (0, 4):
            state.rotate_on_auto_eoi = operation >> 2
        elif operation in (1, 5):
            priority = self._priority(state.isr)
            if priority != 8:
                irq = priority + state.priority_add & 7
                state.isr &= ~(1 << irq)
                if operation == 5:
                    state.priority_add = irq + 1 & 7
        elif operation in (3, 7):
            state.isr &= ~(1 << level)
            if operation == 7:
                state.priority_add = level + 1 & 7
        elif operation == 6:
            state.priority_add = level + 1 & 7

    def _initialise(self, value: int) -> None:
        state = self.state
        if state.init_state == 1:
            state.irq_base = value & 0xF8
            state.init_state = 2
        elif state.init_state == 2:
            state.init_state = 3 if state.init4 else 0
        else:
            state.special_fully_nested_mode = value >> 4 & 1
            state.auto_eoi = value >> 1 & 1
            state.init_state = 0

    def read(self, offset: int) -> int:
        state = self.state
        if offset == 1:
            return state.imr
        return state.isr if state.read_reg_select else state.irr


class PicPair:
    """Ports 0x20, 0x21, 0xa0, 0xa1 and the edge/level registers 0x4d0, 0x4d1. ``changed`` hears of its output."""

    PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)

    def __init__(self, changed: Callable[[], None]) -> None:
        self._chips = tuple(_Pic(mask, index == 0) for index, mask in enumerate(_ELCR_MASKS))
        self._changed = changed
        self.output = False
        """The master's INT pin."""

    def _update(self) -> None:
        master, slave = self._chips
        if slave.request() is not None:
            master.set_line(_CASCADE, True)
            master.set_line(_CASCADE, False)
        self.output = master.request() is not None
        if self.output:
            self._changed()

    def set_line(self, irq: int, level: bool) -> None:
        """One of the 16 lines."""
        self._chips[irq >> 3].set_line(irq & 7, level)
        self._update()

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector, spurious IRQ 7 or 15 if there is none any more."""
        master, slave = self._chips
        irq = master.request()
        if irq is None:
            return master.state.irq_base + 7
        master.acknowledge(irq)
        vector = master.state.irq_base + irq
        if irq == _CASCADE:
            inner = slave.request()
            if inner is None:
                inner = 7
            else:
                slave.acknowledge(inner)
            vector = slave.state.irq_base + inner
        self._update()
        return vector

    def read(self, port: int) -> int:
        """A port read of one byte."""
        if port >= 0x4D0:
            return self._chips[port & 1].state.elcr
        chip = self._chips[port >> 7 & 1]
        if chip.state.poll:
            chip.state.poll = 0
            irq = chip.request()
            if irq is None:
                return 7
            chip.acknowledge(irq)
            self._update()
            return irq | 0x80
        return chip.read(port & 1)

    def write(self, port: int, value: int) -> None:
        """A port write of one byte."""
        if port >= 0x4D0:
            state = self._chips[port & 1].state
            state.elcr = value & state.elcr_mask
        else:
            self._chips[port >> 7 & 1].write(port & 1, value)
        self._update()

    def save(self, chip: int) -> bytes:
        """struct kvm_pic_state of the master (0) or the slave (1)."""
        return bytes(self._chips[chip].state)

    def load(self, chip: int, raw: bytes) -> None:
        self._chips[chip].state = PicState.from_buffer_copy(raw)
        self._update()
