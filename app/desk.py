"""The workstation's one screen: who gets how much of it, what is drawn, and which pane has the keyboard."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, Vertical
from textual.geometry import Size
from textual.widgets import Button

from app import plan, stopped
from app.commands import COMMANDS
from app.frames import make_frame
from app.ledger_rows import ledger_rows
from app.operations import Operations
from app.prompted import PromptedScreen
from app.shelf import Shelf
from app.tree import checkpoint_entries, file_entries, origin
from kvm.machine import Machine, Phase, Status
from kvm.quirks import Ignored
from widgets.console import ConsolePane
from widgets.frame import Changes
from widgets.key_footer import KeyFooter
from widgets.ledger import LedgerPane
from widgets.prompt import Prompt
from widgets.snapshots import SnapshotsPane
from widgets.status import Banner, StatusLine, StatusValues, TooSmall
from widgets.vcpu_area import VcpuArea
from widgets.vcpu_pane import VcpuPane

RATE = 30
"""Frames a second while the guest runs."""
IDLE = 8
"""While it stands, only every IDLEth of them is looked at."""
OUTPUT = 6 << 10
"""Bytes of console output that one frame takes: a third of its time."""
BACKLOG = 256 << 10
"""Of output that lies further behind, the older part is left out, and the console says so."""
SHOWN_ROWS = 200
PANES = ("vcpus", "ledger", "snapshots")
"""What Tab goes through: the console takes every key, so it's entered on purpose only."""
BELOW = 6
"""Rows below the VCPUs that are worth having."""
WIDE = 140
"""Columns from which the buttons stand beside the status."""


class Desk(PromptedScreen):
    """Draws the machine 30 times a second, and never waits for it."""

    AUTO_FOCUS = "#vcpus"
    FOCUSED = ("vcpus", "console", "ledger", "snapshots")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "cycle(1)", "Next pane", show=False, id="show.next_pane"),
        Binding("shift+tab", "cycle(-1)", "Previous pane", show=False, id="show.previous_pane"),
    ]

    def __init__(self, machine: Machine, title: str, operations: Operations) -> None:
        super().__init__()
        self.machine = machine
        self.image = title
        self.selected = 0
        """The VCPU that keys are for."""
        self.keyboard = "vcpus"
        """The pane that has the keyboard, or had it before the prompt."""
        self.shelf = Shelf()
        self.error = ""
        """What went wrong with the last operation, for the status line."""
        self.news = ""
        """What it was good for, where that isn't seen elsewhere."""
        self.ignored: tuple[Ignored, ...] = ()
        """What the kernel takes and ignores, as far as it's known yet."""
        self._operations = operations
        self._laid_out = False
        self._cells = Size(80, 24)
        self._place = "console"
        """What is shown in the place that console, ledger and snapshots share on a small terminal."""
        self._zoomed = False
        self._changes = [Changes() for _ in machine.vcpus]
        self._ticks = 0
        self._seen_total = -1
        self._last_status: Status | None = None
        self._parents: dict[int, int | None] = {}
        """Of every checkpoint there ever was."""
        self._usable: dict[str, bool | None] = {}
        self._outputs = (machine.board.serial_console, machine.board.debug_console)
        self._positions = [0, 0]

    def compose(self) -> ComposeResult:
        with Container(id="top"):
            yield StatusLine(id="status")
            with Horizontal(id="buttons"):
                for command in COMMANDS:
                    if command.button:
                        button = Button(command.label, action=command.action, id=f"button-{command.name}", compact=True)
                        button.can_focus = False
                        yield button
        yield Banner(id="banner")
        yield VcpuArea(id="vcpus")
        with Horizontal(id="below"):
            yield ConsolePane(("serial", "debug"), id="console")
            with Vertical(id="side"):
                yield LedgerPane(id="ledger")
                yield SnapshotsPane(id="snapshots")
        yield Prompt(id="prompt")
        yield KeyFooter()
        yield TooSmall(plan.MIN_COLUMNS, plan.MIN_ROWS)

    def on_mount(self) -> None:
        self._laid_out = True
        self._cells = self.app.size  # no Resize has told of it yet, and to lay out twice is dear
        self._arrange()
        self.set_interval(1 / RATE, self._tick)
        self.call_after_refresh(self.draw)

    @property
    def too_small(self) -> bool:
        """The terminal is: nothing but the notice is shown."""
        return self._laid_out and self.has_class("-too-small")

    # Layout

    def on_resize(self, event: events.Resize) -> None:
        self._cells = event.size
        if self._laid_out:  # the first one comes before the widgets are there
            self._arrange()
            self.call_after_refresh(self.draw)

    def _arrange(self) -> None:
        columns, rows = self._cells
        too_small = columns < plan.MIN_COLUMNS or rows < plan.MIN_ROWS
        self.set_class(too_small, "-too-small")
        if too_small:
            while self.app.screen is not self:  # the notice is what a person must see now
                self.app.pop_screen()
            return
        wide = columns >= WIDE
        self.query_one("#top").set_class(wide, "-wide")
        chrome = (1 if wide else 2) + 1 + len(self.query_one(Banner).content)
        count = len(self.machine.vcpus)
        alone = self.keyboard if self._zoomed else ""
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
        self.set_class(not beside, "-tabbed")
        self.query_one("#side").styles.width = shares.side if beside else "100%"
        self._share_place(beside)

    def _share_place(self, beside: bool) -> None:
        console, ledger = self.query_one(ConsolePane), self.query_one(LedgerPane)
        snapshots = self.query_one(SnapshotsPane)
        console.display = beside or self._place == "console"
        self.query_one("#side").display = beside or self._place != "console"
        ledger.display = beside or self._place == "ledger"
        snapshots.display = beside or self._place == "snapshots"
        zoom = "z Back" if self._zoomed else "z Zoom"
        console.others = "" if beside else f"F3 Ledger  F4 Snapshots  {zoom}"
        ledger.others = "" if beside else f"F2 Console  F4 Snapshots  {zoom}"
        snapshots.others = "" if beside else f"F2 Console  F3 Ledger  {zoom}"
        for pane in (console, ledger, snapshots):
            pane.redraw()

    def action_zoom(self) -> None:
        """All rows for the pane that has the keyboard, or for all of them again."""
        self._zoomed = not self._zoomed
        self._arrange()
        self.call_after_refresh(self.draw)

    # What is drawn

    def _tick(self) -> None:
        self._ticks += 1
        behind = any(output.total > at for output, at in zip(self._outputs, self._positions, strict=True))
        moves = behind or self._operations.shown is not None or self.machine.status.phase is Phase.RUNNING
        if moves or self._ticks % IDLE == 0:
            self.draw()

    def draw(self) -> None:
        """Ask for new samples and draw the newest there are."""
        if self.too_small or not self.is_running:
            return
        self.machine.request_samples()
        self._draw_vcpus()
        self._draw_console()
        self._draw_ledger()
        self._draw_snapshots()
        self.draw_status()

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

    def _draw_snapshots(self) -> None:
        self._parents.update((checkpoint.number, checkpoint.parent) for checkpoint in self.machine.checkpoints)
        entries = checkpoint_entries(self.machine, self._parents)
        self.query_one(SnapshotsPane).show([*entries, *file_entries(self.shelf.files)])

    def settle(self) -> None:
        """Something is about to be done with the machine: what changes from now on is marked."""
        self.news = ""
        for changes in self._changes:
            changes.settle()

    def draw_status(self) -> None:
        """What the machine and the operations on it are doing."""
        status = self.machine.status
        if status is not self._last_status:
            self._last_status = status
            self._draw_banner(status)
            self.query_one(ConsolePane).listen(status.phase is Phase.RUNNING)
        self.query_one(StatusLine).show(self.status_values())

    def status_values(self, *, in_view: bool = True) -> StatusValues:
        """What a status line says; ``in_view``: this screen's, under which a banner may say why the machine stopped."""
        status, machine = self.machine.status, self.machine
        count = len(machine.vcpus)
        return StatusValues(
            phase=status.phase.value,
            reason="" if in_view and self.query_one(Banner).content else status.reason,
            facts=(
                self.image,
                " ignores ".join((machine.system.name, *(quirk.what for quirk in self.ignored[:1]))),
                f"{count} VCPU{'s' if count > 1 else ''}",
                f"{machine.config.memory >> 20} MiB",
            ),
            busy=self._busy(escapes=not in_view or self.keyboard == "vcpus"),
            error=self.error,
            news=self.news,
        )

    def _busy(self, *, escapes: bool) -> str:
        """The operation under way; how far it is, once a person may wonder. ``escapes``: Esc calls it off."""
        job = self._operations.shown
        if job is None:
            return ""
        if job.percent is None:
            return f"{job.name} …"
        return f"{job.name} {job.percent} %{'  esc calls it off' if escapes else ''}"

    def _draw_banner(self, status: Status) -> None:
        if status.vcpu is not None and status.phase is Phase.STOPPED:
            self.selected = status.vcpu
        back = origin(self.machine)
        banner = self.query_one(Banner)
        banner.set_class(status.phase is Phase.EXITED, "-exited")
        before = len(banner.content)
        banner.show(
            stopped.banner(
                self.machine,
                status,
                back=back.name if back else "",
                width=self._cells.width,
                typing=self.keyboard == "console",
            )
        )
        if len(banner.content) != before:
            self._arrange()
            self.call_after_refresh(self.draw)

    def draw_keys(self, usable: dict[str, bool | None]) -> None:
        """Footer and buttons, where what works has changed: to build the footer anew is dear, and steps come fast."""
        if usable == self._usable:
            return
        self._usable = usable
        for command in COMMANDS:
            if command.button:
                button = self.query_one(f"#button-{command.name}", Button)
                button.display = usable[command.name] is not False
                button.disabled = usable[command.name] is not True
        for screen in self.app.screen_stack:  # one over this may have a footer, too
            screen.refresh_bindings()

    # The keyboard

    def action_select(self, by: int) -> None:
        self.selected = (self.selected + by) % len(self.machine.vcpus)
        self._draw_vcpus()

    def on_vcpu_pane_selected(self, message: VcpuPane.Selected) -> None:
        self.selected = message.index
        self.give_keyboard("vcpus")
        self._draw_vcpus()

    def action_focus_pane(self, name: str) -> None:
        """Give the keyboard to a pane; from the pane itself, back to the VCPUs."""
        self.give_keyboard("vcpus" if name == self.keyboard else name)

    def give_keyboard(self, name: str) -> None:
        """At once: the next key is already the pane's."""
        self._take_keyboard(name)
        self.set_focus(self.query_one(f"#{name}"))

    def _take_keyboard(self, name: str) -> None:
        """What follows from it, also where a click gave it."""
        before, self.keyboard = self.keyboard, name
        if name != "vcpus":
            self._place = name
        if name != before:
            if self._zoomed:
                self._arrange()
            else:
                self._share_place(not self.has_class("-tabbed"))
            if "console" in (name, before) and self._last_status:
                self._draw_banner(self._last_status)
            self.call_after_refresh(self.draw)

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        if event.widget.id in self.FOCUSED:
            self._take_keyboard(event.widget.id)

    def action_cycle(self, by: int) -> None:
        at = PANES.index(self.keyboard) if self.keyboard in PANES else 0
        self.give_keyboard(PANES[(at + by) % len(PANES)])

    def action_source(self) -> None:
        self.query_one(ConsolePane).action_next_source()

    def action_scroll_console(self, pages: int) -> None:
        self.query_one(ConsolePane).action_scroll_back(pages)

    def on_console_pane_typed(self, message: ConsolePane.Typed) -> None:
        self.machine.board.serial.feed(message.data)

    def on_prompt_left(self, message: Prompt.Left) -> None:
        if message.by_person:
            self.give_keyboard(self.keyboard)

    def on_console_pane_left(self) -> None:
        self.give_keyboard("vcpus")
