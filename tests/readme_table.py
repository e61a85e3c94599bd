"""The README's table of substates, made from the code: ``python -m tests.readme_table`` rewrites it."""

from __future__ import annotations

import re
from pathlib import Path

from kvm.x86 import msrs
from kvm.x86.substates import machine_table, vcpu_table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- substates -->", "<!-- /substates -->"


class _Every(dict[str, int]):
    """A kernel that has it all."""

    def get(self, key: str, default: object = None) -> int:  # type: ignore[override]
        return self[key]

    def __missing__(self, key: str) -> int:
        return 4096


def table() -> str:
    """Markdown, in put order; the machine's own substates come before the VCPUs' at FULL, so they stand first."""
    every = _Every()
    listed = vcpu_table(every, [*msrs.NAMES])
    reads = {row.name: place for place, row in enumerate(listed.get_order, 1)}
    lines = ["| put | substate | get | ioctls | from level | because |", "|---|---|---|---|---|---|"]
    for place, row in enumerate(listed.put_order, 1):
        names = " ".join(f"`{name}`" for name in (row.get, row.put) if name)
        lines.append(f"| {place} | {row.name} | {reads.get(row.name, '')} | {names} | {row.level.name} | {row.why} |")
    lines += [
        f"| VM | {row.name} | VM | `{row.get}` `{row.put}` | {row.level.name} | {row.why} |"
        for row in machine_table(every)
    ]
    return "\n".join(lines)


def rewritten(readme: str) -> str:
    """The README with the table as it is now."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", readme, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
