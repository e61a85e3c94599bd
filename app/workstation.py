"""The workstation: the Textual app on a machine. It reads views and the ledger, and asks the machine for operations."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import events, work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, Vertical
from textual.geometry import Size
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Button, Footer

from app import edit, plan
from app.code import read_code
from app.commands import BINDINGS, COMMANDS
from app.explain import exit_code, explain
from app.frames import make_frame
from app.ledger_rows import ledger_rows
from app.theme import VMDECK
from app.tree import tree_entries
from kvm.backends.interface import ExitKind
from kvm.errors import VmdeckError
from kvm.machine import Checkpoint, Machine, Phase, Status
from kvm.x86 import decode
from kvm.x86.structs import Regs, Sregs
from widgets.checkpoints import CheckpointsPane
from widgets.console import ConsolePane
from widgets.frame import Changes
from widgets.ledger import LedgerPane
from widgets.prompt import Prompt, Question
from widgets.status import Banner, StatusLine, StatusValues, TooSmall
from widgets.vcpu_area import VcpuArea
from widgets.vcpu_pane import VcpuPane

RATE = 30
"""Frames a second while the guest runs."""
IDLE = 8
"""While it stands, only every IDLEth of them is looked at."""
QUEUED = 16
"""Operations that may wait for their turn; keys pressed beyond that are dropped."""
OUTPUT = 6 << 10
"""Bytes of console output that one frame takes: a third of its time."""
BACKLOG = 256 << 10
"""Of output that lies further behind, the older part is left out, and the console says so."""
SHOWN_ROWS = 200
FOCUSED = ("vcpus", "console", "ledger", "checkpoints")
"""The panes that can have the keyboard."""
BELOW = 6
"""Rows below the VCPUs that are worth having."""
WIDE = 140
"""Columns from which the buttons stand beside the status."""


@dataclass(frozen=True, slots=True)
class _Operation:
    name: str
    function: Callable[[], object]


class Workstation(App[int]):
    """Runs until a person quits; ``return_value`` and ``return_code`` are the process's exit code.

    The machine stays the caller's, to be closed after. ``run``: let the guest run, once the first frame is drawn: a
    busy guest would take the processor from it.
    """

    CSS_PATH = "workstation.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [*BINDINGS]
    AUTO_FOCUS = "#vcpus"
    PANES = ("vcpus", "ledger", "checkpoints")
    """What Tab goes through: the console takes every key, so it's entered on purpose only."""

    class StatusChanged(Message):
        """The machine has another status."""

    class OperationEnded(Message):
        """An operation is over; ``error`` is empty if it went well."""

        def __init__(self, name: str, error: str) -> None:
            super().__init__()
            self.name = name
            self.error = error

    def __init__(self, machine: Machine, *, title: str = "", run: bool = False) -> None:
        super().__init__()
        self.register_theme(VMDECK)
        self.theme = VMDECK.name  # now: a change of theme later styles everything a second time
        self.machine = machine
        self.title = title or Path(machine.image.path).name
        self._run_it = run
        self.selected = 0
        self._laid_out = False
        self._cells = Size(80, 24)
        self._place = "console"
        """What is shown in the place that console, ledger and checkpoints share on a small terminal."""
        self._keyboard = "vcpus"
        """The pane that has the keyboard, or had it before the prompt."""
        self._zoomed = False
        self._changes = [Changes() for _ in machine.vcpus]
        self._waiting: deque[_Operation] = deque()
        self._busy = ""
        self._error = ""
        self._ticks = 0
        self._seen_total = -1
        self._last_status: Status | None = None
        self._parents: dict[int, int | None] = {}
        """Of every checkpoint there ever was."""
        self._asked: Callable[[str], None] = lambda text: None
        """What the prompt's answer is for. It raises VmdeckError for one that won't do."""
        self._usable: dict[str, bool | None] = {}
        self._outputs = (machine.board.serial_console, machine.board.debug_console)
        self._positions = [0, 0]

    def compose(self) -> ComposeResult:
        with Container(id="top"):
            yield StatusLine(id="status")
            with Horizontal(id="buttons"):
                for command in COMMANDS:
                    if command.button:
                        name = command.action.partition("(")[0]
                        button = Button(
                            command.label, action=f"app.{command.action}", id=f"button-{name}", compact=True
                        )
                        button.can_focus = False
                        yield button
        yield Banner(id="banner")
        yield VcpuArea(id="vcpus")
        with Horizontal(id="below"):
            yield ConsolePane(("serial", "debug"), id="console")
            with Vertical(id="side"):
                yield LedgerPane(id="ledger")
                yield CheckpointsPane(id="checkpoints")
        yield Prompt(id="prompt")
        yield Footer(show_command_palette=False, compact=True)
        yield TooSmall(plan.MIN_COLUMNS, plan.MIN_ROWS)

    def on_mount(self) -> None:
        self._main = self.screen
        self._laid_out = True
        self._arrange()
        self.machine.subscribe(self._hear)
        self.set_interval(1 / RATE, self._tick)
        self.call_after_refresh(self._draw)
        if self._run_it:
            self.call_after_refresh(self.action_run)

    def _hear(self, status: Status) -> None:
        """On a thread of the machine: only leave a message, and none for an app that is gone."""
        if self.is_running:
            self.post_message(self.StatusChanged())

    # Layout

    def on_resize(self, event: events.Resize) -> None:
        self._cells = event.size
        if self._laid_out:  # the first one comes before the widgets are there
            self._arrange()
            self.call_after_refresh(self._draw)

    def _arrange(self) -> None:
        columns, rows = self._cells
        too_small = columns < plan.MIN_COLUMNS or rows < plan.MIN_ROWS
        self._main.set_class(too_small, "-too-small")
        if too_small:
            while self.screen is not self._main:  # the notice is what a person must see now
                self.pop_screen()
            return
        wide = columns >= WIDE
        self.query_one("#top").set_class(wide, "-wide")
        chrome = (1 if wide else 2) + 1 + len(self.query_one(Banner).content)
        count = len(self.machine.vcpus)
        alone = self._keyboard if self._zoomed else ""
        shares = plan.plan(columns, rows - chrome, count, whole=alone == "vcpus")
        if alone == "vcpus" and rows - chrome - shares.rows >= BELOW:
            alone = ""  # everything about them leaves room for the others
        self.query_one(VcpuArea).lay_out(
            list_rows=shares.list_rows,
            across=shares.across,
            pane_rows=shares.pane_rows,
            panes=min(shares.panes, count),
        )
        self.query_one(VcpuArea).display = alone in ("", "vcpus")
        self.query_one("#below").display = alone != "vcpus"
        beside = shares.side > 0 and not alone
        self._main.set_class(not beside, "-tabbed")
        self.query_one("#side").styles.width = shares.side if beside else "100%"
        self._share_place(beside)

    def _share_place(self, beside: bool) -> None:
        console, ledger = self.query_one(ConsolePane), self.query_one(LedgerPane)
        checkpoints = self.query_one(CheckpointsPane)
        console.display = beside or self._place == "console"
        self.query_one("#side").display = beside or self._place != "console"
        ledger.display = beside or self._place == "ledger"
        checkpoints.display = beside or self._place == "checkpoints"
        zoom = "z Back" if self._zoomed else "z Zoom"
        console.others = "" if beside else f"F3 Ledger  F4 Checkpoints  {zoom}"
        ledger.others = "" if beside else f"F2 Console  F4 Checkpoints  {zoom}"
        checkpoints.others = "" if beside else f"F2 Console  F3 Ledger  {zoom}"
        for pane in (console, ledger, checkpoints):
            pane.redraw()

    def action_zoom(self) -> None:
        """All rows for the pane that has the keyboard, or for all of them again."""
        self._zoomed = not self._zoomed
        self._arrange()
        self.call_after_refresh(self._draw)

    # What is drawn

    def _tick(self) -> None:
        self._ticks += 1
        behind = any(output.total > at for output, at in zip(self._outputs, self._positions, strict=True))
        if behind or self.machine.status.phase is Phase.RUNNING or self._ticks % IDLE == 0:
            self._draw()

    def _draw(self) -> None:
        """Ask for new samples and draw the newest there are."""
        if self._main.has_class("-too-small") or not self.is_running:
            return
        self.machine.request_samples()
        self._draw_vcpus()
        self._draw_console()
        self._draw_ledger()
        self._draw_checkpoints()
        self._draw_status()

    def _draw_vcpus(self) -> None:
        area = self.query_one(VcpuArea)
        visible = area.in_view(len(self.machine.vcpus), self.selected)
        frames = [
            make_frame(self.machine, index, changes, detailed=index in visible)
            for index, changes in enumerate(self._changes)
        ]
        area.show(frames, self.selected)

    def _draw_console(self) -> None:
        pane = self.query_one(ConsolePane)
        for index, output in enumerate(self._outputs):
            data, end = output.since(self._positions[index])
            skipped = end - self._positions[index] - OUTPUT
            if skipped > BACKLOG:
                pane.write(index, f"\x1b[0m\r\n[… {skipped} bytes left out …]\r\n".encode())
                data = data[-OUTPUT:]
            self._positions[index] = end - max(len(data) - OUTPUT, 0)
            pane.write(index, data[:OUTPUT])

    def _draw_ledger(self) -> None:
        pane = self.query_one(LedgerPane)
        ledger = self.machine.ledger
        if ledger.total != self._seen_total and pane.display:
            self._seen_total = ledger.total
            pane.show(ledger_rows(ledger.records)[:SHOWN_ROWS], ledger.total)

    def _draw_checkpoints(self) -> None:
        self._parents.update((checkpoint.number, checkpoint.parent) for checkpoint in self.machine.checkpoints)
        self.query_one(CheckpointsPane).show(tree_entries(self.machine, self._parents))

    def _draw_status(self) -> None:
        status = self.machine.status
        machine = self.machine
        count = len(machine.vcpus)
        if status is not self._last_status:
            self._last_status = status
            self._draw_banner(status)
            self._draw_keys()
            self.query_one(ConsolePane).listen(status.phase is Phase.RUNNING)
        self.query_one(StatusLine).show(
            StatusValues(
                phase=status.phase.value,
                reason="" if self.query_one(Banner).content else status.reason,
                facts=(
                    self.title,
                    machine.system.name,
                    f"{count} VCPU{'s' if count > 1 else ''}",
                    f"{machine.config.memory >> 20} MiB",
                ),
                busy=self._busy,
                error=self._error,
            )
        )

    def _draw_banner(self, status: Status) -> None:
        rip, bits, code = None, 64, b""
        if status.vcpu is not None and status.phase is Phase.STOPPED:
            view = self.machine.view(status.vcpu)
            if view.regs and view.sregs:
                regs, sregs = Regs.from_buffer_copy(view.regs), Sregs.from_buffer_copy(view.sregs)
                rip, bits = regs.rip, decode.mode(sregs, regs.rflags).bits
                code = read_code(self.machine, regs, sregs)
            self.selected = status.vcpu
        back = self._origin()
        banner = self.query_one(Banner)
        banner.set_class(status.phase is Phase.EXITED, "-exited")
        before = len(banner.content)
        banner.show(
            explain(
                status,
                rip=rip,
                bits=bits,
                code=code,
                back=back.name if back else "",
                width=self._cells.width,
                typing=self._keyboard == "console",
            )
        )
        if len(banner.content) != before:
            self._arrange()
            self.call_after_refresh(self._draw)

    def _draw_keys(self) -> None:
        """Footer and buttons, where what works has changed: to build the footer anew is dear, and steps come fast."""
        usable = {command.action: self.check_action(command.action.partition("(")[0], ()) for command in COMMANDS}
        if usable == self._usable:
            return
        self._usable = usable
        for command in COMMANDS:
            if command.button:
                button = self.query_one(f"#button-{command.action}", Button)
                button.display = usable[command.action] is not False
                button.disabled = usable[command.action] is not True
        self.refresh_bindings()

    # Operations

    def operate(self, name: str, function: Callable[[], object]) -> None:
        """Have the machine do this on a worker thread, after what was asked before."""
        if len(self._waiting) < QUEUED:
            self._waiting.append(_Operation(name, function))
            self._next_operation()

    def _next_operation(self) -> None:
        if self._busy or not self._waiting:
            return
        operation = self._waiting.popleft()
        self._busy = operation.name
        for changes in self._changes:
            changes.settle()
        self._operate(operation)

    @work(thread=True, group="machine", exit_on_error=False)
    def _operate(self, operation: _Operation) -> None:
        error = ""
        try:
            operation.function()
        except VmdeckError as failure:
            error = str(failure)
        except Exception as failure:  # a bug of ours must not take a person's machine away
            self.log.error(f"{operation.name}: {failure!r}")
            error = f"{operation.name} failed: {failure!r}. This is a bug in vmdeck; the guest is as it was left."
        self.post_message(self.OperationEnded(operation.name, error))

    def on_workstation_operation_ended(self, message: OperationEnded) -> None:
        self._busy = ""
        self._error = message.error.splitlines()[0] if message.error else ""
        if message.error:
            self.notify(message.error, title=f"Can't {message.name}", severity="error", timeout=8, markup=False)
        self._draw()
        self._draw_keys()
        self._next_operation()

    def on_workstation_status_changed(self) -> None:
        self._draw()

    def action_run(self) -> None:
        self.operate("run", self.machine.run)

    def action_pause(self) -> None:
        self.operate("pause", self.machine.pause)

    def action_step(self) -> None:
        self.operate("step", partial(self.machine.step, self.selected))

    def action_step_all(self) -> None:
        self.operate("step all", self.machine.step)

    def action_reset(self) -> None:
        self.operate("reset", self.machine.reset)

    def action_checkpoint(self) -> None:
        self.take_checkpoint("")

    def take_checkpoint(self, name: str) -> None:
        """Without a name it gets one from its number."""
        self.operate("checkpoint", partial(self.machine.checkpoint, name))

    def action_restore(self) -> None:
        def back() -> None:  # where to is known when its turn comes: a checkpoint being taken right now counts
            origin = self._origin()
            if origin:
                self.machine.restore(origin)

        self.operate("restore", back)

    def _origin(self) -> Checkpoint | None:
        """The checkpoint that the machine came from, or else the newest one."""
        checkpoints = self.machine.checkpoints
        return self._checkpoint(self.machine.came_from) or (checkpoints[-1] if checkpoints else None)

    def _checkpoint(self, number: int | None) -> Checkpoint | None:
        return next((found for found in self.machine.checkpoints if found.number == number), None)

    def on_checkpoints_pane_chosen(self, message: CheckpointsPane.Chosen) -> None:
        checkpoint = self._checkpoint(message.number)
        if checkpoint is None:
            return
        if message.what == "restore":
            self.operate("restore", partial(self.machine.restore, checkpoint))
        elif message.what == "forget":
            self.operate("delete", partial(self.machine.forget, checkpoint))
        else:
            self._ask_about(checkpoint, message.what)

    # What is typed

    def _ask(self, question: Question, answered: Callable[[str], None], help: str = "") -> None:
        self._asked = answered
        prompt = self.query_one(Prompt)
        prompt.ask(question)
        prompt.help(help)

    def on_prompt_answered(self, message: Prompt.Answered) -> None:
        prompt = self.query_one(Prompt)
        try:
            self._asked(message.text)
        except VmdeckError as error:
            prompt.refuse(str(error))
        else:
            prompt.close()

    def on_prompt_left(self, message: Prompt.Left) -> None:
        if message.by_person:
            self._give_keyboard(self._keyboard)

    def action_edit(self) -> None:
        index = self.selected

        def set_register(text: str) -> None:
            register, value = edit.parse(text)
            self.operate("edit", partial(self.machine.edit, index, register, value))

        self._ask(Question("edit", f"VCPU {index} register", words=edit.WORDS), set_register)
        self._help_edit("")

    def on_prompt_changed(self, message: Prompt.Changed) -> None:
        if message.purpose == "edit":
            self._help_edit(message.text)

    def _help_edit(self, text: str) -> None:
        view = self.machine.view(self.selected)
        running = self.machine.status.phase is Phase.RUNNING
        self.query_one(Prompt).help(edit.help_line(text, view.regs, view.sregs, running=running))

    def action_checkpoint_as(self) -> None:
        self._ask(Question("name", "Checkpoint name"), self.take_checkpoint, "Enter takes it now, Esc doesn't.")

    def _ask_about(self, checkpoint: Checkpoint, what: str) -> None:
        """Its ``name`` or its ``note``."""

        def rename(text: str) -> None:
            kept = self._checkpoint(checkpoint.number)
            if kept:
                words = {"name": kept.name, "note": kept.note, what: text}
                self.machine.rename(kept, words["name"] or kept.name, words["note"])

        self._ask(
            Question(what, f"{what.title()} of checkpoint {checkpoint.number}", getattr(checkpoint, what)),
            lambda text: self.operate("rename", partial(rename, text)),
            "Enter keeps it, Esc leaves it as it was.",
        )

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        status = self.machine.status
        dead = status.phase is Phase.STOPPED and status.exit is not None and status.exit.kind is ExitKind.SHUTDOWN
        if action in ("help", "command_palette") and self._laid_out and self._main.has_class("-too-small"):
            return None
        if action == "pause":
            return status.phase is Phase.RUNNING
        if action == "run":
            return False if status.phase is Phase.RUNNING else None if dead else True
        if action in ("step", "step_all"):
            return None if dead else True
        if action == "restore":
            coming = self._busy == "checkpoint" or any(waits.name == "checkpoint" for waits in self._waiting)
            return True if self.machine.checkpoints or coming else None
        return True

    # The person

    async def on_event(self, event: events.Event) -> None:
        """Keys that the focused pane doesn't take act before the next key is looked at.

        Textual hands a key to the focused widget's queue and tries the bindings when it comes back. Where several keys
        come at once (a slow line, a macro), those after one that moves the keyboard would go to the old place: of
        ``e rax=1`` the r would reset the machine.
        """
        if not isinstance(event, events.Key) or event.is_forwarded:
            await super().on_event(event)
            return
        await asyncio.sleep(0)  # a flood of keys must not keep signals and frames from their turn
        if self._exit:
            return  # those typed ahead don't hold up the end
        if self._laid_out and self.screen is self._main:
            pane = self.focused
            ours = pane is None or (pane.id in FOCUSED and not pane.check_consume_key(event.key, event.character))
            # Priority bindings come first here as in Textual.
            if ours and (await self._check_bindings(event.key, True) or await self._check_bindings(event.key)):
                return
        await super().on_event(event)

    def action_select(self, by: int) -> None:
        self.selected = (self.selected + by) % len(self.machine.vcpus)
        self._draw_vcpus()

    def on_vcpu_pane_selected(self, message: VcpuPane.Selected) -> None:
        self.selected = message.index
        self._give_keyboard("vcpus")
        self._draw_vcpus()

    def action_focus_pane(self, name: str) -> None:
        """Give the keyboard to a pane; from the pane itself, back to the VCPUs."""
        self._give_keyboard("vcpus" if name == self._keyboard else name)

    def _give_keyboard(self, name: str) -> None:
        """At once: the next key is already the pane's."""
        self._take_keyboard(name)
        self._main.set_focus(self._main.query_one(f"#{name}"))

    def _take_keyboard(self, name: str) -> None:
        """What follows from it, also where a click gave it."""
        before, self._keyboard = self._keyboard, name
        if name != "vcpus":
            self._place = name
        if name != before:
            if self._zoomed:
                self._arrange()
            else:
                self._share_place(not self._main.has_class("-tabbed"))
            if "console" in (name, before) and self._last_status:
                self._draw_banner(self._last_status)
            self.call_after_refresh(self._draw)

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        if event.widget.id in FOCUSED:
            self._take_keyboard(event.widget.id)

    def action_focus_next(self) -> None:
        self._cycle(1)

    def action_focus_previous(self) -> None:
        self._cycle(-1)

    def _cycle(self, by: int) -> None:
        at = self.PANES.index(self._keyboard) if self._keyboard in self.PANES else 0
        self._give_keyboard(self.PANES[(at + by) % len(self.PANES)])

    def action_source(self) -> None:
        self.query_one(ConsolePane).action_next_source()

    def action_scroll_console(self, pages: int) -> None:
        self.query_one(ConsolePane).action_scroll_back(pages)

    def on_console_pane_typed(self, message: ConsolePane.Typed) -> None:
        self.machine.board.serial.feed(message.data)

    def on_console_pane_left(self) -> None:
        self._give_keyboard("vcpus")

    def action_help(self) -> None:
        from app.help import HelpScreen  # not needed for the first frame

        self.push_screen(HelpScreen())

    def action_command_palette(self) -> None:
        from app.palette import Palette  # not needed for the first frame

        if not isinstance(self.screen, Palette):
            self.push_screen(Palette(id="--command-palette"))

    def action_leave(self) -> None:
        """Quit with the guest's exit code, if it gave one."""
        status = self.machine.status
        code = exit_code(status.code or 0) if status.phase is Phase.EXITED else 0
        self.exit(code, return_code=code)

    def get_key_display(self, binding: Binding) -> str:
        shown = super().get_key_display(binding)
        return shown.upper() if shown[:1] == "f" and shown[1:].isdigit() else shown

    async def action_quit(self) -> None:
        self.action_leave()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        for command in COMMANDS:
            name = command.action.partition("(")[0]
            if self.check_action(name, ()):
                yield SystemCommand(command.label, command.help, partial(self.run_action, f"app.{command.action}"))
        yield SystemCommand("Theme", "Other colours", self.action_change_theme)
