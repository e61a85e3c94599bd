"""A tiny app around one widget, and registers by hand."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import App, ComposeResult
from textual.widget import Widget

from kvm.x86.structs import Regs, Sregs
from widgets.address_pane import AddressPane
from widgets.console import ConsolePane
from widgets.line_pane import Line
from widgets.snapshots import SnapshotsPane
from widgets.vcpu_pane import VcpuPane


class Host(App[None]):
    """Holds the widget; ``heard`` is what it said."""

    CSS = "LinePane { height: 100%; width: 100%; }"

    def __init__(self, widget: Widget) -> None:
        super().__init__()
        self.widget = widget
        self.heard: list[object] = []

    def compose(self) -> ComposeResult:
        yield self.widget

    def on_vcpu_pane_selected(self, message: VcpuPane.Selected) -> None:
        self.heard.append(("selected", message.index))

    def on_address_pane_pointed(self, message: AddressPane.Pointed) -> None:
        self.heard.append(message.address)

    def on_console_pane_typed(self, message: ConsolePane.Typed) -> None:
        self.heard.append(message.data)

    def on_console_pane_left(self) -> None:
        self.heard.append("left")

    def on_snapshots_pane_chosen(self, message: SnapshotsPane.Chosen) -> None:
        self.heard.append((message.what, message.key, message.marked))


def text(lines: Sequence[Line]) -> list[str]:
    """The lines without their styles."""
    return ["".join(part for part, _ in line).rstrip() for line in lines]


def regs(**values: int) -> bytes:
    """struct kvm_regs of code in the kernel's half."""
    return bytes(Regs(**{"rip": 0xFFFFFFFF81000123, "rflags": 0x246, **values}))


def sregs() -> bytes:
    """struct kvm_sregs of 64-bit code at CPL 0."""
    made = Sregs(cr0=0x80050033, cr3=0x1000, cr4=0x6F0, efer=0xD01)
    made.cs.l = made.cs.s = made.cs.present = 1
    made.cs.type, made.cs.selector = 0xB, 0x10
    return bytes(made)
