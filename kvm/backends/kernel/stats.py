"""KVM's binary statistics (api.rst, KVM_GET_STATS_FD): where in the file a counter is."""

from __future__ import annotations

import os
import struct

_HEADER = struct.Struct("<6I")
_DESCRIPTOR = struct.Struct("<IhHII")


def find(fd: int, name: str) -> int | None:
    """The file offset of the u64 called ``name``; None if this kernel doesn't count it."""
    _, name_size, count, _, descriptors, data = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    step = _DESCRIPTOR.size + name_size
    raw = os.pread(fd, step * count, descriptors)
    for start in range(0, len(raw), step):
        label = raw[start + _DESCRIPTOR.size : start + step].split(b"\0", 1)[0]
        if label == name.encode():
            _, _, _, offset, _ = _DESCRIPTOR.unpack_from(raw, start)
            return int(data + offset)
    return None
