"""The VCPUs' TSC offsets for a put of all of them: VCPU 0's TSC goes on from its copy's, and the others' stay as far
from it as the offsets in their copies are apart.

The TSC's MSR can't say that. KVM takes a zero, and a value within a second of what it expects, for a wish to be in step
with the VCPU written last, and drops the value; any other counts from the moment of the ioctl, so that VCPUs come to
stand apart (Linux x86.c, kvm_synchronize_tsc; QEMU 5286c3662294, Cloud Hypervisor #8437, Firecracker #6200). An offset
is exact: the guest's TSC is the host's, scaled, plus the offset (api.rst, devices/vcpu.rst, 4.1 KVM_VCPU_TSC_OFFSET).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvm.x86 import msrs
from kvm.x86.structs import MSR_ENTRY

FOUND_IN = ("msrs_reset", "tsc_offset")
"""The substates that hold a VCPU's TSC and its offset."""

_MASK = (1 << 64) - 1


def offsets(copies: Sequence[Mapping[str, bytes]], now: Mapping[str, bytes]) -> list[bytes]:
    """What each copy's ``tsc_offset`` is to be. ``now``: VCPU 0's FOUND_IN as the kernel holds them at this moment."""
    hosts = _tsc(now) - _offset(now)
    shift = _tsc(copies[0]) - hosts - _offset(copies[0])
    return [(_offset(copy) + shift & _MASK).to_bytes(8, "little") for copy in copies]


def _tsc(copy: Mapping[str, bytes]) -> int:
    for index, value in MSR_ENTRY.iter_unpack(copy["msrs_reset"][8:]):
        if index == msrs.TSC:
            return value  # type: ignore[no-any-return]
    return 0


def _offset(copy: Mapping[str, bytes]) -> int:
    return int.from_bytes(copy["tsc_offset"], "little")
