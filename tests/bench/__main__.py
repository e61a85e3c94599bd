"""The benchmarks: vmdeck beside its floors, in one run. ``python -m tests.bench [NAME…]`` prints a table of ratios.

Needs /dev/kvm and gcc. Medians of many rounds on whatever machine this is: read the ratios, not the microseconds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvm import sync
from kvm.backends.interface import PAGE_SIZE
from kvm.backends.kernel.system import KernelSystem
from kvm.machine import Machine
from tests.bench.ui import ui
from tests.kvm.machines import COUNT, HLT, build, until

HERE = Path(__file__).parent
MEMORY = 128 << 20

DIRTY = bytes.fromhex("bf 00 00 20 00  fe 07  81 c7 00 10 00 00  e2 f6  fa f4")
"""32-bit: mov edi, 0x200000; inc byte [edi]; add edi, 4096; loop (ECX pages); cli; hlt."""


def floor(*arguments: object) -> dict[str, float]:
    """What the C program measures, in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "floor"
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-pthread", "-o", program, HERE / "floor.c"], check=True)
        command = [str(program), *map(str, arguments)]
        answer = subprocess.run(command, check=True, capture_output=True, timeout=120)
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def median(work: Callable[[], object], rounds: int = 301, prepare: Callable[[], object] = lambda: None) -> float:
    """The median of ``rounds`` calls, in microseconds; ``prepare`` runs before each, unmeasured."""
    times = []
    for _ in range(rounds):
        prepare()
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def line(what: str, ours: float, bare: float, unit: str = "µs") -> None:
    print(f"{what:<52}{ours:>10.1f}{bare:>10.1f} {unit:<3}{ours / bare:>8.3g} ×", flush=True)


def machine(code: bytes, vcpus: int = 1, memory: int = 4 << 20, format: str = "flat16") -> Machine:
    with tempfile.TemporaryDirectory() as folder:
        return build(KernelSystem(), Path(folder), code, vcpus=vcpus, memory=memory, format=format)


def hooks() -> None:
    """The all-CPU hooks against a C loop that makes the same ioctls on one thread."""
    for vcpus in (1, 4, 8):
        bare = floor("hooks", vcpus)
        with machine(HLT, vcpus) as m:
            told = {"ledger": m.ledger, "caller": "bench"}

            def clean() -> None:
                sync.cpu_synchronize_all_post_reset(m.vcpus, **told)  # type: ignore[arg-type]

            def dirty() -> None:
                sync.cpu_synchronize_all_states(m.vcpus, **told)  # type: ignore[arg-type]

            line(f"get all substates, {vcpus} VCPUs", median(dirty, prepare=clean), bare["get"])
            line(f"put at RESET, {vcpus} VCPUs", median(clean, prepare=dirty), bare["put"])
            full = median(lambda: sync.cpu_synchronize_all_post_init(m.vcpus, **told), prepare=dirty)  # type: ignore[arg-type]
            line(f"put at FULL, {vcpus} VCPUs", full, bare["put"])


ALL_PAGES = (MEMORY - (2 << 20)) // PAGE_SIZE


def restore() -> None:
    """Going back to a checkpoint of 128 MiB: the pages alone, then the whole machine.

    Beside the ioctls made by one thread, and by a thread a VCPU, woken for it, as the contract has it.
    """
    pages_floor = floor("pages")
    for vcpus in (1, 4):
        one_thread, own_threads = floor("restore", vcpus), floor("threads", vcpus)
        with machine(DIRTY, vcpus, MEMORY, "flat32") as m:
            checkpoint = m.checkpoint()
            for name, count in (("10", 10), ("1000", 1000), ("all", ALL_PAGES)):
                rounds = 101 if count < ALL_PAGES else 15

                def touch(count: int = count) -> None:
                    m.restore(checkpoint)
                    m.edit(0, "rcx", count)
                    m.run()
                    while not m.vcpus[0].fd.waiting():
                        """No sleep: the floor's guest has just run too."""
                    m.pause()

                if vcpus == 1:
                    ours = median(lambda: m._pages.put_back(checkpoint.index), rounds, touch)
                    line(f"pages back, 128 MiB, {name} dirty", ours, pages_floor[name])
                ours = median(lambda: m.restore(checkpoint), rounds, touch)
                line(f"restore, 128 MiB, {name} dirty, {vcpus} VCPUs", ours, one_thread[name])
                line("  beside a thread a VCPU", ours, own_threads[name])
                if vcpus == 1:
                    line("  its VCPU's ioctls alone, as they were made", median_of_puts(m), one_thread[name])


def median_of_puts(m: Machine) -> float:
    """Microseconds in the kernel of VCPU 0's part of the newest loads, its TSC's reading included."""
    loads = [record for record in m.ledger.records if record.hook == "cpu_synchronize_all_post_init"]
    return statistics.median(part.microseconds for record in loads[-15:] for part in record.parts if part.vcpu == 0)


def reset() -> None:
    """An idle reset of four VCPUs; the floor is a get and a put at RESET of all."""
    bare = floor("hooks", 4)
    with machine(HLT, 4) as m:
        line("reset, 4 VCPUs", median(m.reset, 101), bare["get"] + bare["put"])


def pio() -> None:
    """A port write served by a Python device against a bare exit."""
    bare = floor("pio")["exit"]
    code = bytes.fromhex("66 40 e6 99 eb fa")  # inc eax; out 0x99, al (nobody's port); jmp back
    with machine(code) as m:
        m.run()
        until(lambda: rax(m) > 1000)
        start, first = time.perf_counter(), rax(m)
        time.sleep(3)
        exits, seconds = rax(m) - first, time.perf_counter() - start
        line("port exit served by Python", seconds / exits * 1e6, bare)


def rax(m: Machine) -> int:
    from kvm.x86.structs import Regs

    before = m.view(0).time_ns
    m.request_samples()
    until(lambda: m.view(0).time_ns > before)
    return Regs.from_buffer_copy(m.view(0).regs).rax


def sampling() -> None:
    """A busy guest's speed while its registers are sampled 30 times a second, against left alone."""
    with machine(COUNT) as m:
        m.run()

        def speed(period: float) -> float:
            first, start = rax(m), time.perf_counter()
            while time.perf_counter() - start < 4:
                time.sleep(period)
                if period < 1:
                    m.request_samples()
            return (rax(m) - first) / (time.perf_counter() - start) / 1e6

        pairs = [(speed(4), speed(1 / 30)) for _ in range(3)]
        alone, watched = (statistics.median(values) for values in zip(*pairs, strict=True))
        line("busy guest, sampled at 30 Hz", watched, alone, "M/s")


ALL = {work.__name__: work for work in (hooks, restore, reset, pio, sampling, ui)}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(ALL)
    if unknown := set(chosen) - ALL.keys():
        sys.exit(f"There is no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}.")
    print(f"{'':<52}{'vmdeck':>10}{'floor':>10}{'ratio':>13}")
    for name in chosen:
        ALL[name]()
