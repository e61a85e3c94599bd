"""Register text in QEMU's format: what no guest in tests/parity shows. The expected lines are QEMU's."""

from __future__ import annotations

import ctypes
import re

import pytest

from kvm.x86.dump import dump
from kvm.x86.structs import (
    EVENT_VALID_SMM,
    MP_STATE_HALTED,
    MP_STATE_RUNNABLE,
    CpuidEntry,
    Fpu,
    MpState,
    Regs,
    Segment,
    Sregs,
    Sregs2,
    VcpuEvents,
    Xcr,
    Xcrs,
    Xsave,
    pack_cpuid,
)

LONG_MODE = {"cr0": 0x80000011, "cr4": 0x620, "efer": 0x500}
CODE64 = Segment(limit=0xFFFFFFFF, selector=8, type=0xB, present=1, s=1, l=1, g=1)


def vcpu(sregs: Sregs | Sregs2 | None = None, **copies: bytes) -> dict[str, bytes]:
    """A VCPU of zeros but for what is given."""
    plain = {"regs": Regs(), "sregs": sregs or Sregs(), "xsave": Xsave(), "mp_state": MpState()}
    return {name: bytes(struct) for name, struct in plain.items()} | copies


def line(text: str, begins: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(begins)]
    return found


def segment_line(sregs: Sregs, **descriptor: int) -> str:
    sregs.es = Segment(selector=0x10, base=0x123, limit=0x456, **descriptor)
    return line(dump([vcpu(sregs)]), "ES ")


@pytest.mark.parametrize(
    ("descriptor", "expected"),
    [
        ({"type": 0x3, "s": 1, "db": 1, "g": 1}, "00c09300 DPL=0 DS   [-WA]"),
        ({"type": 0x4, "s": 1, "dpl": 2}, "0000d400 DPL=2 DS16 [E--]"),
        ({"type": 0x9, "s": 1}, "00009900 DPL=0 CS16 [--A]"),
        ({"type": 0xE, "s": 1, "db": 1, "dpl": 3, "avl": 1}, "0050fe00 DPL=3 CS32 [CR-]"),
        ({"type": 0xA, "s": 1, "l": 1}, "00209a00 DPL=0 CS64 [-R-]"),
        ({"type": 0x2}, "00008200 DPL=0 LDT"),
        ({"type": 0x1}, "00008100 DPL=0 TSS16-avl"),
        ({"type": 0xB}, "00008b00 DPL=0 TSS32-busy"),
        ({"type": 0x5}, "00008500 DPL=0 TaskGate"),
    ],
)
def test_a_segment_in_protected_mode(descriptor: dict[str, int], expected: str) -> None:
    assert segment_line(Sregs(cr0=1), present=1, **descriptor) == f"ES =0010 00000123 00000456 {expected}"


@pytest.mark.parametrize(
    ("descriptor", "expected"),
    [
        ({"type": 0x3, "s": 1}, "00009300 DPL=0 DS   [-WA]"),
        ({"type": 0xB}, "00008b00 DPL=0 TSS64-busy"),
        ({"type": 0x0}, "00008000 DPL=0 <hiword>"),
        ({"type": 0x1}, "00008100 DPL=0 Reserved"),
    ],
)
def test_a_segment_in_long_mode(descriptor: dict[str, int], expected: str) -> None:
    sregs = Sregs(cs=CODE64, **LONG_MODE)
    assert segment_line(sregs, present=1, **descriptor) == f"ES =0010 0000000000000123 00000456 {expected}"


def test_a_segment_that_isnt_present_or_usable_is_not_spelled_out() -> None:
    assert segment_line(Sregs(cr0=1), type=3, s=1).endswith(" 00001300")
    assert segment_line(Sregs(cr0=1), type=3, s=1, present=1, unusable=1).endswith(" 00001300")


def test_in_real_mode_no_segment_is_spelled_out() -> None:
    assert segment_line(Sregs(), type=3, s=1, present=1).endswith(" 00009300")


def test_flags_and_what_the_vcpu_is_doing() -> None:
    events = VcpuEvents(interrupt_shadow=2, smi_smm=1, flags=EVENT_VALID_SMM)
    sregs = Sregs(cr0=1, ss=Segment(dpl=3))
    changed = {"events": bytes(events), "mp_state": bytes(MpState(MP_STATE_HALTED))}
    text = dump([vcpu(sregs, regs=bytes(Regs(rip=0x1_2345_6789, rflags=0x403)), **changed)])
    assert line(text, "EIP") == "EIP=23456789 EFL=00000403 [D-----C] CPL=3 II=1 A20=1 SMM=1 HLT=1"
    quiet = {"events": bytes(VcpuEvents(smi_smm=1)), "mp_state": bytes(MpState(MP_STATE_RUNNABLE))}
    text = dump([vcpu(Sregs(cs=CODE64, **LONG_MODE), regs=bytes(Regs(rip=1 << 63, rflags=0x8D4)), **quiet)])
    assert line(text, "RIP") == "RIP=8000000000000000 RFL=000008d4 [-OSZAP-] CPL=0 II=0 A20=1 SMM=0 HLT=0"


def test_all_vcpus_are_named() -> None:
    text = dump([vcpu(), vcpu(regs=bytes(Regs(rax=1))), vcpu()])
    assert re.findall(r"^\nCPU#(\d)$", text, re.MULTILINE) == ["0", "1", "2"]
    assert text.split("\nCPU#")[2].startswith("1\nEAX=00000001 ")


def test_sregs2_reads_as_sregs() -> None:
    assert dump([vcpu(Sregs2(cr0=0x60000010, cr3=0x1000))]) == dump([vcpu(Sregs(cr0=0x60000010, cr3=0x1000))])


def test_a_kernel_without_debugregs_xcrs_and_xsave() -> None:
    copy = vcpu()
    del copy["xsave"]
    fpu = Fpu(fcw=0x37F, fsw=0x2800, ftwx=0xE0, mxcsr=0x1F80)
    ctypes.memmove(ctypes.addressof(fpu), bytes(range(1, 129)), 128)
    text = dump([{**copy, "fpu": bytes(fpu)}])
    assert line(text, "FCW") == "FCW=037f FSW=2800 [ST=5] FTW=e0 MXCSR=00001f80"
    assert line(text, "FPR0") == "FPR0=0807060504030201 0a09 FPR1=1817161514131211 1a19"
    assert line(text, "DR6") == "DR6=00000000ffff0ff0 DR7=0000000000000400"
    assert line(text, "XMM00").startswith("XMM00=0000000000000000 0000000000000000 XMM01=")


class TestVectors:
    """A different byte in every place of the XSAVE area."""

    AREA = bytes(index * 7 % 251 for index in range(512)) + bytes(64) + bytes(index * 11 % 253 for index in range(3520))

    def text(self, xcr0: int, cpuid: bytes = b"", *, code64: bool = True) -> str:
        xcrs = Xcrs(nr_xcrs=1)
        xcrs.xcrs[0] = Xcr(value=xcr0)
        sregs = Sregs(cs=CODE64, **LONG_MODE) if code64 else Sregs()
        return dump([vcpu(sregs, xsave=self.AREA, xcrs=bytes(xcrs), cpuid=cpuid)])

    def at(self, *places: tuple[int, int]) -> str:
        """The bytes there, (offset, size) from the lowest, as one number in 64-bit words."""
        raw = b"".join(self.AREA[offset : offset + size] for offset, size in places)
        digits = raw[::-1].hex()
        return " ".join(digits[start : start + 16] for start in range(0, len(digits), 16))

    def test_without_avx(self) -> None:
        text = self.text(0x3)
        assert line(text, "XMM14") == f"XMM14={self.at((160 + 14 * 16, 16))} XMM15={self.at((160 + 15 * 16, 16))}"
        assert "YMM" not in text
        assert "XMM08" not in self.text(0x3, code64=False)

    def test_avx(self) -> None:
        text = self.text(0x7)
        assert line(text, "YMM09") == f"YMM09={self.at((160 + 9 * 16, 16), (576 + 9 * 16, 16))}"
        assert len(re.findall("^YMM", text, re.MULTILINE)) == 16
        assert len(re.findall("^YMM", self.text(0x7, code64=False), re.MULTILINE)) == 8
        assert "XMM" not in text

    def test_avx512(self) -> None:
        text = self.text(0xE7)
        assert line(text, "Opmask04").startswith(f"Opmask04={self.at((1088 + 32, 8))} Opmask05=")
        low = (160 + 3 * 16, 16), (576 + 3 * 16, 16), (1152 + 3 * 32, 32)
        assert line(text, "ZMM03") == f"ZMM03={self.at(*low)}"
        assert line(text, "ZMM17") == f"ZMM17={self.at((1664 + 64, 64))}"
        assert len(re.findall("^ZMM", text, re.MULTILINE)) == 32
        assert len(re.findall("^ZMM", self.text(0xE7, code64=False), re.MULTILINE)) == 8

    def test_avx512_where_cpuid_has_the_parts_elsewhere(self) -> None:
        """AMD's layout."""
        places = {5: 832, 6: 896, 7: 1408}
        leaves = [CpuidEntry(0xD, index, 1, ebx=offset) for index, offset in places.items()]
        text = self.text(0xE7, pack_cpuid(leaves))
        assert line(text, "Opmask00").startswith(f"Opmask00={self.at((832, 8))} ")
        assert line(text, "ZMM00") == f"ZMM00={self.at((160, 16), (576, 16), (896, 32))}"
        assert line(text, "ZMM31") == f"ZMM31={self.at((1408 + 15 * 64, 64))}"
