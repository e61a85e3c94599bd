"""The command as a process of its own: what it refuses and how it says so, the backends, the workstation's ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from app.cli import FORMATS
from kvm.boot import linux, loader
from tests.app import guests
from tests.app.process import EMPTY_DEV, LIMIT, Terminal, in_namespace, refused, refused_here, vmdeck
from tests.guests.assemble import BinutilsMissing, assemble
from tests.kvm.boot.bzimage import BzImage


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "guest.bin"
    path.write_bytes(guests.HALT)
    return str(path)


GUEST = Path(__file__).parents[1] / "guests" / "linux.S"
FLAT = ("--format", "flat16", "--address", "0x7c00", "--memory", "2M", "--vcpus", "1")
SOFTWARE = ("--backend", "software", "--headless")


# What needs no guest


def test_version() -> None:
    done = vmdeck("--version")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"vmdeck {version('vmdeck')}\n", b"")


def test_help_names_every_command() -> None:
    done = vmdeck("--help")
    assert done.returncode == 0
    for command in (b"demo", b"run", b"doctor"):
        assert command in done.stdout


def test_the_command_line_that_help_tells_of_is_the_loaders() -> None:
    done = vmdeck("run", "--help", env={**os.environ, "COLUMNS": "500"})
    assert f"(default: {linux.COMMAND_LINE})" in done.stdout.decode()


def test_the_formats_offered_are_the_loaders() -> None:
    assert sorted(FORMATS) == sorted((loader.AUTO, *loader.FORMATS))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "COMMAND"),
        (("walk",), "walk"),
        (("run",), "IMAGE"),
        (("demo", "--backend", "xen"), "xen"),
        (("demo", "--wings"), "--wings"),
        (("run", "x", "--format", "floppy"), "floppy"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: tuple[str, ...], why: str) -> None:
    message = refused(*arguments)
    assert why in message
    assert message.count("\n") == 1
    assert "--help" in message


# Numbers


@pytest.mark.parametrize(
    ("size", "why"),
    [
        ("abc", "not a memory size"),
        ("-1", "not a memory size"),
        ("1.5G", "not a memory size"),
        ("0", "1 MiB or more"),
        ("1K", "1 MiB or more"),
        ("2097153", "steps of 4 KiB"),
        ("1P", "more than this host has"),
        ("99999999999999999999P", "more than this host has"),
    ],
)
def test_memory_that_cannot_be(image: str, size: str, why: str) -> None:
    assert why in refused_here("run", image, "--memory", size, *SOFTWARE)


@pytest.mark.parametrize("count", ["0", "-1", "10000"])
@pytest.mark.parametrize("backend", ["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_vcpus_that_cannot_be(image: str, backend: str, count: str) -> None:
    message = refused_here("run", image, "--vcpus", count, "--backend", backend, "--headless")
    assert f"{count} VCPUs" in message
    assert "1 to " in message


def test_what_is_no_number_of_vcpus(image: str) -> None:
    assert "not a number of VCPUs" in refused("run", image, "--vcpus", "abc", *SOFTWARE)


@pytest.mark.parametrize("address", ["-1", "here", "0x1ffffffffffffffff"])
def test_addresses_that_cannot_be(image: str, address: str) -> None:
    assert "not a guest-physical address" in refused_here("run", image, f"--address={address}", *SOFTWARE)


# Images


def test_images_that_cannot_be_loaded(tmp_path: Path) -> None:
    elf = bytearray(64)
    elf[:6] = b"\x7fELF\x02\x01"
    elf[16:20] = b"\x02\x00\xb7\x00"  # ET_EXEC, EM_AARCH64
    elf[20] = 1
    elf[52:54] = (64).to_bytes(2, "little")
    files = {
        "empty": (b"", "empty"),
        "oversized": (bytes(3 << 20), "memory"),
        "truncated": (b"\x7fELF\x02\x01\x01", ""),
        "another machine's": (bytes(elf), "EM_AARCH64"),
        "nothing known": (b"once upon a time", "--format"),
    }
    for name, (content, why) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        flat = ("--format", "flat32") if name == "oversized" else ()
        message = refused_here("run", str(path), *flat, "--memory", "2M", *SOFTWARE)
        assert name in message, "the message names the file"
        assert why in message
    assert "missing.bin" in refused_here("run", str(tmp_path / "missing.bin"), *SOFTWARE)
    assert str(tmp_path) in refused("run", str(tmp_path), *SOFTWARE)


def test_initrd_and_command_line_are_for_linux(image: str, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x")
    for wish in (("--initrd", str(initrd)), ("--append", "quiet")):
        assert "flat16 takes no initrd" in refused_here("run", image, *FLAT, *wish, *SOFTWARE)
        assert "go with an IMAGE" in refused_here("run", "--restore", image, *wish, *SOFTWARE)


def test_a_linux_kernel_gets_what_the_command_line_says(tmp_path: Path) -> None:
    try:
        code = assemble(GUEST, base=0, format="bin")
    except BinutilsMissing as missing:
        pytest.skip(str(missing))
    kernel, initrd = tmp_path / "bzImage", tmp_path / "initrd"
    kernel.write_bytes(BzImage(code=code).build())
    initrd.write_bytes(b"the initrd")
    done = vmdeck("run", str(kernel), "--initrd", str(initrd), "--append", "quiet x=1", "--memory", "24M", *SOFTWARE)
    assert (done.returncode, done.stdout, done.stderr) == (24 << 1 | 1, b"quiet x=1\nthe initrd", b"")
    assert "--memory 256M" in refused("run", str(kernel), "--memory", "16M", *SOFTWARE)
    assert "takes 2047" in refused("run", str(kernel), "--append", "x" * 2048, *SOFTWARE)
    assert f"{initrd}x: No such file" in refused("run", str(kernel), "--initrd", f"{initrd}x", *SOFTWARE)


# Backends. The real thing can be had: namespaces hide /dev/kvm, another user may not open it, and a library put
# in front of libc's ioctl answers as a kernel does whose virtualisation VirtualBox holds.


@pytest.mark.kvm
def test_no_dev_kvm(image: str) -> None:
    done = in_namespace(EMPTY_DEV, "run", image, *FLAT, "--backend", "kvm", "--headless")
    assert done.returncode == 2
    assert done.stderr.startswith("vmdeck: /dev/kvm is not there")
    assert "--backend software" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.kvm
def test_auto_goes_on_in_software_without_dev_kvm(tmp_path: Path) -> None:
    path = tmp_path / "guest.bin"
    path.write_bytes(guests.print_and_exit(b"here", 1))
    done = in_namespace(EMPTY_DEV, "run", str(path), *FLAT, "--headless")
    assert (done.returncode, done.stdout) == (3, "here")
    assert "software backend" in done.stderr
    assert "vmdeck doctor" in done.stderr


@pytest.mark.kvm
def test_no_permission(image: str) -> None:
    """Root may open anything, unless it gives up the right to."""
    without_rights = "--bounding-set=-dac_override,-dac_read_search"
    done = in_namespace(
        f"{EMPTY_DEV} && mknod -m 000 /dev/kvm c 10 232 && set -- setpriv {without_rights} \"$@\"",
        "run", image, *FLAT, "--backend", "kvm", "--headless",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("vmdeck: /dev/kvm may not be opened by this user")
    assert "usermod" in done.stderr
    assert "--backend software" in done.stderr
    assert "Traceback" not in done.stderr


def interposed(folder: Path, request: str, error: str) -> str:
    """A library whose ioctl fails like that for one KVM request, and is libc's for all others."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = folder / "busy.c", folder / "busy.so"
    source.write_text(
        "#define _GNU_SOURCE\n#include <errno.h>\n#include <stdarg.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n"
        "#include <linux/kvm.h>\n"
        "int ioctl(int fd, unsigned long request, ...) {\n"
        "    va_list arguments; va_start(arguments, request);\n"
        "    void *argument = va_arg(arguments, void *); va_end(arguments);\n"
        f"    if (request == {request}) {{ errno = {error}; return -1; }}\n"
        "    return syscall(SYS_ioctl, fd, request, argument);\n}\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=LIMIT)
    return str(library)


@pytest.mark.kvm
def test_kvm_is_busy(image: str, tmp_path: Path) -> None:
    env = {**os.environ, "LD_PRELOAD": interposed(tmp_path, "KVM_CREATE_VM", "EBUSY")}
    done = vmdeck("run", image, *FLAT, "--backend", "kvm", "--headless", env=env)
    message = done.stderr.decode()
    assert done.returncode == 2
    assert message.startswith("vmdeck: KVM is busy: another hypervisor")
    assert "--backend software" in message
    assert "Traceback" not in message


# The workstation


def test_the_workstation_needs_a_terminal(image: str) -> None:
    message = refused("run", image, *FLAT, "--backend", "software")
    assert "needs a terminal" in message
    assert "--headless" in message


def test_the_workstation_needs_room(image: str) -> None:
    with Terminal("run", image, *FLAT, "--backend", "software", columns=40, lines=10) as terminal:
        assert terminal.wait() == 2
        assert "too small: 40×10".encode() in terminal.seen
        assert b"--headless" in terminal.seen
        assert b"Traceback" not in terminal.seen


def test_the_workstation_needs_more_than_a_dumb_terminal(image: str) -> None:
    with Terminal("run", image, *FLAT, "--backend", "software", env={"TERM": "dumb"}) as terminal:
        assert terminal.wait() == 2
        assert b"TERM=dumb" in terminal.seen


@pytest.mark.parametrize("backend", ["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_the_workstation_opens_on_a_running_guest_and_q_quits(image: str, backend: str) -> None:
    with Terminal("run", image, *FLAT, "--backend", backend) as terminal:
        terminal.shows("RUNNING")
        terminal.type(b"q")
        assert terminal.wait() == 0
        assert terminal.is_sane()


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("software", signal.SIGTERM),
        ("software", signal.SIGINT),
        ("software", signal.SIGHUP),
        pytest.param("kvm", signal.SIGTERM, marks=pytest.mark.kvm),
    ],
)
def test_a_signal_ends_the_workstation(image: str, backend: str, number: signal.Signals) -> None:
    with Terminal("run", image, *FLAT, "--backend", backend) as terminal:
        terminal.shows("RUNNING")
        terminal.signal(number)
        assert terminal.wait() == 128 + number
        assert terminal.is_sane()
        assert b"Traceback" not in terminal.seen


@pytest.mark.parametrize("backend", ["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_closing_the_terminal_ends_the_workstation(image: str, backend: str) -> None:
    with Terminal("run", image, *FLAT, "--backend", backend) as terminal:
        terminal.shows("RUNNING")
        terminal.hang_up()
        assert terminal.process.wait(LIMIT) == 128 + signal.SIGHUP


# The demo


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).parent / "vmdeck"
    if not script.exists():
        pytest.skip("vmdeck is not installed here: pip install -e .")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == f"vmdeck {version('vmdeck')}\n"


@pytest.mark.parametrize("backend", ["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_the_demo_runs_headless(backend: str) -> None:
    with Terminal("demo", "--headless", "--backend", backend, "--vcpus", "2", "--memory", "2M") as terminal:
        terminal.expect(b"round 2 ")
        terminal.type(b"help\r")
        terminal.expect(b"help")
        terminal.type(b"\x01x")
        assert terminal.wait() == 0
        assert terminal.is_sane()


@pytest.mark.parametrize("backend", ["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_the_demo_opens_the_workstation(backend: str) -> None:
    with Terminal("demo", "--backend", backend, columns=120, lines=40) as terminal:
        terminal.shows("VCPU 3 ")
        terminal.shows("round 2 ")
        terminal.type(b"q")
        assert terminal.wait() == 0
        assert terminal.is_sane()
