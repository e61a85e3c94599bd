"""Which of the MSRs that KVM lists can be carried: those that a VCPU, offered all that guests are, lets be read and be
written back.

The list says what the host has. A VCPU refuses some of it, for want of a bit in its CPUID or of a feature that is off
(Linux before 6.13, 44dd0f5732b4), and KVM_GET_MSRS and KVM_SET_MSRS stop at the first such (Cloud Hypervisor #1543).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from kvm.backends.kernel.fd import Fd, Tracer
from kvm.backends.kernel.library import ffi, lib
from kvm.x86.structs import pack_msrs, unpack_msrs

_ENABLE_CAP = struct.Struct("<IIQ24x64x")  # struct kvm_enable_cap: cap, flags, args[0]
_IOAPIC_PINS = 24


def accepted(system: Fd, tracer: Tracer, cpuid: bytes, listed: Iterable[int]) -> tuple[int, ...]:
    """Those of the listed that a VCPU takes. Makes a VM of one VCPU, about a millisecond. Raises KvmError."""
    vm = Fd(system.call_value("KVM_CREATE_VM", 0), tracer)
    try:
        # A local APIC, which some MSRs want, and no more: a VM with all of the chips takes 15 ms to close.
        vm.call("KVM_ENABLE_CAP", _ENABLE_CAP.pack(lib.KVM_CAP_SPLIT_IRQCHIP, 0, _IOAPIC_PINS))
        vcpu = Fd(vm.call_value("KVM_CREATE_VCPU", 0), tracer, 0)
        try:
            vcpu.call("KVM_SET_CPUID2", cpuid)
            values: dict[int, int] = {}

            def read(indices: list[int]) -> int:
                raw = ffi.new("char[]", pack_msrs(indices))
                moved = vcpu.call("KVM_GET_MSRS", raw)
                values.update(unpack_msrs(bytes(ffi.buffer(raw))))
                return moved

            def write(indices: list[int]) -> int:
                return vcpu.call("KVM_SET_MSRS", pack_msrs({index: values[index] for index in indices}))

            return tuple(_taken(write, _taken(read, list(listed))))
        finally:
            vcpu.close()
    finally:
        vm.close()


def _taken(move: Callable[[list[int]], int], indices: list[int]) -> list[int]:
    """All but those at which ``move``, which tells how many it moved, stops."""
    taken: list[int] = []
    while indices:
        moved = move(indices)
        taken += indices[:moved]
        indices = indices[moved + 1 :]
    return taken
