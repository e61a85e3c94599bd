"""vmdeck's own notes and the file's head around them: packed, and decoded with nothing taken on trust.

The layout, with offsets, is in FORMAT.md.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE
from kvm.boot.entry import LongMode, ProtectedMode, RealMode, ResetVector
from kvm.boot.image import Entry
from kvm.snapshot import core
from kvm.snapshot.core import Extent
from kvm.snapshot.state import MachineState
from kvm.x86 import layout
from kvm.x86.structs import MSR_ENTRY, CpuidEntry, Fpu, Lapic, MpState, Regs, Sregs, Sregs2, VcpuEvents, Xcrs, Xsave

OWNER = b"VMDECK"
VERSION = 1
FORMAT, CONFIG, LABEL, SUBSTATE, DEVICE, CHUNKS = range(0x564D_0001, 0x564D_0007)

DATA_ALIGN = 1 << 16
"""Of guest memory in the file: every host's page size divides it."""
CHUNK = 1 << 20
"""Bytes of the file, from the head's end on, that one checksum covers."""
MAX_HEAD = 64 << 20
MAX_VCPUS = 4096
MAX_IMAGE = 1 << 30
"""Bytes of the guest's image, which is read at once."""
_MOST = {
    CONFIG: (1 << 20, "the description of the guest's image"), LABEL: (64 << 10, "name and note"),
    SUBSTATE: (64 << 10, "a substate"), DEVICE: (1 << 20, "a device's state, with the input that waits for the guest,"),
}  # fmt: skip
"""Bytes of a payload, and what it is to a person. A JSON text, decoded, takes 30 times its size, an MSR 10 times:
with these and ``_MOST_NAMED`` what a reader holds stays in proportion to the head (FORMAT.md, Reading)."""
_MOST_NAMED = 64
"""Substates of a VCPU, and devices."""
_YEAR_3000 = 32_503_680_000

_FORMAT = struct.Struct("<IIQQQ16s16s")
_FORMAT_NOTE = core.NHDR.size + 8 + _FORMAT.size
_CHECKSUM_AT = _FORMAT_NOTE - 16
_SUBSTATE = struct.Struct("<I24s")
_DEVICE = struct.Struct("<32s")
_MACHINE = 0xFFFF_FFFF
_SMALLEST = core.EHDR.size + core.PHDR.size + _FORMAT_NOTE

_ENTRIES: dict[str, type] = {kind.__name__: kind for kind in (ResetVector, RealMode, ProtectedMode, LongMode)}
_SIZES = {
    "regs": {ctypes.sizeof(Regs)}, "sregs": {ctypes.sizeof(Sregs), ctypes.sizeof(Sregs2)},
    "events": {ctypes.sizeof(VcpuEvents)}, "mp_state": {ctypes.sizeof(MpState)}, "lapic": {ctypes.sizeof(Lapic)},
    "fpu": {ctypes.sizeof(Fpu)}, "xcrs": {ctypes.sizeof(Xcrs)}, "tsc_khz": {4},
}  # fmt: skip
"""Sizes of what readers look into; the rest is checked against the machine that takes it."""
_COUNTED = dict.fromkeys(("msrs", "msrs_reset", "tsc_deadline"), MSR_ENTRY.size) | {"cpuid": ctypes.sizeof(CpuidEntry)}
"""Sizes of the entries behind a count of 8 bytes."""
_NEEDED = ("regs", "sregs")

T = TypeVar("T")


class Damaged(ValueError):
    """What the bytes can't be; the message names the place."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The file that an incremental one builds on; ``path`` is where it was, from the child's folder."""

    identity: bytes
    path: str


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The guest image as a reset needs it: ``size`` bytes in the file, after the last memory segment.

    ``segments`` are (address, size, bytes stored); those bytes lie one after the other.
    """

    path: str
    format: str
    entry: Entry
    size: int
    segments: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Head:
    """All that a snapshot file holds but its memory. Sizes in bytes, ``taken`` is time.time()."""

    vcpus: int
    memory: int
    rom: int
    backend: str
    taken: float
    why: str
    name: str
    note: str
    parent: Parent | None
    image: StoredImage | None
    """Where there is a parent, the first ancestor has it."""
    state: MachineState
    extents: tuple[Extent, ...]
    chunks: NDArray[np.uint64]
    identity: bytes
    size: int
    """The head's own: memory begins there."""
    file_size: int


@dataclass(frozen=True, slots=True)
class Draft:
    """What ``pack`` makes a head of: a :class:`Head` whose offsets and checksums aren't known yet.

    ``extents`` are (address, size), ascending; ``file_pages`` counts theirs and the image's pages.
    """

    vcpus: int
    memory: int
    rom: int
    backend: str
    taken: float
    why: str
    name: str
    note: str
    parent: Parent | None
    image: StoredImage | None
    state: MachineState
    extents: tuple[tuple[int, int], ...]
    chunks: int
    file_pages: int
    vmcoreinfo: bytes = b""
    """What the guest offers to debuggers: it's in memory too."""


def head_size(draft: Draft) -> int:
    """The head's size: it doesn't depend on what the checksums are."""
    return -(-len(_body(draft, np.zeros(draft.chunks, np.uint64))[0]) // DATA_ALIGN) * DATA_ALIGN


def pack(draft: Draft, chunks: NDArray[np.uint64]) -> tuple[bytes, bytes]:
    """The head, and the identity by which a child names this file."""
    body, identity = _body(draft, chunks)
    size = -(-len(body) // DATA_ALIGN) * DATA_ALIGN
    head = bytearray(body.ljust(size, b"\0"))
    at = core.EHDR.size + core.PHDR.size * (1 + len(draft.extents))
    seal = core.note(
        OWNER, FORMAT,
        _FORMAT.pack(VERSION, 0, size, size + draft.file_pages * PAGE_SIZE, CHUNK, identity, bytes(16)),
    )  # fmt: skip
    head[at : at + len(seal)] = seal
    # The program headers hold offsets that depend on the head's size.
    offset = size
    phdrs = [core.note_segment(at, len(body) - at)]
    for address, length in draft.extents:
        phdrs.append(core.load_segment(Extent(address, offset, length), PAGE_SIZE))
        offset += length
    head[core.EHDR.size : at] = b"".join(phdrs)
    head[at + _CHECKSUM_AT : at + _FORMAT_NOTE] = xxhash.xxh3_128_digest(head)
    return bytes(head), identity


def _body(draft: Draft, chunks: NDArray[np.uint64]) -> tuple[bytes, bytes]:
    """Headers and notes, offsets and seal still blank; and the identity."""
    config = {
        "vcpus": draft.vcpus, "memory": draft.memory, "rom": draft.rom, "backend": draft.backend,
        "taken": draft.taken, "why": draft.why,
        "parent": draft.parent and {"identity": draft.parent.identity.hex(), "path": draft.parent.path},
        "image": draft.image and {
            "path": draft.image.path, "format": draft.image.format,
            "entry": {"kind": type(draft.image.entry).__name__, **asdict(draft.image.entry)},  # type: ignore[call-overload]
            "size": draft.image.size, "segments": draft.image.segments,
        },
    }  # fmt: skip
    copies = [*enumerate(draft.state.vcpus), (_MACHINE, draft.state.machine)]
    named = [
        (CONFIG, _json(config)),
        *((SUBSTATE, _SUBSTATE.pack(vcpu, key.encode()) + raw) for vcpu, copy in copies for key, raw in copy.items()),
        *((DEVICE, _DEVICE.pack(key.encode()) + raw) for key, raw in draft.state.devices.items()),
        (CHUNKS, chunks.astype("<u8").tobytes()),
    ]
    own = [(LABEL, _json({"name": draft.name, "note": draft.note})), *named]
    if draft.image and draft.image.size > MAX_IMAGE:
        raise ValueError(f"the guest's image has {draft.image.size >> 20} MiB, more than {MAX_IMAGE >> 20}")
    for kind, payload in own:
        if kind in _MOST and len(payload) > _MOST[kind][0]:
            most, what = _MOST[kind]
            raise ValueError(f"{what} would have {len(payload)} bytes, more than the {most} that a reader takes")
    body = b"".join((
        core.elf_header(1 + len(draft.extents)),
        bytes(core.PHDR.size * (1 + len(draft.extents))),
        core.note(OWNER, FORMAT, bytes(_FORMAT.size)),
        core.guest_notes(draft.state.vcpus, draft.vmcoreinfo),
        *(core.note(OWNER, kind, payload) for kind, payload in own),
    ))  # fmt: skip
    return body, _identity(draft.extents, [payload for _, payload in named])


def _identity(extents: Sequence[tuple[int, int]], payloads: Sequence[bytes]) -> bytes:
    """Over the state and, by the chunks' checksums, memory. Not over name and note: they may change."""
    digest = xxhash.xxh3_128(np.array(extents, "<u8").tobytes())
    for payload in payloads:
        digest.update(len(payload).to_bytes(8, "little") + payload)
    return digest.digest()


def _json(value: object) -> bytes:
    # "replace": a path on Linux may be no text at all.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


# Reading


def head_bytes(start: bytes, file_size: int) -> int:
    """How many bytes the head has, given the file's first ``core.EHDR.size``; more if ``start`` is too short for it.

    Raises Damaged for what isn't a whole snapshot of this version.
    """
    if len(start) < core.EHDR.size:
        raise Damaged(f"it has only {len(start)} bytes" if start else "it's empty")
    header = core.EHDR.unpack_from(start)
    if header[0][:4] != core.IDENT[:4]:
        raise Damaged("it isn't an ELF file")
    segments: int = header[10]
    if start[: core.EHDR.size] != core.elf_header(segments) or not segments:
        raise Damaged("its ELF header isn't that of a vmdeck snapshot (an ELF core of x86-64)")
    at = core.EHDR.size + core.PHDR.size * segments
    if len(start) < at + _FORMAT_NOTE:
        if file_size < at + _FORMAT_NOTE:
            raise Damaged(f"it's cut off in its headers, after {file_size} bytes")
        return at + _FORMAT_NOTE
    size, kind = core.NHDR.unpack_from(start, at)[1:]
    if start[at + core.NHDR.size : at + core.NHDR.size + 7] != OWNER + b"\0" or kind != FORMAT:
        raise Damaged("its first note isn't vmdeck's: another program's core, or damaged")
    fields: tuple[int, ...] = _FORMAT.unpack_from(start, at + core.NHDR.size + 8)
    version, _, head, expected, chunk = fields[:5]
    if version != VERSION:
        raise Damaged(
            f"its format is version {version}, this vmdeck knows version {VERSION}. "
            f"Open it with {'a newer' if version > VERSION else 'the'} vmdeck that knows it"
        )
    fits = at + _FORMAT_NOTE <= head <= min(expected, MAX_HEAD)
    if size != _FORMAT.size or chunk != CHUNK or head % DATA_ALIGN or not fits:
        raise Damaged("its format note is damaged")
    if file_size != expected:
        how = "cut off" if file_size < expected else "longer than it was written"
        raise Damaged(f"it's {how}: {file_size} bytes, not {expected}")
    return head


def unpack(head: bytes) -> Head:
    """Decode a head, whole. Raises Damaged."""
    segments = core.EHDR.unpack_from(head)[10]
    at = core.EHDR.size + core.PHDR.size * segments
    _, flags, size, file_size, _, identity, checksum = _FORMAT.unpack_from(head, at + core.NHDR.size + 8)
    digest = xxhash.xxh3_128(memoryview(head)[: at + _CHECKSUM_AT])
    digest.update(bytes(16))
    digest.update(memoryview(head)[at + _FORMAT_NOTE :])
    if digest.digest() != checksum:
        raise Damaged("its headers and notes don't match their checksum")
    try:
        extents, raw = _program_headers(head, segments, size)
        return _decode(_own(raw), extents, identity, size, file_size, flags)
    except (ValueError, KeyError, TypeError, struct.error, RecursionError, OverflowError) as error:
        raise error if isinstance(error, Damaged) else Damaged(f"its notes can't be decoded ({error!r})") from error


def _own(raw: memoryview) -> list[tuple[int, bytes]]:
    """Type and payload of vmdeck's own notes. Other tools' aren't looked at."""
    own: list[tuple[int, bytes]] = []
    for owner, kind, payload in core.notes(raw):
        if owner != OWNER:
            continue
        if not FORMAT <= kind <= CHUNKS:
            raise Damaged("it has notes that this version doesn't know")
        if kind in _MOST and len(payload) > _MOST[kind][0]:
            raise Damaged(f"it has a note of type {kind:#x} with {len(payload)} bytes")
        own.append((kind, payload))
        if len(own) > _MOST_NAMED * (MAX_VCPUS + 2):
            raise Damaged(f"it has more than {len(own)} notes")
    return own


def _program_headers(head: bytes, count: int, size: int) -> tuple[tuple[Extent, ...], memoryview]:
    headers = list(core.PHDR.iter_unpack(head[core.EHDR.size : core.EHDR.size + core.PHDR.size * count]))
    start, length = headers[0][2], headers[0][5]
    if core.note_segment(start, length) != core.PHDR.pack(*headers[0]) or start + length > size:
        raise Damaged("its note segment is no such")
    if start != core.EHDR.size + core.PHDR.size * count:
        raise Damaged("its notes don't follow its headers")
    extents: list[Extent] = []
    offset = size
    for header in headers[1:]:
        extent = Extent(header[3], offset, header[5])
        if core.load_segment(extent, PAGE_SIZE) != core.PHDR.pack(*header) or extent.size % PAGE_SIZE:
            raise Damaged(f"its memory segment at {extent.address:#x} doesn't follow the one before")
        if extent.address % PAGE_SIZE or not extent.size or (extents and extent.address < extents[-1].end):
            raise Damaged(f"its memory segment at {extent.address:#x} overlaps another or isn't page-aligned")
        extents.append(extent)
        offset += extent.size
    return tuple(extents), memoryview(head)[start : start + length]


def _decode(
    own: list[tuple[int, bytes]], extents: tuple[Extent, ...], identity: bytes, size: int, file_size: int, flags: int
) -> Head:  # fmt: skip
    if flags:
        raise Damaged("it has flags that this version doesn't know")
    by_kind = {kind: [payload for this, payload in own if this == kind] for kind in range(FORMAT, CHUNKS + 1)}
    for kind in (FORMAT, CONFIG, LABEL, CHUNKS):
        if len(by_kind[kind]) != 1:
            raise Damaged(f"it has {len(by_kind[kind])} notes of type {kind:#x}, not one")
    config, label = json.loads(by_kind[CONFIG][0]), json.loads(by_kind[LABEL][0])
    vcpus, memory = _get(config, "vcpus", int), _get(config, "memory", int)
    if not 1 <= vcpus <= MAX_VCPUS or not layout.MIN_MEMORY <= memory <= layout.MAX_MEMORY or memory % PAGE_SIZE:
        raise Damaged(f"its configuration can't be: {vcpus} VCPUs, {memory} bytes of memory")
    taken = _get(config, "taken", float)
    if not 0 <= taken < _YEAR_3000:
        raise Damaged(f"it was taken at {taken} s")
    rom = _get(config, "rom", int)
    if not 0 <= rom <= layout.MAX_ROM or rom % PAGE_SIZE:
        raise Damaged(f"its configuration can't be: {rom} bytes of ROM")
    parent = None
    if config["parent"] is not None:
        parent = Parent(bytes.fromhex(_get(config["parent"], "identity", str)), _get(config["parent"], "path", str))
        if len(parent.identity) != 16 or "\0" in parent.path:
            raise Damaged("its parent's name is no such")
    _check_extents(extents, layout.ram(memory), [(layout.ROM_END - rom, rom)] if rom else [], whole=parent is None)
    stored = sum(extent.size for extent in extents)
    image = None if config["image"] is None else _image(config["image"], memory)
    if (image is None) != (parent is not None):
        raise Damaged("either a parent or a guest image must be in it")
    image_pages = 0 if image is None else -(-image.size // PAGE_SIZE)
    if file_size != size + stored + image_pages * PAGE_SIZE:
        raise Damaged("its memory and its size don't agree")
    chunks = np.frombuffer(by_kind[CHUNKS][0], "<u8").astype(np.uint64)
    if len(chunks) != -(-(file_size - size) // CHUNK):
        raise Damaged(f"it has {len(chunks)} checksums of memory for {file_size - size} bytes")
    if (
        _identity([(e.address, e.size) for e in extents], [p for kind, p in own if kind not in (FORMAT, LABEL)])
        != identity
    ):
        raise Damaged("its identity doesn't match what it holds")
    return Head(
        vcpus, memory, rom, _get(config, "backend", str), taken,
        _get(config, "why", str), _get(label, "name", str), _get(label, "note", str), parent, image,
        _state(by_kind[SUBSTATE], by_kind[DEVICE], vcpus), extents, chunks, identity, size, file_size,
    )  # fmt: skip


def _check_extents(
    extents: Sequence[Extent], ram: Sequence[tuple[int, int]], rom: Sequence[tuple[int, int]], *, whole: bool
) -> None:
    """All of the machine's memory, or parts of its RAM and all of its ROM or nothing."""
    places = [(extent.address, extent.size) for extent in extents]
    if whole and places != sorted((*ram, *rom)):
        raise Damaged("its memory segments aren't all of the machine's memory")
    for address, size in places:
        if (address, size) not in rom and not _inside(address, size, ram):
            raise Damaged(f"its memory segment at {address:#x} lies outside the machine's memory")


def _inside(address: int, size: int, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(start <= address and address + size <= start + length for start, length in ranges)


def _image(raw: Mapping[str, Any], memory: int) -> StoredImage:
    fields = dict(raw["entry"])
    kind = _ENTRIES[fields.pop("kind")]
    if any(type(value) is not int or not 0 <= value < 1 << 64 for value in fields.values()):
        raise Damaged("its guest image's entry state is no such")
    segments = []
    for address, size, data in raw["segments"]:
        if not all(type(value) is int for value in (address, size, data)) or not 0 <= data <= size:
            raise Damaged("a segment of its guest image is no such")
        if not _inside(address, size, layout.ram(memory)):
            raise Damaged(f"the segment of its guest image at {address:#x} lies outside RAM")
        segments.append((address, size, data))
    ordered = sorted((address, address + size) for address, size, _ in segments if size)
    if any(end > start for (_, end), (start, _) in pairwise(ordered)):
        raise Damaged("segments of its guest image overlap")
    size = _get(raw, "size", int)
    if sum(data for _, _, data in segments) != size or size > MAX_IMAGE:
        raise Damaged("its guest image's segments and size don't agree, or are too large")
    return StoredImage(
        _get(raw, "path", str), _get(raw, "format", str), kind(**fields), size, tuple(segments)
    )  # fmt: skip


def _state(substates: Sequence[bytes], devices: Sequence[bytes], vcpus: int) -> MachineState:
    copies: dict[int, dict[str, bytes]] = {index: {} for index in (*range(vcpus), _MACHINE)}
    for payload in substates:
        vcpu, raw_name = _SUBSTATE.unpack_from(payload)
        name, raw = _name(raw_name), payload[_SUBSTATE.size :]
        if vcpu not in copies or name in copies[vcpu] or len(copies[vcpu]) == _MOST_NAMED:
            raise Damaged(f"it has a substate {name} of VCPU {vcpu} twice, of one that there isn't, or too many")
        if name in _COUNTED:
            right = len(raw) == 8 + int.from_bytes(raw[:8], "little") * _COUNTED[name]
        elif name == "xsave":
            right = len(raw) >= ctypes.sizeof(Xsave)
        else:
            right = len(raw) in _SIZES.get(name, {len(raw)})
        if not right:
            raise Damaged(f"its {name} of VCPU {vcpu} has {len(raw)} bytes")
        copies[vcpu][name] = raw
    for index in range(vcpus):
        if missing := [name for name in _NEEDED if name not in copies[index]]:
            raise Damaged(f"it lacks VCPU {index}'s {', '.join(missing)}")
    by_name = {_name(raw[: _DEVICE.size]): raw[_DEVICE.size :] for raw in devices}
    if len(by_name) != len(devices) or len(devices) > _MOST_NAMED or any(len(raw) < _DEVICE.size for raw in devices):
        raise Damaged(f"it has a device twice, less of one than its name, or more than {_MOST_NAMED}")
    return MachineState(tuple(copies[index] for index in range(vcpus)), copies[_MACHINE], by_name)


def _name(raw: bytes) -> str:
    """A name that can stand in a message."""
    name = raw.rstrip(b"\0").decode("ascii")
    if not name.isprintable():
        raise Damaged(f"it has a substate or device with the name {name!r}")
    return name


def _get(mapping: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = mapping[key]
    if type(value) is not kind:
        raise Damaged(f"its {key} isn't {kind.__name__}")
    if isinstance(value, str):
        value.encode()  # JSON's escapes can hold half a character, which nothing could print
    return value
