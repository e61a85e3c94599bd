"""What a person looks at in memory: where, in which address space, following which register, and what changed there."""

from __future__ import annotations

import time

from app.address import Place
from app.eyes import Eyes
from app.look import Look
from app.seen import Seen
from app.space import PAGE, Page, Space
from kvm.errors import ConfigError
from widgets.memory_pane import Heading, HexRow, MemoryFrame, row_bytes

START = "rsp"
"""What is looked at first."""
LEAD = 2
"""Rows above an address that the cursor went to."""
_SHORT = 1 << 32
"""Addresses below have eight digits."""


class MemoryLook(Look):
    """Where the cursor is, and the window round it. The window moves only as far as the cursor needs."""

    def __init__(self) -> None:
        super().__init__(START)
        self.physical = False
        self._linear_cursor = 0
        self._linear_follows: Place | None = None
        self._top = 0
        self._afar = True
        """The cursor has gone somewhere: if that is out of view, the window begins there."""
        self._row = 16
        self._shown = 1
        self._seen = Seen()

    # Where to

    def go(self, place: Place, eyes: Eyes) -> None:
        """Put the cursor there, and keep it there if the place moves."""
        super().go(place, eyes)
        self.physical = place.physical
        self._afar = True

    def catch_up(self, eyes: Eyes) -> None:
        """Put the cursor where what it follows is now."""
        super().catch_up(eyes)
        self._afar |= self.follows is not None

    def move(self, unit: str, by: int) -> None:
        """By bytes, rows, or pages of rows; not beyond the ends of the address space."""
        size = {"byte": 1, "row": self._row, "page": self._row * self._shown}[unit]
        self.cursor += by * size
        if unit == "page":
            self._top += by * size
        self.follows = None

    def turn(self, eyes: Eyes) -> None:
        """Linear to physical at the same byte; physical to linear where that was left. ConfigError: it isn't mapped."""
        if self.physical:
            self.physical, self.cursor, self.follows = False, self._linear_cursor, self._linear_follows
            self._afar = True
            return
        address = self.physical_cursor(eyes)
        self._linear_cursor, self._linear_follows = self.cursor, self.follows
        self._top += address - self.cursor  # the byte stays where it's drawn
        self.physical, self.cursor, self.follows = True, address, None

    def physical_cursor(self, eyes: Eyes) -> int:
        """Where the cursor is in physical memory. Raises ConfigError where its page isn't mapped."""
        address = eyes.space(physical=self.physical).physical(self.cursor)
        if address is None:
            raise ConfigError(
                f"Linear {self.cursor:x} isn't mapped by VCPU {eyes.vcpu}'s page tables, so it is nowhere in physical "
                "memory. Go to an address that is, or to one as phys:1000."
            )
        return address

    def settle(self) -> None:
        """What changes from now on is marked."""
        self._seen.settle()

    # What is there

    def look(self, eyes: Eyes, width: int, height: int) -> MemoryFrame:
        """What there is to draw in ``height`` rows of ``width`` cells."""
        space = eyes.space(physical=self.physical)
        self.catch_up(eyes)
        self.cursor = min(max(self.cursor, 0), (1 << space.bits) - 1)
        digits = 8 if self.cursor + height * 16 < _SHORT else 16
        self._row = row_bytes(width, digits)
        drawn = self._window(space, height)
        self._shown = max(sum(not is_heading for _, is_heading in drawn), 1)
        pages = {address: space.page(address) for address in {at - at % PAGE for at, _ in drawn}}
        now = time.monotonic_ns()
        changed = {
            page.address: self._seen.observe(
                (None if self.physical else eyes.vcpu, page.address), page.data, running=eyes.running, now_ns=now
            )
            for page in pages.values()
            if page.data
        }
        rows: list[Heading | HexRow] = []
        for address, is_heading in drawn:
            page = pages[address - address % PAGE]
            if is_heading:
                rows.append(_heading(page, digits))
                continue
            offset = address % PAGE
            data = page.data[offset : offset + self._row]
            marked = changed[page.address][offset : offset + self._row].nonzero()[0] if data else ()
            rows.append(HexRow(address, data, frozenset(map(int, marked)), page.why))
        where = "physical" if self.physical else f"VCPU {eyes.vcpu} linear"
        return MemoryFrame(where, self._facts(space, digits), eyes.note, tuple(rows), self.cursor, digits)

    def _window(self, space: Space, height: int) -> list[tuple[int, bool]]:
        """What is drawn, top to bottom: an address, and whether it's a heading. The cursor's row is in it."""
        last = (1 << space.bits) - self._row
        row = self.cursor - self.cursor % self._row
        self._top = min(max(self._top - self._top % self._row, 0), last)
        drawn = self._from(self._top, height, last)
        below = row - drawn[-1][0]
        if row < self._top or (below > 0 and self._afar) or below > height * self._row:
            lead = min(LEAD, height // 4) if self._afar else 0
            self._top = max(row - lead * self._row, 0)
            drawn = self._from(self._top, height, last)
        while drawn[-1][0] < row:
            self._top += self._row
            drawn = self._from(self._top, height, last)
        self._afar = False
        return drawn

    def _from(self, top: int, height: int, last: int) -> list[tuple[int, bool]]:
        drawn: list[tuple[int, bool]] = []
        for address in range(top, last + 1, self._row):
            if not self.physical and (address == top or address % PAGE == 0):
                drawn.append((address, True))
            drawn.append((address, False))
            if len(drawn) >= height:
                break
        while len(drawn) > max(height, 2) or drawn[-1][1]:
            drawn.pop()
        return drawn

    def _facts(self, space: Space, digits: int) -> tuple[str, ...]:
        value = space.read(self.cursor, 8)
        number = f"  u64 {int.from_bytes(value, 'little'):016x}" if len(value) == 8 else ""
        return (f"{self.cursor:0{digits}x}{number}", self.following)


def _heading(page: Page, digits: int) -> Heading:
    text = f"page {page.address:0{digits}x}"
    if page.physical is None:
        return Heading(f"{text}: {page.why}", bad=True)
    missing = ", where there is no memory" if not page.data else ""
    return Heading(f"{text} is physical {page.physical:x}{missing}", bad=bool(missing))
