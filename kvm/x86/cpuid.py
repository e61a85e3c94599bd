"""CPUID as each VCPU sees it: the host's supported set with this machine's topology in it."""

from __future__ import annotations

from collections.abc import Iterable

from kvm.x86.structs import CpuidEntry, pack_cpuid

_TSC_DEADLINE = 1 << 24  # leaf 1 ECX: left out of KVM_GET_SUPPORTED_CPUID as it depends on the irqchip (api.rst 4.46)
_HTT = 1 << 28  # leaf 1 EDX: EBX[23:16] is valid


def for_vcpu(supported: Iterable[CpuidEntry], index: int, vcpus: int, *, tsc_deadline: bool) -> bytes:
    """``struct kvm_cpuid2`` of VCPU ``index`` of ``vcpus``: one package, one thread a core, APIC id = index."""
    entries = [CpuidEntry.from_buffer_copy(entry) for entry in supported]
    bits = (vcpus - 1).bit_length()
    for entry in entries:
        match entry.function:
            case 0x1:
                entry.ebx = (entry.ebx & 0xFFFF) | min(vcpus, 255) << 16 | (index & 0xFF) << 24
                entry.edx = entry.edx | _HTT if vcpus > 1 else entry.edx & ~_HTT
                entry.ecx = entry.ecx | _TSC_DEADLINE if tsc_deadline else entry.ecx & ~_TSC_DEADLINE
            case 0x4 if entry.eax & 0x1F:  # a cache: shared by one thread, cores in the package (SDM 2A, CPUID.4)
                entry.eax = entry.eax & 0x3FFF | min(vcpus - 1, 63) << 26
            case 0xB | 0x1F:
                _topology_level(entry, index, vcpus, bits)
            case 0x80000008:
                entry.ecx = (vcpus - 1) & 0xFF | bits << 12
            case 0x8000001E:
                entry.eax, entry.ebx, entry.ecx = index, index, 0
    return pack_cpuid(entries)


def version(cpuid: bytes) -> int:
    """CPUID leaf 1 EAX: what EDX holds after a reset (SDM vol. 3, table 10-1)."""
    count = int.from_bytes(cpuid[:4], "little")
    entries = (CpuidEntry * count).from_buffer_copy(cpuid, 8)
    return next((entry.eax for entry in entries if entry.function == 1), 0x600)


def _topology_level(entry: CpuidEntry, index: int, vcpus: int, bits: int) -> None:
    """Extended topology: level 0 the threads of a core (one), level 1 the cores of the package."""
    levels = {0: (0, 1, 1), 1: (bits, vcpus, 2)}
    shift, count, kind = levels.get(entry.index, (0, 0, 0))
    entry.eax, entry.ebx, entry.ecx, entry.edx = shift, count, kind << 8 | entry.index, index
