"""The machine as a whole: run, pause, step, reset, checkpoints, and what guests do to it."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvm.backends.interface import ExitKind, System
from kvm.errors import ConfigError, MachineError, MemoryAccessError
from kvm.machine import Activity, Machine, MachineConfig, Phase
from kvm.x86.structs import Irqchip, PitState2, Regs, Sregs
from tests.kvm.machines import COUNT, EXIT_7, HLT, ORIGIN, ORIGIN_32, OUT_80, RESET_8042, TRIPLE_FAULT, build, until


def regs(machine: Machine, vcpu: int = 0) -> Regs:
    return Regs.from_buffer_copy(machine.view(vcpu).regs)


def sampled(machine: Machine, vcpu: int = 0) -> Regs:
    """Registers of a running VCPU, from a sample newer than the call."""
    before = machine.view(vcpu).time_ns
    machine.request_samples()
    until(lambda: machine.view(vcpu).time_ns > before)
    return regs(machine, vcpu)


def test_a_new_machine_is_paused_at_its_entry(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        assert machine.status.phase is Phase.PAUSED
        assert regs(machine).rip == ORIGIN
        assert regs(machine, 1).rip == 0xFFF0
        assert machine.view(0).dirty is False
        assert [record.hook.removeprefix("cpu_synchronize_all_") for record in machine.ledger.records] == [
            "post_init", "states", "post_init"
        ]  # fmt: skip


def test_runs_samples_and_pauses(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        machine.run()
        first = sampled(machine).rax
        until(lambda: sampled(machine).rax != first)
        assert sampled(machine, 1).rip == 0xFFF0
        until(lambda: sampled(machine, 1) and machine.view(1).activity is Activity.WAIT_SIPI)
        assert machine.view(0).activity is Activity.RUNNING
        machine.pause()
        assert {machine.view(i).activity for i in (0, 1)} == {Activity.STOPPED}
        stood = regs(machine).rax
        machine.request_samples()
        assert regs(machine).rax == stood


def test_sampling_never_synchronises(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        machine.run()
        total = machine.ledger.total
        for _ in range(50):
            sampled(machine)
        assert machine.ledger.total == total
        assert machine.view(0).dirty is False


def test_halted_is_seen(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, HLT) as machine:
        machine.run()
        until(lambda: sampled(machine) and machine.view(0).activity is Activity.HALTED)


def test_step_executes_one_instruction(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        rips = []
        for _ in range(6):
            (ended,) = machine.step(0)
            assert ended.kind is ExitKind.DEBUG
            rips.append(regs(machine).rip)
        assert rips == [ORIGIN + 2, ORIGIN] * 3
        assert regs(machine).rax & 0xFFFFFFFF == 3


def test_a_step_over_port_io_is_one_instruction(system: System, tmp_path: Path) -> None:
    """in al, 0x99; out 0x99, al; insb; jmp back: each exits to the bus in the middle of its step."""
    with build(system, tmp_path, bytes.fromhex("e4 99 e6 99 6c eb f9")) as machine:
        rips = []
        for _ in range(8):
            (ended,) = machine.step(0)
            assert ended.kind is ExitKind.DEBUG
            rips.append(regs(machine).rip - ORIGIN)
        assert rips == [2, 4, 5, 0] * 2
        assert regs(machine).rax & 0xFF == 0xFF
        assert regs(machine).rdi == 2
        machine.run()
        until(lambda: sampled(machine).rdi & 0xFFFF > 50)
        assert machine.status.phase is Phase.RUNNING


def test_step_all_leaves_waiting_vcpus_where_they_are(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=3) as machine:
        kinds = [ended.kind for ended in machine.step()]
        assert kinds == [ExitKind.DEBUG, ExitKind.KICKED, ExitKind.KICKED]
        assert regs(machine).rip == ORIGIN + 2
        machine.run()
        until(lambda: sampled(machine).rax > 3)


def test_a_vcpu_that_is_slow_to_step_is_not_one_that_waits(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvm.machine.STEP_LIMIT", 0.0)  # as on a host that hasn't run it yet by then
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        assert {machine.step(0)[0].kind for _ in range(50)} == {ExitKind.DEBUG}
        assert machine.step(1)[0].kind is ExitKind.KICKED


def test_step_then_run_no_longer_steps(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        machine.step(0)
        machine.run()
        until(lambda: sampled(machine).rax > 100)
        assert machine.status.phase is Phase.RUNNING


def test_edit_reaches_the_guest(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        machine.edit(0, "rax", 0x7000_0000)
        machine.edit(0, "cs.limit", 0xFFFF)
        view = machine.view(0)
        assert view.dirty
        assert view.from_copy
        assert regs(machine).rax == 0x7000_0000
        machine.step(0)
        assert regs(machine).rax == 0x7000_0001
        with pytest.raises(ConfigError, match="no register"):
            machine.edit(0, "rxx", 0)
        with pytest.raises(ConfigError, match="16 bits"):
            machine.edit(0, "gdt.limit", 0x10000)


def test_reset_starts_over(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        machine.memory.write(ORIGIN + 0x10, b"left behind")
        machine.memory.write(ORIGIN, b"\xf4")  # the image is loaded anew
        machine.edit(0, "rsi", 77)
        machine.reset()
        assert machine.status.phase is Phase.PAUSED
        assert regs(machine).rip == ORIGIN
        assert regs(machine).rsi == 0
        assert machine.memory.read(ORIGIN, len(COUNT)) == COUNT
        assert machine.memory.read(ORIGIN + 0x10, 11) == b"left behind"
        machine.run()
        until(lambda: sampled(machine).rax > 0)
        machine.reset()
        assert machine.status.phase is Phase.RUNNING
        until(lambda: sampled(machine).rax > 0)


def test_the_guest_resets_the_machine(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, RESET_8042) as machine:
        resets = threading.Semaphore(0)
        machine.subscribe(lambda status: resets.release() if status.reason == "reset" else None)
        machine.run()
        for _ in range(3):
            assert resets.acquire(timeout=20)
        machine.pause()
        assert regs(machine).rbx <= 1


def test_a_reset_that_a_step_asked_for_is_done_once_it_has_settled(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, RESET_8042) as machine:
        for _ in range(5):
            for _ in range(3):
                machine.step(0)
            machine.settle()
            assert regs(machine).rip == ORIGIN
    with pytest.raises(MachineError, match="closed"):
        machine.settle()


def test_the_guest_exits_and_stands_where_it_wrote(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, EXIT_7) as machine:
        machine.run()
        status = machine.wait(Phase.EXITED, timeout=20)
        assert (status.phase, status.code) == (Phase.EXITED, 7)
        assert regs(machine).rip == ORIGIN + 4


def test_a_triple_fault_stops_with_a_reason_and_only_reset_helps(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, TRIPLE_FAULT, vcpus=2, format="flat32") as machine:
        machine.run()
        status = machine.wait(Phase.STOPPED, timeout=20)
        assert status.phase is Phase.STOPPED
        assert status.vcpu == 0
        assert status.exit is not None
        assert status.exit.kind is ExitKind.SHUTDOWN
        with pytest.raises(MachineError, match="Reset"):
            machine.run()
        machine.reset()
        assert regs(machine).rip == ORIGIN_32


def test_restore_brings_back_registers_and_memory(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, OUT_80, vcpus=2) as machine:
        machine.run()
        until(lambda: sampled(machine).rax & 0xFF > 3)
        machine.pause()
        before = bytes(regs(machine))
        memory = machine.memory.read(0, machine.memory.size)
        checkpoint = machine.checkpoint("here")
        assert machine.status.phase is Phase.PAUSED
        assert checkpoint.position == (regs(machine).rip, 0xFFF0)
        machine.write_memory(0x8000, b"changed")
        machine.run()
        until(lambda: sampled(machine).rax != Regs.from_buffer_copy(before).rax)
        machine.restore(checkpoint)
        assert machine.status.phase is Phase.RUNNING
        machine.pause()
        machine.restore(checkpoint)
        assert bytes(regs(machine)) == before
        assert machine.memory.read(0, machine.memory.size) == memory


WRITES_WHEN_TYPED_TO = bytes.fromhex("ba fd 03  ec  a8 01  74 fb  c6 06 00 11 01  eb fe")
"""mov dx, 0x3fd; until the UART has a byte: in al, dx; then mov byte [0x1100], 1, in this page; jmp itself."""


def test_what_the_guest_writes_while_a_first_checkpoint_is_copied_is_in_it(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(system, tmp_path, WRITES_WHEN_TYPED_TO) as machine:
        written = []
        copy_pages = machine._vm.copy_pages

        def copy_then_type(*arguments: Any) -> None:
            copy_pages(*arguments)
            if machine.vcpus[0].running:  # where a backend's log allows that
                machine.board.serial.feed(b"x")
                until(lambda: machine.read_memory(0x1100, 1) == b"\1")
                written.append(1)

        monkeypatch.setattr(machine._vm, "copy_pages", copy_then_type)
        machine.run()
        checkpoint = machine.checkpoint()
        machine.write_memory(0x1100, b"\2")
        machine.restore(checkpoint)
        assert machine.read_memory(0x1100, 1) == bytes(written or [0])
        assert len(written) == machine._vm.exact_log


WRITE_AND_EXIT = bytes.fromhex("c6 06 00 30 02 e6 f4")
"""mov byte [0x3000], 2; out 0xf4, al."""


def test_a_guest_that_does_the_same_each_time_is_undone_each_time(system: System, tmp_path: Path) -> None:
    """The page comes to hold what it held when the log was looked at last."""
    with build(system, tmp_path, WRITE_AND_EXIT, memory=1 << 20) as machine:
        checkpoint = machine.checkpoint()
        for _ in range(3):
            machine.run()
            assert machine.wait(Phase.EXITED, timeout=20).phase is Phase.EXITED
            assert machine.read_memory(0x3000, 1) == b"\2"
            machine.restore(checkpoint)
            assert machine.read_memory(0x3000, 1) == b"\0"


def test_a_restore_says_what_it_cost(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, HLT, memory=2 << 20) as machine:
        checkpoint = machine.checkpoint()
        machine.write_memory(0x100000, os.urandom(7 * 4096))
        assert machine.restore(checkpoint) == 7
        assert machine.restore(checkpoint) == 0


def test_many_checkpoints_in_any_order(system: System, tmp_path: Path) -> None:
    rng = random.Random(1)
    with build(system, tmp_path, HLT, memory=2 << 20) as machine:
        kept = []
        for number in range(12):
            machine.write_memory(rng.randrange(256, 511) * 4096, rng.randbytes(100))
            machine.edit(0, "rdi", number)
            kept.append((machine.checkpoint(f"n{number}"), machine.memory.read(0, 2 << 20)))
        for checkpoint, memory in rng.sample(kept, 12) + rng.sample(kept, 12):
            machine.restore(checkpoint)
            assert machine.memory.read(0, 2 << 20) == memory
            assert regs(machine).rdi == checkpoint.number - 1
        first = kept[0][0]
        for checkpoint, _ in kept[::2]:
            machine.forget(checkpoint)
        machine.write_memory(0x100000, os.urandom(50 * 4096))
        kept = [*kept[1::2], (machine.checkpoint("new"), machine.memory.read(0, 2 << 20))]
        for checkpoint, memory in kept:
            machine.restore(checkpoint)
            assert machine.memory.read(0, 2 << 20) == memory
        with pytest.raises(MachineError, match="no checkpoint 1 "):
            machine.restore(first)


def test_load_refuses_what_does_not_fit_and_changes_nothing(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        state = machine.save()
        before = machine.ledger.total
        broken = type(state)(state.vcpus[:1], state.machine, state.devices)
        with pytest.raises(MachineError, match="1 VCPUs"):
            machine.load(broken)
        broken = type(state)(({**state.vcpus[0], "regs": b"short"}, state.vcpus[1]), state.machine, state.devices)
        with pytest.raises(MachineError, match="regs has 5 bytes"):
            machine.load(broken)
        assert machine.ledger.total == before
        machine.edit(0, "rax", 1)
        machine.load(state)
        again = machine.save()
        assert again.devices == state.devices
        time = {"msrs_reset", "tsc_offset", "lapic"}
        for before_load, after in zip(state.vcpus, again.vcpus, strict=True):
            assert {name for name, raw in after.items() if raw != before_load[name]} <= time


def test_a_timer_s_count_of_zero_is_65536(system: System, tmp_path: Path) -> None:
    """As a snapshot may have it: KVM divided by it once (CVE-2015-7513)."""
    with build(system, tmp_path, COUNT) as machine:
        state = machine.save()
        pit = PitState2.from_buffer_copy(state.machine["pit"])
        for channel in pit.channels:
            channel.mode, channel.count = 2, 0
        machine.load(replace(state, machine={**state.machine, "pit": bytes(pit)}))
        loaded = PitState2.from_buffer_copy(machine.save().machine["pit"])
        assert [channel.count for channel in loaded.channels] == [0x10000] * 3


def test_a_device_that_breaks_stops_the_machine_and_not_its_thread(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(system, tmp_path, EXIT_7) as machine:

        def broken(code: int) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(machine, "request_exit", broken)
        machine.run()
        status = machine.wait(Phase.STOPPED, timeout=20)
        assert status.phase is Phase.STOPPED
        assert "ZeroDivisionError: a bug" in status.reason
        monkeypatch.undo()
        machine.reset()
        machine.run()
        assert machine.wait(Phase.EXITED, timeout=20).code == 7


def test_operations_from_many_threads_are_serialised(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        checkpoint = machine.checkpoint()
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(25):
                    rng.choice(
                        [machine.run, machine.pause, machine.reset, machine.checkpoint, lambda: machine.step(0),
                         lambda: machine.restore(checkpoint), machine.request_samples]
                    )()  # fmt: skip
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert not any(thread.is_alive() for thread in threads)
        machine.restore(checkpoint)
        machine.run()
        until(lambda: sampled(machine).rax > 0)


def test_close_leaves_no_thread(system: System, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    machine = build(system, tmp_path, COUNT, vcpus=4)
    machine.run()
    machine.close()
    machine.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(MachineError, match="closed"):
        machine.run()


@pytest.mark.parametrize("vcpus", [0, 256, 10_000, -1])
def test_impossible_vcpu_counts(system: System, tmp_path: Path, vcpus: int) -> None:
    with pytest.raises(ConfigError, match="VCPUs"):
        build(system, tmp_path, COUNT, vcpus=vcpus)


@pytest.mark.parametrize("memory", [0, 4096, (1 << 20) + 1, 1 << 60])
def test_impossible_memory(memory: int) -> None:
    with pytest.raises(ConfigError, match="memory"):
        MachineConfig(1, memory).check({"KVM_CAP_MAX_VCPUS": 8})


def test_memory_outside_of_ram_is_an_error(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        with pytest.raises(MemoryAccessError, match="0x400000"):
            machine.read_memory((4 << 20) - 4, 8)
        machine.memory.write(0x2000, b"before")
        with pytest.raises(MemoryAccessError):
            machine.write_memory((4 << 20) - 4, bytes(8))
        assert machine.read_memory((4 << 20) - 4, 4) == bytes(4)


def test_sregs_of_the_view_are_plain_sregs(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        assert Sregs.from_buffer_copy(machine.view(0).sregs).cr0 == 0x60000010
        machine.run()
        sampled(machine)
        assert Sregs.from_buffer_copy(machine.view(0).sregs).cr0 & 1 == 0


@pytest.mark.parametrize("how", ["load", "reset"])
def test_an_interrupt_that_the_slave_8259_asks_for_is_gone_with_the_state_it_was_in(
    system: System, tmp_path: Path, how: str
) -> None:
    """Put before the slave, the master took the old slave's request for one of the new state's: a spurious IRQ 15."""
    with build(system, tmp_path, COUNT) as machine:
        quiet = machine.save()
        chip = Irqchip.from_buffer_copy(quiet.machine["pic_slave"])
        chip.chip[0] = chip.chip[1] = 1  # last_irr, irr: IRQ 8
        machine.load(replace(quiet, machine={**quiet.machine, "pic_slave": bytes(chip)}))
        if how == "load":
            machine.load(quiet)
        else:
            machine.reset()
        after = machine.save().machine
        for name in ("pic_master", "pic_slave"):
            assert after[name] == quiet.machine[name]
