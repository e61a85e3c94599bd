"""``--headless`` as a process of its own: consoles on stdin and stdout, its keys, exit codes, signals, the terminal."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from app.headless import BACKLOG
from tests.app import guests
from tests.app.process import COMMAND, LIMIT, Terminal, said, vmdeck


@pytest.fixture(params=["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Guest:
    """Writes guests to files and says how to run them."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._folder = folder
        self._backend = backend

    def arguments(self, code: bytes, format: str = "flat16", vcpus: int = 1) -> tuple[str, ...]:
        path = self._folder / "guest.bin"
        path.write_bytes(code)
        return (
            "run", str(path), "--format", format, "--address", "0x7c00", "--backend", self._backend,
            "--vcpus", str(vcpus), "--memory", "2M", "--headless",
        )  # fmt: skip


@pytest.fixture
def guest(tmp_path: Path, backend: str) -> Guest:
    return Guest(tmp_path, backend)


def start(*arguments: str, **streams: int) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen([*COMMAND, *arguments], bufsize=0, **pipes)


def read(process: subprocess.Popen[bytes], wanted: bytes) -> None:
    """Wait until the guest has printed this."""
    assert process.stdout is not None
    seen = b""
    while wanted not in seen:
        assert select.select([process.stdout], [], [], LIMIT)[0], f"{wanted!r} did not come, only {seen!r}"
        data = process.stdout.read(65536)
        assert data, f"{wanted!r} did not come, only {seen!r}"
        seen += data


# How a guest ends


@pytest.mark.parametrize(("value", "code"), [(0x15, 43), (0xFF, 255)])
def test_exit_code_of_isa_debug_exit(guest: Guest, value: int, code: int) -> None:
    done = vmdeck(*guest.arguments(guests.print_and_exit(b"hello", value)))
    assert (done.returncode, done.stdout, said(done.stderr)) == (code, b"hello", b"")


def test_a_machine_that_is_switched_off_is_no_error(guest: Guest) -> None:
    done = vmdeck(*guest.arguments(guests.POWER_OFF))
    assert (done.returncode, done.stdout, said(done.stderr)) == (0, b"", b"")


def test_guest_bytes_pass_as_they_are(guest: Guest) -> None:
    everything = bytes(range(256))
    assert vmdeck(*guest.arguments(guests.print_and_exit(everything, 0))).stdout == everything


def test_a_slow_reader_loses_nothing(guest: Guest) -> None:
    """More than a pipe and our own backlog take while nobody reads: the guest has to wait."""
    assert guests.FLOOD_BYTES > BACKLOG + (64 << 10)
    process = start(*guest.arguments(guests.FLOOD))
    assert process.stdout is not None
    first = process.stdout.read(1)
    stdout, stderr = process.communicate(timeout=LIMIT)
    assert (process.returncode, said(stderr)) == (85, b"")
    assert first + stdout == b"x" * guests.FLOOD_BYTES


def test_a_triple_fault_is_explained(guest: Guest) -> None:
    done = vmdeck(*guest.arguments(guests.TRIPLE_FAULT_64, "flat64"))
    message = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b"")
    assert "triple fault" in message
    assert "VCPU 0 in long mode" in message
    assert "RIP 0x7c08" in message
    assert "0x7c08: 0f 0b  ud2" in message
    assert "Traceback" not in message


@pytest.mark.kvm
def test_what_kvm_cannot_emulate_is_shown(tmp_path: Path) -> None:
    done = vmdeck(*Guest(tmp_path, "kvm").arguments(guests.NO_EMULATION_64, "flat64"))
    message = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b"")
    assert "VCPU 0 in long mode, CPL 0, RIP 0x7c05" in message
    assert "0x7c05: 0f 58 03  addps xmm0, xmmword ptr [rbx]" in message
    assert "Traceback" not in message


# Keys


def test_stdin_goes_to_the_serial_line_and_its_end_ends_nothing(guest: Guest) -> None:
    process = start(*guest.arguments(guests.ECHO))
    assert process.stdin is not None
    process.stdin.write(b"ping")
    process.stdin.close()
    read(process, b">ping")
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 128 + signal.SIGTERM


def test_ctrl_a_x_quits(guest: Guest) -> None:
    done = vmdeck(*guest.arguments(guests.ECHO), given=b"\x01x")
    assert done.returncode == 0


def test_the_other_keys(guest: Guest) -> None:
    process = start(*guest.arguments(guests.ECHO))
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"1\x01\x01")
    read(process, b">1\x01")
    process.stdin.write(b"2\x01a")
    read(process, b"2\x01")
    process.stdin.write(b"3\x01")  # the two halves of a key may come apart
    read(process, b"3")
    process.stdin.write(b"q4")  # ctrl-a q means nothing
    read(process, b"4")
    process.stdin.write(b"\x01r")
    read(process, b">")  # it starts again
    process.stdin.write(b"\x01h\x01x")
    assert process.wait(LIMIT) == 0
    help_text = process.stderr.read()
    for key in (b"ctrl-a x", b"ctrl-a r", b"ctrl-a h", b"ctrl-a ctrl-a"):
        assert key in help_text
    process.communicate()


# Signals and streams


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, guests.SPIN), (signal.SIGINT, guests.HALT), (signal.SIGHUP, guests.HALT)],
    ids=["TERM-busy", "INT-halted", "HUP-halted"],
)
def test_a_signal_ends_it(guest: Guest, number: signal.Signals, code: bytes) -> None:
    process = start(*guest.arguments(guests.print_and_exit(b"!", 0)[:4] + code, vcpus=2))
    read(process, b"!")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=LIMIT)
    assert (process.returncode, stdout, said(stderr)) == (128 + number, b"", b"")


def test_a_signal_ends_it_while_nobody_reads_stdout(guest: Guest) -> None:
    process = start(*guest.arguments(guests.FLOOD))
    read(process, b"x")
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 128 + signal.SIGTERM
    process.communicate()


@pytest.mark.parametrize("code", [guests.FLOOD, guests.PRINT_AND_SPIN], ids=["writing", "silent"])
def test_a_closed_stdout_ends_it(guest: Guest, code: bytes) -> None:
    process = start(*guest.arguments(code))
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(LIMIT) == 128 + signal.SIGPIPE
    assert process.stderr is not None
    assert said(process.stderr.read()) == b""


def test_a_full_disk_is_an_error(guest: Guest) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    process = start(*guest.arguments(guests.print_and_exit(b"hello", 0)), stdout=full)
    os.close(full)
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert b"No space left" in stderr
    assert b"Traceback" not in stderr


def test_closed_standard_streams_harm_nothing(guest: Guest) -> None:
    """What is opened first would else become fd 0, and the guest would read from it."""
    arguments = guest.arguments(guests.print_and_exit(b"hello", 3))
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *COMMAND, *arguments], stdout=subprocess.PIPE, timeout=LIMIT
    )
    assert (done.returncode, done.stdout) == (7, b"hello")


# On a terminal


def test_a_terminal_is_raw_meanwhile_and_sane_again(guest: Guest) -> None:
    with Terminal(*guest.arguments(guests.ECHO)) as terminal:
        terminal.expect(b">")
        assert not terminal.is_sane()
        terminal.type(b"a\x03b\x1ac\x1c\r")  # ctrl-c, ctrl-z and ctrl-\ are the guest's
        terminal.expect(b"a\x03b\x1ac\x1c\r")
        terminal.type(b"\x01x")
        assert terminal.wait() == 0
        assert terminal.is_sane()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_sane_terminal(guest: Guest, number: signal.Signals) -> None:
    with Terminal(*guest.arguments(guests.ECHO)) as terminal:
        terminal.expect(b">")
        terminal.signal(number)
        assert terminal.wait() == 128 + number
        assert terminal.is_sane()


def test_a_stopped_guest_leaves_a_sane_terminal(guest: Guest) -> None:
    with Terminal(*guest.arguments(guests.TRIPLE_FAULT_64, "flat64")) as terminal:
        assert terminal.wait() == 2
        assert terminal.is_sane()
        assert b"triple fault" in terminal.seen


def test_closing_the_terminal_ends_it(guest: Guest) -> None:
    with Terminal(*guest.arguments(guests.ECHO, vcpus=2)) as terminal:
        terminal.expect(b">")
        terminal.hang_up()
        assert terminal.process.wait(LIMIT) == 128 + signal.SIGHUP
