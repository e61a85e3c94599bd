from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from app.cli import main
from app.snapshot_cli import Meter, shown
from kvm.backends.software.system import SoftwareSystem
from tests.kvm.machines import COUNT, EXIT_7, build

MIB = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole snapshot and one that builds on it."""
    folder = tmp_path_factory.mktemp("snapshots")
    with closing(SoftwareSystem()) as system, build(system, folder, COUNT, vcpus=2, memory=2 * MIB) as machine:
        machine.write_memory(MIB, b"here and there")
        machine.save_file(folder / "base", name="a name", note="\x1b[31mred")
        machine.write_memory(MIB + 5, b"AND")
        machine.edit(1, "r9", 0x99)
        machine.save_file(folder / "child", incremental=True)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    assert main(["snapshot", *map(str, arguments)]) == code
    return capsys.readouterr().out


def test_list_draws_the_tree(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, child = said(capsys, "list", files).splitlines()
    assert base.startswith(f"{files}/base  a name  ")
    assert child.startswith(f"  {files}/child")
    assert "since base" in child
    assert "RIP 0x1000 0xfff0" in base


def test_info_tells_everything_and_prints_no_escape(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "info", files / "base", files / "child")
    for part in (
        "2 VCPUs, 2M of memory",
        "software",
        r"\x1b[31mred",
        "0x0–0x1fffff",
        "uart",
        "RIP 0x1000; cpuid sregs",
    ):
        assert part in told
    assert "\x1b" not in told


def test_diff_shows_registers_and_memory_by_byte(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "diff", files / "base", files / "child", code=1).splitlines()
    assert told == ["VCPU 1 regs.r9: 0x0 → 0x99", "memory 0x100005: 61 6e 64 → 41 4e 44"]
    assert said(capsys, "diff", files / "base", files / "base") == ""


def test_diff_counts_what_it_does_not_show(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "1 more places" in said(capsys, "diff", files / "base", files / "child", "--lines", "0", code=1)


def test_flatten_makes_a_file_of_its_own(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "stored" in said(capsys, "flatten", files / "child", tmp_path / "flat")
    assert said(capsys, "diff", files / "child", tmp_path / "flat") == ""
    assert "parent        none" in said(capsys, "info", tmp_path / "flat")


def test_verify_finds_what_is_damaged(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray((files / "base").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "bad").write_bytes(raw)
    assert main(["snapshot", "verify", str(tmp_path / "bad"), str(files / "child")]) == 2
    told = capsys.readouterr()
    assert "whole, 2 files" in told.out
    assert "doesn't match its checksum" in told.err


@pytest.mark.parametrize("action", ["list", "info", "verify", "diff"])
def test_what_is_no_snapshot_is_an_error_without_a_traceback(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(tmp_path / "nothing")] * (2 if action == "diff" else 1)
    assert main(["snapshot", action, *names]) == 2
    assert "No such file" in capsys.readouterr().err


def test_run_restores_a_machine(tmp_path: Path) -> None:
    """Two instructions before it ends itself; restored, it does."""
    with closing(SoftwareSystem()) as system, build(system, tmp_path, EXIT_7, memory=2 * MIB) as machine:
        machine.step()
        machine.save_file(tmp_path / "a")
    assert main(["run", "--restore", str(tmp_path / "a"), "--backend", "software", "--headless"]) == 7 << 1 | 1


@pytest.mark.parametrize("arguments", [["run"], ["run", "image", "--restore", "file"]])
def test_run_wants_an_image_or_a_snapshot(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Name either an IMAGE" in capsys.readouterr().err


def test_a_files_own_text_stays_on_its_line() -> None:
    assert shown("a\nb\x1b[2J\u202eü") == r"a\nb\x1b[2J\u202eü"


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...


def test_what_is_quick_draws_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    terminal = Terminal()
    meter = Meter("verifying", terminal)  # type: ignore[arg-type]
    meter(1, 10)
    assert terminal.text == ""
    clock[0] += 1
    meter(5, 10)
    assert terminal.text == "\rverifying: 50 %"
    meter.end()
    assert terminal.text.endswith("\r")
