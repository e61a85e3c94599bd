"""The compiled extension, or why there is none: ``ffi`` and ``lib`` are None then, and KernelSystem says so."""

from __future__ import annotations

__all__ = ["ffi", "lib", "missing"]

try:
    from kvm.backends.kernel._kvm import ffi, lib
except ImportError as error:
    ffi = lib = None
    missing = str(error)
    """Why the extension can't be loaded; empty if it is."""
else:
    missing = ""
