"""The UART: against a plain model of the data sheet, and the sequences that real drivers rely on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm.devices.console import Console
from kvm.devices.uart import Uart
from kvm.errors import VmdeckError

RBR = THR = 0
IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 1, 2, 2, 3, 4, 5, 6, 7
OUT2, LOOP = 0x08, 0x10


class Wired:
    """A UART with its interrupt line and console."""

    def __init__(self) -> None:
        self.edges: list[bool] = []
        self.console = Console()
        self.lock = threading.Lock()
        self.uart = Uart(self.edges.append, self.console, self.lock)

    @property
    def line(self) -> bool:
        return bool(self.edges) and self.edges[-1]

    def read(self, offset: int) -> int:
        return self.uart.port_in(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.port_out(offset, 1, value)

    def feed(self, data: bytes) -> None:
        self.uart.feed(data)

    @property
    def output(self) -> bytes:
        return self.console.since(0)[0]


class Model:
    """The data sheet in the plainest way: everything recomputed from lists after each access."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.fifo: list[int] = []
        self.sent: list[int] = []
        self.registers = dict.fromkeys(("ier", "fcr", "lcr", "mcr", "scr", "dll", "dlm"), 0)
        self.overrun = False
        self.deltas = 0
        self.thre = False
        self.last = 0

    @property
    def fifos(self) -> bool:
        return self.registers["fcr"] & 1 == 1

    @property
    def loop(self) -> bool:
        return self.registers["mcr"] & LOOP != 0

    @property
    def level(self) -> int:
        return {0: 1, 1: 4, 2: 8, 3: 14}[self.registers["fcr"] >> 6] if self.fifos else 1

    @property
    def modem(self) -> int:
        mcr = self.registers["mcr"]
        if not self.loop:
            return 0xB0
        dtr, rts, out1, out2 = (mcr >> bit & 1 for bit in range(4))
        return rts << 4 | dtr << 5 | out1 << 6 | out2 << 7

    def look(self) -> None:
        if not self.loop:
            while self.waiting and len(self.fifo) < self.level:
                self.fifo.append(self.waiting.pop(0))

    def look_if_enabled(self) -> None:
        if self.registers["ier"] & 1:
            self.look()

    def causes(self) -> list[int]:
        ier = self.registers["ier"]
        wanted = (
            (4, self.overrun, 0x06),
            (1, len(self.fifo) >= self.level, 0x04),
            (1, 0 < len(self.fifo) < self.level, 0x0C),
            (2, self.thre, 0x02),
            (8, self.deltas, 0x00),
        )
        return [code for enable, happened, code in wanted if ier & enable and happened]

    @property
    def line(self) -> bool:
        return bool(self.causes()) and self.registers["mcr"] & OUT2 != 0 and not self.loop

    def feed(self, data: bytes) -> None:
        self.waiting += data
        self.look_if_enabled()

    def read(self, offset: int) -> int:
        latch = self.registers["lcr"] & 0x80
        if offset == RBR and not latch:
            if self.fifo:
                self.last = self.fifo.pop(0)
                self.look_if_enabled()
            return self.last
        if offset == IIR:
            cause = self.causes()[0] if self.causes() else 0x01
            if cause == 0x02:
                self.thre = False
            return cause | (0xC0 if self.fifos else 0)
        if offset == LSR:
            self.look()
            value = 0x60 | self.overrun << 1 | bool(self.fifo)
            self.overrun = False
            return value
        if offset == MSR:
            value, self.deltas = self.modem | self.deltas, 0
            return value
        names = {0: "dll", 1: "dlm" if latch else "ier", LCR: "lcr", MCR: "mcr", SCR: "scr"}
        return self.registers[names[offset]]

    def write(self, offset: int, value: int) -> None:
        latch = self.registers["lcr"] & 0x80
        if offset in (0, 1) and latch:
            self.registers[("dll", "dlm")[offset]] = value
        elif offset == THR:
            self.thre = True
            if not self.loop:
                self.sent.append(value)
            elif len(self.fifo) < (16 if self.fifos else 1):
                self.fifo.append(value)
            else:
                self.overrun = True
                if not self.fifos:
                    self.fifo = [value]
        elif offset == IER:
            self.thre = self.thre or bool(value & 2 and not self.registers["ier"] & 2)
            self.registers["ier"] = value & 0x0F
            self.look_if_enabled()
        elif offset == FCR:
            if value & 2 or value & 1 != self.fifos:
                self.fifo = []
            self.registers["fcr"] = value & 0xC1 if value & 1 else 0
            self.look_if_enabled()
        elif offset == MCR:
            before = self.modem
            self.registers["mcr"] = value & 0x1F
            changed = before ^ self.modem
            self.deltas |= (changed & 0xB0 | changed & before & 0x40) >> 4
            self.look_if_enabled()
        elif offset in (LCR, SCR):
            self.registers[{LCR: "lcr", SCR: "scr"}[offset]] = value


bytes_ = st.integers(0, 255)
useful = {
    IER: st.sampled_from((0, 1, 2, 3, 5, 7, 15)),
    FCR: st.sampled_from((0, 1, 3, 0x07, 0x41, 0x81, 0xC7, 0xC1)),
    LCR: st.sampled_from((3, 3, 3, 0x83)),
    MCR: st.sampled_from((0x0B, 0x0B, 0x08, 0x1B, 0x1E, 0x10, 0x00)),
}
accesses = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 7)),
    st.integers(0, 7).flatmap(
        lambda offset: st.tuples(st.just("write"), st.just(offset), st.one_of(useful.get(offset, bytes_), bytes_))
    ),
    st.tuples(st.just("feed"), st.binary(min_size=1, max_size=40)),
)


def do(target: Any, access: tuple[Any, ...]) -> Any:
    return getattr(target, access[0])(*access[1:])


@settings(max_examples=300, deadline=None)
@given(st.lists(accesses, max_size=60))
def test_it_behaves_as_the_data_sheet_says(script: list[tuple[Any, ...]]) -> None:
    real, model = Wired(), Model()
    for access in script:
        assert do(real, access) == do(model, access), access
        assert real.line == model.line, access
    assert real.output == bytes(model.sent)
    assert real.uart.unread == len(model.waiting)


@settings(max_examples=150, deadline=None)
@given(st.lists(accesses, max_size=40), st.lists(accesses, max_size=40))
def test_a_saved_uart_goes_on_as_if_nothing_had_happened(
    before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]
) -> None:
    first, second = Wired(), Wired()
    for access in before:
        do(first, access)
    second.uart.load(first.uart.save())
    assert second.line == first.line
    assert second.uart.save() == first.uart.save()
    first.edges.clear()
    second.edges.clear()
    assert [do(first, access) for access in after] == [do(second, access) for access in after]
    assert (second.edges, second.uart.save()) == (first.edges, first.uart.save())


@settings(max_examples=300, deadline=None)
@given(st.lists(accesses, max_size=20), st.data())
def test_a_damaged_state_is_refused_or_taken_whole(script: list[tuple[Any, ...]], data: st.DataObject) -> None:
    wired = Wired()
    for access in script:
        do(wired, access)
    before = wired.uart.save()
    raw = bytearray(before)
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(bytes_)
    del raw[data.draw(st.integers(0, 2 * len(raw))) :]
    try:
        wired.uart.check(bytes(raw))
    except VmdeckError:
        assert wired.uart.save() == before
    else:
        wired.uart.load(bytes(raw))
        assert wired.uart.save() == raw


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.data())
def test_a_polling_guest_reads_what_was_typed(typed: bytes, data: st.DataObject) -> None:
    wired = Wired()
    wired.write(FCR, data.draw(st.sampled_from((0, 0x01, 0x41, 0x81, 0xC1))))
    cut = data.draw(st.integers(0, len(typed)))
    wired.feed(typed[:cut])
    got = bytearray()
    for part in (b"", typed[cut:]):
        wired.feed(part)
        while wired.read(LSR) & 1:
            got.append(wired.read(RBR))
    assert bytes(got) == typed


@pytest.mark.parametrize("fcr", [0x00, 0x01, 0x41, 0x81, 0xC1])
@pytest.mark.parametrize("at_a_time", [1, 8, 16])
def test_a_paste_reaches_a_guest_that_waits_for_interrupts(fcr: int, at_a_time: int) -> None:
    """The 8259 sees edges only: a handler that reads some bytes and returns must find a new edge, or it sleeps on."""
    wired = Wired()
    wired.write(FCR, fcr)
    wired.write(MCR, 0x0B)
    wired.write(IER, 1)
    paste = bytes(range(256)) * 40
    wired.feed(paste)
    got = bytearray()
    latched = wired.edges == [True]
    while latched:
        wired.edges.clear()
        assert wired.read(IIR) & 0x0F in (0x04, 0x0C) or bytes(got) == paste  # a last edge, of what was read already
        for _ in range(at_a_time):
            if wired.read(LSR) & 1:
                got.append(wired.read(RBR))
        latched = True in wired.edges
    assert bytes(got) == paste
    assert wired.read(IIR) & 0x0F == 0x01


def test_input_from_another_thread_raises_the_line() -> None:
    wired = Wired()
    wired.write(MCR, OUT2)
    wired.write(IER, 1)
    typist = threading.Thread(target=wired.feed, args=(b"x",))
    typist.start()
    typist.join(30)
    assert wired.line
    assert wired.read(RBR) == ord("x")
    assert not wired.line


def test_input_typed_early_survives_the_guest_setting_up_its_uart() -> None:
    """The sequence of osdev's serial tutorial, with its loopback self-test."""
    wired = Wired()
    wired.feed(b"early")
    for offset, value in ((IER, 0), (LCR, 0x80), (0, 3), (1, 0), (LCR, 3), (FCR, 0xC7), (MCR, 0x0B), (MCR, 0x1E)):
        wired.write(offset, value)
    wired.write(THR, 0xAE)
    assert wired.read(RBR) == 0xAE
    wired.write(MCR, 0x0F)
    got = bytearray()
    while wired.read(LSR) & 1:
        got.append(wired.read(RBR))
    assert (bytes(got), wired.output) == (b"early", b"")


def test_each_sent_byte_gives_a_transmitter_interrupt_with_an_edge() -> None:
    wired = Wired()
    wired.write(MCR, OUT2)
    wired.write(IER, 2)
    for byte in b"abc":
        assert wired.edges[-1] is True
        wired.edges.clear()
        wired.write(THR, byte)
        assert wired.edges == [False, True]
    assert wired.read(IIR) == 0x02
    assert not wired.line
    assert wired.read(IIR) == 0x01
    assert wired.output == b"abc"


def test_enabling_the_transmitter_interrupt_again_gives_another() -> None:
    """What Linux's 8250 driver tests for (UART_BUG_THRE)."""
    wired = Wired()
    wired.write(IER, 2)
    assert wired.read(IIR) == 0x02
    wired.write(IER, 0)
    wired.write(IER, 2)
    assert wired.read(IIR) == 0x02


def test_writing_the_enable_register_again_gives_no_transmitter_interrupt() -> None:
    wired = Wired()
    wired.write(IER, 2)
    assert wired.read(IIR) == 0x02
    wired.write(IER, 3)
    assert wired.read(IIR) == 0x01


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ((), 0xB0),  # the other end is there
        ((0x10,), 0x0B),  # loopback, all off: the three inputs fell
        ((0x10, 0x1F), 0xFB),  # and rose; ring indicator's rise is no event
        ((0x1F, 0x1B), 0xB4),  # but its fall is
        ((0x11,), 0x29),  # DTR comes back as DSR
        ((0x12,), 0x1A),  # RTS as CTS
    ],
)
def test_modem_status(steps: tuple[int, ...], status: int) -> None:
    wired = Wired()
    wired.write(IER, 8)
    for step in steps:
        wired.write(MCR, step)
    assert wired.read(IIR) == (0x00 if status & 0x0F else 0x01)
    assert wired.read(MSR) == status
    assert wired.read(MSR) == status & 0xF0
    assert wired.read(IIR) == 0x01


def test_interrupts_come_by_priority() -> None:
    wired = Wired()
    wired.write(MCR, LOOP)
    wired.write(THR, 1)
    wired.write(THR, 2)  # overruns
    wired.write(IER, 0x0F)
    seen = []
    for clear in (LSR, RBR, IIR, MSR):
        seen.append(wired.read(IIR) if clear != IIR else 0x02)
        wired.read(clear)
    assert seen == [0x06, 0x04, 0x02, 0x00]
    assert wired.read(IIR) == 0x01


@pytest.mark.parametrize(("mcr", "level"), [(0x03, False), (0x0B, True), (0x1B, False)])
def test_out2_gates_the_line_and_loopback_turns_it_off(mcr: int, level: bool) -> None:
    wired = Wired()
    wired.write(IER, 2)
    wired.write(MCR, mcr)
    assert wired.line is level


def test_reset_drops_the_line_and_keeps_what_is_still_on_its_way() -> None:
    wired = Wired()
    wired.write(MCR, OUT2)
    wired.write(IER, 1)
    wired.feed(b"abc")
    with wired.lock:
        wired.uart.reset()
    assert not wired.line
    assert [wired.read(offset) for offset in (IER, IIR, LCR, MCR, SCR)] == [0, 1, 0, 0, 0]
    assert wired.read(LSR) == 0x61
    assert wired.read(RBR) == ord("b")  # "a" was in the chip
