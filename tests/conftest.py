"""What all tests share: the ``kvm`` marker skips, loudly, where /dev/kvm can't run a guest."""

from __future__ import annotations

from functools import cache

import pytest

from kvm.backends.choice import open_system
from kvm.errors import BackendUnavailable

_NEEDS_KVM = "needs KVM: "


@cache
def why_no_kvm() -> str:
    """Why the kernel backend can't run here; empty where it can."""
    try:
        open_system("kvm").close()
    except BackendUnavailable as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kvm") and (why := why_no_kvm()):
        pytest.skip(_NEEDS_KVM + why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and _NEEDS_KVM in report.longrepr[2]
    ]
    if skipped:
        terminalreporter.write_sep("=", "real KVM was not tested", yellow=True, bold=True)
        terminalreporter.write_line(f"{len(skipped)} KVM tests skipped: {why_no_kvm()}", yellow=True)
