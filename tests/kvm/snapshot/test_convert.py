"""States of one shape made states of another: what is carried, and what is told."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kvm.backends.software.system import SoftwareSystem
from kvm.snapshot.convert import fit
from kvm.snapshot.state import MachineState
from kvm.x86 import cpuid
from kvm.x86.structs import (
    CpuidEntry,
    Fpu,
    Irqchip,
    Sregs,
    Sregs2,
    Xcr,
    Xcrs,
    Xsave,
    pack_cpuid,
    pack_msrs,
    unpack_msrs,
)
from kvm.x86.substates import Table, machine_table, vcpu_table

MSRS = (0x10, 0x174, 0x277, 0x6E0, 0xC0000103)
NEW = {
    "KVM_CAP_SREGS2": 1, "KVM_CAP_XSAVE": 1, "KVM_CAP_XSAVE2": 4096, "KVM_CAP_XCRS": 1, "KVM_CAP_VCPU_EVENTS": 1,
    "KVM_CAP_DEBUGREGS": 1, "KVM_CAP_IRQCHIP": 1,
}  # fmt: skip
OLD: dict[str, int] = {"KVM_CAP_IRQCHIP": 1}


def blank(table: Table) -> dict[str, bytes]:
    """A VCPU's copy with every row as its template, and a CPUID."""
    own = cpuid.for_vcpu(SoftwareSystem().cpuid(), 0, 1, tsc_deadline=True)
    return {row.name: row.template for row in table.put_order} | {"cpuid": own}


def fitted(
    copy: Mapping[str, bytes], caps: Mapping[str, int], listed: tuple[int, ...] = MSRS, *, ran: bool = False
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    table = vcpu_table(caps, listed)
    rows = machine_table(caps)
    machine = {row.name: row.template for row in rows}
    fresh = MachineState((blank(table),), machine, {})
    state, losses = fit(MachineState((copy,), machine, {}), table, rows, fresh, ran=ran)
    assert [row.name for row in table.put_order] == list(state.vcpus[0])
    return dict(state.vcpus[0]), losses


def of(caps: Mapping[str, int], **values: bytes) -> dict[str, bytes]:
    return blank(vcpu_table(caps, MSRS)) | values


def test_the_same_shape_loses_nothing() -> None:
    copy = of(NEW, regs=b"r" * 144)
    assert fitted(copy, NEW) == (copy, ())


@pytest.mark.parametrize(("source", "target"), [(NEW, OLD), (OLD, NEW)])
def test_sregs_become_the_other_kind(source: Mapping[str, int], target: Mapping[str, int]) -> None:
    kind = Sregs2 if source is NEW else Sregs
    sregs = kind(cr3=0x1000, efer=0x500)
    sregs.cs.selector = 8
    result, losses = fitted(of(source, sregs=bytes(sregs)), target)
    carried = (Sregs if target is OLD else Sregs2).from_buffer_copy(result["sregs"])
    assert (carried.cr3, carried.efer, carried.cs.selector) == (0x1000, 0x500, 8)
    assert not losses


def test_what_only_one_kind_of_sregs_has_is_told() -> None:
    _, losses = fitted(of(NEW, sregs=bytes(Sregs2(flags=1))), OLD)
    assert any("PDPTR" in loss for loss in losses)
    bitmap = Sregs()
    bitmap.interrupt_bitmap[0] = 1
    _, losses = fitted(of(OLD, sregs=bytes(bitmap)), NEW)
    assert any("interrupt_bitmap" in loss for loss in losses)


def test_xsave_of_another_size() -> None:
    small = bytes(Xsave(mxcsr=0x1F80, xstate_bv=3)).ljust(4096, b"\0")
    wide = NEW | {"KVM_CAP_XSAVE2": 8192}
    result, losses = fitted(of(NEW, xsave=small), wide)
    assert result["xsave"] == small.ljust(8192, b"\0")
    assert not losses
    result, losses = fitted(of(wide, xsave=small.ljust(8192, b"\0")), NEW)
    assert result["xsave"] == small
    assert not losses
    _, losses = fitted(of(wide, xsave=small.ljust(8192, b"\1")), NEW)
    assert any(loss.startswith("xsave: 8192 bytes") for loss in losses)


def test_x87_and_sse_become_fpu_and_xsave_again() -> None:
    fpu = Fpu(fcw=0x37F, fsw=0x3800, ftwx=0x80, mxcsr=0x1F80, last_ip=0x1234)
    fpu.xmm[3][5], fpu.fpr[0][9] = 0x55, 0x40
    there, losses = fitted(of(OLD, fpu=bytes(fpu)), NEW)
    assert not losses
    back, losses = fitted(of(NEW, xsave=there["xsave"]), OLD)
    assert back["fpu"] == bytes(fpu)
    assert not losses
    _, losses = fitted(of(NEW, xsave=bytes(Xsave(xstate_bv=7)).ljust(4096, b"\0")), OLD)
    assert any("AVX" in loss for loss in losses)


def test_msrs_go_by_their_numbers() -> None:
    """Between groups, too: which group an MSR is in, and in which order, is each host's own."""
    copy = of(NEW, msrs=pack_msrs({0x277: 7, 0x174: 8, 0xC0000103: 9}), msrs_reset=pack_msrs({0x10: 10}))
    result, losses = fitted(copy, NEW, (0x10, 0x174, 0x1A0, 0x277))
    carried = unpack_msrs(result["msrs"]) | unpack_msrs(result["msrs_reset"])
    assert (carried[0x277], carried[0x174], carried[0x10], carried[0x1A0]) == (7, 8, 10, 0)
    (loss,) = losses
    assert loss.startswith("MSR TSC_AUX = 0x9")


def test_a_state_without_tsc_offsets_gets_them_from_its_tscs() -> None:
    """Those read within a second of VCPU 0's count as one, as KVM has it; one set apart by the guest stays so."""
    caps = NEW | {"KVM_CAP_VCPU_ATTRIBUTES": 1}
    table, start = vcpu_table(caps, MSRS), 1 << 42
    apart = (0, 5_000, 1 << 40, -(1 << 40))
    old = tuple(of(NEW, msrs_reset=pack_msrs({0x10: start + ticks})) for ticks in apart)
    fresh = MachineState((blank(table) | {"tsc_offset": b"\7" * 8},) * 4, {}, {})
    state, losses = fit(MachineState(old, {}, {}), table, (), fresh, ran=False)
    assert not losses
    assert [int.from_bytes(vcpu["tsc_offset"], "little", signed=True) for vcpu in state.vcpus] == [
        0, 0, 1 << 40, -(1 << 40)
    ]  # fmt: skip
    new = of(caps, tsc_offset=b"\5" * 8)
    assert fitted(new, caps)[0]["tsc_offset"] == b"\5" * 8
    assert fitted(new, NEW)[1] == ()


def test_xcr0_matters_only_beyond_x87() -> None:
    def xcrs(value: int) -> bytes:
        raw = Xcrs(nr_xcrs=1)
        raw.xcrs[0] = Xcr(0, 0, value)
        return bytes(raw)

    assert not fitted(of(NEW, xcrs=xcrs(1)), OLD)[1]
    assert any("XCR0" in loss for loss in fitted(of(NEW, xcrs=xcrs(7)), OLD)[1])


def entry(**words: int) -> bytes:
    return pack_cpuid([CpuidEntry(function=1, **words)])


def test_cpuid_is_kept_where_its_promises_can_be() -> None:
    own = CpuidEntry.from_buffer_copy(blank(vcpu_table(NEW, MSRS))["cpuid"], 8 + 40)
    assert own.function == 1
    less = entry(ecx=own.ecx & ~1, edx=own.edx)
    result, losses = fitted(of(NEW, cpuid=less), NEW)
    assert (result["cpuid"], losses) == (less, ())
    more = entry(ecx=own.ecx | 1 << 28, edx=own.edx)
    result, losses = fitted(of(NEW, cpuid=more), NEW)
    assert result["cpuid"] == blank(vcpu_table(NEW, MSRS))["cpuid"]
    assert losses == ("CPUID 0x1 ECX: avx: this backend has none of it (VCPU 0)",)


def test_a_machine_that_has_run_keeps_its_cpuid_and_says_so() -> None:
    own = CpuidEntry.from_buffer_copy(blank(vcpu_table(NEW, MSRS))["cpuid"], 8 + 40)
    result, losses = fitted(of(NEW, cpuid=entry(ecx=own.ecx & ~1, edx=own.edx)), NEW, ran=True)
    assert result["cpuid"] == blank(vcpu_table(NEW, MSRS))["cpuid"]
    assert any("has run" in loss for loss in losses)


def test_chips_that_are_not_there_are_told() -> None:
    table = vcpu_table(OLD, MSRS)
    state = MachineState((blank(table),), {"ioapic": bytes(Irqchip()), "hpet": b"x"}, {})
    _, losses = fit(state, table, machine_table({}), MachineState((blank(table),), {}, {}), ran=False)
    assert losses == ("ioapic: this backend has none", "hpet: this backend has none")


def test_vcpus_with_the_same_loss_share_a_line() -> None:
    table = vcpu_table(NEW, (0x10,))
    copy = of(NEW, msrs=pack_msrs({0xC0000103: 1}))
    state = MachineState((copy, copy), {}, {})
    _, losses = fit(state, table, (), MachineState((blank(table),) * 2, {}, {}), ran=False)
    assert losses == ("MSR TSC_AUX = 0x1: this backend has no such register (VCPUs 0, 1)",)
