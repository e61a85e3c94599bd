"""One of KVM's file descriptors: ioctls by name, traced, with errors that say which one it was."""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol

from kvm.backends.interface import IoctlTrace
from kvm.backends.kernel.library import ffi, lib
from kvm.errors import KvmError


class Tracer(Protocol):
    """Whoever holds the trace: the system."""

    trace: list[IoctlTrace] | None


class Fd:
    """Owns ``number`` and closes it once. ``vcpu`` is the index that errors and the trace name."""

    def __init__(self, number: int, tracer: Tracer, vcpu: int | None = None) -> None:
        self.number = number
        self.vcpu = vcpu
        self._tracer = tracer

    def call(self, ioctl: str, argument: Any = None, *, detail: str = "") -> int:
        """An ioctl with a pointer (cdata, or bytes that it only reads). Raises KvmError."""
        pointer = ffi.NULL if argument is None else argument
        return self.checked(ioctl, lib.vd_ioctl(self.number, getattr(lib, ioctl), pointer), detail)

    def call_value(self, ioctl: str, value: int, *, detail: str = "") -> int:
        """An ioctl whose argument is a number. Raises KvmError."""
        return self.checked(ioctl, lib.vd_ioctl_value(self.number, getattr(lib, ioctl), value), detail)

    def checked(self, ioctl: str, result: int, detail: str = "") -> int:
        """Trace an ioctl that the shim made and hand on its result; a negative one is raised as KvmError."""
        self.note(ioctl)
        if result < 0:
            raise KvmError(ioctl, -result, vcpu=self.vcpu, detail=detail)
        return result

    def note(self, ioctl: str, substate: str = "", thread: int = 0) -> None:
        """Append to the trace, if anybody wants one; ``thread`` made it, if it wasn't the calling one."""
        trace = self._tracer.trace
        if trace is not None:
            trace.append(IoctlTrace(ioctl, substate, self.vcpu, thread or threading.get_ident()))

    @property
    def traced(self) -> bool:
        return self._tracer.trace is not None

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)
