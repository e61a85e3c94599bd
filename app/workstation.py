"""The workstation: the Textual app on a machine. It asks the machine for operations; the desk draws what they do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.signal import Signal

from app import edit, shelf
from app.commands import BINDINGS, COMMANDS, MEMORY_COMMANDS
from app.compare import compare
from app.desk import Desk
from app.lines_screen import LinesScreen
from app.operations import Job, Operations, Stage
from app.prompted import PromptedScreen
from app.stopped import exit_code
from app.theme import VMDECK
from app.tree import find, origin
from kvm.backends.interface import ExitKind
from kvm.errors import CalledOff, SnapshotMismatch, VmdeckError
from kvm.machine import Checkpoint, Machine, Phase, Status
from kvm.quirks import ignored
from kvm.snapshot import chain
from widgets.line_pane import Line
from widgets.prompt import Prompt, PromptInput, Question
from widgets.snapshots import Key, SnapshotsPane, amount

if TYPE_CHECKING:
    from app.memory_screen import Looks


class Workstation(App[int]):
    """Runs until a person quits; ``return_value`` and ``return_code`` are the process's exit code.

    The machine stays the caller's, to be closed after. ``run``: let the guest run, once the first frame is drawn: a
    busy guest would take the processor from it.
    """

    CSS_PATH = "workstation.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [*BINDINGS]

    class StatusChanged(Message):
        """The machine has another status."""

    class JobMoved(Message):
        """An operation has stepped aside or ended: ``stage`` at that moment."""

        def __init__(self, job: Job, stage: Stage) -> None:
            super().__init__()
            self.job, self.stage = job, stage

    class Found(Message):
        """A worker has something to show: what to do with it on the UI's thread."""

        def __init__(self, show: Callable[[], object]) -> None:
            super().__init__()
            self.show = show

    def __init__(self, machine: Machine, *, title: str = "", run: bool = False) -> None:
        super().__init__()
        self.register_theme(VMDECK)
        self.theme = VMDECK.name  # now: a change of theme later styles everything a second time
        self.machine = machine
        self.title = title or Path(machine.image.path).name
        self.operations = Operations(self._start)
        self.desk = Desk(machine, self.title, self.operations)
        self.begins: Signal[None] = Signal(self, "an operation begins")
        self.moved: Signal[None] = Signal(self, "an operation has changed what is to be seen")
        self._run_it = run
        self._promised: list[Path] = []
        """Files that will be written."""
        self._writing = threading.Lock()
        self._leaving = False
        self._held: list[events.Key] | None = None
        """Keys that came behind the one that ends the prompt, until it's gone; None while there is nothing to hold."""
        self._prompt: Prompt
        """The one that asks, or asked last."""
        self._asked: Callable[[str], None]
        self._help: Callable[[str], str]

    def get_default_screen(self) -> Desk:
        return self.desk

    def on_mount(self) -> None:
        self.machine.subscribe(self._hear)
        self.call_after_refresh(self._draw_keys)
        if self._run_it:
            self.call_after_refresh(self.action_run)
            self.call_after_refresh(self._find_ignored)

    def _hear(self, status: Status) -> None:
        """On a thread of the machine: only leave a message, and none for an app that is gone."""
        if self.is_running:
            self.post_message(self.StatusChanged())

    def _find_ignored(self) -> None:
        """What this kernel takes and ignores is said beside its name, and in the contract's screen."""

        def find_out(job: Job) -> None:
            job.aside()
            found = ignored(self.machine.system)
            self.show(partial(setattr, self.desk, "ignored", found))

        self.ask("look at the kernel", find_out)

    # Operations

    def operate(self, name: str, function: Callable[[], object]) -> None:
        """Have the machine do this on a worker thread, after what was asked before."""
        self.ask(name, lambda job: function())

    def ask(self, name: str, work: Callable[[Job], object]) -> bool:
        """The same for what takes long: the job tells how far it is, and may be called off. False if it's dropped."""
        return self.operations.ask(Job(name, work, self._job_moved))

    def show(self, act: Callable[[], object]) -> None:
        """From a worker's thread: do this on the UI's, soon."""
        self.post_message(self.Found(act))

    def tell(self, news: str) -> None:
        """From a worker's thread: what an operation was good for, for the status line."""
        self.show(partial(setattr, self.desk, "news", news))

    def _job_moved(self, job: Job) -> None:
        self.post_message(self.JobMoved(job, job.stage))

    def _start(self, job: Job) -> None:
        self.desk.settle()
        self.begins.publish(None)
        self.run_worker(job.run, thread=True, group="machine", exit_on_error=False)

    def on_workstation_job_moved(self, message: JobMoved) -> None:
        job = message.job
        self.operations.next()
        if message.stage is Stage.ENDED:
            failure = "" if isinstance(job.error, CalledOff) else job.failure
            self.desk.error = failure.splitlines()[0] if failure else ""
            if isinstance(job.error, CalledOff):
                self.notify(str(job.error), markup=False)
            elif failure:
                self.log.error(f"{job.name}: {job.error!r}")
                self.notify(failure, title=f"Can't {job.name}", severity="error", timeout=8, markup=False)
        if self._leaving and self.operations.shown is None:
            self._leave()
            return
        self._draw()

    def on_workstation_found(self, message: Found) -> None:
        message.show()

    def on_workstation_status_changed(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self.desk.draw()
        self.moved.publish(None)
        self._draw_keys()

    def _draw_keys(self) -> None:
        self.desk.draw_keys({command.name: self.check_action(command.name, ()) for command in COMMANDS})

    def action_run(self) -> None:
        self.operate("run", self.machine.run)

    def action_pause(self) -> None:
        self.operate("pause", self.machine.pause)

    def action_step(self) -> None:
        self.operate("step", partial(self.machine.step, self.desk.selected))

    def action_step_all(self) -> None:
        self.operate("step all", self.machine.step)

    def action_reset(self) -> None:
        self.operate("reset", self.machine.reset)

    def action_call_off(self) -> None:
        self.operations.call_off()

    # Snapshots

    def action_checkpoint(self) -> None:
        self.take_checkpoint("")

    def take_checkpoint(self, name: str) -> None:
        """Without a name it gets one from its number."""
        self.operate("checkpoint", partial(self.machine.checkpoint, name))

    def action_restore(self) -> None:
        def back() -> None:  # where to is known when its turn comes: a checkpoint being taken right now counts
            there = origin(self.machine)
            if there:
                self.machine.restore(there)

        self.operate("restore", back)

    def on_snapshots_pane_chosen(self, message: SnapshotsPane.Chosen) -> None:
        key = message.key
        if message.what == "compare":
            since, to = (key, None) if message.marked is None else (message.marked, key)
            self._compare(since, to)
        elif isinstance(key, str):
            self._chosen_file(message.what, key)
        elif checkpoint := find(self.machine, key):
            self._chosen_checkpoint(message.what, checkpoint)

    def _chosen_checkpoint(self, what: str, checkpoint: Checkpoint) -> None:
        if what == "restore":
            self.operate("restore", partial(self.machine.restore, checkpoint))
        elif what == "forget":
            self.operate("delete", partial(self.machine.forget, checkpoint))
        else:
            self._ask_label(
                what, f"checkpoint {checkpoint.number}", getattr(checkpoint, what), self._rename(checkpoint)
            )

    def _rename(self, checkpoint: Checkpoint) -> Callable[[str, str], None]:
        def rename(what: str, text: str) -> None:
            kept = find(self.machine, checkpoint.number)
            if kept:
                words = {"name": kept.name, "note": kept.note, what: text}
                self.machine.rename(kept, words["name"] or kept.name, words["note"])

        return lambda what, text: self.operate("rename", partial(rename, what, text))

    def _chosen_file(self, what: str, key: str) -> None:
        file = self.desk.shelf.find(key)
        if file is None:
            return
        if what == "restore":
            self.load(file.path)
        elif what == "forget":
            self.desk.shelf.take_away(key)
            self.notify(f"{file.path} is off the list; the file stays.", markup=False)
            self.desk.draw()
        else:
            self._ask_label(what, file.path.name, getattr(file, what), partial(self._relabel, file))

    def _relabel(self, file: shelf.ShelfFile, what: str, text: str) -> None:
        words = {"name": file.name, "note": file.note, what: text}

        def relabel(job: Job) -> None:
            job.aside()
            chain.relabel(file.path, words["name"], words["note"], job.progress, job.cancel)
            self._shelve(file.path)

        self.ask("rename", relabel)

    def _shelve(self, path: Path) -> None:
        """On a worker's thread: show this file among the snapshots."""
        self.show(partial(self.desk.shelf.put, shelf.look(path)))

    def action_save(self) -> None:
        self._ask_save("Save to", incremental=False)

    def action_save_changes(self) -> None:
        self._ask_save("Save what changed to", incremental=True)

    def _ask_save(self, title: str, *, incremental: bool) -> None:
        def save(text: str) -> None:
            path = shelf.target(text)
            self._promised.append(path)
            if not self.ask("save", partial(work, path)):
                self._promised.remove(path)

        def work(path: Path, job: Job) -> None:
            try:
                with self._writing:  # what builds on a file comes after it
                    written = self.machine.save_file(
                        path, incremental=incremental, progress=job.progress, cancel=job.cancel, taken=job.aside
                    )
            finally:
                self._promised.remove(path)
            self._shelve(path)
            news = f"{amount(written.stored).strip()}B written to {path.name}"
            self.tell(news)

        self.ask_for(
            Question("save", title, shelf.suggestion(self.title, self._promised), shelf.words),
            save,
            lambda text: shelf.help_saving(text, running=self.machine.status.phase is Phase.RUNNING),
        )

    def action_load(self) -> None:
        self.ask_for(
            Question("load", "Load", words=shelf.words), lambda text: self.load(shelf.source(text)), shelf.help_loading
        )

    def load(self, path: Path, *, drop: bool = False) -> None:
        """Become the machine in this file, and keep a checkpoint of it, so that Back leads there."""

        def work(job: Job) -> None:
            try:
                self.machine.load_file(path, drop=drop, progress=job.progress, cancel=job.cancel)
            except SnapshotMismatch as mismatch:
                self.show(partial(self._ask_drop, path, mismatch.losses))
                return
            self.machine.checkpoint(path.name)
            self._shelve(path)

        self.ask("load", work)

    def _ask_drop(self, path: Path, losses: tuple[str, ...]) -> None:
        lines: list[Line] = [((f" {loss}", "text"),) for loss in losses]
        title = f"{path.name} was saved elsewhere. Here it would lose"
        self.push_screen(
            LinesScreen(title, lines, agree="load it without"),
            lambda agreed: self.load(path, drop=True) if agreed else None,
        )

    def _compare(self, a: Key, b: Key | None) -> None:
        def work(job: Job) -> None:
            title, lines = compare(self.machine, a, b, job)
            self.show(lambda: self.push_screen(LinesScreen(title, lines)))

        self.ask("compare", work)

    # What is typed

    def ask_for(self, question: Question, answered: Callable[[str], None], help: Callable[[str], str]) -> None:
        """Ask a person in the prompt that is on top. ``answered`` raises VmdeckError for an answer that won't do.

        ``help``: the prompt's second line while this text is typed.
        """
        self._asked, self._help = answered, help
        top = next(screen for screen in reversed(self.screen_stack) if isinstance(screen, PromptedScreen))
        self._prompt = top.query_one(Prompt)
        self._prompt.ask(question)
        self._prompt.help(help(question.text))

    async def on_prompt_answered(self, message: Prompt.Answered) -> None:
        try:
            self._asked(message.text)
        except VmdeckError as error:
            self._prompt.refuse(str(error))
            await self._release_keys()
        else:
            self._prompt.close()

    async def on_prompt_left(self) -> None:
        await self._release_keys()

    async def _release_keys(self) -> None:
        held, self._held = self._held, None
        for event in held or ():
            await self.on_event(event)

    def on_prompt_changed(self, message: Prompt.Changed) -> None:
        if self._prompt.is_attached:  # not gone with its screen
            self._prompt.help(self._help(message.text))

    def action_edit(self) -> None:
        index = self.desk.selected

        def set_register(text: str) -> None:
            register, value = edit.parse(text)
            self.operate("edit", partial(self.machine.edit, index, register, value))

        def help(text: str) -> str:
            view = self.machine.view(index)
            running = self.machine.status.phase is Phase.RUNNING
            return edit.help_line(text, view.regs, view.sregs, running=running)

        self.ask_for(Question("edit", f"VCPU {index} register", words=edit.words), set_register, help)

    def action_checkpoint_as(self) -> None:
        self.ask_for(
            Question("name", "Checkpoint name"), self.take_checkpoint, lambda text: "Enter takes it now, Esc doesn't."
        )

    def _ask_label(self, what: str, whose: str, text: str, keep: Callable[[str, str], None]) -> None:
        """A snapshot's ``name`` or its ``note``."""
        self.ask_for(
            Question(what, f"{what.title()} of {whose}", text),
            partial(keep, what),
            lambda text: "Enter keeps it, Esc leaves it as it was.",
        )

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        status = self.machine.status
        dead = status.phase is Phase.STOPPED and status.exit is not None and status.exit.kind is ExitKind.SHUTDOWN
        if action in ("help", "command_palette", "contract", "memory") and self.desk.too_small:
            return None
        if action == "pause":
            return status.phase is Phase.RUNNING
        if action == "run":
            return False if status.phase is Phase.RUNNING else None if dead else True
        if action in ("step", "step_all"):
            return None if dead else True
        if action == "restore":
            return True if self.machine.checkpoints or self.operations.coming("checkpoint") else None
        if action == "save_changes":
            return True if self.machine.files.saved or self.operations.coming("save") else None
        if action == "call_off":
            return self.operations.cancellable and self.desk.keyboard == "vcpus"
        return True

    # The person

    async def on_event(self, event: events.Event) -> None:
        """Keys that the focused pane doesn't take act before the next key is looked at.

        Textual hands a key to the focused widget's queue and tries the bindings when it comes back. Where several keys
        come at once (a slow line, a macro), those after one that moves the keyboard would go to the old place: of
        ``e rax=1`` the r would reset the machine. Those after the Enter that ends it are held until the prompt is gone.
        """
        if not isinstance(event, events.Key) or event.is_forwarded:
            await super().on_event(event)
            return
        await asyncio.sleep(0)  # a flood of keys must not keep signals and frames from their turn
        if self._exit:
            return  # those typed ahead don't hold up the end
        if self._held is not None and not self._prompt.is_attached:
            await self._release_keys()  # it went with its screen, and couldn't say that it left
        if self._held is not None:
            self._held.append(event)
            return
        if isinstance(self.screen, PromptedScreen):
            pane = self.focused
            if isinstance(pane, PromptInput) and event.key in PromptInput.ENDS:
                self._held = []
            theirs = pane is not None and pane.check_consume_key(event.key, event.character)
            ours = pane is None or (pane.id in self.screen.FOCUSED and not theirs)
            # Priority bindings come first here as in Textual.
            if ours and (await self._check_bindings(event.key, True) or await self._check_bindings(event.key)):
                return
        await super().on_event(event)

    def action_help(self) -> None:
        from app.help import HelpScreen  # not needed for the first frame

        self.push_screen(HelpScreen())

    def action_command_palette(self) -> None:
        from app.palette import Palette  # not needed for the first frame

        if not isinstance(self.screen, Palette):
            self.push_screen(Palette(id="--command-palette"))

    def action_contract(self) -> None:
        from app.contract import ContractScreen  # not needed for the first frame

        self.push_screen(ContractScreen(self.machine, self.desk.selected, self.desk.ignored))

    @cached_property
    def _looks(self) -> Looks:
        from app.memory_screen import Looks

        return Looks()

    async def action_memory(self) -> None:
        from app.memory_screen import MemoryScreen  # not needed for the first frame

        if not any(isinstance(screen, MemoryScreen) for screen in self.screen_stack):
            await self.push_screen(MemoryScreen(self, self._looks))  # the next key finds its prompt there

    def action_leave(self) -> None:
        """Quit; a file that is being written is written first, or called off the second time."""
        if self.operations.coming("save") and not self._leaving:
            self._leaving = True
            self.notify("vmdeck leaves when the file is written. q again calls that off.", timeout=8)
            return
        self.operations.call_off()
        self._leave()

    def _leave(self) -> None:
        """With the guest's exit code, if it gave one."""
        status = self.machine.status
        code = exit_code(status.code) if status.phase is Phase.EXITED else 0
        self.exit(code, return_code=code)

    def get_key_display(self, binding: Binding) -> str:
        shown = super().get_key_display(binding)
        return shown.upper() if shown[:1] == "f" and shown[1:].isdigit() else shown

    async def action_quit(self) -> None:
        self.action_leave()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        for command in (*COMMANDS, *MEMORY_COMMANDS):
            there = command.action.startswith("app.") or hasattr(screen, f"action_{command.name}")
            if there and self.check_action(command.name, ()):
                yield SystemCommand(command.label, command.help, partial(self.run_action, command.action))
        yield SystemCommand("Theme", "Other colours", self.action_change_theme)
