"""Snapshot files made wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kvm.machine import Machine
from kvm.snapshot import chain, notes
from kvm.snapshot.file import read
from kvm.snapshot.state import MachineState
from kvm.x86 import layout
from kvm.x86.structs import unpack_msrs

_NUMBERS = count(1)
_TSC = (0x10, 0x3B)
_TIMER_COUNT = 0x390
CHECKSUM = 20 + 48
"""Of the head, from the FORMAT note's start."""


def seal_at(head: bytes) -> int:
    """Where the FORMAT note is: after the program headers."""
    return 64 + 56 * int.from_bytes(head[56:58], "little")


def seal(head: bytes) -> bytes:
    """The head with a checksum that's right for whatever is in it."""
    at = seal_at(head) + CHECKSUM
    blank = head[:at] + bytes(16) + head[at + 16 :]
    return head[:at] + xxhash.xxh3_128_digest(blank) + head[at + 16 :]


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A file whose checksums are all right, with ``change`` made to its draft's fields; memory as in ``path``."""
    with read(path) as file:
        head = file.head
        pages = np.array(file.pages())
    draft = {
        **{field.name: getattr(head, field.name) for field in fields(notes.Draft) if hasattr(head, field.name)},
        "extents": tuple((extent.address, extent.size) for extent in head.extents),
        "chunks": len(head.chunks),
        "file_pages": len(pages),
    }
    change(draft)
    crafted, _ = notes.pack(notes.Draft(**draft), head.chunks)
    bad = path.with_name(f"crafted {next(_NUMBERS)}.vmdeck")
    bad.write_bytes(crafted + pages.tobytes())
    return bad


def with_substate(path: Path, vcpu: int, name: str, raw: bytes) -> Path:
    """A file whose state has other bytes for this."""

    def change(draft: dict[str, Any]) -> None:
        state: MachineState = draft["state"]
        vcpus = [dict(copy) for copy in state.vcpus]
        vcpus[vcpu][name] = raw
        draft["state"] = replace(state, vcpus=tuple(vcpus))

    return rewritten(path, change)


def without_substate(path: Path, name: str) -> Path:
    """A file as from before vmdeck had this."""

    def change(draft: dict[str, Any]) -> None:
        state: MachineState = draft["state"]
        vcpus = tuple({key: raw for key, raw in copy.items() if key != name} for copy in state.vcpus)
        draft["state"] = replace(state, vcpus=vcpus)

    return rewritten(path, change)


def with_device(path: Path, name: str, raw: bytes) -> Path:
    def change(draft: dict[str, Any]) -> None:
        state: MachineState = draft["state"]
        draft["state"] = replace(state, devices={**state.devices, name: raw})

    return rewritten(path, change)


def without_device(path: Path, name: str) -> Path:
    """A file as from before vmdeck's board had this."""

    def change(draft: dict[str, Any]) -> None:
        state: MachineState = draft["state"]
        devices = {key: raw for key, raw in state.devices.items() if key != name}
        draft["state"] = replace(state, devices=devices)

    return rewritten(path, change)


def settled(state: MachineState) -> tuple[object, ...]:
    """The state without what goes on by itself while the machine stands: the TSC (and its distance from the host's) and
    the LAPIC timer's count."""
    vcpus = []
    for copy in state.vcpus:
        time = {name: unpack_msrs(copy[name]) | dict.fromkeys(_TSC, 0) for name in ("msrs_reset", "tsc_deadline")}
        lapic = copy["lapic"][:_TIMER_COUNT] + bytes(4) + copy["lapic"][_TIMER_COUNT + 4 :]
        vcpus.append({**copy, **time, "lapic": lapic, "tsc_offset": b""})
    return vcpus, state.devices


def memory_of(machine: Machine) -> bytes:
    """All of a (small) machine's RAM."""
    return b"".join(machine.read_memory(address, size) for address, size in layout.ram(machine.config.memory))


def memory_in(path: Path) -> bytes:
    """All of the RAM in a (small) snapshot file and its ancestors."""
    with chain.open_chain(path) as opened:
        contents = opened.contents()
        room = np.empty((len(contents.index), 4096), np.uint8)
        return contents.read(contents.index, room).tobytes()
