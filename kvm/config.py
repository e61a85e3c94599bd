"""What a machine is made of, before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvm.backends.interface import PAGE_SIZE
from kvm.errors import ConfigError
from kvm.x86 import layout

_XAPIC_IDS = 255
"""0 to 254; 255 means everybody. More would take x2APIC ids (KVM_CAP_X2APIC_API)."""


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """``vcpus`` ≥ 1; ``memory`` in bytes, a multiple of 4 KiB."""

    vcpus: int = 1
    memory: int = 64 << 20

    def check(self, caps: Mapping[str, int]) -> None:
        """Raise ConfigError for a machine that can't be, on a system with these capabilities."""
        # api.rst, 4.7: the recommended number where no other is told, and 4 where none is
        max_vcpus = min(caps["KVM_CAP_MAX_VCPUS"] or caps["KVM_CAP_NR_VCPUS"] or 4, _XAPIC_IDS)
        if not 1 <= self.vcpus <= max_vcpus:
            raise ConfigError(f"{self.vcpus} VCPUs: this backend can have 1 to {max_vcpus}.")
        if self.memory < layout.MIN_MEMORY or self.memory % PAGE_SIZE:
            raise ConfigError(
                f"{self.memory} bytes of memory: it takes {layout.MIN_MEMORY >> 20} MiB or more, in steps of 4 KiB."
            )
        if self.memory > layout.MAX_MEMORY:
            raise ConfigError(
                f"{self.memory >> 30} GiB of memory: more than the {layout.MAX_MEMORY >> 30} GiB that a guest's "
                "physical addresses can hold here."
            )
