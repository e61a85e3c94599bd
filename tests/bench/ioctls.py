"""How many ioctls an operation on a running machine takes: vmdeck beside QEMU, on the same guest, counted by strace.

``python -m tests.bench.ioctls`` prints the table. Needs /dev/kvm, strace, qemu-system-x86 and qemu-utils. The guest's
VCPUs all run and make no exits. What is counted is everything up to and with the guest running on, but for KVM_RUN.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvm.backends.kernel.system import KernelSystem
from kvm.boot import loader
from kvm.machine import Checkpoint, Machine, MachineConfig
from tests.kvm.machines import until
from tests.parity.qemu import Qemu
from tests.parity.test_registers import SPIN16, SPIN32, Stay

MEMORY = 16
"""MiB."""
OPERATIONS = ("inspect, resume", "pause, resume", "reset", "save", "load")
QUIET = 0.3
"""Seconds without another line from strace: the operation is over."""

_IOCTL = re.compile(r"ioctl\(\d+, (KVM_\w+|_IOC\([^)]*0xae[^)]*\))")
_OF_A_VCPU = re.compile(
    "KVM_[GS]ET_(REGS|S?REGS2|SREGS|XSAVE2?|FPU|XCRS|MSRS|LAPIC|VCPU_EVENTS|MP_STATE|DEBUGREGS|NESTED_STATE|TSC_KHZ"
    "|CPUID2|ONE_REG|DEVICE_ATTR)$|KVM_SET_GUEST_DEBUG$|KVM_KVMCLOCK_CTRL$"
)


class Strace:
    """What strace has written about one process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def command(self) -> tuple[str, ...]:
        return ("strace", "-f", "-qq", "-e", "trace=ioctl", "-o", str(self._path))

    def settled(self) -> int:
        """The length of what is written, once no more comes."""
        size, since = -1, time.monotonic()
        while time.monotonic() - since < QUIET:
            if (now := self._path.stat().st_size) != size:
                size, since = now, time.monotonic()
            time.sleep(0.02)
        return size

    def during(self, work: Callable[[], object]) -> Counter[str]:
        """The ioctls that this makes, by name."""
        start = self.settled()
        work()
        end = self.settled()
        found = Counter(_IOCTL.findall(self._path.read_text()[start:end]))
        del found["KVM_RUN"]
        return found


def stay(vcpus: int) -> Stay:
    return Stay("all run", b"\7", (SPIN32, *[SPIN16] * (vcpus - 1)))


def qemu(image: Path, folder: Path, vcpus: int) -> dict[str, Counter[str]]:
    """savevm and loadvm, with an image file for them."""
    disk = folder / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    strace = Strace(folder / "qemu.strace")
    cpu = ("-accel", "kvm", "-cpu", "host,-arch-capabilities", "-smp", str(vcpus))
    machine = (*cpu, "-m", str(MEMORY), "-bios", str(image))
    drive = ("-drive", f"if=none,format=qcow2,file={disk}")
    with Qemu(*machine, *drive, wrapper=strace.command()) as guest:

        def monitor(line: str) -> None:
            said = guest.command("human-monitor-command", **{"command-line": line})
            assert not said, said

        def pause_resume() -> None:
            guest.stop()
            guest.cont()

        guest.cont()
        until(lambda: stay(vcpus).reached(guest.registers()))
        counts = {
            "inspect, resume": strace.during(guest.registers),
            "pause, resume": strace.during(pause_resume),
            "save": strace.during(lambda: monitor("savevm one")),
            "load": strace.during(lambda: monitor("loadvm one")),
        }
        # Last: after it the guest starts its APs again, which strace can't tell from the reset's own.
        guest.stop()
        counts["reset"] = strace.during(lambda: (guest.reset(), guest.cont()))
    return counts


def vmdeck(image: Path, folder: Path, vcpus: int) -> dict[str, Counter[str]]:
    """A child under strace does the same operations, each when we say so."""
    strace = Strace(folder / "vmdeck.strace")
    command = [*strace.command(), sys.executable, "-m", "tests.bench.ioctls", str(image), str(vcpus)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def do(operation: str) -> None:
            print(operation, file=stdin, flush=True)
            assert stdout.readline() == "done\n"

        assert stdout.readline() == "done\n"
        order = [name for name in OPERATIONS if name != "reset"] + ["reset"]
        counts = {name: strace.during(lambda name=name: do(name)) for name in order}  # type: ignore[misc]
        stdin.close()
    return counts


def child(image: Path, vcpus: int) -> None:
    """The process that strace watches."""
    loaded = loader.load(image, memory=MEMORY << 20, format="firmware")
    checkpoints: list[Checkpoint] = []
    with Machine(KernelSystem(), loaded, MachineConfig(vcpus=vcpus, memory=MEMORY << 20)) as machine:

        def pause_resume() -> None:
            machine.pause()
            machine.run()

        def reset() -> None:
            machine.pause()
            machine.reset()
            machine.run()

        work: dict[str, Callable[[], object]] = {
            "inspect, resume": machine.dump_registers,
            "pause, resume": pause_resume,
            "save": lambda: checkpoints.append(machine.checkpoint()),
            "load": lambda: machine.restore(checkpoints[0]),
            "reset": reset,
        }
        machine.run()
        until(lambda: stay(vcpus).reached(machine.dump_registers()))
        print("done", flush=True)
        for line in sys.stdin:
            work[line.strip()]()
            print("done", flush=True)


@contextmanager
def _image(vcpus: int) -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "firmware.bin").write_bytes(stay(vcpus).image())
        yield folder / "firmware.bin", folder


def _parts(counts: Counter[str]) -> tuple[int, int]:
    of_vcpus = sum(count for name, count in counts.items() if _OF_A_VCPU.match(name))
    return of_vcpus, counts.total() - of_vcpus


def main() -> None:
    print(f"{'ioctls: of VCPUs + of the VM':<30}{'QEMU':>14}{'vmdeck':>14}{'vmdeck / QEMU':>16}")
    details = "-v" in sys.argv
    for vcpus in (1, 4):
        with _image(vcpus) as (image, folder):
            theirs, ours = qemu(image, folder, vcpus), vmdeck(image, folder, vcpus)
        for name in OPERATIONS:
            columns = [f"{a} + {b}" for a, b in (_parts(theirs[name]), _parts(ours[name]))]
            ratio = ours[name].total() / max(1, theirs[name].total())
            print(f"{f'{name}, {vcpus} VCPU' + 's' * (vcpus > 1):<30}{columns[0]:>14}{columns[1]:>14}{ratio:>14.2f} ×")
            if details:
                print(f"    QEMU   {dict(theirs[name].most_common())}\n    vmdeck {dict(ours[name].most_common())}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
