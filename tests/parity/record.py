"""What QEMU with KVM prints of each of the guest's states, kept for machines without QEMU or /dev/kvm.

Made by ``python -m tests.parity.record``, with the QEMU that is installed.
"""

from __future__ import annotations

from pathlib import Path

from tests.parity.test_registers import STAYS, Stay, qemu

FOLDER = Path(__file__).parent / "recorded"


def file(stay: Stay) -> Path:
    return FOLDER / f"{stay.name.replace(' ', '-').lower()}.txt"


if __name__ == "__main__":
    for stay in STAYS:
        file(stay).write_text(qemu("kvm", stay)[1])
