"""The bells' protocol, every interleaving of it: a model checked by spin (spinroot.com; Debian: spin)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("bells.pml")

pytestmark = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="spin or gcc is not installed: apt install spin gcc"
)


def check(folder: Path, *defines: str) -> str:
    """What the checker says of the model, ended by the first error that it finds."""
    subprocess.run(["spin", "-a", *defines, str(MODEL)], cwd=folder, check=True, capture_output=True)
    command = ["gcc", "-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=2000", "-o", "pan", "pan.c"]
    subprocess.run(command, cwd=folder, check=True)
    # -E: that the VCPU's thread waits in the end is no error; the model's end_state looks at how everything stands.
    done = subprocess.run(["./pan", "-E", "-m100000"], cwd=folder, capture_output=True, text=True, timeout=240)
    assert "max search depth too small" not in done.stdout
    assert "Search not completed" not in done.stdout or "errors: 1" in done.stdout
    return done.stdout


def test_no_ring_and_no_job_is_lost_and_none_overtakes_another(tmp_path: Path) -> None:
    assert "errors: 0" in check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "found"),
    [("SLEEPS_BLINDLY", "finished==2"), ("MAIL_OVERTAKES", "made[job]==1")],
    ids=["the job isn't looked for before the sleep", "mail is read before the jobs are made"],
)
def test_the_model_tells_a_mistake(tmp_path: Path, mistake: str, found: str) -> None:
    said = check(tmp_path, f"-D{mistake}", "-DODDITIES=0")
    assert "errors: 1" in said
    assert found in said
