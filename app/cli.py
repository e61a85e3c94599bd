"""The command ``vmdeck``. What a command needs is imported when it runs: ``--version`` and errors are quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from app.size import parse_address, parse_count, parse_size, show_size
from kvm.backends.choice import BACKENDS, open_system
from kvm.errors import ConfigError, VmdeckError

if TYPE_CHECKING:
    from kvm.machine import Machine

FAILED = 2
"""The exit code of everything that vmdeck refuses or that stops the guest for good."""

FORMATS = ("auto", "linux", "elf", "multiboot", "bootsector", "firmware", "flat16", "flat32", "flat64")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"vmdeck: {message}. See {self.prog} --help\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import version

        print(f"vmdeck {version('vmdeck')}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``vmdeck`` with these arguments (the process's own by default); the exit code."""
    _open_missing_streams()
    try:
        options = _parser().parse_args(arguments)
        code: int = options.command(options)
    except VmdeckError as error:
        print(f"vmdeck: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130
    return code


def _open_missing_streams() -> None:
    """A file opened later must not become fd 0, 1 or 2 by chance because our caller had closed it.

    And print would take stdout where there is no ``sys.stderr``: the guest's output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmdeck", description="A VM workstation for the terminal.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    machine = _Parser(add_help=False)
    machine.add_argument(
        "--backend",
        choices=tuple(BACKENDS),
        default="auto",
        help="what runs the guest: kvm (/dev/kvm), software, or auto: kvm where it is usable (default)",
    )
    machine.add_argument("--vcpus", metavar="N", default="4", help="number of VCPUs (default: %(default)s)")
    machine.add_argument("--memory", metavar="SIZE", default="64M", help="guest memory, as 64M or 1G (default: 64M)")
    machine.add_argument(
        "--headless",
        action="store_true",
        help="no workstation: the guest's consoles on stdin and stdout (ctrl-a h for the keys)",
    )
    machine.add_argument(
        "--dump-registers",
        action="store_true",
        help="with --headless: at the end, all VCPUs' registers on stderr as QEMU's 'info registers -a' prints them",
    )
    machine.add_argument(
        "--ledger",
        metavar="FILE",
        type=Path,
        help="with --headless: write every move of VCPU state to FILE, which is replaced, a JSON object a line",
    )

    demo = commands.add_parser("demo", parents=[machine], help="open the workstation on the demo guest")
    demo.set_defaults(command=_demo)

    image = _Parser(add_help=False)
    image.add_argument("--format", choices=FORMATS, default="auto", help="what the image is (default: look at it)")
    image.add_argument("--address", metavar="ADDR", help="guest-physical address to load a flat binary at, as 0x100000")
    image.add_argument("--initrd", metavar="FILE", type=Path, help="the initial RAM disk of a Linux kernel")
    image.add_argument(
        "--append",
        metavar="TEXT",
        help="the command line of a Linux kernel, all of it (default: console=ttyS0 earlyprintk=ttyS0)",
    )

    run = commands.add_parser("run", parents=[machine, image], help="open the workstation on a guest image")
    run.add_argument("image", metavar="IMAGE", nargs="?", type=Path, help="kernel, boot sector, firmware, flat binary")
    run.add_argument("--restore", metavar="FILE", type=Path, help="the machine in a snapshot file, instead of an image")
    run.add_argument("--drop", action="store_true", help="with --restore: go on without what this backend can't carry")
    run.add_argument("--verify", action="store_true", help="with --restore: check all memory before the guest runs")
    run.set_defaults(command=_run)

    from app.snapshot_cli import add_commands

    add_commands(commands, _Parser)

    lockstep = commands.add_parser(
        "lockstep",
        parents=[image],
        help="step a guest on KVM and on the software backend at once, up to the first difference",
    )
    lockstep.add_argument("image", metavar="IMAGE", type=Path, help="kernel, boot sector, firmware or flat binary")
    lockstep.add_argument("--count", metavar="N", type=int, default=10000, help="instructions to step (default: 10000)")
    lockstep.add_argument("--vcpus", metavar="N", default="1", help="number of VCPUs (default: %(default)s)")
    lockstep.add_argument("--memory", metavar="SIZE", default="16M", help="guest memory (default: %(default)s)")
    lockstep.set_defaults(command=_lockstep)

    doctor = commands.add_parser("doctor", help="say what works on this machine, what doesn't, and why")
    doctor.set_defaults(command=_doctor)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from app import guests

    return _start(options, guests.demo(), {})


def _run(options: argparse.Namespace) -> int:
    if (options.image is None) == (options.restore is None):
        raise ConfigError("Name either an IMAGE to run or, with --restore, a snapshot file. See vmdeck run --help.")
    if options.restore is not None:
        if (options.initrd, options.append) != (None, None):
            raise ConfigError("--initrd and --append go with an IMAGE: a snapshot has its guest's already.")
        return _show(options, _restored(options.backend, options.restore, drop=options.drop, verify=options.verify))
    return _start(options, options.image, _wishes(options))


def _wishes(options: argparse.Namespace) -> dict[str, Any]:
    """How the image is to be loaded, as ``kvm.boot.loader.load`` takes it."""
    return {
        "format": options.format,
        "address": None if options.address is None else parse_address(options.address),
        "initrd": options.initrd,
        "command_line": options.append,
    }


def _lockstep(options: argparse.Namespace) -> int:
    from app import lockstep
    from kvm.machine import MachineConfig

    vcpus, memory = parse_count(options.vcpus), parse_size(options.memory)
    check_memory(memory)
    return lockstep.run(
        options.image, count=options.count, config=MachineConfig(vcpus, memory), wishes=_wishes(options)
    )


def _doctor(options: argparse.Namespace) -> int:
    from app.doctor import examine

    return examine()


def _start(options: argparse.Namespace, image: Path, wishes: Mapping[str, Any]) -> int:
    vcpus, memory = parse_count(options.vcpus), parse_size(options.memory)
    check_memory(memory)
    return _show(options, _machine(options.backend, vcpus, memory, image, wishes))


def _show(options: argparse.Namespace, opening: AbstractContextManager[Machine]) -> int:
    """The machine in the workstation, or headless; it isn't opened before the terminal is known to do."""
    if not options.headless:
        if options.dump_registers or options.ledger:
            raise ConfigError("--dump-registers and --ledger go with --headless: add it, or leave them out.")
        from app.terminal import check_terminal

        check_terminal()
    with opening as machine:
        if options.headless:
            from kvm.quirks import ignored

            if options.backend == "auto" and machine.system.name == "software":
                print(
                    "vmdeck: KVM isn't usable here (vmdeck doctor says why): the software backend runs the guest.",
                    file=sys.stderr,
                )
            for quirk in ignored(machine.system):
                print(f"vmdeck: this KVM ignores writes to {quirk.what}: {quirk.lost}.", file=sys.stderr)
            return _headless(machine, options.ledger, dump_registers=options.dump_registers)
        from app import session

        return session.run(machine)


def _headless(machine: Machine, ledger: Path | None, *, dump_registers: bool) -> int:
    from app import headless
    from kvm.ledger_file import LedgerFile

    with ExitStack() as ending:
        if ledger is not None:
            file = LedgerFile(machine.ledger, ledger)
            ending.callback(lambda: print(f"vmdeck: {file.trouble}", file=sys.stderr) if file.trouble else None)
            ending.enter_context(file)
        code = headless.run(machine)
        if dump_registers:
            sys.stderr.write(machine.dump_registers())
        return code


@contextmanager
def _machine(backend: str, vcpus: int, memory: int, image: Path, wishes: Mapping[str, Any]) -> Iterator[Machine]:
    """A machine with the image in it, paused; closed in the end, whatever happens."""
    from kvm.boot import loader
    from kvm.machine import Machine, MachineConfig

    config = MachineConfig(vcpus=vcpus, memory=memory)
    with closing(open_system(backend)) as system:
        config.check(system.caps)
        boot_image = loader.load(image, memory=memory, vcpus=vcpus, **wishes)
        with Machine(system, boot_image, config) as machine:
            yield machine


@contextmanager
def _restored(backend: str, path: Path, *, drop: bool, verify: bool) -> Iterator[Machine]:
    """The machine in a snapshot file, paused; what it lost is said. VCPUs and memory are the file's."""
    from app.snapshot_cli import Meter
    from kvm.machine import Machine
    from kvm.snapshot.file import read

    with read(path) as file:
        check_memory(file.head.memory)
    with closing(open_system(backend)) as system:
        meter = Meter(f"verifying {path.name}")
        try:
            machine, losses = Machine.from_file(system, path, drop=drop, verify=verify, progress=meter)
        finally:
            meter.end()
        with machine:
            for loss in losses:
                print(f"vmdeck: lost: {loss}", file=sys.stderr)
            yield machine


def check_memory(size: int) -> None:
    """Raise ConfigError unless the host could ever back so much guest memory."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > host:
        raise ConfigError(
            f"--memory {show_size(size)} is more than this host has ({host >> 20}M). Ask for less: 64M does for most."
        )
