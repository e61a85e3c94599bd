"""Make the README's pictures from the running app: ``python screenshots/make.py``.

Each is a real machine with the demo guest, on KVM if it can be used here and on the software backend otherwise. The one
of Linux is in software, of the bzImage that VMDECK_LINUX names, and is left out without.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from textual.events import Key  # noqa: E402
from textual.keys import _character_to_key as character_to_key  # noqa: E402

from app.workstation import Workstation  # noqa: E402
from kvm.backends.choice import open_system  # noqa: E402
from kvm.boot import loader  # noqa: E402
from kvm.machine import Machine, MachineConfig, Phase  # noqa: E402
from tests.guests.initrd import initrd  # noqa: E402

DEMO = ROOT / "app" / "guests" / "demo.elf"
MEMORY, LINUX_MEMORY = 64 << 20, 256 << 20
LIMIT = 120.0


@dataclass(frozen=True)
class Picture:
    """What is pressed before it's taken: keys, ``type=…`` as keys, ``text=…`` to the guest; ``output=…`` waits until
    the guest has said that.
    """

    name: str
    size: tuple[int, int]
    vcpus: int
    keys: tuple[str, ...]
    linux: bool = False


PICTURES = (
    Picture("running", (120, 40), 4, ("output=round 6", "c", "output=round 9")),
    Picture(
        "editing", (120, 40), 4,
        ("output=round 4", "c", "space", "s", "s", "e", "type=r9=0xbeef", "enter", "e", "type=cs.ba", "tab"),
    ),
    Picture(
        "wall", (200, 60), 4,
        (
            "output=round 4", "C", "type=four rounds in", "enter", "output=round 6", "c", "f4", "up", "enter",
            "output=round 6", "C", "type=another way", "enter", "output=round 8", "c", "escape", "f2", "text=cpus",
            "enter", "output=cpu 3", "f2",
        ),
    ),
    Picture("sixteen", (80, 24), 16, ("output=round 3", "j", "j", "j", "j", "j", "output=round 5")),
    Picture("crash", (100, 30), 2, ("output=round 3", "c", "f2", "text=crash triple", "enter", "stopped", "f2")),
    Picture("help", (100, 76), 4, ("question_mark",)),
    Picture("contract", (170, 30), 4, ("output=round 4", "c", "space", "e", "type=r9=0xbeef", "enter", "t")),
    Picture(
        "memory", (120, 40), 4,
        ("output=round 4", "m", "g", "type=gs.base", "enter", "output=round 6", "e", 'type=0xdead "beef" 00'),
    ),
    Picture("diff", (120, 40), 4, ("output=round 4", "space", "c", "s", "s", "S", "s", "f4", "d")),
    Picture(
        "linux", (140, 48), 2,
        (
            "output=ACPI: Early table", "c", "output=Brought up 1 node, 2 CPUs", "C", "type=both CPUs up", "enter",
            "output=rootfs image as initramfs", "c", "space",
        ),
        linux=True,
    ),
)  # fmt: skip


async def take(picture: Picture, machine: Machine) -> str:
    """The SVG."""
    app = Workstation(machine)
    async with app.run_test(size=picture.size) as pilot:
        machine.run()

        async def until(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(LIMIT):
                while not condition():
                    await pilot.pause(0.02)

        def said() -> bytes:
            return machine.board.serial_console.since(0)[0]

        for key in picture.keys:
            verb, _, text = key.partition("=")
            if verb == "output":
                await until(lambda text=text: text.encode() in said())  # type: ignore[misc]
            elif verb == "stopped":
                await until(lambda: machine.status.phase is Phase.STOPPED)
            elif verb == "text":
                machine.board.serial.feed(text.encode())
            elif verb == "type":
                for character in text:
                    app.post_message(Key(character_to_key(character), character))
            else:
                app.simulate_key(key)
            await pilot.pause(0.3)
        await pilot.pause(0.3)
        return smaller(app.export_screenshot(title="vmdeck"))


def smaller(svg: str) -> str:
    """The same picture in fewer bytes: short ids, one rectangle a colour run, no clipping of what is cut anyway."""
    svg = re.sub(r"terminal-\d+-", "t", svg)
    svg = re.sub(r' clip-path="url\(#tline-\d+\)"', "", svg)
    svg = re.sub(r'<clipPath id="tline-\d+">.*?</clipPath>', "", svg, flags=re.DOTALL)
    return re.sub(r"(?:<rect fill=[^>]* shape-rendering=[^>]*/>)+", merged, svg.replace("&#160;", "\u00a0"))


def merged(rectangles: re.Match[str]) -> str:
    """A row of rectangles, those of one colour that touch as one."""
    runs: list[list[str | float]] = []
    for fill, x, y, width in re.findall(r'fill="(\S+)" x="(\S+)" y="(\S+)" width="(\S+)"', rectangles[0]):
        if runs and runs[-1][0] == fill and runs[-1][2] == y and abs(float(runs[-1][3]) - float(x)) < 0.1:
            runs[-1][3] = float(x) + float(width)
        else:
            runs.append([fill, x, y, float(x) + float(width)])
    return "".join(
        f'<rect fill="{fill}" x="{x}" y="{y}" width="{float(end) - float(x):g}" height="24.65"/>'
        for fill, x, y, end in runs
    )


def start(picture: Picture) -> Machine:
    """A machine with the picture's guest in it."""
    if not picture.linux:
        image = loader.load(DEMO, memory=MEMORY, vcpus=picture.vcpus)
        return Machine(open_system("auto"), image, MachineConfig(picture.vcpus, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "initrd"
        disk.write_bytes(initrd(Path(folder)))
        kernel = os.environ["VMDECK_LINUX"]
        image = loader.load(kernel, memory=LINUX_MEMORY, vcpus=picture.vcpus, initrd=disk)
    return Machine(open_system("software"), image, MachineConfig(picture.vcpus, LINUX_MEMORY))


def main() -> None:
    """Take them all, or those named on the command line."""
    for picture in PICTURES:
        if sys.argv[1:] and picture.name not in sys.argv[1:]:
            continue
        path = Path(__file__).parent / f"{picture.name}.svg"
        if picture.linux and "VMDECK_LINUX" not in os.environ:
            print(f"{path} left as it is: VMDECK_LINUX names no kernel")
            continue
        with start(picture) as machine:
            svg = asyncio.run(take(picture, machine))
        machine.system.close()
        path.write_text(svg, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
