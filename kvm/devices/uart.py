"""A 16550A UART (National Semiconductor PC16550D; the offsets, bits and priorities are its data sheet's).

Time on the line is ours to choose. A sent byte is gone at once, so the transmitter is always empty. Input waits in
an unbounded queue on the host and arrives as late as the guest can't tell: up to the FIFO's trigger level, when the
guest looks (LSR) or lets it interrupt (IER). So a guest that is slow, not set up yet or in loopback loses nothing.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable

from kvm.devices.console import Console
from kvm.devices.device import damaged, unpack

# Register offsets; 0 and 1 are the divisor latch while LCR has DLAB set.
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = range(3, 8)

IER_RX, IER_THRE, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_RX, IIR_LINE, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 0x01, 0x02
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_READY, LSR_OVERRUN, LSR_THRE, LSR_IDLE = 0x01, 0x02, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80

FIFO_SIZE = 16
_TRIGGERS = (1, 4, 8, 14)
_PEER = MSR_DCD | MSR_DSR | MSR_CTS
"""The other end is always there and always ready."""
_LOOPED = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))

_STATE = struct.Struct("<12B16s")


class Uart:
    """The chip, its interrupt line and the line's far end: ``feed`` types, ``console`` hears.

    The bus calls it with ``lock`` held; ``feed`` takes it.
    """

    name = "uart"

    def __init__(self, irq: Callable[[bool], None], console: Console, lock: threading.Lock) -> None:
        self._irq = irq
        self._console = console
        self._lock = lock
        self._input: deque[int] = deque()
        self._power_on()

    def _power_on(self) -> None:
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = self._dll = self._dlm = 0
        self._errors = 0
        """LSR's error bits, cleared as they're read."""
        self._deltas = 0
        """MSR's low half, likewise."""
        self._rx: deque[int] = deque()
        self._last = 0
        """What an empty receiver reads as: the byte before."""
        self._thre_pending = False
        self._timeout_pending = False
        self._line = False

    # The far end

    def feed(self, data: bytes) -> None:
        """Type ``data`` at the guest. Any thread; nothing is lost, whatever its size."""
        with self._lock:
            self._input.extend(data)
            if self._ier & IER_RX:
                self._arrive()
                self._update()

    @property
    def unread(self) -> int:
        """How many bytes that were fed have not reached the chip."""
        return len(self._input)

    def reset(self) -> None:
        """The chip's reset pin. What waits on the line still comes: its sender knows nothing of the reset."""
        self._power_on()
        self._irq(False)

    # The registers

    def port_in(self, offset: int, size: int) -> int:
        return self._READ[offset](self)

    def port_out(self, offset: int, size: int, value: int) -> None:
        self._WRITE[offset](self, value & 0xFF)

    def _read_rbr(self) -> int:
        if self._lcr & LCR_DLAB:
            return self._dll
        if self._rx:
            self._last = self._rx.popleft()
            self._timeout_pending = False
            self._update()  # the line falls before the next byte raises it: the 8259 wants an edge
            if self._ier & IER_RX:
                self._arrive()
                self._update()
        return self._last

    def _read_ier(self) -> int:
        return self._dlm if self._lcr & LCR_DLAB else self._ier

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRE:
            self._thre_pending = False
            self._update()
        return cause | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)

    def _read_lsr(self) -> int:
        self._arrive()
        status = LSR_THRE | LSR_IDLE | self._errors | (LSR_READY if self._rx else 0)
        self._errors = 0
        self._update()
        return status

    def _read_msr(self) -> int:
        status = self._modem_inputs() | self._deltas
        self._deltas = 0
        self._update()
        return status

    def _write_thr(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._dll = value
            return
        if self._thre_pending:
            self._thre_pending = False
            self._update()
        if self._mcr & MCR_LOOP:
            self._receive(value)
        else:
            self._console.put(value)
        self._thre_pending = True
        if self._ier:
            self._update()

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._dlm = value
            return
        if value & ~self._ier & IER_THRE:
            self._thre_pending = True  # the transmitter is empty now: enabling its interrupt gives one
        self._ier = value & 0x0F
        if value & IER_RX:
            self._arrive()
        self._update()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
            self._rx.clear()
            self._timeout_pending = False
            self._update()
        self._fcr = value & 0xC1 if value & FCR_ENABLE else 0
        if self._ier & IER_RX:
            self._arrive()
        self._update()

    def _write_mcr(self, value: int) -> None:
        before = self._modem_inputs()
        self._mcr = value & 0x1F
        after = self._modem_inputs()
        self._deltas |= (before ^ after) >> 4 & 0b1011
        if before & ~after & MSR_RI:
            self._deltas |= MSR_RI >> 4  # ring indicator tells of its trailing edge only
        if self._ier & IER_RX:
            self._arrive()
        self._update()

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_scr(self, value: int) -> None:
        self._scr = value

    def _ignore(self, value: int) -> None:
        """LSR and MSR can't be written, but for factory tests."""

    _READ = (
        _read_rbr, _read_ier, _read_iir,
        lambda self: self._lcr, lambda self: self._mcr, _read_lsr, _read_msr, lambda self: self._scr,
    )  # fmt: skip
    _WRITE = (_write_thr, _write_ier, _write_fcr, _write_lcr, _write_mcr, _ignore, _ignore, _write_scr)

    # Inside

    def _trigger(self) -> int:
        return _TRIGGERS[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1

    def _arrive(self) -> None:
        """Let input in, up to the trigger level: one more interrupt's worth. Loopback cuts the line off."""
        trigger = self._trigger()
        if not self._mcr & MCR_LOOP:
            while self._input and len(self._rx) < trigger:
                self._rx.append(self._input.popleft())
        # Fewer than that, and nothing on its way: the four character times of silence are over.
        self._timeout_pending = 0 < len(self._rx) < trigger

    def _receive(self, value: int) -> None:
        """A byte that came round by loopback."""
        if not self._fcr & FCR_ENABLE:
            if self._rx:
                self._errors |= LSR_OVERRUN
                self._rx.clear()  # without FIFOs the new byte replaces the one that wasn't read
            self._rx.append(value)
        elif len(self._rx) < FIFO_SIZE:
            self._rx.append(value)
        else:
            self._errors |= LSR_OVERRUN
        self._timeout_pending = 0 < len(self._rx) < self._trigger()

    def _modem_inputs(self) -> int:
        if not self._mcr & MCR_LOOP:
            return _PEER
        return sum(status for control, status in _LOOPED if self._mcr & control)

    def _cause(self) -> int:
        """IIR's low bits: the pending interrupt of the highest priority."""
        if self._ier & IER_LINE and self._errors:
            return IIR_LINE
        if self._ier & IER_RX:
            if len(self._rx) >= self._trigger():
                return IIR_RX
            if self._timeout_pending:
                return IIR_TIMEOUT
        if self._ier & IER_THRE and self._thre_pending:
            return IIR_THRE
        if self._ier & IER_MODEM and self._deltas:
            return IIR_MODEM
        return IIR_NONE

    def _level(self) -> bool:
        """A PC gates the interrupt with OUT2, a pin that loopback turns off."""
        return self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 and self._cause() != IIR_NONE

    def _update(self) -> None:
        level = self._level()
        if level != self._line:
            self._line = level
            self._irq(level)

    # State: the registers, then the receiver, then the input that waits on the line

    def save(self) -> bytes:
        rx = bytes(self._rx)
        return _STATE.pack(
            self._ier, self._fcr, self._lcr, self._mcr, self._scr, self._dll, self._dlm,
            self._errors, self._deltas, self._last, self._thre_pending, len(rx), rx,
        ) + bytes(self._input)  # fmt: skip

    def check(self, raw: bytes) -> None:
        ier, fcr, _, mcr, *_, errors, deltas, _, thre, count, rx = unpack(self.name, _STATE, raw[: _STATE.size])
        impossible = (
            ier & ~0x0F or fcr & ~0xC1 or mcr & ~0x1F or errors & ~LSR_OVERRUN or deltas & ~0x0F or thre > 1
            or (fcr and not fcr & FCR_ENABLE)
            or count > (FIFO_SIZE if fcr else 1) or any(rx[count:])
        )  # fmt: skip
        if impossible:
            raise damaged(self.name, "no 16550A can be in it")

    def load(self, raw: bytes) -> None:
        (
            self._ier, self._fcr, self._lcr, self._mcr, self._scr, self._dll, self._dlm,
            self._errors, self._deltas, self._last, thre, count, rx,
        ) = _STATE.unpack(raw[: _STATE.size])  # fmt: skip
        self._thre_pending = bool(thre)
        self._rx = deque(rx[:count])
        self._input = deque(raw[_STATE.size :])
        self._timeout_pending = 0 < count < self._trigger()
        self._update()  # the interrupt controllers keep the levels of their inputs out of their saved state
