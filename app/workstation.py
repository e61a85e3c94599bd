"""The workstation: the Textual app on a machine. It reads views and the ledger, and asks the machine for operations."""

from __future__ import annotations

import time
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

from app import plan
from app.code import instruction_at, read_code
from app.commands import BINDINGS, COMMANDS
from app.explain import exit_code, explain
from app.theme import VMDECK
from kvm.backends.interface import ExitKind
from kvm.errors import VmdeckError
from kvm.ledger import Record
from kvm.machine import Activity, Checkpoint, Machine, Phase, Status, VcpuView
from kvm.x86 import decode
from kvm.x86.structs import Regs, Sregs
from widgets.checkpoints import CheckpointEntry, CheckpointsPane
from widgets.console import ConsolePane
from widgets.frame import Changes, VcpuFrame
from widgets.ledger import LedgerEntry, LedgerPane
from widgets.status import Banner, StatusLine, StatusValues, TooSmall
from widgets.vcpu_area import VcpuArea
from widgets.vcpu_pane import VcpuPane

RATE = 30
"""Frames a second while the guest runs."""
IDLE = 8
"""While it stands, only every IDLEth of them is looked at."""
STALE_NS = 1_000_000_000
QUEUED = 16
"""Operations that may wait for their turn; keys pressed beyond that are dropped."""
OUTPUT = 6 << 10
"""Bytes of console output that one frame takes: a third of its time."""
BACKLOG = 256 << 10
"""Of output that lies further behind, the older part is left out, and the console says so."""
SHOWN_RECORDS = 200
WIDE = 130
"""Columns from which the buttons stand beside the status."""


@dataclass(frozen=True, slots=True)
class _Operation:
    name: str
    function: Callable[[], object]


class Workstation(App[int]):
    """Runs until a person quits; ``return_value`` and ``return_code`` are the process's exit code.

    The machine stays the caller's: to be run before, to be closed after.
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

    def __init__(self, machine: Machine, *, title: str = "") -> None:
        super().__init__()
        self.machine = machine
        self.title = title or Path(machine.image.path).name
        self.selected = 0
        self._laid_out = False
        self._cells = Size(80, 24)
        self._place = "console"
        """What is shown in the place that console, ledger and checkpoints share on a small terminal."""
        self._changes = [Changes() for _ in machine.vcpus]
        self._waiting: deque[_Operation] = deque()
        self._busy = ""
        self._error = ""
        self._ticks = 0
        self._seen_total = -1
        self._last_status: Status | None = None
        self._restored: int | None = None
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
        yield Footer(show_command_palette=False, compact=True)
        yield TooSmall(plan.MIN_COLUMNS, plan.MIN_ROWS)

    def on_mount(self) -> None:
        self.register_theme(VMDECK)
        self.theme = VMDECK.name
        self._main = self.screen
        self._laid_out = True
        self._arrange()
        self.machine.subscribe(self._hear)
        self.set_interval(1 / RATE, self._tick)
        self.call_after_refresh(self._draw)

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
        shares = plan.plan(columns, rows - chrome, count)
        self.query_one(VcpuArea).lay_out(
            list_rows=shares.list_rows,
            across=shares.across,
            pane_rows=shares.pane_rows,
            panes=min(shares.panes, count),
        )
        self._main.set_class(not shares.side, "-tabbed")
        self.query_one("#side").styles.width = shares.side or "100%"
        self._share_place(shares.side > 0)

    def _share_place(self, beside: bool) -> None:
        console, ledger = self.query_one(ConsolePane), self.query_one(LedgerPane)
        checkpoints = self.query_one(CheckpointsPane)
        console.display = beside or self._place == "console"
        self.query_one("#side").display = beside or self._place != "console"
        ledger.display = beside or self._place == "ledger"
        checkpoints.display = beside or self._place == "checkpoints"
        console.others = "" if beside else "F3 Ledger  F4 Checkpoints"
        ledger.others = "" if beside else "F2 Console  F4 Checkpoints"
        checkpoints.others = "" if beside else "F2 Console  F3 Ledger"
        for pane in (console, ledger, checkpoints):
            pane.redraw()

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
        now = time.monotonic_ns()
        running = self.machine.status.phase is Phase.RUNNING
        area.show(
            [
                self._frame(self.machine.view(index), index in visible, running, now)
                for index in range(len(self.machine.vcpus))
            ],
            self.selected,
        )

    def _frame(self, view: VcpuView, detailed: bool, running: bool, now: int) -> VcpuFrame:
        changed = self._changes[view.index].observe(view.regs, view.sregs, running=running, now_ns=now)
        old = running and view.activity is not Activity.STOPPED and view.regs and not view.from_copy
        age = now - view.time_ns if old else 0
        insn = instruction_at(self.machine, view.regs, view.sregs) if detailed and view.regs and view.sregs else None
        return VcpuFrame(
            index=view.index,
            activity=view.activity.value,
            reason=view.reason,
            dirty=view.dirty,
            last_put=view.last_put.name if view.last_put else "",
            regs=view.regs,
            sregs=view.sregs,
            insn=insn,
            changed=changed,
            age=age // 1_000_000_000 if age > STALE_NS else 0,
        )

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
            pane.show([_ledger_entry(record) for record in reversed(ledger.records[-SHOWN_RECORDS:])], ledger.total)

    def _draw_checkpoints(self) -> None:
        now = time.time()
        self.query_one(CheckpointsPane).show(
            [
                CheckpointEntry(
                    number=checkpoint.number,
                    name=checkpoint.name,
                    age=max(int(now - checkpoint.taken), 0),
                    pages=checkpoint.pages,
                    rip=checkpoint.position[0] if checkpoint.position else None,
                    current=checkpoint.number == self._restored,
                )
                for checkpoint in reversed(self.machine.checkpoints)
            ]
        )

    def _draw_status(self) -> None:
        status = self.machine.status
        machine = self.machine
        count = len(machine.vcpus)
        if status is not self._last_status:
            self._last_status = status
            self._draw_banner(status)
            self._draw_keys()
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
        newest = self.machine.checkpoints[-1:]
        banner = self.query_one(Banner)
        banner.set_class(status.phase is Phase.EXITED, "-exited")
        before = len(banner.content)
        banner.show(
            explain(
                status, rip=rip, bits=bits, code=code, back=newest[0].name if newest else "", width=self._cells.width
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
        self._restored = None
        self.operate("reset", self.machine.reset)

    def action_checkpoint(self) -> None:
        def take() -> None:
            self._restored = self.machine.checkpoint().number

        self.operate("checkpoint", take)

    def action_restore(self) -> None:
        # The newest when its turn comes: the one being taken right now counts.
        self.operate("restore", lambda: self._restore(self.machine.checkpoints[-1]))

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.machine.restore(checkpoint)
        self._restored = checkpoint.number

    def _checkpoint(self, number: int) -> Checkpoint | None:
        return next((found for found in self.machine.checkpoints if found.number == number), None)

    def on_checkpoints_pane_chosen(self, message: CheckpointsPane.Chosen) -> None:
        checkpoint = self._checkpoint(message.number)
        if checkpoint:
            self.operate("restore", partial(self._restore, checkpoint))

    def on_checkpoints_pane_forgotten(self, message: CheckpointsPane.Forgotten) -> None:
        checkpoint = self._checkpoint(message.number)
        if checkpoint:
            self.operate("forget", partial(self.machine.forget, checkpoint))

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

    def action_select(self, by: int) -> None:
        self.selected = (self.selected + by) % len(self.machine.vcpus)
        self._draw_vcpus()

    def on_vcpu_pane_selected(self, message: VcpuPane.Selected) -> None:
        self.selected = message.index
        self.query_one(VcpuArea).focus()
        self._draw_vcpus()

    def action_focus_pane(self, name: str) -> None:
        """Give the keyboard to a pane; from the pane itself, back to the VCPUs."""
        pane = self._main.query_one(f"#{name}")
        if pane.has_focus:
            name, pane = "vcpus", self.query_one(VcpuArea)
        if name != "vcpus":
            self._place = name
            self._share_place(not self._main.has_class("-tabbed"))
        self._main.set_focus(pane)  # at once: the next key is already the pane's

    def action_focus_next(self) -> None:
        self._cycle(1)

    def action_focus_previous(self) -> None:
        self._cycle(-1)

    def _cycle(self, by: int) -> None:
        focused = self.focused.id if self.focused else None
        at = self.PANES.index(focused) if focused in self.PANES else 0
        self.action_focus_pane(self.PANES[(at + by) % len(self.PANES)])

    def action_source(self) -> None:
        self.query_one(ConsolePane).action_next_source()

    def action_scroll_console(self, pages: int) -> None:
        self.query_one(ConsolePane).action_scroll_back(pages)

    def on_console_pane_typed(self, message: ConsolePane.Typed) -> None:
        self.machine.board.serial.feed(message.data)

    def on_console_pane_left(self) -> None:
        self._main.set_focus(self.query_one(VcpuArea))

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


def _ledger_entry(record: Record) -> LedgerEntry:
    seconds, rest = divmod(record.time_ns, 1_000_000_000)
    return LedgerEntry(
        number=record.number,
        clock=f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1_000_000:03d}",
        hook=record.hook.removeprefix("cpu_synchronize_"),
        level=record.level.name if record.level else "",
        caller=record.caller,
        vcpus=len(record.parts),
        ioctls=sum(part.ioctls for part in record.parts),
        microseconds=record.microseconds,
        skew_us=record.skew_us,
        moved=_moved(record),
    )


def _moved(record: Record) -> str:
    """Which substates moved, in any of the VCPUs, in the order in which they did."""
    words = []
    for verb, rows in (
        ("read", [part.read for part in record.parts]),
        ("wrote", [part.written for part in record.parts]),
        ("unchanged", [part.skipped for part in record.parts]),
    ):
        names = list(dict.fromkeys(name for row in rows for name in row))
        if names:
            words.append(f"{verb} {len(names)}: {' '.join(names)}")
    return "; ".join(words) or "moved nothing"
