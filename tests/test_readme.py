"""What the README shows runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests import readme_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_scripts_run() -> None:
    library, fuzzer = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    positions, record = printed(library)
    assert positions.count("0x") == 4
    assert "cpu_synchronize_all_post_init" in record
    assert printed(fuzzer) == ["99 the last of a hundred"]


def printed(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_the_files_it_links_to_are_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_it_names_every_option() -> None:
    for command in ("demo", "run"):
        shown = subprocess.run(
            [sys.executable, "-m", "app", command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
        ).stdout
        for option in re.findall(r"--[a-z-]+", shown):
            assert option == "--help" or option in README


def test_its_table_of_substates_is_the_code_s() -> None:
    assert readme_table.rewritten(README) == README
