"""Any two of now, a checkpoint and a file."""

from __future__ import annotations

from pathlib import Path

from kvm.backends.interface import System
from kvm.snapshot import diff
from kvm.snapshot.chain import open_chain
from tests.kvm.machines import COUNT, build

MIB = 1 << 20


def test_registers_devices_and_memory_of_a_checkpoint_a_file_and_now(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2, memory=4 * MIB) as machine:
        machine.write_memory(3 * MIB, b"file and checkpoint")
        machine.save_file(tmp_path / "a")
        machine.edit(1, "rcx", 0xC)
        machine.edit(0, "cs.limit", 0x1234)
        machine.write_memory(3 * MIB, b"file AND checkpoint")
        machine.write_memory(2 * MIB + 4095, b"xy")
        machine.board.bus.port_out(0x80, 1, 0x42)
        checkpoint = machine.checkpoint()
        with open_chain(tmp_path / "a") as file:
            found = {each.where: (each.a, each.b) for each in diff.states(file.state, checkpoint.state)}
            found = {where: values for where, values in found.items() if "TSC" not in where and "clock" not in where}
            assert found["VCPU 1 regs.rcx"] == ("0x0", "0xc")
            assert found["VCPU 0 sregs.cs.limit"] == ("0xffff", "0x1234")
            assert found["device post[0x0]"] == (None, "42")
            assert len(found) == 3 + sum("pit" in where or "lapic" in where for where in found)
            with machine.held(checkpoint) as (_, contents):
                runs = list(diff.memory(file.contents(), contents, 4 * MIB))
        assert runs == [diff.Bytes(2 * MIB + 4095, b"\0", b"x"), diff.Bytes(2 * MIB + 4096, b"\0", b"y"),
                        diff.Bytes(3 * MIB + 5, b"and", b"AND")]  # fmt: skip
        machine.write_memory(3 * MIB, b"n")
        with machine.held(checkpoint) as (_, before), machine.held() as (state, now):
            machine.forget(checkpoint)
            machine.write_memory(3 * MIB, b"another")
            machine.checkpoint()  # would take the places of pages that are let go
            assert list(diff.memory(before, now, 4 * MIB)) == [diff.Bytes(3 * MIB, b"f", b"n")]
            assert not list(diff.states(state, state))


def test_what_both_have_from_the_same_page_is_not_read(tmp_path: Path) -> None:
    from kvm.backends.software.system import SoftwareSystem

    with build(SoftwareSystem(), tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.write_memory(2 * MIB, b"\1" * MIB)
        first = machine.checkpoint()
        machine.write_memory(2 * MIB, b"\2")
        told: list[tuple[int, int]] = []
        with machine.held() as (_, two), machine.held(first) as (_, one):
            found = diff.pages(one, two, 4 * MIB, progress=lambda done, total: told.append((done, total)))
            assert [(page.address, page.count, *page.runs()) for page in found] == [
                (2 * MIB, 1, diff.Bytes(2 * MIB, b"\1", b"\2"))
            ]
        assert told == [(4096, 4096)]


def test_what_one_side_lacks_is_none() -> None:
    from kvm.snapshot.state import MachineState

    a = MachineState(({"regs": bytes(144)},), {}, {"gone": b"\1"})
    b = MachineState((), {"new": b"\2"}, {})
    timer = {"lapic": bytes(0x390) + b"\5" + bytes(0x6F)}
    (found,) = diff.states(MachineState(({"lapic": bytes(0x400)},), {}, {}), MachineState((timer,), {}, {}))
    assert found == diff.Difference("VCPU 0 lapic timer current count", "00000000", "00000005")
    found = list(diff.states(a, b))
    assert diff.Difference("VCPU 0 regs.rip", "0x0", None) in found
    assert diff.Difference("device gone[0x0]", "01", None) in found
    assert diff.Difference("new[0x0]", None, "02") in found
