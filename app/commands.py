"""All that can be done: one table from which the keys, the buttons, the palette and the help are made."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding


@dataclass(frozen=True, slots=True)
class Command:
    """One action. ``keys`` as Textual names them; F-keys work while the console has the keyboard, too."""

    id: str
    keys: str
    action: str
    label: str
    help: str
    footer: bool = True
    button: bool = False


COMMANDS = (
    Command("machine.run", "space,f5", "run", "Run", "Let the guest run on", button=True),
    Command("machine.pause", "space,f5", "pause", "Pause", "Stop every VCPU where it is", button=True),
    Command("machine.step", "s,f6", "step", "Step", "One instruction on the selected VCPU", button=True),
    Command("machine.edit", "e", "edit", "Edit", "Set a register of the selected VCPU", button=True),
    Command("machine.step_all", "S", "step_all", "Step all", "One instruction on every VCPU", footer=False),
    Command(
        "machine.checkpoint", "c,f8", "checkpoint", "Checkpoint", "Keep the whole machine as it is now", button=True
    ),
    Command(
        "machine.checkpoint_as", "C", "checkpoint_as", "Checkpoint as", "Type a name, then keep the machine",
        footer=False,
    ),
    Command(
        "machine.restore", "b,f9", "restore", "Back", "Go back to the checkpoint that the machine came from",
        button=True,
    ),
    Command(
        "machine.reset", "r", "reset", "Reset", "Reset the machine, at once; only a checkpoint takes it back",
        button=True,
    ),
    Command("vcpu.next", "j,down,right_square_bracket", "select(1)", "Next VCPU", "Select the next VCPU", footer=False),
    Command(
        "vcpu.previous", "k,up,left_square_bracket", "select(-1)", "Previous VCPU", "Select the previous VCPU",
        footer=False,
    ),
    Command("show.vcpus", "escape", "focus_pane('vcpus')", "VCPUs", "Back to the VCPUs", footer=False),
    Command("show.console", "f2", "focus_pane('console')", "Type", "Type at the guest; F2 again leaves"),
    Command("show.zoom", "z,f7", "zoom", "Zoom", "The whole terminal for the pane that has the keyboard", footer=False),
    Command("show.source", "o", "source", "Other output", "Serial line or debug console", footer=False),
    Command("show.ledger", "f3", "focus_pane('ledger')", "Ledger", "What the hooks moved", footer=False),
    Command(
        "show.checkpoints", "f4", "focus_pane('checkpoints')", "Checkpoints", "Choose a checkpoint to go back to",
        footer=False,
    ),
    Command("show.back", "pageup", "scroll_console(1)", "Scroll back", "Older output of the guest", footer=False),
    Command(
        "show.forward", "pagedown", "scroll_console(-1)", "Scroll forward", "Newer output of the guest", footer=False
    ),
    Command("app.help", "question_mark,f1", "help", "Help", "All keys", button=True),
    Command("app.leave", "q,ctrl+c", "leave", "Quit", "End the guest and leave", button=True),
)  # fmt: skip

BINDINGS = [
    Binding(command.keys, command.action, command.label, show=command.footer, id=command.id, tooltip=command.help)
    for command in COMMANDS
]
