"""A whole state read, put at FULL into a fresh machine and read again: equal bit for bit, but for EXCEPTIONS."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvm.backends.interface import System
from kvm.machine import Machine
from kvm.snapshot.state import MachineState
from kvm.x86.structs import (
    ClockData,
    DebugRegs,
    PitState2,
    Regs,
    Xsave,
    pack_msrs,
    unpack_msrs,
)
from tests.kvm.contract.lab import AP_ADDRESS, AP_CODE, START_AP, assembled, makes_progress, put_bytes, tsc_distances
from tests.kvm.machines import COUNT, build, until

LAPIC_CURRENT_COUNT = 0x390

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("msrs_reset", "0x10"): "the TSC runs on",
    ("tsc_offset", "value"): "from the host's TSC, which runs on; how far the VCPUs' are apart is equal",
    ("lapic", "0x390"): "the timer's current count runs on",
    ("pit", "count_load_time"): "the host's time of the last load, which a put is",
    ("clock", "clock"): "kvmclock runs on",
    ("clock", "flags"): "says which of the two below the host could tell",
    ("clock", "realtime"): "the host's time of the read",
    ("clock", "host_tsc"): "the host's TSC at the read",
}
"""(substate, part): why it isn't equal after a round trip. Everything else is."""


def differences(name: str, before: bytes, after: bytes) -> set[tuple[str, str]]:
    """The parts in which two of a substate's structs differ; where a struct's parts have no names, their offsets."""
    if len(before) != len(after):
        return {(name, "size")}
    if name.startswith("msrs") or name == "tsc_deadline":
        old, new = unpack_msrs(before), unpack_msrs(after)
        return {(name, hex(index)) for index in old.keys() | new.keys() if old.get(index) != new.get(index)}
    if name == "tsc_offset":
        return {(name, "value")} if before != after else set()
    if name == "clock":
        clocks = ClockData.from_buffer_copy(before), ClockData.from_buffer_copy(after)
        fields = [field[0] for field in ClockData._fields_ if not field[0].startswith("pad")]
        return {(name, field) for field in fields if getattr(clocks[0], field) != getattr(clocks[1], field)}
    if name == "pit":
        timeless = without_load_time(before), without_load_time(after)
        if timeless[0] == timeless[1] and before != after:
            return {(name, "count_load_time")}
    step = 16 if name == "lapic" else 1
    return {(name, hex(at)) for at in range(0, len(before), step) if before[at : at + step] != after[at : at + step]}


def without_load_time(raw: bytes) -> bytes:
    pit = PitState2.from_buffer_copy(raw)
    for channel in pit.channels:
        channel.count_load_time = 0
    return bytes(pit)


def all_differences(before: MachineState, after: MachineState) -> set[tuple[str, str]]:
    pairs: list[tuple[Mapping[str, bytes], Mapping[str, bytes]]] = [
        *zip(before.vcpus, after.vcpus, strict=True),
        (before.machine, after.machine),
    ]
    found: set[tuple[str, str]] = set()
    for old, new in pairs:
        assert old.keys() == new.keys()
        for name in old:
            found |= differences(name, old[name], new[name])
    if tsc_distances(before.vcpus) != tsc_distances(after.vcpus):
        found.add(("tsc_offset", "distance"))
    return found


def through_a_fresh_machine(system: System, folder: Path, state: MachineState, memory: bytes) -> MachineState:
    with build(system, folder, COUNT, vcpus=len(state.vcpus)) as fresh:
        fresh.memory.write(0, memory)
        fresh.load(state)
        return fresh.save()


def check(system: System, folder: Path, machine: Machine) -> None:
    state = machine.save()
    memory = machine.read_memory(0, machine.memory.size)
    again = through_a_fresh_machine(system, folder, state, memory)
    assert again.devices == state.devices
    assert all_differences(state, again) - EXCEPTIONS.keys() == set()


def test_after_power_on(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=3) as machine:
        check(system, tmp_path, machine)


def test_a_guest_with_aps_that_started(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, START_AP, vcpus=3, format="flat64") as machine:
        machine.write_memory(AP_ADDRESS, AP_CODE)
        machine.run()
        until(lambda: machine.read_memory(0x9000, 2) != bytes(2))
        check(system, tmp_path, machine)


@pytest.mark.parametrize("guest", ["deadline64", "timer64"])
def test_a_guest_with_a_timer(system: System, tmp_path: Path, guest: str) -> None:
    folders = (Path(__file__).parent, Path(__file__).parents[2] / "guests")
    source = next(path for folder in folders if (path := folder / f"{guest}.S").exists())
    with build(system, tmp_path, assembled(source, tmp_path), format="flat64") as machine:
        machine.run()
        until(lambda: int.from_bytes(machine.view(0).regs[8:16], "little") > 0 or ticks(machine) > 2)
        for _ in range(5):  # at whatever moment
            machine.run()
            check(system, tmp_path, machine)


def ticks(machine: Machine) -> int:
    machine.request_samples()
    return int.from_bytes(machine.read_memory(0x190000, 2), "little")


@pytest.mark.parametrize("seed", range(8))
def test_any_values(system: System, tmp_path: Path, seed: int) -> None:
    """Registers that hold anything: each VCPU's general registers, x87 and SSE, debug registers, MSRs of addresses."""
    rng = random.Random(seed)
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        state = machine.save()
        vcpus = tuple({**vcpu, **anything(rng, vcpu)} for vcpu in state.vcpus)
        given = MachineState(vcpus, state.machine, state.devices)
        machine.load(given)
        assert all_differences(given, machine.save()) - EXCEPTIONS.keys() == set()
        check(system, tmp_path, machine)
        machine.vcpus[0].copy["regs"] = state.vcpus[0]["regs"]
        machine.run()
        makes_progress(machine)


def anything(rng: random.Random, vcpu: Mapping[str, bytes]) -> dict[str, bytes]:
    regs = Regs(*(rng.getrandbits(64) for _ in range(16)), rng.getrandbits(16), 0x2)
    registers = b"".join(rng.randbytes(10) + bytes(6) for _ in range(8)) + rng.randbytes(256)
    xsave = Xsave.from_buffer_copy(vcpu["xsave"])
    xsave.fcw, xsave.fsw, xsave.ftw, xsave.mxcsr, xsave.xstate_bv = 0x37F, 0x3800, 0xFF, 0x1FA0, 3
    known = unpack_msrs(vcpu["msrs"])
    addresses = {index: rng.getrandbits(47) for index in (0x175, 0x176, 0xC0000082, 0xC0000083, 0xC0000102)}
    dr6, dr7 = 0xFFFF0FF0 | rng.getrandbits(4), 0x400 | rng.getrandbits(2)
    debug = DebugRegs(dr6=dr6, dr7=dr7)
    for number in range(4):
        debug.db[number] = rng.getrandbits(47)
    return {
        "regs": bytes(regs),
        "xsave": put_bytes(put_bytes(vcpu["xsave"], 0, bytes(xsave)[:32]), 32, registers)[:512]
        + bytes(xsave)[512:]
        + vcpu["xsave"][len(bytes(xsave)) :],
        "msrs": pack_msrs({**known, **{index: value for index, value in addresses.items() if index in known}}),
        "debugregs": bytes(debug),
    }


@pytest.mark.kvm
def test_the_exceptions_are_needed(tmp_path: Path) -> None:
    """A list that holds what never differs would hide what one day does. (What the host tells of its time may not.)"""
    from kvm.backends.kernel.system import KernelSystem

    system = KernelSystem()
    source = Path(__file__).parents[2] / "guests" / "timer64.S"
    with build(system, tmp_path, assembled(source, tmp_path), format="flat64") as machine:
        machine.run()
        until(lambda: b"tick" in machine.board.debug_console.since(0)[0])
        state = machine.save()
        again = through_a_fresh_machine(system, tmp_path, state, machine.read_memory(0, machine.memory.size))
    system.close()
    hosts = {("clock", "flags"), ("clock", "realtime"), ("clock", "host_tsc"), ("tsc_offset", "value")}
    assert all_differences(state, again) - hosts == EXCEPTIONS.keys() - hosts
