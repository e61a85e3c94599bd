"""What a person looks at: a place, chosen by hand or kept on what a register holds."""

from __future__ import annotations

from app.address import Place, parse
from app.eyes import Eyes


class Look:
    """Follows ``start`` at first."""

    def __init__(self, start: str) -> None:
        self._followed = parse(start)
        self.follows: Place | None = self._followed
        """What the cursor is kept on; None once it was moved."""
        self.cursor = 0

    def go(self, place: Place, eyes: Eyes) -> None:
        """Put the cursor there, and keep it there if the place moves. Raises ConfigError where that can't be shown."""
        self.cursor = place.address(eyes.regs, eyes.sregs)
        self.follows = place if place.moves else None
        self._followed = self.follows or self._followed

    def follow_again(self, eyes: Eyes) -> None:
        """Back to the register that was followed last."""
        self.go(self._followed, eyes)

    def catch_up(self, eyes: Eyes) -> None:
        """Put the cursor where what it follows is now."""
        if self.follows is not None:
            self.cursor = self.follows.address(eyes.regs, eyes.sregs)

    def point(self, address: int) -> None:
        """The cursor to an address that is in view."""
        self.cursor, self.follows = address, None

    @property
    def following(self) -> str:
        """What is followed, or would be again, for the title."""
        return f"{'follows' if self.follows else 'home follows'} {self._followed.text}"
