"""A guest that sleeps until the UART interrupts it, on both backends: no byte typed at it may be lost."""

from __future__ import annotations

from pathlib import Path

from kvm.backends.interface import System
from kvm.boot.loader import load
from kvm.machine import Machine, MachineConfig, Phase

ECHO = bytes.fromhex(
    "fa 31c0 8ed8"  # cli; ds = 0
    "c7063000387c a33200"  # vector 0x0c: 0000:7c38
    "b011 e620 b008 e621 b004 e621 b001 e621 b0ef e621"  # the 8259: vectors from 8, all but IRQ 4 masked
    "bafa03 b087 ee"  # FCR: FIFOs on and empty, trigger level 8
    "bafc03 b00b ee"  # MCR: DTR, RTS, OUT2
    "baf903 b001 ee"  # IER: received data
    "fb f4 ebfc"  # 1: sti; hlt; jmp 1b
    # 7c38, the handler: takes one byte, however many there are
    "bafd03 ec a801 740b"  # LSR: none there? to the end
    "baf803 ec ee"  # echo it
    "3c04 7502 e6f4"  # ctrl-d: leave
    "b020 e620 cf"  # end of interrupt
)


def test_a_paste_is_echoed_whole(system: System, tmp_path: Path) -> None:
    file = tmp_path / "echo"
    file.write_bytes(ECHO)
    paste = bytes(byte for byte in range(256) if byte != 4) * 8
    with Machine(system, load(file, memory=1 << 20, format="flat16"), MachineConfig(memory=1 << 20)) as machine:
        machine.board.serial.feed(paste[:100])
        machine.run()
        for start in range(100, len(paste), 100):
            machine.board.serial.feed(paste[start : start + 100])
        assert machine.board.serial_console.wait(len(paste) - 1, 20)
        machine.board.serial.feed(b"\x04")
        assert machine.wait(Phase.EXITED, Phase.STOPPED, timeout=20).code == 4
        assert machine.board.serial_console.since(0)[0] == paste + b"\x04"
