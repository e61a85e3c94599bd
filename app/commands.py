"""All that can be done: one table from which the keys, the buttons, the palette and the help are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from textual.binding import Binding


@dataclass(frozen=True, slots=True)
class Command:
    """One action. ``keys`` as Textual names them; F-keys work while the console has the keyboard, too.

    ``action`` is the app's ("app.run") or the desk's ("screen.zoom").
    """

    id: str
    keys: str
    action: str
    label: str
    help: str
    footer: bool = True
    button: bool = False

    @property
    def name(self) -> str:
        """The action without its place and parameters, as ``check_action`` is asked."""
        return self.action.partition("(")[0].partition(".")[2]


COMMANDS = (
    Command("machine.run", "space,f5", "app.run", "Run", "Let the guest run on", button=True),
    Command("machine.pause", "space,f5", "app.pause", "Pause", "Stop every VCPU where it is", button=True),
    Command("machine.step", "s,f6", "app.step", "Step", "One instruction on the selected VCPU", button=True),
    Command("machine.edit", "e", "app.edit", "Edit", "Set a register of the selected VCPU", button=True),
    Command("machine.step_all", "S", "app.step_all", "Step all", "One instruction on every VCPU", footer=False),
    Command(
        "machine.checkpoint", "c,f8", "app.checkpoint", "Checkpoint", "Keep the whole machine as it is now", button=True
    ),
    Command(
        "machine.checkpoint_as", "C", "app.checkpoint_as", "Checkpoint as", "Type a name, then keep the machine",
        footer=False,
    ),
    Command(
        "machine.restore", "b,f9", "app.restore", "Back", "Go back to the checkpoint that the machine came from",
        button=True,
    ),
    Command(
        "machine.reset", "r", "app.reset", "Reset", "Reset the machine, at once; only a checkpoint takes it back",
        button=True,
    ),
    Command(
        "machine.save", "w", "app.save", "Save", "Write the machine to a file; the guest runs on", footer=False,
        button=True,
    ),
    Command(
        "machine.save_changes", "W", "app.save_changes", "Save changes", "Only what changed since the last file",
        footer=False,
    ),
    Command(
        "machine.load", "l", "app.load", "Load", "Become the machine in a snapshot file", footer=False, button=True
    ),
    Command("machine.call_off", "escape", "app.call_off", "Call off", "End what takes long early", footer=False),
    Command(
        "vcpu.next", "j,down,right_square_bracket", "screen.select(1)", "Next VCPU", "Select the next VCPU",
        footer=False,
    ),
    Command(
        "vcpu.previous", "k,up,left_square_bracket", "screen.select(-1)", "Previous VCPU", "Select the previous VCPU",
        footer=False,
    ),
    Command("show.vcpus", "escape", "screen.focus_pane('vcpus')", "VCPUs", "Back to the VCPUs", footer=False),
    Command("show.console", "f2", "screen.focus_pane('console')", "Type", "Type at the guest; F2 again leaves"),
    Command(
        "show.zoom", "z,f7", "screen.zoom", "Zoom", "The whole terminal for the pane that has the keyboard",
        footer=False,
    ),
    Command("show.source", "o", "screen.source", "Other output", "Serial line or debug console", footer=False),
    Command(
        "show.contract", "t", "app.contract", "Contract", "The table of substates: what moves, when and why",
        footer=False,
    ),
    Command(
        "show.memory", "m", "app.memory", "Memory", "Code and memory as the selected VCPU sees them", footer=False
    ),
    Command("show.ledger", "f3", "screen.focus_pane('ledger')", "Ledger", "What the hooks moved", footer=False),
    Command(
        "show.snapshots", "f4", "screen.focus_pane('snapshots')", "Snapshots",
        "Go back to one, name it, compare it, delete it", footer=False,
    ),
    Command(
        "show.back", "pageup", "screen.scroll_console(1)", "Scroll back", "Older output of the guest", footer=False
    ),
    Command(
        "show.forward", "pagedown", "screen.scroll_console(-1)", "Scroll forward", "Newer output of the guest",
        footer=False,
    ),
    Command("app.help", "question_mark,f1", "app.help", "Help", "All keys", button=True),
    Command("app.leave", "q,ctrl+c", "app.leave", "Quit", "End the guest and leave", button=True),
)  # fmt: skip

MEMORY_COMMANDS = (
    Command("memory.goto", "g", "screen.goto", "Go to", "An address or a register that it follows, in hexadecimal"),
    Command("memory.turn", "p", "screen.turn", "Physical", "Linear addresses or physical ones, at the same byte"),
    Command("memory.write", "e", "screen.write", "Write", "Bytes at the cursor; pauses the guest"),
    Command("memory.find", "slash", "screen.find", "Find", "Bytes or text in physical memory, from the cursor on"),
    Command("memory.again", "n", "screen.find_again", "Find again", "The same, further on", footer=False),
    Command(
        "memory.follow", "home", "screen.follow", "Follow", "Back to the register that was followed last", footer=False
    ),
    Command("memory.other", "tab,shift+tab", "screen.other", "Other pane", "Code or memory", footer=False),
    Command("memory.leave", "escape,q,m", "screen.leave", "Close", "Back; a search is called off first"),
)  # fmt: skip
"""What can be done where code and memory are shown, besides all that is the app's."""


def bindings(commands: Iterable[Command]) -> list[Binding]:
    """The keys of these commands."""
    return [
        Binding(command.keys, command.action, command.label, show=command.footer, id=command.id, tooltip=command.help)
        for command in commands
    ]


BINDINGS = bindings(COMMANDS)
MEMORY_BINDINGS = bindings(MEMORY_COMMANDS)
