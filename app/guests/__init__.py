"""The guests that come with vmdeck."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def demo() -> Path:
    """The demo guest's image: multiboot 1, ELF32, linked at 1 MiB; it needs 2 MiB of RAM."""
    return Path(str(resources.files(__name__) / "demo.elf"))
