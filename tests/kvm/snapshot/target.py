"""What a fuzzer of snapshot files calls: everything that opens one, and what must hold whatever is in it.

An input is one byte, which of ``WAYS`` to open it, then the head of a file without the zeros that it ends in. It's
sealed anew (heads.py), so that the decoders behind the checksum are reached; memory is mostly a hole.
"""

from __future__ import annotations

import contextlib
import gc
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import xxhash

from app import guests
from app.cli import main
from kvm.backends.choice import open_system
from kvm.backends.interface import System
from kvm.backends.software.system import SoftwareSystem
from kvm.boot import loader
from kvm.errors import BackendUnavailable, SnapshotError, VmdeckError
from kvm.machine import Machine, MachineConfig
from kvm.snapshot import chain, convert, diff, notes
from kvm.snapshot.file import read
from kvm.snapshot.state import MachineState
from kvm.x86.structs import MP_STATE_RUNNABLE, MpState
from kvm.x86.substates import machine_table, vcpu_table
from tests.kvm.fw_cfg import note, offer
from tests.kvm.machines import COUNT, build, until
from tests.kvm.snapshot.crafted import memory_of, rewritten, settled
from tests.kvm.snapshot.heads import identity, put_together, sealed, taken_apart, write
from tests.kvm.snapshot.test_convert import MSRS, NEW, OLD, blank, of

VCPUS, MEMORY = 2, 2 << 20
_SMALL = 4 << 20
_MOST_VCPUS = 4


class Target:
    """A machine of the software backend and files in ``folder``. A context manager.

    ``taken`` counts the files that were taken, ``refused`` those that weren't.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.system: System = SoftwareSystem()
        self.taken = self.refused = 0
        # A real file: atheris asks stderr for its fileno at any moment, and leaves the error to whoever comes next.
        self._said = open(folder / "said", "w+", encoding="utf-8")  # noqa: SIM115
        self._faults: list[str] = []
        self._excepthook = threading.excepthook
        threading.excepthook = lambda fault: self._faults.append(f"{fault.thread}: {fault.exc_value!r}")
        self.machine = build(self.system, self.folder, COUNT, vcpus=VCPUS, memory=MEMORY)
        self.machine.image = replace(self.machine.image, path="guest.bin")
        self.machine.write_memory(0x3000, b"as it was")
        offer(self.machine, note(b"OSRELEASE=6.18.0\n"))
        self.good = self.folder / "0.vmdeck"
        with patch("time.time", return_value=0.0):  # the same identities every time: an input may name one
            for number in range(3):
                self.machine.write_memory(0x8000 + number * 8192, b"generation")
                self.machine.save_file(self.folder / f"{number}.vmdeck", incremental=number > 0)
        self._child = self._head(self.folder / "1.vmdeck")
        self.machine.step(0)  # what a machine takes depends on whether it has run
        self.machine.load_file(self.good, verify=True)
        self._settle()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *error: object) -> None:
        self.machine.close()
        self._said.close()
        threading.excepthook = self._excepthook

    def seeds(self) -> list[bytes]:
        """Inputs that are taken: files of this backend, of KVM where there is one, of hosts with more and with less."""
        heads = [self._head(self.folder / f"{number}.vmdeck") for number in range(3)]
        for caps in (NEW, OLD):
            copy = {name: raw for name, raw in of(caps).items() if raw}
            heads.append(self._head(rewritten(self.good, lambda draft, copy=copy: draft.update(  # type: ignore[misc]
                state=type(draft["state"])((copy,) * VCPUS, draft["state"].machine, draft["state"].devices)
            ))))  # fmt: skip
        heads.append(self._busy(self.system))
        with contextlib.suppress(BackendUnavailable):
            kernel = open_system("kvm")
            heads.append(self._busy(kernel))
            kernel.close()
        repaired = [put_together(parts).rstrip(b"\0") for head in heads if (parts := taken_apart(head))]
        return [bytes([way]) + head for head in repaired for way in range(len(WAYS))]

    def __call__(self, data: bytes) -> None:
        """Open it. Raises what nothing that opens a file may raise, AssertionError for what doesn't hold."""
        if not data:
            return
        way, head = WAYS[data[0] % len(WAYS)], sealed(data[1:])
        path = self._write("input.vmdeck", head)
        try:
            way(self, path, head)
            self.taken += 1
        except VmdeckError:
            self.refused += 1
        finally:
            path.unlink()
        assert not self._faults, self._faults

    # The ways

    def load(self, path: Path, head: bytes) -> None:
        """Into the machine."""
        try:
            self.machine.load_file(path, drop=True, verify=True)
        except VmdeckError:
            self._unchanged()
            raise
        self.machine.load_file(self.good, verify=True)
        self._settle()

    def live(self, path: Path, head: bytes) -> None:
        """What the machine takes it can execute, save and load."""
        self.machine.load_file(path, drop=True)
        try:
            self._goes_on(self.machine, path)
        finally:
            self.machine.load_file(self.good, verify=True)
            self._settle()

    def load_child(self, path: Path, head: bytes) -> None:
        """As the parent of another."""
        parts, parent = taken_apart(self._child), taken_apart(head)
        if parts is None or parent is None:
            return
        config = json.loads(parts.first(notes.CONFIG))
        config["parent"] = {"identity": identity(head).hex(), "path": path.name}
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            theirs = json.loads(parent.first(notes.CONFIG))
            config.update({key: theirs[key] for key in ("vcpus", "memory", "rom")})
        parts.replace(notes.CONFIG, json.dumps(config).encode())
        child = put_together(parts)
        self.load(self._write("child.vmdeck", child), child)

    def build(self, path: Path, head: bytes) -> None:
        """A machine of its own."""
        with read(path) as file:
            if file.head.vcpus > _MOST_VCPUS or file.head.memory > _SMALL:
                raise SnapshotError("more than a fuzzer has time for")
        machine, _ = Machine.from_file(self.system, path, drop=True)
        with machine:
            self._goes_on(machine, path)
            machine.files.wait_checked()
        del machine
        gc.collect()  # it holds itself, and its memory

    def carry(self, path: Path, head: bytes) -> None:
        """To a host that has less: no XSAVE, no XCRs."""
        table, rows = vcpu_table(OLD, MSRS), machine_table(OLD)
        with read(path) as file:
            state = file.head.state
        machine = {row.name: row.template for row in rows}
        fresh = MachineState((blank(table),) * len(state.vcpus), machine, {})
        try:
            convert.fit(state, table, rows, fresh, ran=False)
        except ValueError as error:  # as documented
            raise SnapshotError("can't be carried") from error

    def look(self, path: Path, head: bytes) -> None:
        """What the command line makes of it: nothing that a terminal would obey."""
        new = self.folder / "flat.vmdeck"
        for arguments in (
            ("list", path), ("info", path), ("verify", path), ("diff", path, self.good), ("flatten", path, new)
        ):  # fmt: skip
            self._said.seek(0)
            self._said.truncate()
            with contextlib.redirect_stdout(self._said), contextlib.redirect_stderr(self._said):
                code = main(["snapshot", *map(str, arguments)])
            self._said.seek(0)
            said = self._said.read()
            assert code in (0, 1, 2), f"{arguments[0]} ends with {code}"
            assert all(char.isprintable() or char == "\n" for char in said), f"{arguments[0]} prints {said!r}"
        if new.exists():
            with chain.open_chain(new) as flat, chain.open_chain(path) as opened:
                assert flat.head.state == opened.head.state
            new.unlink()
        chain.relabel(path, "another", "name")

    # What must hold

    def _goes_on(self, machine: Machine, path: Path) -> None:
        if MpState.from_buffer_copy(machine.save().vcpus[0]["mp_state"]).mp_state == MP_STATE_RUNNABLE:
            machine.step(0)
        else:  # a step would wait for it
            machine.run()
            machine.pause()
        memory, state = memory_of(machine), machine.save()
        saved = path.with_name("saved.vmdeck")
        machine.save_file(saved, incremental=True)
        machine.load_file(saved, drop=True, verify=True)
        saved.unlink()
        assert memory_of(machine) == memory, "other memory after a save and a load"
        after = machine.save()
        assert _comparable(after) == _comparable(state), [str(each) for each in diff.states(state, after)]

    def _settle(self) -> None:
        self._before = self._machine()

    def _unchanged(self) -> None:
        assert self._machine() == self._before, "a load that was refused has changed the machine"

    def _machine(self) -> tuple[object, ...]:
        machine = self.machine
        saved = machine.files.saved
        return (
            machine.save(), xxhash.xxh3_128_digest(memory_of(machine)), machine.status, machine.image,
            saved and saved.identity,
        )  # fmt: skip

    def _write(self, name: str, head: bytes) -> Path:
        path = self.folder / name
        path.unlink(missing_ok=True)  # a machine may be mapped from it
        write(path, head)
        return path

    def _busy(self, system: System) -> bytes:
        """Of a machine whose timers, interrupt controllers and serial line are in use."""
        path = self.folder / "busy"
        with Machine(system, loader.load(guests.demo(), memory=MEMORY), MachineConfig(VCPUS, MEMORY)) as machine:
            machine.run()
            until(lambda: b"ok" in machine.board.serial_console.since(0)[0])
            machine.board.serial.feed(b"help\r")
            machine.save_file(path)
        return self._head(path)

    @staticmethod
    def _head(path: Path) -> bytes:
        with read(path) as file, open(path, "rb") as raw:
            return raw.read(file.head.size)


def _comparable(state: MachineState) -> tuple[object, ...]:
    """Without CPUID: a machine that has run refuses any but what it got when it was built, even its own."""
    return settled(replace(state, vcpus=tuple({**copy, "cpuid": b""} for copy in state.vcpus)))


WAYS: tuple[Callable[[Target, Path, bytes], None], ...] = (
    Target.load, Target.live, Target.load_child, Target.build, Target.carry, Target.look,
)  # fmt: skip
