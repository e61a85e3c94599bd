"""Heads of snapshot files taken apart, mutated by their structure, and put together with everything derived right.

What a fuzzer needs: bytes changed at random get no further than the head's checksum, an identity, or a length.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kvm.backends.interface import PAGE_SIZE
from kvm.snapshot import core, notes
from kvm.snapshot.core import Extent
from kvm.x86 import msrs
from tests.kvm.snapshot.crafted import CHECKSUM, seal, seal_at

Note = tuple[bytes, int, bytes]
Mutate = Callable[[bytes, int], bytes]
"""Bytes changed somehow, at most so many of them."""

_IDENTITY = CHECKSUM - 16
_FORMAT = struct.Struct("<IIQQQ16s16s")
_MACHINE = 0xFFFF_FFFF
_U64 = (1 << 64) - 1
_MOST = 1 << 31
"""Bytes of a file that is really made; it's sparse."""
_INTEGERS = (
    0, 1, 2, 3, 16, 255, 256, 4095, 4096, 4097, 1 << 16, 1 << 20, 1 << 21, 3 << 30, 4 << 30, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, (1 << 40) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *_INTEGERS, *(-value for value in _INTEGERS), 1 << 64, 10**40, 0.0, -1.5, 1e300, float("nan"), float("inf"), None,
    True, False, "", "a", "a" * 300, "../a", "/", "a\0b", "\x1b[31m", "\n", "\ud800", "\u202e", "0" * 32, [], {}, [[]],
)  # fmt: skip
_SUBSTATES = (
    "regs", "sregs", "xsave", "fpu", "xcrs", "lapic", "msrs", "msrs_reset", "tsc_deadline", "events", "mp_state",
    "debugregs", "guest_debug", "cpuid", "nested", "tsc_khz", "pic_master", "pic_slave", "ioapic", "pit", "clock",
)  # fmt: skip
_ENTRY_SIZES = {"msrs": 16, "msrs_reset": 16, "tsc_deadline": 16, "cpuid": 40}


@dataclass
class Parts:
    """What a head is made of; the rest of it follows from that. ``extents`` are (address, size) in bytes."""

    extents: list[tuple[int, int]]
    notes: list[Note]
    """All but FORMAT."""

    def first(self, kind: int) -> bytes:
        """The payload of vmdeck's first note of a type; nothing if there is none."""
        return next((payload for owner, this, payload in self.notes if (owner, this) == (notes.OWNER, kind)), b"")

    def replace(self, kind: int, payload: bytes) -> None:
        """Put another payload into vmdeck's first note of a type."""
        for place, (owner, this, _) in enumerate(self.notes):
            if (owner, this) == (notes.OWNER, kind):
                self.notes[place] = (owner, this, payload)
                return


def taken_apart(head: bytes) -> Parts | None:
    """A head's parts, as far as it can be read; None if it can't be at all."""
    if len(head) < core.EHDR.size:
        return None
    count, start = core.EHDR.unpack_from(head)[10], seal_at(head)
    if not 0 < count < 1000 or len(head) < start:
        return None
    headers = list(core.PHDR.iter_unpack(head[core.EHDR.size : start]))
    raw = head[start : start + headers[0][5]].ljust(headers[0][5] if headers[0][5] < 1 << 20 else 0, b"\0")
    found: list[Note] = []
    try:
        found.extend(core.notes(raw))
    except ValueError:
        pass
    if not found:
        return None
    return Parts([(header[3], header[5]) for header in headers[1:]], found[1:])


def put_together(parts: Parts) -> bytes:
    """The head that has these parts, its offsets, sizes, checksums and identity all right for what ``write`` makes."""
    stored = sum(size for _, size in parts.extents) + -(-_image_size(parts) // PAGE_SIZE) * PAGE_SIZE
    fits = 0 <= stored <= _MOST
    if fits:
        parts.replace(notes.CHUNKS, _checksums(stored))
    body = b"".join(core.note(owner, kind, payload) for owner, kind, payload in parts.notes)
    at = core.EHDR.size + core.PHDR.size * (1 + len(parts.extents))
    length = len(core.note(notes.OWNER, notes.FORMAT, bytes(_FORMAT.size))) + len(body)
    size = -(-(at + length) // notes.DATA_ALIGN) * notes.DATA_ALIGN
    blank = _FORMAT.pack(notes.VERSION, 0, size, size + (stored if fits else 0), notes.CHUNK, bytes(16), bytes(16))
    headers, offset = [core.note_segment(at, length)], size
    for address, extent in parts.extents:
        headers.append(core.load_segment(Extent(address, offset & _U64, extent), PAGE_SIZE))
        offset += extent
    start = core.elf_header(len(headers)) + b"".join(headers) + core.note(notes.OWNER, notes.FORMAT, blank)
    return sealed((start + body).ljust(size, b"\0"))


def sealed(head: bytes) -> bytes:
    """The head, whole, with the identity and the checksum that are right for what can be read of it."""
    head = head.ljust(_sizes(head)[0], b"\0")
    parts, at = taken_apart(head), seal_at(head) if len(head) >= core.EHDR.size else len(head)
    if len(head) < at + CHECKSUM + 16:
        return head
    if parts is not None:
        digest = xxhash.xxh3_128(np.array(parts.extents, "<u8").tobytes())
        for owner, kind, payload in parts.notes:
            if owner == notes.OWNER and kind not in (notes.FORMAT, notes.LABEL):
                digest.update(len(payload).to_bytes(8, "little") + payload)
        head = head[: at + _IDENTITY] + digest.digest() + head[at + CHECKSUM :]
    return seal(head)


def identity(head: bytes) -> bytes:
    """What a child names it by."""
    at = seal_at(head) + _IDENTITY
    return head[at : at + 16]


def write(path: Path, head: bytes) -> None:
    """A new file with this head, and memory as ``put_together`` has it: a page, then a hole."""
    size, file_size = _sizes(head)
    with open(path, "xb") as file:
        file.write(head)
        file.truncate(max(file_size, len(head)))
        os.pwrite(file.fileno(), _tail(file_size - size), size)


def _sizes(head: bytes) -> tuple[int, int]:
    """The head's and the file's size as its FORMAT note says; the head's own where that can't be."""
    if len(head) >= core.EHDR.size and len(head) >= seal_at(head) + CHECKSUM + 16:
        _, _, size, file_size, *_ = _FORMAT.unpack_from(head, seal_at(head) + 20)
        if len(head) <= size <= file_size <= _MOST + size and size <= max(len(head), 1 << 20):
            return size, file_size
    return len(head), len(head)


def _tail(size: int) -> bytes:
    return (b"\xf4" * PAGE_SIZE)[:size]


def _checksums(stored: int) -> bytes:
    whole = xxhash.xxh3_64_intdigest(bytes(notes.CHUNK)).to_bytes(8, "little")
    count, rest = divmod(stored, notes.CHUNK)
    chunks = [whole] * count + ([xxhash.xxh3_64_intdigest(bytes(rest)).to_bytes(8, "little")] if rest else [])
    if chunks:
        first = min(stored, notes.CHUNK)
        chunks[0] = xxhash.xxh3_64_intdigest(_tail(first).ljust(first, b"\0")).to_bytes(8, "little")
    return b"".join(chunks)


def _image_size(parts: Parts) -> int:
    try:
        image = json.loads(parts.first(notes.CONFIG))["image"]
        return int(image["size"]) if image else 0
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0


# Mutations


def mutated(head: bytes, most: int, rng: random.Random, mutate: Mutate) -> bytes:
    """A head that differs in one or more things, its derived fields right again; at most ``most`` bytes."""
    parts = taken_apart(head)
    if parts is None or not parts.notes:
        return mutate(head, most)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_MUTATIONS)(parts, rng, mutate)
    made = put_together(parts).rstrip(b"\0")
    return made if len(made) <= most else head


def _a_note(parts: Parts, rng: random.Random, mutate: Mutate) -> None:
    """By its type and name: most of a head's bytes are the XSAVE areas of its substates."""
    kind = rng.choice([notes.CONFIG, notes.LABEL, notes.SUBSTATE, notes.SUBSTATE, notes.SUBSTATE, notes.DEVICE])
    named: dict[bytes, list[int]] = {}
    for place, (owner, this, payload) in enumerate(parts.notes):
        if (owner, this) == (notes.OWNER, kind):
            named.setdefault(payload[4:28] if kind == notes.SUBSTATE else payload[:32], []).append(place)
    if named:
        place = rng.choice(named[rng.choice(list(named))])
        owner, kind, payload = parts.notes[place]
        parts.notes[place] = owner, kind, _PAYLOADS[kind](payload, rng, mutate)


def _notes_as_a_sequence(parts: Parts, rng: random.Random, mutate: Mutate) -> None:
    place, other = rng.randrange(len(parts.notes)), rng.randrange(len(parts.notes))
    match rng.randrange(4):
        case 0:
            del parts.notes[place]
            if not parts.notes:
                parts.notes.append((b"CORE", 1, b""))
        case 1:
            parts.notes.insert(other, parts.notes[place])
        case 2:
            parts.notes[place], parts.notes[other] = parts.notes[other], parts.notes[place]
        case _:
            owner, kind, payload = parts.notes[place]
            parts.notes[place] = mutate(owner, 12), kind ^ rng.choice((0, 1, 2, 1 << 31)), payload


def _extents(parts: Parts, rng: random.Random, mutate: Mutate) -> None:
    if not parts.extents or rng.random() < 0.2:
        parts.extents.append((rng.choice(_INTEGERS), rng.choice((4096, 65536, 1 << 20))))
        parts.extents.sort()
        return
    place = rng.randrange(len(parts.extents))
    address, size = parts.extents[place]
    match rng.randrange(5):
        case 0:
            del parts.extents[place]
        case 1 if size >= 2 * PAGE_SIZE:
            first = rng.randrange(1, size // PAGE_SIZE) * PAGE_SIZE
            parts.extents[place : place + 1] = [(address, first), ((address + first) & _U64, size - first)]
        case 2:
            parts.extents[place] = address, rng.choice(_INTEGERS)
        case 3:
            parts.extents[place] = rng.choice(_INTEGERS), size
        case _:
            step = PAGE_SIZE * rng.choice((-1, 1, 16, -16))
            parts.extents[place] = (address + step) & _U64, (size - step) & _U64


def _memory_size(parts: Parts, rng: random.Random, mutate: Mutate) -> None:
    """Of the configuration and of the segments at once, as in a file of another machine."""
    try:
        config = json.loads(parts.first(notes.CONFIG))
        memory = rng.choice((1, 2, 4, 16, 1024, 3072, 3073)) << 20
        config["memory"] = memory
    except (ValueError, TypeError):
        return
    if config.get("parent") is None:
        low = min(memory, 3 << 30)
        parts.extents = [(0, low), *([(4 << 30, memory - low)] if memory > low else [])]
    parts.replace(notes.CONFIG, _encoded(config, rng))


_MUTATIONS = (*[_a_note] * 10, *[_notes_as_a_sequence] * 2, *[_extents] * 2, _memory_size)


def _json(payload: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """One value replaced, deleted or doubled, wherever it is."""
    try:
        top = json.loads(payload)
    except (ValueError, RecursionError):
        return mutate(payload, len(payload) + 64)
    places: list[tuple[Any, Any]] = []
    stack = [top]
    while stack:
        value = stack.pop()
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        places += [(value, key) for key in keys]
        stack += [value[key] for key in keys]
    if not places or rng.random() < 0.1:
        return mutate(payload, len(payload) + 64)
    holder, key = rng.choice(places)
    old = holder[key]
    match rng.randrange(6):
        case 0 if isinstance(old, int):
            holder[key] = old + rng.choice((-4096, -1, 1, 4096))
        case 1 if isinstance(old, str):
            holder[key] = mutate(old.encode(errors="replace"), len(old) + 32).decode(errors="replace")
        case 2:
            del holder[key]
        case 3 if isinstance(holder, list):
            holder.append(old)
        case 4:
            other, place = rng.choice(places)
            try:
                holder[key] = other[place]
            except LookupError:
                pass
        case _:
            holder[key] = rng.choice(_VALUES)
    return _encoded(top, rng)


def _encoded(value: Any, rng: random.Random) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    except (ValueError, RecursionError):  # one that holds itself
        return b"[]"


def _substate(payload: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    vcpu, name, raw = payload[:4], payload[4:28], payload[28:]
    size = _ENTRY_SIZES.get(name.rstrip(b"\0").decode("latin-1"))
    match rng.randrange(12):
        case 0:
            vcpu = rng.choice((0, 1, 2, _MACHINE)).to_bytes(4, "little")
        case 1:
            name = rng.choice(_SUBSTATES).encode().ljust(24, b"\0")
        case 2:
            name = mutate(name, 24).ljust(24, b"\0")
        case 3:
            raw = mutate(raw, len(raw) + 64)
        case 4:
            raw = raw[: rng.randrange(len(raw) + 1)]
        case 5 if name.startswith(b"sregs"):
            raw = (raw + bytes(8))[: 632 - len(raw)]
        case _ if size is not None:
            raw = _entries(raw, size, rng)
        case _:
            raw = _field(raw, rng)
    return vcpu + name + raw


def _entries(raw: bytes, size: int, rng: random.Random) -> bytes:
    """MSRs or CPUID leaves, one more or less or other, and their count."""
    entries = [bytearray(raw[at : at + size].ljust(size, b"\0")) for at in range(8, len(raw), size)]
    place = rng.randrange(len(entries)) if entries else 0
    match rng.randrange(4):
        case 0 if entries:
            del entries[place]
        case 1 if size == 16:
            index = rng.choice((*msrs.NAMES, 0x1B, 0x200, 0xFFFF_FFFF))
            entries.insert(place, bytearray(struct.pack("<IIQ", index, 0, rng.choice(_INTEGERS))))
        case 2 if entries:
            entries.insert(place, entries[place])
        case _ if entries:
            entries[place] = bytearray(_field(bytes(entries[place]), rng))
    return len(entries).to_bytes(8, "little") + b"".join(entries)


def _field(raw: bytes, rng: random.Random) -> bytes:
    """A number of 1 to 8 bytes somewhere in a struct."""
    width = rng.choice((1, 2, 4, 8))
    if len(raw) < width:
        return raw + b"\1"
    at = rng.randrange(len(raw) // width) * width
    return raw[:at] + (rng.choice(_INTEGERS) & (1 << 8 * width) - 1).to_bytes(width, "little") + raw[at + width :]


def _device(payload: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    if rng.random() < 0.1:
        return mutate(payload, len(payload) + 32)
    return payload[:32] + (_field(payload[32:], rng) if rng.random() < 0.7 else mutate(payload[32:], len(payload) + 8))


_PAYLOADS = {notes.CONFIG: _json, notes.LABEL: _json, notes.SUBSTATE: _substate, notes.DEVICE: _device}
