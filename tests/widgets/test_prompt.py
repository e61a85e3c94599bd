"""The one line that a person types into: completion, memory, refusal, and every way out."""

from __future__ import annotations

import pytest
from textual import events
from textual.app import App, ComposeResult
from textual.widgets import Static

from widgets.prompt import Prompt, Question

WORDS = ("rax=", "rbx=", "rip=", "cs.base=", "cs.limit=")


def words(text: str) -> list[str]:
    return [word for word in WORDS if word.startswith(text.lower())]


class Desk(App[None]):
    """``heard`` is what the prompt said."""

    CSS = "#prompt { display: none; height: 2; } #prompt-line { height: 1; } .other { height: 3; }"

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[object] = []

    def compose(self) -> ComposeResult:
        yield Other(classes="other")
        yield Prompt(id="prompt")

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    def on_prompt_changed(self, message: Prompt.Changed) -> None:
        self.prompt.help(f"help for {message.text}")

    def on_prompt_answered(self, message: Prompt.Answered) -> None:
        self.heard.append((message.purpose, message.text))

    def on_prompt_left(self, message: Prompt.Left) -> None:
        self.heard.append("left" if message.by_person else "lost")


class Other(Static, can_focus=True):
    """Something else that can have the keyboard."""


def said(app: Desk) -> str:
    return str(app.query_one("#prompt-help", Static).content)


async def test_what_is_typed_is_helped_and_answered() -> None:
    app = Desk()
    async with app.run_test(size=(60, 10)) as pilot:
        app.prompt.ask(Question("edit", "VCPU 0", words=words))
        await pilot.press(*"rax=1", "enter")
        await pilot.pause()
        assert app.heard == [("edit", "rax=1")]
        assert said(app) == "help for rax=1"
        app.prompt.refuse("No.")
        assert said(app) == "No."
        await pilot.press("backspace", "2", "enter")
        assert app.heard[-1] == ("edit", "rax=2")
        app.prompt.close()
        await pilot.pause()
        assert app.heard[-1] == "left"
        assert not app.prompt.display


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("ra", "rax="), ("RI", "rip="), ("r", "r"), ("c", "cs."), ("cs.l", "cs.limit="), ("x", "x"), ("rax=5", "rax=5")],
)
async def test_tab_completes_as_far_as_it_is_clear(typed: str, completed: str) -> None:
    app = Desk()
    async with app.run_test(size=(60, 10)) as pilot:
        app.prompt.ask(Question("edit", "VCPU 0", words=words))
        await pilot.press(*typed, "tab")
        assert app.prompt.input.value == completed
        assert app.prompt.input.has_focus


async def test_up_brings_back_what_was_answered_to_the_same_question() -> None:
    app = Desk()
    async with app.run_test(size=(60, 10)) as pilot:
        for text in ("one", "two", "two"):
            app.prompt.ask(Question("edit", "VCPU 0"))
            await pilot.press(*text, "enter")
        app.prompt.ask(Question("edit", "VCPU 1"))
        seen = []
        for key in ("up", "up", "up", "down", "down"):
            await pilot.press(key)
            seen.append(app.prompt.input.value)
        assert seen == ["two", "one", "one", "two", ""]
        app.prompt.ask(Question("name", "Name", "as it is"))
        await pilot.press("up")
        assert app.prompt.input.value == "as it is"


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
async def test_never_mind(key: str) -> None:
    app = Desk()
    async with app.run_test(size=(60, 10)) as pilot:
        app.prompt.ask(Question("edit", "VCPU 0"))
        await pilot.press("a", key)
        await pilot.pause()
        assert app.heard == ["left"]


async def test_it_closes_where_the_keyboard_goes_elsewhere_but_not_with_the_whole_terminal() -> None:
    app = Desk()
    async with app.run_test(size=(60, 10)) as pilot:
        app.prompt.ask(Question("edit", "VCPU 0"))
        await pilot.press("a")
        app.post_message(events.AppBlur())
        await pilot.pause()
        app.post_message(events.AppFocus())
        await pilot.pause()
        await pilot.press("b")
        assert (app.prompt.input.value, app.heard) == ("ab", [])
        app.query_one(Other).focus()
        await pilot.pause()
        assert app.heard == ["lost"]


async def test_editing_keys_act_in_their_turn_in_a_burst() -> None:
    app = Desk()
    async with app.run_test(size=(60, 10)) as pilot:
        app.prompt.ask(Question("edit", "VCPU 0"))
        for key, character in (("a", "a"), ("ctrl+u", "\x15"), ("b", "b"), ("home", None), ("c", "c"), ("enter", "\r")):
            app.post_message(events.Key(key, character))
        await pilot.pause()
        await pilot.pause()
        assert app.heard == [("edit", "cb")]
