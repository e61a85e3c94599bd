"""Checkpoints drawn as a tree, and the ledger's records as rows."""

from __future__ import annotations

import pytest

from app.ledger_rows import ledger_rows
from app.tree import tree
from kvm.ledger import Part, Record
from kvm.levels import WritebackLevel


def drawn(*pairs: tuple[int, int | None], deleted: tuple[int, ...] = ()) -> list[str]:
    left = {number: parent for number, parent in pairs if number not in deleted}
    return [f"{branch}{number}" for branch, number in tree(left, dict(pairs))]


@pytest.mark.parametrize(
    ("pairs", "lines"),
    [
        ([], []),
        ([(1, None)], ["╶1"]),
        ([(1, None), (2, 1), (3, 2)], ["┌1", "│2", "╵3"]),
        ([(1, None), (2, None)], ["╶1", "╶2"]),
        (
            [(1, None), (2, 1), (3, 2), (4, 2), (5, 4), (6, None)],
            ["┌1", "│2", "├3", "└4", " ╵5", "╶6"],
        ),
        (
            [(1, None), (2, 1), (3, 1), (4, 2), (5, 4), (6, 4)],
            ["┌1", "├2", "││4", "│├5", "│└6", "└3"],
        ),
    ],
)
def test_who_came_from_whom(pairs: list[tuple[int, int | None]], lines: list[str]) -> None:
    assert drawn(*pairs) == lines


def test_children_of_a_deleted_checkpoint_hang_on_its_parent() -> None:
    pairs = ((1, None), (2, 1), (3, 2), (4, 3), (5, 2))
    assert drawn(*pairs, deleted=(2, 3)) == ["┌1", "├4", "└5"]
    assert drawn(*pairs, deleted=(1, 2, 3)) == ["╶4", "╶5"]


def test_a_long_chain_stays_in_its_column() -> None:
    lines = drawn((1, None), *((number, number - 1) for number in range(2, 5000)))
    assert {line[0] for line in lines[1:-1]} == {"│"}
    assert not {line[1] for line in lines} & set("│├└")


def record(number: int, hook: str, *parts: Part, level: WritebackLevel | None = None) -> Record:
    return Record(number, 10**9, hook, level, "run", parts, 10.0, 0.0)


def test_the_vcpus_of_one_resume_are_one_row() -> None:
    runs = [
        record(
            number, "before_run", Part(vcpu, written=("regs",) if vcpu == 2 else (), skipped=("xsave",), ioctls=vcpu)
        )
        for number, vcpu in enumerate((0, 1, 2, 1, 0), 2)
    ]
    machine = Part(None, read=("ioapic", "clock"), ioctls=2)
    save = record(1, "cpu_synchronize_all_states", machine, Part(0, read=("regs",), ioctls=1), Part(1, ioctls=1))
    rows = ledger_rows([save, *runs, record(7, "before_run", Part(2))])
    assert [(row.number, row.hook, row.vcpus, row.ioctls, row.microseconds) for row in rows] == [
        (5, "before_run", 3, 1, 30.0),
        (2, "before_run", 3, 3, 30.0),
        (1, "all_states", 2, 4, 10.0),
    ]
    assert rows[1].moved == "wrote 1: regs; 1 unchanged"
    assert rows[2].moved == "read 1 + VM 2: regs ioapic clock"
    assert rows[0].moved == "1 unchanged"


def test_what_was_tolerated_is_said_once_before_what_moved() -> None:
    parts = [Part(vcpu, written=("regs",), tolerated=(("tsc_khz", "EINVAL"),)) for vcpu in range(2)]
    (row,) = ledger_rows([record(1, "cpu_synchronize_all_post_init", *parts)])
    assert row.moved == "tolerated: tsc_khz EINVAL; wrote 1: regs"


def test_a_part_that_failed_says_so_first() -> None:
    (row,) = ledger_rows([record(1, "before_run", Part(0, written=("sregs",), error="KVM_SET_MSRS refused"))])
    assert row.moved == "failed: KVM_SET_MSRS refused; wrote 1: sregs"
    (row,) = ledger_rows([record(1, "cpu_synchronize_all_states", Part(None, read=("pit",), error="KVM_GET_CLOCK"))])
    assert (row.vcpus, row.moved) == (0, "failed: KVM_GET_CLOCK; read VM 1: pit")
