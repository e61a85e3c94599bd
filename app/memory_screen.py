"""Code and memory as a VCPU sees them, over the workstation: live while the guest runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container

from app import address, typed_bytes
from app.address import Place
from app.code_look import CodeLook
from app.commands import MEMORY_BINDINGS
from app.edit import SHOWN_NAMES
from app.eyes import Eyes, eyes_of
from app.memory_look import MemoryLook
from app.operations import Job
from app.prompted import PromptedScreen
from app.space import PAGE, Space
from kvm.errors import ConfigError, MachineError
from kvm.machine import Machine
from widgets.address_pane import AddressPane
from widgets.code_pane import CodeFrame, CodePane
from widgets.key_footer import KeyFooter
from widgets.memory_pane import MemoryFrame, MemoryPane
from widgets.prompt import Prompt, PromptInput, Question
from widgets.status import StatusLine

if TYPE_CHECKING:
    from app.workstation import Workstation

RATE = 5
"""Times a second that it's read and drawn anew."""
WIDE = 160
"""Columns from which code and memory stand side by side."""
_UNKNOWN = "nothing is known of this VCPU yet"


@dataclass(slots=True)
class Looks:
    """What outlives the screen: where a person looked last, and for what."""

    code: CodeLook = field(default_factory=CodeLook)
    memory: MemoryLook = field(default_factory=MemoryLook)
    sought: bytes = b""


class MemoryScreen(PromptedScreen):
    """Opens on RIP and RSP of the selected VCPU, then on what was looked at last."""

    AUTO_FOCUS = "#memory"
    BINDINGS: ClassVar[list[BindingType]] = [*MEMORY_BINDINGS]
    FOCUSED = ("code", "memory")

    def __init__(self, station: Workstation, looks: Looks) -> None:
        super().__init__()
        self._station = station
        self._machine: Machine = station.machine
        self._looks = looks
        self._keyboard = "memory"
        if eyes := self._eyes:  # keys may come before the first frame
            looks.code.catch_up(eyes)
            looks.memory.catch_up(eyes)

    def compose(self) -> ComposeResult:
        yield StatusLine(id="memory-status")
        with Container(id="looks"):
            yield CodePane(id="code")
            yield MemoryPane(id="memory")
        yield Prompt(id="prompt")
        yield KeyFooter()

    def on_mount(self) -> None:
        self._arrange(self.app.size.width)
        self._station.begins.subscribe(self, lambda _: self._looks.memory.settle(), immediate=True)
        self._station.moved.subscribe(self, lambda _: self.draw())
        self.set_interval(1 / RATE, self.draw)
        self.call_after_refresh(self.draw)

    def on_resize(self, event: events.Resize) -> None:
        self._arrange(event.size.width)
        self.call_after_refresh(self.draw)

    def _arrange(self, width: int) -> None:
        self.set_class(width >= WIDE, "-wide")

    # What is drawn

    @property
    def _vcpu(self) -> int:
        return self._station.desk.selected

    def draw(self) -> None:
        """Read what is in view and draw it, if anybody can see it."""
        top = self.app.screen
        if not self.is_running or (top is not self and top.styles.background.a == 1):
            return
        self.query_one(StatusLine).show(self._station.desk.status_values(in_view=False))
        code, memory = self.query_one(CodePane), self.query_one(MemoryPane)
        eyes = self._eyes
        if eyes is None:
            code.show(CodeFrame(note=_UNKNOWN))
            memory.show(MemoryFrame(note=_UNKNOWN))
            return
        code.show(self._looks.code.look(eyes, code.size.width, max(code.size.height - 1, 1)))
        memory.show(self._looks.memory.look(eyes, memory.size.width, max(memory.size.height - 1, 1)))

    @property
    def _eyes(self) -> Eyes | None:
        return eyes_of(self._machine, self._vcpu)

    # Where to

    def on_address_pane_moved(self, message: AddressPane.Moved) -> None:
        if isinstance(message.pane, MemoryPane):
            self._looks.memory.move(message.unit, message.by)
        elif eyes := self._eyes:
            self._looks.code.move(message.unit, message.by, eyes)
        self.draw()

    def on_address_pane_pointed(self, message: AddressPane.Pointed) -> None:
        look = self._looks.memory if isinstance(message.pane, MemoryPane) else self._looks.code
        look.point(message.address)
        self.draw()

    @property
    def _look(self) -> CodeLook | MemoryLook:
        """What the pane shows that has the keyboard, or had it before the prompt."""
        return self._looks.code if self._keyboard == "code" else self._looks.memory

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        if event.widget.id in self.FOCUSED:
            self._keyboard = event.widget.id

    def on_prompt_left(self, message: Prompt.Left) -> None:
        if message.by_person:
            self.set_focus(self.query_one(f"#{self._keyboard}"))

    def action_other(self) -> None:
        self.set_focus(self.query_one("#memory" if self._keyboard == "code" else "#code"))

    def action_select(self, by: int) -> None:
        self._station.desk.action_select(by)
        self.draw()

    def action_follow(self) -> None:
        if eyes := self._eyes:
            self._look.follow_again(eyes)
            self.draw()

    def action_turn(self) -> None:
        if eyes := self._eyes:
            try:
                self._looks.memory.turn(eyes)
            except ConfigError as error:
                self.notify(str(error), severity="warning", markup=False)
            self.draw()

    def action_goto(self) -> None:
        look = self._look
        physical = isinstance(look, MemoryLook) and look.physical
        space = "Physical" if physical else f"VCPU {self._vcpu} linear"

        def go(text: str) -> None:
            if eyes := self._eyes:
                look.go(address.parse(text, physical=physical), eyes)
                self.draw()

        self._station.ask_for(
            Question("address", f"{space} address", words=address.words), go, partial(self._help_going, physical)
        )

    def _help_going(self, physical: bool, text: str) -> str:
        if not text.strip():
            return "7c00, rsp, rbp-18, gs.base+10, phys:1000; numbers are hexadecimal, a register is followed"
        eyes = self._eyes
        if eyes is None:
            return _UNKNOWN
        try:
            place = address.parse(text, physical=physical)
        except ConfigError as error:
            names = address.words(text)
            return "  ".join(names[:SHOWN_NAMES]) + " …" * (len(names) > SHOWN_NAMES) or str(error)
        at = place.address(eyes.regs, eyes.sregs)
        page = eyes.space(physical=place.physical).page(at)
        where = "" if page.physical is None or place.physical else f", physical {page.physical + at % PAGE:x}"
        return f"{_name(place.physical)} {at:x}{where}{f': {page.why}' if page.why else ''}"

    def action_leave(self) -> None:
        """Close; but what can be called off is called off first."""
        if self._station.operations.cancellable:
            self._station.operations.call_off()
        else:
            self.dismiss()

    # What is done to it

    def action_write(self) -> None:
        look, vcpu = self._look, self._vcpu
        physical = isinstance(look, MemoryLook) and look.physical
        at = look.cursor  # now: a cursor that follows a register moves on
        where = f"{_name(physical)} {at:x}"

        def write(text: str) -> None:
            data = typed_bytes.parse(text)
            self._station.operate("write memory", partial(self._write, vcpu, at, physical, data))

        self._station.ask_for(Question("bytes", f"Write at {where}"), write, partial(self._help_writing, at, physical))

    def _write(self, vcpu: int, at: int, physical: bool, data: bytes) -> None:
        """On a worker's thread. The guest stands first: what was there is then what the bytes replace."""
        self._machine.pause()
        eyes = eyes_of(self._machine, vcpu)
        old = Space(self._machine, None if physical or eyes is None else eyes.sregs).read(at, len(data))
        where = f"{_name(physical)} {at:x}"
        if physical:
            self._machine.write_memory(at, data)
        else:
            pages = [f"{piece.physical:x}" for piece in self._machine.write_linear(vcpu, at, data)]
            where += f" (physical {', '.join(pages)})" if pages != [f"{at:x}"] else ""
        self._station.tell(
            f"{len(data)} byte{'s' if len(data) > 1 else ''} written at {where}; was {typed_bytes.spelled(old)}"
        )

    def _help_writing(self, at: int, physical: bool, text: str) -> str:
        if not text.strip():
            return 'bytes in hexadecimal, in their order in memory, and "text": 90 90 0xdeadbeef "ok\\n" 00'
        eyes = self._eyes
        if eyes is None:
            return _UNKNOWN
        try:
            data = typed_bytes.parse(text)
        except ConfigError as error:
            return str(error)
        old = eyes.space(physical=physical).read(at, len(data))
        if len(old) < len(data):
            return f"{_name(physical)} {at + len(old):x} can't be written: it isn't mapped, or there is no memory."
        pauses = "Enter pauses the guest; " if eyes.running else ""
        return f"{pauses}{typed_bytes.spelled(old)} → {typed_bytes.spelled(data)}"

    def action_find(self) -> None:
        def find(text: str) -> None:
            self._looks.sought = typed_bytes.parse(text)
            self._find(0)

        self._station.ask_for(Question("find", "Find in physical memory"), find, self._help_finding)

    def action_find_again(self) -> None:
        try:
            self._find(1)
        except ConfigError as error:
            self.notify(str(error), severity="warning", markup=False)

    def _find(self, further: int) -> None:
        """From the cursor on, so many bytes further. Raises ConfigError if that is nowhere in physical memory."""
        eyes = self._eyes
        if eyes is None:
            raise ConfigError(f"There is no address to begin at: {_UNKNOWN}.")
        start, data = self._looks.memory.physical_cursor(eyes) + further, self._looks.sought

        def work(job: Job) -> None:
            job.aside()
            at = self._machine.find_memory(data, start, job.progress, job.cancel)
            if at is None:
                raise MachineError(
                    f"{typed_bytes.spelled(data)} isn't in memory from physical {start:x} on. g phys:0 goes to the "
                    "beginning, / then looks through all of it."
                )
            self._station.show(partial(self._found, at))
            self._station.tell(f"found at physical {at:x}")

        self._station.ask("find", work)

    def _found(self, at: int) -> None:
        if eyes := self._eyes:
            self._looks.memory.go(Place(f"{at:x}", True, ((1, at),)), eyes)
            self.draw()

    def _help_finding(self, text: str) -> str:
        if not text.strip():
            return 'bytes in hexadecimal, in their order in memory, and "text"; from the cursor on'
        try:
            return f"finds {typed_bytes.spelled(typed_bytes.parse(text))}, from the cursor on"
        except ConfigError as error:
            return str(error)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if isinstance(self.focused, PromptInput):
            return False  # its keys are letters of the answer
        if action == "find_again":
            return bool(self._looks.sought) or None
        return hasattr(self, f"action_{action}")


def _name(physical: bool) -> str:
    return "physical" if physical else "linear"
