"""The software backend as /dev/kvm would present itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ParamSpec, TypeVar

from kvm.backends.interface import IoctlTrace, Vm
from kvm.backends.software import cpuid, msr
from kvm.backends.software.selfcheck import self_check
from kvm.backends.software.state import Invalid
from kvm.backends.software.vm import SoftwareVm
from kvm.errors import SubstateError
from kvm.x86.structs import (
    GUESTDBG_BLOCKIRQ,
    GUESTDBG_ENABLE,
    GUESTDBG_SINGLESTEP,
    GUESTDBG_USE_HW_BP,
    GUESTDBG_USE_SW_BP,
    CpuidEntry,
)
from kvm.x86.substates import Substate

P = ParamSpec("P")
T = TypeVar("T")

SLICE_INSTRUCTIONS = 1000
"""A VCPU's turn."""
MAX_VCPUS = 254

_CAPS = {
    "KVM_CAP_NR_VCPUS": MAX_VCPUS, "KVM_CAP_MAX_VCPUS": MAX_VCPUS, "KVM_CAP_MAX_VCPU_ID": MAX_VCPUS,
    "KVM_CAP_NR_MEMSLOTS": 32, "KVM_CAP_READONLY_MEM": 1, "KVM_CAP_USER_MEMORY": 1, "KVM_CAP_IRQCHIP": 1,
    "KVM_CAP_PIT2": 1, "KVM_CAP_PIT_STATE2": 1, "KVM_CAP_ADJUST_CLOCK": 1, "KVM_CAP_MP_STATE": 1,
    "KVM_CAP_SREGS2": 1, "KVM_CAP_XSAVE": 1, "KVM_CAP_XCRS": 1, "KVM_CAP_VCPU_EVENTS": 1, "KVM_CAP_DEBUGREGS": 1,
    "KVM_CAP_SET_GUEST_DEBUG": 1, "KVM_CAP_USER_NMI": 1, "KVM_CAP_EXT_CPUID": 1, "KVM_CAP_TSC_DEADLINE_TIMER": 1,
    "KVM_CAP_IMMEDIATE_EXIT": 1, "KVM_CAP_INTERNAL_ERROR_DATA": 1, "KVM_CAP_GET_TSC_KHZ": 1,
    "KVM_CAP_VCPU_ATTRIBUTES": 1,
    "KVM_CAP_SET_GUEST_DEBUG2": GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP | GUESTDBG_USE_SW_BP | GUESTDBG_USE_HW_BP
    | GUESTDBG_BLOCKIRQ,
}  # fmt: skip


class _Caps(dict[str, int]):
    def __missing__(self, name: str) -> int:
        return 0


class SoftwareSystem:
    """Implements ``kvm.backends.interface.System``. Raises BackendUnavailable without the right Unicorn.

    ``slice_instructions`` is a VCPU's turn: 1 interleaves VCPUs instruction by instruction. ``fault``, if set, is asked
    before each ioctl (its name, the substate's or "", the VCPU) and answers an errno to fail with, or 0.
    """

    name = "software"

    def __init__(self, *, slice_instructions: int = SLICE_INSTRUCTIONS) -> None:
        self.caps: Mapping[str, int] = MappingProxyType(_Caps(_CAPS))
        self.trace: list[IoctlTrace] | None = None
        self.fault: Callable[[str, str, int | None], int] | None = None
        self._slice = slice_instructions
        self_check(self)

    def msr_list(self) -> tuple[int, ...]:
        return msr.LISTED

    def cpuid(self) -> list[CpuidEntry]:
        return cpuid.supported()

    def create_vm(self) -> Vm:
        self.note("KVM_CREATE_VM", "", None)
        return SoftwareVm(self, self._slice)

    def close(self) -> None:
        pass

    def note(self, ioctl: str, substate: str, vcpu: int | None) -> int:
        """Trace this ioctl; the errno that it is to fail with, or 0."""
        if self.trace is not None:
            self.trace.append(IoctlTrace(ioctl, substate, vcpu, threading.get_ident()))
        return self.fault(ioctl, substate, vcpu) if self.fault is not None else 0

    def move(
        self,
        row: Substate,
        ioctl: str,
        moved: int,
        vcpu: int | None,
        function: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """One row of a batch. Raises SubstateError."""
        error, detail = self.note(ioctl, row.name, vcpu), ""
        if not error:
            try:
                return function(*args, **kwargs)
            except Invalid as invalid:
                error, detail = invalid.errno, str(invalid)
        raise SubstateError(row.name, moved, ioctl, error, vcpu=vcpu, detail=detail)
