"""The help screen: every key, from the same table as the keys themselves."""

from __future__ import annotations

from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from app.commands import COMMANDS, MEMORY_COMMANDS

_GROUPS = (
    ("machine", "The machine"), ("vcpu", "VCPUs"), ("show", "Panes"),
    ("memory", "Code and memory, once m shows them"), ("app", "vmdeck"),
)  # fmt: skip
_LEGEND = (
    ("•", "this register changed: a moment ago while the guest runs, since it last stood while it stands"),
    ("•90", "in memory: this byte changed, in the same way; ▶ in code: the next instruction"),
    ("▶ ◌ ■", "running, halted or waiting for a SIPI, stopped"),
    ("kernel owns", "the registers live in KVM (or the software backend's model of it); what is drawn is a sample"),
    ("user copy owns", "they live in vmdeck's copy and go back to KVM before the VCPU runs again"),
    ("put RUNTIME", "the level at which the copy was last written: RUNTIME, RESET or FULL"),
    ("●", "the checkpoint that the machine came from: there Back goes"),
    ("▤ ◆", "a snapshot in a file; the snapshot that others are compared with"),
    ("?", "not known"),
)


class HelpScreen(ModalScreen[None]):
    """Closes on any of the keys that people try."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,f1,enter", "dismiss", "Close", id="help.close")
    ]

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help"):
            yield Static(self._table(), id="help-text")

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        for prefix, title in _GROUPS:
            table.add_row("", Text(title, style="bold"))
            for command in (*COMMANDS, *MEMORY_COMMANDS):
                if command.id.startswith(prefix + "."):
                    keys = "  ".join(self.app.get_key_display(key) for key in _bindings(command.keys, command.action))
                    table.add_row(Text(keys, style="bold"), f"{command.label}. {command.help}.")
            table.add_row("", "")
        table.add_row("", Text("What the panes say", style="bold"))
        for sign, meaning in _LEGEND:
            table.add_row(sign, meaning)
        table.add_row("", "")
        table.add_row("", "Mouse: click a VCPU to select it, the console to type, a button to press it.")
        table.add_row(
            "", "In the snapshots: ⏎ goes back, d shows what differs from now, or from the one that m has marked;"
        )
        table.add_row("", "n names, N notes, x deletes (a file only from the list). ctrl+p is the palette.")
        table.add_row("", "Code and memory are read while the guest runs: one look may be of several moments.")
        table.add_row("", "While you type at the guest only F1 to F9, ctrl+], ctrl+p and ctrl+q are vmdeck's.")
        return table


def _bindings(keys: str, action: str) -> list[Binding]:
    return [Binding(key, action) for key in keys.split(",")]
