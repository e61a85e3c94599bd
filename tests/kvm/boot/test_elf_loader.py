"""ELF images: what loads and where, what is refused and why, and that no file does anything else."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm.boot.elf import load_elf
from kvm.boot.entry import LongMode, ProtectedMode
from kvm.boot.image import BootImage, Segment, Source
from kvm.boot.loader import detect, load
from kvm.errors import ImageError
from tests.kvm.boot.images import EM, PT_INTERP, PT_NOTE, ElfImage, Load, multiboot_header

MEMORY = 16 << 20
CODE = b"\xf4" * 16


def source(data: bytes, memory: int = MEMORY) -> Source:
    return Source("kernel.elf", data, memory, None)


def placed(image: BootImage) -> set[tuple[int, bytes, int]]:
    return {(segment.address, segment.data, segment.size) for segment in image.segments if segment.address >= 0x8000}


@pytest.mark.parametrize(("bits", "entry"), [(64, LongMode(0x100000)), (32, ProtectedMode(0x100000))])
def test_segments_go_to_their_physical_addresses(bits: int, entry: object) -> None:
    loads = (
        Load(0x100000, CODE),
        Load(0x200000, b"data", memsz=0x5000),
        Load(0x300000, memsz=0x1000),
        Load(0, b"n", type=PT_NOTE),
    )
    image = load_elf(source(ElfImage(bits, loads).build()))
    assert image.format == "elf"
    assert image.entry == entry
    assert placed(image) == {(0x100000, CODE, 16), (0x200000, b"data", 0x5000), (0x300000, b"", 0x1000)}


@pytest.mark.parametrize("entry", [0xFFFFFFFF80000004, 0x100004])
def test_a_kernel_linked_high_may_give_a_virtual_or_a_physical_entry(entry: int) -> None:
    high = Load(0x100000, CODE, vaddr=0xFFFFFFFF80000000)
    assert load_elf(source(ElfImage(64, (high,), entry=entry).build())).entry == LongMode(0x100004)


def test_sections_do_not_matter() -> None:
    assert load_elf(source(ElfImage(shoff=0xFFFFFFFFFFFF).build()))


def test_segments_may_lie_above_4_gib_but_not_the_entry() -> None:
    high = Load(4 << 30, CODE)
    assert load_elf(source(ElfImage(64, (Load(0x100000, CODE), high)).build(), memory=5 << 30))
    with pytest.raises(ImageError, match="above 4 GiB"):
        load_elf(source(ElfImage(64, (high,)).build(), memory=5 << 30))


HOLE = "where a PC has devices"
BEYOND = "doesn't fit into the guest's"
REFUSED = {
    "overlap": (ElfImage(loads=(Load(0x100000, CODE), Load(0x100008, CODE))), "overlap"),
    "over the page tables": (ElfImage(loads=(Load(0x100000, CODE), Load(0x1000, CODE))), "what vmdeck puts there"),
    "over the GDT": (ElfImage(loads=(Load(0x100000, CODE), Load(0, memsz=0x501))), "what vmdeck puts there"),
    "wraps": (ElfImage(loads=(Load((1 << 64) - 8, CODE),)), BEYOND),
    "wraps at 32 bits": (ElfImage(32, loads=(Load((1 << 32) - 8, CODE),)), BEYOND),
    "wild size": (ElfImage(loads=(Load(0x100000, CODE, memsz=(1 << 64) - 1),)), BEYOND),
    "beyond memory": (ElfImage(loads=(Load(MEMORY - 8, CODE),)), BEYOND),
    "file larger than memory size": (ElfImage(loads=(Load(0x100000, CODE, memsz=8),)), "16 bytes in the file but 8"),
    "data beyond the file": (ElfImage(loads=(Load(0x100000, CODE, filesz=0x1000),)), "cut off within ELF segment 0"),
    "data far beyond": (ElfImage(loads=(Load(0x100000, CODE, offset=(1 << 64) - 4),)), "cut off within ELF segment 0"),
    "headers beyond the file": (ElfImage(phoff=0x10000), "program headers"),
    "headers far beyond": (ElfImage(phoff=(1 << 64) - 1), "program headers"),
    "many headers": (ElfImage(phnum=0xFFFF), "65535 program headers"),
    "odd header size": (ElfImage(phentsize=8), "have 8 bytes, not 56"),
    "no segment": (ElfImage(loads=()), "nothing to load"),
    "no PT_LOAD": (ElfImage(loads=(Load(0x100000, CODE, type=PT_NOTE),)), "nothing to load"),
    "a program": (ElfImage(loads=(Load(0, b"/lib/ld.so", type=PT_INTERP), Load(0x400000, CODE))), "ELF interpreter"),
    "entry outside": (ElfImage(entry=0x200000), "entry point 0x200000 lies in none"),
    "entry in bss": (ElfImage(loads=(Load(0x100000, CODE, memsz=64),), entry=0x100020), "lies in none"),
    "arm": (ElfImage(machine=183), "64-bit ELF file for EM_AARCH64"),
    "x32": (ElfImage(32, machine=EM[64]), "32-bit ELF file for EM_X86_64"),
    "unknown machine": (ElfImage(machine=0xF00D), "ELF file for 61453"),
    "big-endian": (ElfImage(endian=2), "little-endian"),
    "neither 32 nor 64": (ElfImage(ident_class=7), "neither 32 nor 64"),
    "object file": (ElfImage(type=1), "ET_REL"),
    "shared": (ElfImage(type=3), "ET_DYN.*-no-pie"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    image, why = REFUSED[name]
    with pytest.raises(ImageError, match=why) as caught:
        load_elf(source(image.build()))
    assert str(caught.value).startswith("Can't load kernel.elf: ")


def test_the_mmio_hole_is_no_memory_however_much_there_is() -> None:
    image = ElfImage(loads=(Load(0x100000, CODE), Load(3 << 30, CODE)))
    with pytest.raises(ImageError, match=HOLE):
        load_elf(source(image.build(), memory=8 << 30))
    across = ElfImage(loads=(Load(0x100000, CODE, memsz=5 << 30),))
    with pytest.raises(ImageError, match=HOLE):
        load_elf(source(across.build(), memory=8 << 30))


@pytest.mark.parametrize("bits", [32, 64])
def test_every_truncation_is_refused(bits: int) -> None:
    data = ElfImage(bits, (Load(0x100000, CODE), Load(0x200000, CODE))).build()
    for size in range(len(data)):
        with pytest.raises(ImageError):
            load_elf(source(data[:size]))


corruptions = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from((32, 64)), st.booleans(), corruptions, st.binary(max_size=64))
def test_a_corrupted_image_loads_or_is_refused(
    bits: int, kludge: bool, changes: list[tuple[int, int]], tail: bytes
) -> None:
    """Nothing but ImageError comes out, and what loads lies in memory, apart from each other, with data that fits."""
    header = multiboot_header(0x10000, (0x100000, 0x100000, 0, 0, 0x100010)) if kludge else multiboot_header()
    data = bytearray(ElfImage(bits, (Load(0x100000, header + CODE), Load(0x200000, CODE, memsz=64))).build() + tail)
    for at, value in changes:
        if at < len(data):
            data[at] = value
    given_source = source(bytes(data))
    tracemalloc.start()
    try:
        image = load_either(given_source)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20
    if image is not None:
        ranges = sorted((segment.address, segment.address + segment.size) for segment in image.segments)
        assert all(before[1] <= after[0] for before, after in pairwise(ranges))
        assert ranges[-1][1] <= MEMORY
        assert all(len(segment.data) <= segment.size for segment in image.segments)
        assert entry_in(image.entry, image.segments)


def load_either(given_source: Source) -> BootImage | None:
    from kvm.boot.loader import FORMATS

    try:
        return FORMATS[detect(given_source)].load(given_source)
    except ImageError:
        return None


def entry_in(entry: object, segments: tuple[Segment, ...]) -> bool:
    address = getattr(entry, "eip", None) or getattr(entry, "rip", None)
    return address is None or any(s.address <= address < s.address + len(s.data) for s in segments)


def test_many_segments_of_the_same_large_piece_of_file_stay_within_memory(tmp_path: Path) -> None:
    """1,000 headers that each claim 4 MiB of the file: refused before anything is copied."""
    loads = tuple(Load(0x100000, filesz=4 << 20, offset=0x10000) for _ in range(1000))
    path = tmp_path / "bomb"
    path.write_bytes(ElfImage(64, loads).build().ljust(0x10000 + (4 << 20), b"\0"))
    with pytest.raises(ImageError, match="overlap"):
        load(path, memory=MEMORY)
