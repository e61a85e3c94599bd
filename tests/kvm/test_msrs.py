"""Which level writes which MSR."""

from __future__ import annotations

import pytest

from kvm.x86 import msrs

RUNTIME, RESET, NOT_CARRIED = "RUNTIME", "RESET", "not carried"
VMX_FEATURES = (0x480, 0x48F, 0x491)
HYPERV_GUEST_OS_ID = 0x40000000
PMU = (0xC1, 0x186, 0x309, 0x38D, 0x38F)

EXPECTED = {
    **dict.fromkeys((0x174, 0x175, 0x176, 0x277, 0x1A0, 0xDA0, 0x48, 0x17A, 0x17B, 0x1D9), RUNTIME),
    **dict.fromkeys((0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102, 0xC0000103), RUNTIME),
    **dict.fromkeys((0x10, 0x3B, 0x11, 0x12, 0x3A, 0x34), RESET),
    **dict.fromkeys(range(0x4B564D00, 0x4B564D07), RESET),  # kvmclock, async page faults, steal time, EOI, polling
    **dict.fromkeys((*PMU, HYPERV_GUEST_OS_ID), RESET),
    **dict.fromkeys((msrs.EFER, msrs.APIC_BASE), NOT_CARRIED),  # SREGS has them
    msrs.TSC_DEADLINE: NOT_CARRIED,  # a row of its own, after the LAPIC
    **dict.fromkeys((0x10A, 0x345, 0xCE, 0x8B, *VMX_FEATURES), NOT_CARRIED),  # what the host can do
    0x4B564D07: NOT_CARRIED,  # written only
}


@pytest.mark.parametrize("index", EXPECTED, ids=hex)
def test_each_listed_msr_is_in_one_group(index: int) -> None:
    runtime, reset = msrs.groups([index])
    found = RUNTIME if index in runtime else RESET if index in reset else NOT_CARRIED
    assert found == EXPECTED[index]
    assert not {*runtime} & {*reset}


def test_what_no_group_names_is_written_at_runtime() -> None:
    assert msrs.groups([0x12345])[0] == (0x12345,)


def test_the_mtrrs_are_carried_though_no_kernel_lists_them() -> None:
    runtime, reset = msrs.groups([])
    assert runtime == ()
    assert {0x2FF, 0x200, 0x20F, 0x250, 0x258, 0x259, 0x268, 0x26F} <= {*reset}
    assert len(reset) == 1 + 16 + 11
