"""Which backend runs the guest. Each is imported only when it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvm.errors import BackendUnavailable, VmdeckError

if TYPE_CHECKING:
    from kvm.backends.interface import System


def _kernel() -> System:
    from kvm.backends.kernel.system import KernelSystem

    try:
        system = KernelSystem()
        try:
            system.create_vm().close()  # what opens may still be busy
        except BaseException:
            system.close()
            raise
    except VmdeckError as error:
        raise BackendUnavailable(f"{error} Or use --backend software.") from error
    return system


def _software() -> System:
    try:
        from kvm.backends.software.system import SoftwareSystem
    except ImportError as error:
        raise BackendUnavailable(
            f"The software backend can't be loaded: {error}. Install what it needs: pip install unicorn==2.1.4."
        ) from error
    return SoftwareSystem()


def _auto() -> System:
    try:
        return _kernel()
    except BackendUnavailable:
        return _software()


BACKENDS: dict[str, Callable[[], System]] = {"auto": _auto, "kvm": _kernel, "software": _software}


def open_system(name: str) -> System:
    """Open the backend ``auto`` (KVM where it is usable, else software), ``kvm`` or ``software``.

    Raises BackendUnavailable, saying why and what to do.
    """
    return BACKENDS[name]()
