"""The house rules that a machine can hold: who imports whom, and that CI does what the README tells a person to do."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # lint_imports adds to it
    assert lint_imports(no_cache=True) == 0


@pytest.mark.parametrize(
    ("package", "needless"),
    [
        ("kvm.machine", {"textual", "rich", "app", "widgets"}),
        ("app.cli", {"textual", "numpy", "unicorn", "capstone"}),
        ("app.headless", {"textual", "rich", "widgets"}),
    ],
)
def test_an_import_brings_nothing_needless(package: str, needless: set[str]) -> None:
    """The machine works without a user interface, and the command answers before the heavy libraries are loaded."""
    code = f"import sys, {package}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert not needless & set(done.stdout.split())


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    places = [script.index(part) for part in command.split(" && ")]
    assert places == sorted(places)
    assert script[-1] == command.split(" && ")[-1], "pytest's summary closes CI's output"


def test_the_readmes_demo_command_installs_and_starts_the_demo() -> None:
    (command,) = re.findall(r"^python3 -m venv .*demo$", README, re.MULTILINE)
    assert command.split(" && ") == ["python3 -m venv .venv", ".venv/bin/pip install -q .", ".venv/bin/vmdeck demo"]


def test_every_package_is_installed() -> None:
    """The flat layout lists packages by hand: one left out would work from a clone only."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("app", "widgets", "kvm")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(listed) == found
