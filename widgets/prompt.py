"""One line of input just above the footer: a question, names completed by Tab, and below it help or what's wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Input, Static

REMEMBERED = 50
"""Answers that Up brings back."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: ``purpose`` comes back with the answer, ``words`` tells what Tab can complete this text to."""

    purpose: str
    title: str
    text: str = ""
    words: Callable[[str], Sequence[str]] | None = None


class PromptInput(Input):
    """An input whose editing keys act in their turn: in Textual's, letters that come right behind overtake them."""

    ENDS = ("enter", "escape", "ctrl+c")
    """Keys after which the prompt is closed, or has said why not."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel", id="prompt.cancel"),
        Binding("ctrl+c", "cancel", "Cancel", show=False, id="prompt.interrupt"),
    ]

    class Cancelled(Message):
        """Never mind."""

    async def _on_key(self, event: events.Key) -> None:
        if event.is_printable:
            await super()._on_key(event)
        elif await self.app._check_bindings(event.key):
            event.stop()
            event.prevent_default()

    def action_cancel(self) -> None:
        self.post_message(self.Cancelled())


class Prompt(Vertical):
    """Hidden until it's asked something. An answer leaves it open: whoever asked says ``close`` or ``refuse``."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "complete", "Complete", id="prompt.complete"),
        Binding("up", "recall(-1)", "Earlier", id="prompt.earlier"),
        Binding("down", "recall(1)", "Later", show=False, id="prompt.later"),
    ]

    class Changed(Message):
        """Something was typed: time to help."""

        def __init__(self, purpose: str, text: str) -> None:
            super().__init__()
            self.purpose, self.text = purpose, text

    class Answered(Message):
        """Enter."""

        def __init__(self, purpose: str, text: str) -> None:
            super().__init__()
            self.purpose, self.text = purpose, text

    class Left(Message):
        """Closed, answered or not; ``by_person``: the keyboard is nobody's now."""

        def __init__(self, by_person: bool) -> None:
            super().__init__()
            self.by_person = by_person

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.question = Question("", "")
        self._earlier: dict[str, list[str]] = {}
        self._at = 0
        """Where in the earlier answers; behind the last one is what is being typed."""

    def compose(self) -> ComposeResult:
        with Horizontal(id="prompt-line"):
            yield Static(id="prompt-title", markup=False)
            yield PromptInput(id="prompt-input", compact=True, select_on_focus=False)
        yield Static(id="prompt-help", markup=False)

    @property
    def input(self) -> Input:
        """Where a person types."""
        return self.query_one(Input)

    def ask(self, question: Question) -> None:
        """Open, and take the keyboard."""
        self.question = question
        self._at = len(self._earlier.get(question.purpose, ()))
        self.query_one("#prompt-title", Static).update(question.title)
        self.input.value = question.text
        self.input.cursor_position = len(question.text)
        self.display = True
        self.screen.set_focus(self.input)
        self.refresh_bindings()

    def help(self, text: str) -> None:
        """What could be typed, or what this would do."""
        self._say(text, refused=False)

    def refuse(self, error: str) -> None:
        """The answer won't do; it stays to be mended."""
        self._say(error, refused=True)

    def _say(self, text: str, *, refused: bool) -> None:
        line = self.query_one("#prompt-help", Static)
        line.update(text)
        line.set_class(refused, "-refused")

    def close(self, *, by_person: bool = True) -> None:
        """Done."""
        if self.display:
            self.display = False
            self.post_message(self.Left(by_person))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        text = event.value.strip()
        earlier = self._earlier.setdefault(self.question.purpose, [])
        if text and earlier[-1:] != [text]:
            earlier.append(text)
            del earlier[:-REMEMBERED]
        self._at = len(earlier)
        self.post_message(self.Answered(self.question.purpose, text))

    def action_complete(self) -> None:
        """As far as all words that begin like this go on alike."""
        found = self.question.words(self.input.value.lstrip()) if self.question.words else ()
        if found and self.input.cursor_position == len(self.input.value):
            first, last = min(found), max(found)
            differ = (at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
            self.input.value = first[: next(differ, len(first))]
            self.input.cursor_position = len(self.input.value)

    def action_recall(self, by: int) -> None:
        earlier = self._earlier.get(self.question.purpose, [])
        self._at = min(max(self._at + by, 0), len(earlier))
        self.input.value = earlier[self._at] if self._at < len(earlier) else ""
        self.input.cursor_position = len(self.input.value)

    def on_prompt_input_cancelled(self) -> None:
        self.close()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "complete":
            return self.question.words is not None
        if action == "recall":
            return bool(self._earlier.get(self.question.purpose))
        return True

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if self.display:
            self.post_message(self.Changed(self.question.purpose, event.value))

    def on_descendant_blur(self, event: events.DescendantBlur) -> None:
        if self.app.app_focus:  # else the whole terminal lost the keyboard, and gets it back
            self.close(by_person=False)
