"""/dev/kvm itself: opening it, what it can do, and what must be kept from guests."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from kvm.backends.interface import IoctlTrace
from kvm.backends.kernel import library, msr_list
from kvm.backends.kernel.capabilities import CAPABILITIES, REQUIRED
from kvm.backends.kernel.fd import Fd
from kvm.backends.kernel.library import ffi, lib
from kvm.backends.kernel.vm import KernelVm
from kvm.errors import BackendUnavailable, KvmError
from kvm.x86 import msrs
from kvm.x86.structs import CpuidEntry, pack_cpuid, unpack_cpuid

_PVM = Path("/sys/module/kvm_pvm")
_CX16 = 1 << 13  # CPUID leaf 1 ECX
_PV_HYPERCALLS = 1 << 7 | 1 << 11 | 1 << 13  # leaf 0x40000001 EAX: PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD


class KernelSystem:
    """An open /dev/kvm; see ``interface.System``."""

    name = "kvm"

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Raises BackendUnavailable: why KVM can't be used here, and what to do."""
        if library.missing:
            raise BackendUnavailable(
                f"vmdeck's KVM extension is not built ({library.missing}): there was no C compiler, no Python.h or no "
                "linux/kvm.h when vmdeck was installed, or this is not Linux on x86-64. Install them (Debian: "
                "apt install gcc python3-dev linux-libc-dev), then vmdeck again (VMDECK_WERROR=1 shows what fails)."
            )
        self.trace: list[IoctlTrace] | None = None
        self._fd = Fd(_open(path), self)
        try:
            self._check_version(path)
            self.caps = {
                name: max(0, self._fd.call_value("KVM_CHECK_EXTENSION", getattr(lib, name), detail=name))
                for name in CAPABILITIES
            }
            self._check_required()
            self.mmap_size = self._fd.call("KVM_GET_VCPU_MMAP_SIZE")
            lib.vd_install_handler()
        except BaseException:
            self.close()
            raise

    def _check_version(self, path: str) -> None:
        try:
            version = self._fd.call("KVM_GET_API_VERSION")
        except KvmError as error:
            raise BackendUnavailable(
                f"{path} is not KVM's device: it doesn't answer KVM_GET_API_VERSION "
                f"({os.strerror(error.errno)}). Use /dev/kvm."
            ) from error
        if version != lib.KVM_API_VERSION:
            raise BackendUnavailable(
                f"{path} speaks version {version} of KVM's interface; vmdeck knows version {lib.KVM_API_VERSION}, "
                "stable since Linux 2.6.22. Use another kernel."
            )

    def _check_required(self) -> None:
        lacking = [name for name in REQUIRED if not self.caps[name]]
        if lacking:
            raise BackendUnavailable(
                f"This kernel's KVM lacks {', '.join(lacking)}, which vmdeck can't do without. "
                "Use Linux 4.13 or newer on x86-64."
            )

    def msr_list(self) -> tuple[int, ...]:
        """Raises KvmError."""
        return self._msrs[0]

    def refused_msrs(self) -> tuple[int, ...]:
        """Those that vmdeck would carry, and that KVM lists and then refuses. Raises KvmError."""
        return self._msrs[1]

    @cached_property
    def _msrs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        listed = self._listed_msrs()
        runtime, reset = msrs.groups(listed)
        wanted = [*runtime, *reset]
        taken = msr_list.accepted(self._fd, self, pack_cpuid(self.cpuid()), wanted)
        refused = tuple(index for index in wanted if index in listed and index not in taken)
        return tuple(index for index in listed if index not in refused), refused

    def _listed_msrs(self) -> tuple[int, ...]:
        count = 512
        raw = ffi.new("uint32_t[]", 1 + count)  # struct kvm_msr_list: nmsrs, indices
        raw[0] = count
        self._fd.call("KVM_GET_MSR_INDEX_LIST", raw)
        return tuple(raw[1 : 1 + raw[0]])

    def cpuid(self) -> list[CpuidEntry]:
        """Raises KvmError."""
        entries = unpack_cpuid(self._supported_cpuid())
        if _PVM.exists():
            for entry in entries:
                _mask_for_pvm(entry)
        return entries

    def _supported_cpuid(self) -> bytes:
        """``struct kvm_cpuid2``; KVM says E2BIG as long as there is too little room."""
        count = 128
        while True:
            raw = ffi.new("char[]", 8 + 40 * count)
            ffi.memmove(raw, count.to_bytes(4, "little"), 4)
            try:
                self._fd.call("KVM_GET_SUPPORTED_CPUID", raw)
            except KvmError as error:
                if error.errno != errno.E2BIG or count > 4096:
                    raise
                count *= 2
            else:
                return bytes(ffi.buffer(raw))

    def create_vm(self) -> KernelVm:
        """Raises BackendUnavailable if another hypervisor has the processor, KvmError."""
        try:
            number = self._fd.call_value("KVM_CREATE_VM", 0)
        except KvmError as error:
            if error.errno == errno.EBUSY:
                raise BackendUnavailable(_BUSY) from error
            raise
        return KernelVm(self, Fd(number, self))

    def close(self) -> None:
        self._fd.close()


def _mask_for_pvm(entry: CpuidEntry) -> None:
    """PVM, KVM's software-paging variant, advertises what its instruction emulator then fails.

    CMPXCHG16B ends in KVM_EXIT_INTERNAL_ERROR at CPL 0, and the hypercalls of the paravirtual features loop for
    ever on their vmcall. On VMX and SVM both work and stay.
    """
    match entry.function:
        case 0x1:
            entry.ecx &= ~_CX16
        case 0x40000001:
            entry.eax &= ~_PV_HYPERCALLS


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        explain = _OPENING.get(error.errno or 0)
        why = explain(path) if explain else f"{path} can't be opened: {error.strerror}."
        raise BackendUnavailable(why) from error


def _absent(path: str) -> str:
    return (
        f"{path} is not there: the kernel's KVM module isn't loaded, or the processor's virtualisation is off. Enable "
        "VT-x or AMD-V in the firmware setup and load the module (modprobe kvm_intel or kvm_amd); in a virtual "
        "machine enable nested virtualisation; in a container pass the device in (--device /dev/kvm)."
    )


def _forbidden(path: str) -> str:
    import grp  # Unix only, and this file is imported everywhere

    try:
        group = grp.getgrgid(Path(path).stat().st_gid).gr_name
    except (KeyError, OSError):
        group = "kvm"
    return (
        f"{path} may not be opened by this user: it belongs to the group {group}. "
        f"Join it (sudo usermod -aG {group} $USER) and log in again."
    )


_BUSY = (
    "KVM is busy: another hypervisor (VirtualBox, VMware) holds the processor's virtualisation. "
    "Stop its machines, then try again."
)

_OPENING: dict[int, Callable[[str], str]] = {
    errno.ENOENT: _absent,
    errno.ENODEV: _absent,
    errno.ENXIO: _absent,
    errno.EACCES: _forbidden,
    errno.EPERM: _forbidden,
    errno.EBUSY: lambda path: _BUSY,
}
