"""What every tool that reads ELF cores understands: the headers, the notes' framing, the threads.

NT_PRSTATUS is Linux's ``struct elf_prstatus`` of x86-64, the "QEMU" note QEMU's ``QEMUCPUState`` (target/i386/
arch_dump.c). Both are for other people's tools: vmdeck reads its own notes only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvm.x86.structs import SREGS_HEAD, Regs, Segment, Sregs, unpack_msrs

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
NHDR = struct.Struct("<III")
IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
ET_CORE, EM_X86_64, EV_CURRENT = 4, 62, 1
PT_LOAD, PT_NOTE = 1, 4
_READ_WRITE_EXECUTE = 7
MAX_SEGMENTS = 0xFFFE
"""Without the extended numbering that not every reader knows."""

NT_PRSTATUS, NT_FPREGSET = 1, 2
_QEMU_CPU_STATE = 0
_QEMU = b"QEMU\0\0\0"
"""The owner, 8 bytes with its NUL instead of 5: the same name to crash and readelf, but drgn, which takes a file with
QEMU's own for a Linux guest's and refuses it without VMCOREINFO, opens it and shows the threads."""

VMCOREINFO, VMCOREINFO_TYPE = b"VMCOREINFO", 0
"""Linux's own note, as its crash dumps have it."""

_PRSTATUS = struct.Struct("<iiihxxQQiiii64x27Qi4x")
_QEMU_HEAD = struct.Struct("<II18Q")
_QEMU_SEGMENT = struct.Struct("<IIIIQ")
_QEMU_TAIL = struct.Struct("<6Q")
_MSR_KERNEL_GS_BASE = 0xC0000102
_FXSAVE = 512


@dataclass(frozen=True, slots=True)
class Extent:
    """``size`` bytes of guest memory at a guest-physical ``address``, at ``offset`` in the file; all page-aligned."""

    address: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


def elf_header(segments: int) -> bytes:
    """The ELF header of a core with so many program headers, which follow it."""
    return EHDR.pack(
        IDENT, ET_CORE, EM_X86_64, EV_CURRENT, 0, EHDR.size, 0, 0, EHDR.size, PHDR.size, segments, 0, 0, 0
    )  # fmt: skip


def note_segment(offset: int, size: int) -> bytes:
    """The program header of the notes."""
    return PHDR.pack(PT_NOTE, 0, offset, 0, 0, size, 0, 4)


def load_segment(extent: Extent, alignment: int) -> bytes:
    """The program header of guest memory: a debugger without paging finds it at its physical address."""
    return PHDR.pack(
        PT_LOAD, _READ_WRITE_EXECUTE, extent.offset, extent.address, extent.address, extent.size, extent.size, alignment
    )  # fmt: skip


def note(owner: bytes, kind: int, payload: bytes) -> bytes:
    """One note; owner and payload padded to 4 bytes each, as Linux does for ELF64 too."""
    name = owner + b"\0"
    return NHDR.pack(len(name), len(payload), kind) + _padded(name) + _padded(payload)


def notes(raw: bytes | memoryview) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, type and payload of each note. Raises ValueError for what is no sequence of notes."""
    at = 0
    while at < len(raw):
        if at + NHDR.size > len(raw):
            raise ValueError("a note's header reaches beyond the notes")
        name_size, size, kind = NHDR.unpack_from(raw, at)
        start = at + NHDR.size
        payload = start + -(-name_size // 4) * 4
        at = payload + -(-size // 4) * 4
        if at > len(raw):
            raise ValueError("a note reaches beyond the notes")
        yield bytes(raw[start : start + name_size]).rstrip(b"\0"), kind, bytes(raw[payload : payload + size])


def guest_notes(vcpus: Sequence[Mapping[str, bytes]], vmcoreinfo: bytes) -> bytes:
    """What makes every VCPU a thread, in VCPU order, then QEMU's note for each, then Linux's if the guest has one."""
    threads = b"".join(_thread(index, copy) for index, copy in enumerate(vcpus))
    qemu = b"".join(note(_QEMU, _QEMU_CPU_STATE, qemu_cpu_state(copy)) for copy in vcpus)
    return threads + qemu + (note(VMCOREINFO, VMCOREINFO_TYPE, vmcoreinfo) if vmcoreinfo else b"")


def prstatus(index: int, regs: Regs, sregs: Sregs) -> bytes:
    """``struct elf_prstatus``, 336 bytes; the thread's id is ``index`` + 1, as 0 is nobody's."""
    registers = (
        *(getattr(regs, name) for name in ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8")),
        regs.rax, regs.rcx, regs.rdx, regs.rsi, regs.rdi, 0xFFFF_FFFF_FFFF_FFFF,  # orig_rax: in no system call
        regs.rip, sregs.cs.selector, regs.rflags, regs.rsp, sregs.ss.selector,
        sregs.fs.base, sregs.gs.base, sregs.ds.selector, sregs.es.selector, sregs.fs.selector, sregs.gs.selector,
    )  # fmt: skip
    return _PRSTATUS.pack(0, 0, 0, 0, 0, 0, index + 1, 0, 0, 0, *registers, 1)


def qemu_cpu_state(copy: Mapping[str, bytes]) -> bytes:
    """``QEMUCPUState`` version 1, 440 bytes."""
    regs, sregs = _registers(copy)
    msrs = unpack_msrs(copy["msrs"]) if "msrs" in copy else {}
    head = (
        *(getattr(regs, name) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        *(getattr(regs, f"r{number}") for number in range(8, 16)),
        regs.rip, regs.rflags,
    )  # fmt: skip
    segments = [_qemu_segment(getattr(sregs, name)) for name in ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr")]
    tables = [_QEMU_SEGMENT.pack(0, table.limit, 0, 0, table.base) for table in (sregs.gdt, sregs.idt)]
    size = _QEMU_HEAD.size + 10 * _QEMU_SEGMENT.size + _QEMU_TAIL.size
    control = (sregs.cr0, 0, sregs.cr2, sregs.cr3, sregs.cr4)
    tail = _QEMU_TAIL.pack(*control, msrs.get(_MSR_KERNEL_GS_BASE, 0))
    return _QEMU_HEAD.pack(1, size, *head) + b"".join((*segments, *tables)) + tail


def _thread(index: int, copy: Mapping[str, bytes]) -> bytes:
    status = note(b"CORE", NT_PRSTATUS, prstatus(index, *_registers(copy)))
    if "xsave" not in copy:
        return status
    # XSAVE begins with an FXSAVE image, which is Linux's struct user_fpregs_struct.
    return status + note(b"CORE", NT_FPREGSET, copy["xsave"][:_FXSAVE])


def _registers(copy: Mapping[str, bytes]) -> tuple[Regs, Sregs]:
    """Regs, and of sregs or sregs2 what both begin with."""
    head = copy["sregs"][:SREGS_HEAD]
    return Regs.from_buffer_copy(copy["regs"]), Sregs.from_buffer_copy(head + bytes(32))


def _qemu_segment(segment: Segment) -> bytes:
    """Flags as in a descriptor's second word (SDM vol. 3, 3.4.5)."""
    flags = (
        segment.type << 8 | segment.s << 12 | segment.dpl << 13 | segment.present << 15
        | segment.avl << 20 | segment.l << 21 | segment.db << 22 | segment.g << 23
    )  # fmt: skip
    return _QEMU_SEGMENT.pack(segment.selector, segment.limit, flags, 0, segment.base)


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 4)
