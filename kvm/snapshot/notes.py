"""vmdeck's own notes and the file's head around them: packed, and decoded with nothing taken on trust.

The layout, with offsets, is in FORMAT.md.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
"""The most that reading a file takes into memory at once, but for what it's mapped for."""
MAX_VCPUS = 4096
MAX_LABEL = 64 << 10
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
    "fpu": {ctypes.sizeof(Fpu)}, "xcrs": {ctypes.sizeof(Xcrs)},
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
    label = _json({"name": draft.name, "note": draft.note})
    if len(label) > MAX_LABEL:
        raise ValueError(f"name and note have {len(label)} bytes, more than {MAX_LABEL}")
    body = b"".join((
        core.elf_header(1 + len(draft.extents)),
        bytes(core.PHDR.size * (1 + len(draft.extents))),
        core.note(OWNER, FORMAT, bytes(_FORMAT.size)),
        core.cpu_notes(draft.state.vcpus),
        core.note(OWNER, LABEL, label),
        *(core.note(OWNER, kind, payload) for kind, payload in named),
    ))  # fmt: skip
    return body, _identity(draft.extents, [payload for _, payload in named])


def _identity(extents: Sequence[tuple[int, int]], payloads: Sequence[bytes]) -> bytes:
    """Over the state and, by the chunks' checksums, memory. Not over name and note: they may change."""
    digest = xxhash.xxh3_128(np.array(extents, "<u8").tobytes())
    for payload in payloads:
        digest.update(len(payload).to_bytes(8, "little") + payload)
    return digest.digest()


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


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
    if size != _FORMAT.size or chunk != CHUNK or not at < head <= MAX_HEAD or head % DATA_ALIGN or expected < head:
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
        return _decode(list(core.notes(raw)), extents, identity, size, file_size, flags)
    except (ValueError, KeyError, TypeError, struct.error, RecursionError, OverflowError) as error:
        raise error if isinstance(error, Damaged) else Damaged(f"its notes can't be decoded ({error})") from error


def _program_headers(head: bytes, count: int, size: int) -> tuple[tuple[Extent, ...], bytes]:
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
    return tuple(extents), head[start : start + length]


def _decode(
    found: list[tuple[bytes, int, bytes]], extents: tuple[Extent, ...], identity: bytes, size: int, file_size: int,
    flags: int,
) -> Head:  # fmt: skip
    own = [(kind, payload) for owner, kind, payload in found if owner == OWNER]
    if flags or any(not FORMAT <= kind <= CHUNKS for kind, _ in own):
        raise Damaged("it has notes or flags that this version doesn't know")
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
    regions = [*layout.ram(memory), *([(layout.ROM_END - rom, rom)] if rom else [])]
    _check_extents(extents, regions, whole=parent is None)
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


def _check_extents(extents: Sequence[Extent], regions: Sequence[tuple[int, int]], *, whole: bool) -> None:
    if whole:
        if [(extent.address, extent.size) for extent in extents] != sorted(regions):
            raise Damaged("its memory segments aren't all of the machine's memory")
        return
    for extent in extents:
        if not any(start <= extent.address and extent.end <= start + size for start, size in regions):
            raise Damaged(f"its memory segment at {extent.address:#x} lies outside the machine's memory")


def _image(raw: Mapping[str, Any], memory: int) -> StoredImage:
    fields = dict(raw["entry"])
    kind = _ENTRIES[fields.pop("kind")]
    if any(type(value) is not int or not 0 <= value < 1 << 64 for value in fields.values()):
        raise Damaged("its guest image's entry state is no such")
    segments = []
    ranges = layout.ram(memory)
    for address, size, data in raw["segments"]:
        if not all(type(value) is int for value in (address, size, data)) or not 0 <= data <= size:
            raise Damaged("a segment of its guest image is no such")
        if not any(start <= address and address + size <= start + length for start, length in ranges):
            raise Damaged(f"the segment of its guest image at {address:#x} lies outside RAM")
        segments.append((address, size, data))
    size = _get(raw, "size", int)
    if sum(data for _, _, data in segments) != size:
        raise Damaged("its guest image's segments and size don't agree")
    return StoredImage(
        _get(raw, "path", str), _get(raw, "format", str), kind(**fields), size, tuple(segments)
    )  # fmt: skip


def _state(substates: Sequence[bytes], devices: Sequence[bytes], vcpus: int) -> MachineState:
    copies: dict[int, dict[str, bytes]] = {index: {} for index in (*range(vcpus), _MACHINE)}
    for payload in substates:
        vcpu, raw_name = _SUBSTATE.unpack_from(payload)
        name, raw = raw_name.rstrip(b"\0").decode(), payload[_SUBSTATE.size :]
        if vcpu not in copies or name in copies[vcpu]:
            raise Damaged(f"it has a substate {name} of VCPU {vcpu} twice, or of one that there isn't")
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
    by_name = {raw[: _DEVICE.size].rstrip(b"\0").decode(): raw[_DEVICE.size :] for raw in devices}
    if len(by_name) != len(devices) or any(len(raw) < _DEVICE.size for raw in devices):
        raise Damaged("it has a device twice, or less of one than its name")
    return MachineState(tuple(copies[index] for index in range(vcpus)), copies[_MACHINE], by_name)


def _get(mapping: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = mapping[key]
    if type(value) is not kind:
        raise Damaged(f"its {key} isn't {kind.__name__}")
    if isinstance(value, str):
        value.encode()  # JSON's escapes can hold half a character, which nothing could print
    return value
