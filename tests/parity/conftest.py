"""Where QEMU is missing the parity tests skip, and the run's summary says so."""

from __future__ import annotations

import pytest

from tests.parity.qemu import NEEDS_QEMU


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and NEEDS_QEMU in report.longrepr[2]
    ]
    if skipped:
        terminalreporter.write_sep("=", "parity with QEMU was not tested", yellow=True, bold=True)
        terminalreporter.write_line(f"{len(skipped)} tests skipped: {skipped[0].longrepr[2]}", yellow=True)
