"""The same guest in QEMU and in vmdeck: every register that ``info registers -a`` shows, after power-on, after a system
reset, and where the guest stays with known values in all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from kvm.backends.choice import open_system
from kvm.backends.interface import System
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig
from tests.guests.assemble import BinutilsMissing, assemble
from tests.kvm.machines import until
from tests.parity.differences import DIFFERENCES, differing, fields
from tests.parity.qemu import NEEDS_QEMU, Qemu, why_no_qemu

SOURCE = Path(__file__).parent / "registers.S"
SPIN16, SPIN32, SPIN64, HALTED = "0000ff00", "000fff10", "00000000000fff20", "00000000000fff31"
MEMORY = 16 << 20
XCR0_AVX, XCR0_AVX512 = 0x7, 0xE7


@dataclass(frozen=True)
class Stay:
    """One of the guest's states: the bytes at 8 of its image, and where each VCPU then stays (RIP or EIP)."""

    name: str
    choice: bytes
    at: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    def image(self) -> bytes:
        image = _assembled()
        return image[:8] + self.choice + image[8 + len(self.choice) :]

    def reached(self, text: str) -> bool:
        found = fields(text)
        return all(place in (found.get(f"{vcpu}.RIP"), found.get(f"{vcpu}.EIP")) for vcpu, place in enumerate(self.at))


STAYS = (
    Stay("real mode", b"\0", (SPIN16,)),
    Stay("32-bit", b"\1", (SPIN32,)),
    Stay("64-bit", b"\2", (SPIN64,)),
    Stay("32-bit code in long mode", b"\3", (SPIN32,)),
    Stay("CPL3 with x87 and SSE", b"\4", (SPIN64,)),
    Stay("halted", b"\6", (HALTED,)),
    Stay("AP", b"\7", (SPIN32, SPIN16)),
)
YMM = Stay("YMM", bytes([5, XCR0_AVX, 1]), (SPIN64,))
ZMM_LOW = Stay("ZMM, only XMM loaded", bytes([5, XCR0_AVX512, 0]), (SPIN64,))
ZMM = Stay("ZMM", bytes([5, XCR0_AVX512, 2]), (SPIN64,))

Texts = tuple[str, str, str]
"""After power-on, at the stay, after a system reset from there."""


@cache
def _assembled() -> bytes:
    try:
        return assemble(SOURCE, base=0xF0000, format="bin")
    except BinutilsMissing as missing:
        pytest.skip(str(missing))


def _with_image(stay: Stay, use: Callable[[Path], Texts]) -> Texts:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "firmware.bin"
        path.write_bytes(stay.image())
        return use(path)


@cache
def qemu(accelerator: str, stay: Stay) -> Texts:
    # KVM offers AMD hosts an ARCH_CAPABILITIES that it then refuses to set, and QEMU 7.2 aborts.
    cpu = {"kvm": "host,-arch-capabilities", "tcg": "max"}[accelerator]
    machine = ("-accel", accelerator, "-cpu", cpu, "-smp", str(len(stay.at)), "-m", f"{MEMORY >> 20}")

    def run(path: Path) -> Texts:
        with Qemu(*machine, "-bios", str(path)) as guest:
            power_on = guest.registers()

            def stays() -> bool:
                guest.cont()
                guest.stop()
                return stay.reached(guest.registers())

            until(stays)
            there = guest.registers()
            guest.reset()
            return power_on, there, guest.registers()

    return _with_image(stay, run)


@cache
def vmdeck(backend: str, stay: Stay) -> Texts:
    def run(path: Path) -> Texts:
        image = loader.load(path, memory=MEMORY, format="firmware")
        system = open_system(backend)
        with Machine(system, image, MachineConfig(vcpus=len(stay.at), memory=MEMORY)) as machine:
            power_on = machine.dump_registers()
            machine.run()
            until(lambda: stay.reached(machine.dump_registers()))
            machine.pause()
            there = machine.dump_registers()
            machine.reset()
            after = machine.dump_registers()
        system.close()
        return power_on, there, after

    return _with_image(stay, run)


def unexplained(ours: str, theirs: str, accelerator: str) -> list[str]:
    """What differs for no reason in the table, each as "name: ours, theirs"."""
    left, right = fields(ours), fields(theirs)
    return [
        f"{name}: {left.get(name)} here, {right.get(name)} in QEMU"
        for name in differing(left, right)
        if not any(row.explains(name, accelerator, left, right) for row in DIFFERENCES)
    ]


def check(backend: str, accelerator: str, stay: Stay) -> None:
    if why := why_no_qemu():
        pytest.skip(NEEDS_QEMU + why)
    for ours, theirs in zip(vmdeck(backend, stay), qemu(accelerator, stay), strict=True):
        assert unexplained(ours, theirs, accelerator) == []


@pytest.mark.parametrize("stay", STAYS, ids=str)
class TestKnownValues:
    @pytest.mark.kvm
    def test_kvm_beside_qemu_with_kvm(self, stay: Stay) -> None:
        check("kvm", "kvm", stay)

    @pytest.mark.kvm
    def test_kvm_beside_qemu_alone(self, stay: Stay) -> None:
        check("kvm", "tcg", stay)

    @pytest.mark.kvm
    def test_software_beside_qemu_with_kvm(self, stay: Stay) -> None:
        check("software", "kvm", stay)

    def test_software_beside_qemu_alone(self, stay: Stay) -> None:
        check("software", "tcg", stay)


@pytest.mark.kvm
@pytest.mark.parametrize("stay", STAYS, ids=str)
def test_with_kvm_the_text_is_qemus_to_the_last_character(stay: Stay) -> None:
    """Once EDX after a reset, which is the CPUID version, is the same: QEMU's -cpu host has the host's too."""
    if why := why_no_qemu():
        pytest.skip(NEEDS_QEMU + why)
    for ours, theirs in zip(vmdeck("kvm", stay), qemu("kvm", stay), strict=True):
        assert _without_version(ours) == _without_version(theirs)


def _without_version(text: str) -> str:
    """EDX is blanked out in the text of a VCPU that stands at the reset vector."""
    vcpus = text.split("\nCPU#")
    return "\nCPU#".join(
        vcpu.replace(f"EDX={fields('CPU#' + vcpu)[vcpu[0] + '.EDX']}", "EDX=version")
        if "EIP=0000fff0" in vcpu
        else vcpu
        for vcpu in vcpus
    )


def _xcr0(system: System) -> int:
    """The state components that this host's guests may turn on."""
    return next((entry.eax for entry in system.cpuid() if (entry.function, entry.index) == (0xD, 0)), 0)


def _check_vectors(accelerator: str, stay: Stay) -> None:
    """Skips where the host hasn't got the registers. QEMU reads their upper halves only if CPUID has the feature."""
    with_kvm = open_system("kvm")
    wanted, has = stay.choice[1], _xcr0(with_kvm)
    tells_avx = any(entry.function == 1 and entry.ecx >> 28 & 1 for entry in with_kvm.cpuid())
    with_kvm.close()
    if has & wanted != wanted:
        pytest.skip(f"the host's KVM offers XCR0 {has:#x} only")
    if accelerator == "kvm" and stay.choice[2] and not tells_avx:
        pytest.skip("the host's KVM lets guests use AVX but leaves it out of CPUID: QEMU doesn't read those registers")
    check("kvm", accelerator, stay)


@pytest.mark.kvm
@pytest.mark.parametrize(("accelerator", "stay"), [("tcg", YMM), ("kvm", YMM), ("kvm", ZMM_LOW), ("kvm", ZMM)], ids=str)
def test_vector_registers(accelerator: str, stay: Stay) -> None:
    _check_vectors(accelerator, stay)


def test_a_difference_without_a_reason_is_found() -> None:
    text = "\nCPU#0\nEAX=00000001 EBX=00000002\nCS =0008 00000000 ffffffff 00cf9b00 DPL=0 CS32 [-RA]\n"
    assert unexplained(text, text, "kvm") == []
    assert unexplained(text.replace("EBX=00000002", "EBX=00000003"), text, "kvm") == [
        "0.EBX: 00000003 here, 00000002 in QEMU"
    ]
    limit_bits = text.replace("00cf9b00", "00c09b00")
    assert unexplained(limit_bits, text, "tcg") == []
    assert unexplained(limit_bits, text, "kvm") == ["0.CS.attributes: 00c09b00 here, 00cf9b00 in QEMU"]
