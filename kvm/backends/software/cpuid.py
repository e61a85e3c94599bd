"""What the emulated CPU is: the CPUID that the backend offers, and CPUID as a guest's entries answer it."""

from __future__ import annotations

from collections.abc import Iterable

from kvm.backends.software.context import PHYSICAL_BITS
from kvm.x86.structs import CpuidEntry

SIGNATURE = 0x306C4
"""Family 6, model 0x3c: the Haswell that Unicorn emulates unless told otherwise."""

_INDEXED = 1
_FEATURES_ECX = 0x82D8_2203
"""SSE3 PCLMUL SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES, hypervisor. Not RDRAND (the host's, so no two runs alike), not
XSAVE and AVX (Unicorn has none), not x2APIC, MONITOR."""
_FEATURES_EDX = 0x078B_BBFD
"""FPU to SSE2 without VME, MCA."""
_LEAF7_EBX = 0x389
"""FSGSBASE BMI1 SMEP BMI2 ERMS."""
_LEAF7_EDX = 1 << 29
"""ARCH_CAPABILITIES."""
_EXTENDED_ECX, _EXTENDED_EDX = 0x21, 0x2810_0800
"""LAHF and ABM; SYSCALL NX RDTSCP LM."""
_BRAND = b"vmdeck software CPU (Unicorn)".ljust(48, b"\0")


def _text(raw: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4))


_GENU, _NTEL, _INEI = _text(b"GenuntelineI")
_LEAVES: tuple[tuple[int, int | None, tuple[int, ...]], ...] = (
    (0x0, None, (0x15, _GENU, _NTEL, _INEI)),
    (0x1, None, (SIGNATURE, 0x800, _FEATURES_ECX, _FEATURES_EDX)),
    (0x2, None, (1, 0, 0, 0x2C307D)),
    (0x4, 0, (0x121, 0x01C0003F, 0x3F, 1)),
    (0x4, 1, (0x122, 0x01C0003F, 0x3F, 1)),
    (0x4, 2, (0, 0, 0, 0)),
    (0x7, 0, (0, _LEAF7_EBX, 0, _LEAF7_EDX)),
    (0xB, 0, (0, 0, 0, 0)),
    (0xB, 1, (0, 0, 0, 0)),
    (0x15, None, (1, 1, 1_000_000_000, 0)),  # a 1 GHz crystal: what the APIC timer counts, and × 1 the TSC
    (0x40000000, None, (0x40000000, *_text(b"vmdecksoftwr"))),
    (0x80000000, None, (0x80000008, 0, 0, 0)),
    (0x80000001, None, (SIGNATURE, 0, _EXTENDED_ECX, _EXTENDED_EDX)),
    (0x80000002, None, _text(_BRAND[:16])),
    (0x80000003, None, _text(_BRAND[16:32])),
    (0x80000004, None, _text(_BRAND[32:])),
    (0x80000007, None, (0, 0, 0, 0x100)),  # an invariant TSC
    (0x80000008, None, (0x3000 | PHYSICAL_BITS, 0, 0, 0)),
)


def supported() -> list[CpuidEntry]:
    """The entries for KVM_GET_SUPPORTED_CPUID."""
    return [
        CpuidEntry(function, index or 0, 0 if index is None else _INDEXED, *values)
        for function, index, values in _LEAVES
    ]


class CpuidTable:
    """A VCPU's entries, for lookup."""

    def __init__(self, entries: Iterable[CpuidEntry]) -> None:
        self._entries = {(entry.function, entry.index if entry.flags & _INDEXED else None): entry for entry in entries}

    def answer(self, function: int, index: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX; zeros for what isn't there."""
        entry = self._entries.get((function, None)) or self._entries.get((function, index))
        if entry is None:
            return 0, 0, 0, 0
        return entry.eax, entry.ebx, entry.ecx, entry.edx

    @property
    def signature(self) -> int:
        """Family, model and stepping: what EDX holds after INIT."""
        return self.answer(1, 0)[0] or SIGNATURE
