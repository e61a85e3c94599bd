"""What can go wrong in the machine. Each message says what happened, why, and what to do."""

from __future__ import annotations

import errno as _errno
import os

from kvm.levels import WritebackLevel


class VmdeckError(Exception):
    """The root of all errors that vmdeck raises on purpose; the command line exits with 2 on it."""


class BackendUnavailable(VmdeckError):
    """The chosen backend can't run here; the message says why and what to do."""


class ImageError(VmdeckError):
    """A guest image can't be loaded."""


class ConfigError(VmdeckError):
    """A machine that can't be built: too many VCPUs, too little memory."""


class MachineError(VmdeckError):
    """The machine can't do this now (closed, shut down, a VCPU that doesn't stop)."""


class MemoryAccessError(VmdeckError):
    """A guest-physical address that has no memory behind it."""


class CalledOff(VmdeckError):
    """Whoever asked for it has called it off."""


class KvmError(VmdeckError):
    """An ioctl failed.

    ``ioctl`` is its name, ``errno`` its error ("EINVAL": ``symbol``), ``vcpu`` the VCPU's index (None for the VM and
    the system), ``detail`` what it was about.
    """

    def __init__(self, ioctl: str, errno: int, *, vcpu: int | None = None, detail: str = "") -> None:
        self.ioctl = ioctl
        self.errno = errno
        self.vcpu = vcpu
        self.detail = detail
        where = "" if vcpu is None else f"VCPU {vcpu}: "
        what = f" ({detail})" if detail else ""
        self.symbol = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{where}{ioctl}{what} failed: {self.symbol}, {os.strerror(errno)}")


class SubstateError(KvmError):
    """A get or put of one substate failed; those before it in the batch were moved, it and the rest were not.

    ``moved`` counts the substates of the batch that were moved, or whose failure the table tolerates: ``tolerated`` has
    those. ``level`` is the put's, None for a get.
    """

    def __init__(
        self,
        substate: str,
        moved: int,
        ioctl: str,
        errno: int,
        *,
        vcpu: int | None = None,
        detail: str = "",
        level: WritebackLevel | None = None,
    ) -> None:
        about = (substate, detail, f"at level {level.name}" if level else "")
        super().__init__(ioctl, errno, vcpu=vcpu, detail=", ".join(filter(None, about)))
        self.substate = substate
        self.moved = moved
        self.level = level
        self.tolerated: tuple[SubstateError, ...] = ()
        self._about = detail

    def at(self, level: WritebackLevel) -> SubstateError:
        """The same error, of a put at this level."""
        error = SubstateError(
            self.substate, self.moved, self.ioctl, self.errno, vcpu=self.vcpu, detail=self._about, level=level
        )
        error.tolerated = self.tolerated
        return error


class SnapshotError(VmdeckError):
    """A snapshot file can't be written, read or taken; what it was to replace is as it was."""


class SnapshotCancelled(SnapshotError, CalledOff):
    """A save, a load or what goes through a snapshot was called off."""


class SnapshotMismatch(SnapshotError):
    """A state can't be carried over whole. ``losses`` lists, a line each, what would be dropped."""

    def __init__(self, message: str, losses: tuple[str, ...]) -> None:
        super().__init__(message)
        self.losses = losses
