"""The 8254 timer and port 0x61, as KVM models them (struct kvm_pit_state2); time is the VM's virtual time in ns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvm.x86.structs import PitState2

FREQUENCY = 1193182
_SECOND = 1_000_000_000
_LOW, _HIGH, _WORD_LOW, _WORD_HIGH = 1, 2, 3, 4
"""Which byte of a count comes next."""
_SPEAKER_ON = 2
_PERIODIC = (2, 3)


class Pit:
    """``tick`` pulses IRQ 0; ``timers_changed`` hears that ``due`` has moved."""

    PORTS = (0x40, 0x41, 0x42, 0x43, 0x61)

    def __init__(self, now: Callable[[], int], tick: Callable[[], None], timers_changed: Callable[[], None]) -> None:
        self._now = now
        self._pulse = tick
        self._timers_changed = timers_changed
        self._state: Any = PitState2()
        self.due: int | None = None
        """Virtual time of the next IRQ 0."""
        for number in range(3):
            channel = self._state.channels[number]
            channel.mode, channel.gate, channel.count = 0xFF, number != 2, 0x10000

    def save(self) -> bytes:
        """struct kvm_pit_state2; ``count_load_time`` is virtual time."""
        return bytes(self._state)

    def load(self, raw: bytes) -> None:
        self._state = PitState2.from_buffer_copy(raw)
        for channel in self._state.channels:
            channel.count = channel.count or 0x10000  # as the hardware reads it, and KVM since CVE-2015-7513
        self.schedule()

    def _elapsed(self, number: int) -> int:
        """Input clocks since the count was loaded."""
        elapsed = max(0, self._now() - self._state.channels[number].count_load_time)
        return int(elapsed * FREQUENCY // _SECOND)

    def schedule(self) -> None:
        """Work out when channel 0 fires next."""
        channel = self._state.channels[0]
        elapsed = self._elapsed(0)
        clocks: int | None = None
        if channel.gate and channel.mode in _PERIODIC:
            clocks = (elapsed // channel.count + 1) * channel.count
        elif channel.gate and channel.mode in (0, 1, 4) and elapsed < channel.count:
            clocks = channel.count
        self.due = None if clocks is None else channel.count_load_time - (-clocks * _SECOND // FREQUENCY)
        self._timers_changed()

    def tick(self, now: int) -> None:
        """``due`` has come."""
        self.schedule()
        self._pulse()

    def _count(self, number: int) -> int:
        channel, elapsed = self._state.channels[number], self._elapsed(number)
        if channel.mode in (0, 1, 4, 5):
            return int(channel.count - elapsed & 0xFFFF)
        if channel.mode == 3:
            return int(channel.count - 2 * elapsed % channel.count)
        return int(channel.count - elapsed % channel.count)

    def _output(self, number: int) -> bool:
        channel, elapsed = self._state.channels[number], self._elapsed(number)
        by_mode: dict[int, bool] = {
            0: elapsed >= channel.count,
            1: elapsed < channel.count,
            2: elapsed > 0 and elapsed % channel.count == 0,
            3: elapsed % channel.count < channel.count + 1 >> 1,
        }
        return bool(by_mode.get(channel.mode, elapsed == channel.count))

    def _load_count(self, number: int, value: int) -> None:
        channel = self._state.channels[number]
        channel.count = value or 0x10000
        channel.count_load_time = self._now()
        if number == 0:
            channel.gate = True
            self.schedule()

    def read(self, port: int) -> int:
        """A port read of one byte."""
        if port == 0x61:
            refresh = self._now() >> 14 & 1
            speaker = self._state.flags & _SPEAKER_ON
            return int(self._state.channels[2].gate | speaker | refresh << 4 | self._output(2) << 5)
        if port == 0x43:
            return 0
        channel = self._state.channels[port & 3]
        if channel.status_latched:
            channel.status_latched = 0
            return int(channel.status)
        if channel.count_latched:
            value, state = channel.latched_count, channel.count_latched
            channel.count_latched = {_WORD_LOW: _WORD_HIGH}.get(state, 0)
        else:
            value, state = self._count(port & 3), channel.read_state
            channel.read_state = {_WORD_LOW: _WORD_HIGH, _WORD_HIGH: _WORD_LOW}.get(state, state)
        return int(value >> 8 & 0xFF if state in (_HIGH, _WORD_HIGH) else value & 0xFF)

    def write(self, port: int, value: int) -> None:
        """A port write of one byte."""
        if port == 0x61:
            self._set_gate(bool(value & 1))
            self._state.flags = self._state.flags & ~_SPEAKER_ON | value & _SPEAKER_ON
        elif port == 0x43:
            self._control(value)
        else:
            self._write_count(port & 3, value)

    def _write_count(self, number: int, value: int) -> None:
        channel = self._state.channels[number]
        if channel.write_state == _LOW:
            self._load_count(number, value)
        elif channel.write_state == _HIGH:
            self._load_count(number, value << 8)
        elif channel.write_state == _WORD_LOW:
            channel.write_latch = value
            channel.write_state = _WORD_HIGH
        elif channel.write_state == _WORD_HIGH:
            channel.write_state = _WORD_LOW
            self._load_count(number, channel.write_latch | value << 8)

    def _set_gate(self, gate: bool) -> None:
        channel = self._state.channels[2]
        if gate and not channel.gate and channel.mode in (1, 2, 3, 5):
            channel.count_load_time = self._now()
        channel.gate = gate

    def _control(self, value: int) -> None:
        number, access = value >> 6, value >> 4 & 3
        if number == 3:
            for each in range(3):
                if value >> 1 + each & 1:
                    self._read_back(each, count=not value & 0x20, status=not value & 0x10)
        elif access == 0:
            self._read_back(number, count=True, status=False)
        else:
            channel = self._state.channels[number]
            mode = value >> 1 & 7
            channel.mode = mode & 3 if mode > 5 else mode
            channel.bcd = value & 1
            channel.rw_mode = channel.read_state = channel.write_state = access
            if number == 0:
                # It stands until a count comes. Its gate, which nothing else can close, says so in a saved state too.
                channel.gate = False
                self.schedule()

    def _read_back(self, number: int, *, count: bool, status: bool) -> None:
        channel = self._state.channels[number]
        if count and not channel.count_latched:
            channel.latched_count = self._count(number) & 0xFFFF
            channel.count_latched = channel.rw_mode
        if status and not channel.status_latched:
            channel.status = self._output(number) << 7 | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd
            channel.status_latched = 1
