from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.kvm.backends.software import Guest


@pytest.fixture
def make() -> Iterator[Callable[..., Guest]]:
    """Guests on the software backend (the arguments are ``Guest``'s), closed at the test's end."""
    made: list[Guest] = []

    def build(*arguments: object, **more: object) -> Guest:
        made.append(Guest(*arguments, **more))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for guest in made:
        guest.close()
