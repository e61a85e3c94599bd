"""The concurrency tests in a loop, with 8 VCPUs on real KVM, until the first failure: ``python -m tests.soak MINUTES``.

Each round, with a seed that a failure prints (``python -m tests.soak MINUTES SEED`` starts with that one):

1. a machine of 8 VCPUs whose first starts the others by INIT and SIPI;
2. four threads that run, pause, step, edit, reset, checkpoint, restore, sample and synchronise it at random, at once;
3. then it's reset and run: every AP must arrive, and a pause must find every VCPU standing within its limit;
4. every hook's record in the ledger is whole, and no get, put or KVM_RUN was made by a thread not the VCPU's own.

Ends with 0 when the time is over, with 1 and a traceback at the first failure, with 2 where there is no KVM.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from kvm.errors import BackendUnavailable, MachineError
from kvm.machine import Machine, Phase
from kvm.x86.structs import MP_STATE_RUNNABLE, MpState
from tests.kvm.contract.lab import AP_ADDRESS, AP_CODE, AP_COUNT, START_AP, Tracing, nmi, synchronize, word
from tests.kvm.machines import build, until

VCPUS, THREADS, OPERATIONS = 8, 4, 60


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        from kvm.backends.kernel.system import KernelSystem

        KernelSystem().create_vm().close()
    except BackendUnavailable as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    end = time.monotonic() + float(arguments[0]) * 60
    seed = int(arguments[1]) if len(arguments) == 2 else time.time_ns() % 1_000_000
    rounds = 0
    while time.monotonic() < end:
        try:
            one_round(seed)
        except BaseException:
            traceback.print_exc()
            print(f"soak: failed after {rounds} rounds; seed {seed}", file=sys.stderr)
            return 1
        rounds += 1
        seed += 1
    print(f"soak: {rounds} rounds, no failure")
    return 0


def one_round(seed: int) -> None:
    from kvm.backends.kernel.system import KernelSystem

    system = KernelSystem()
    with tempfile.TemporaryDirectory() as folder:
        with build(system, Path(folder), START_AP, vcpus=VCPUS, format="flat64") as machine, Tracing(machine) as trace:
            machine.write_memory(AP_ADDRESS, AP_CODE)
            churn(machine, seed)
            arrives(machine)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        assert not any(name.startswith("vcpu") for name in names.values()), "a VCPU's thread outlived its machine"
        for vcpu in range(VCPUS):
            moving = {
                call.thread for call in trace.calls if call.vcpu == vcpu and (call.substate or call.ioctl == "KVM_RUN")
            }
            assert len(moving) == 1, f"VCPU {vcpu} was moved by {len(moving)} threads"
    system.close()


def churn(machine: Machine, seed: int) -> None:
    first = machine.checkpoint("first")
    failures: list[BaseException] = []

    def work(rng: random.Random) -> None:
        operations: list[Callable[[], object]] = [
            machine.run, machine.run, machine.pause, machine.reset, machine.request_samples,
            lambda: machine.step(0),
            lambda: machine.edit(rng.randrange(VCPUS), "r15", rng.getrandbits(64)),
            lambda: machine.restore(first),
            lambda: machine.forget(machine.checkpoint()),
            lambda: look(machine, rng.randrange(VCPUS)),
            lambda: [machine.view(vcpu) for vcpu in range(VCPUS)],
        ]  # fmt: skip
        try:
            for _ in range(OPERATIONS):
                try:
                    rng.choice(operations)()
                except MachineError as error:
                    if "shut down" not in str(error):  # an AP whose code isn't there yet may triple-fault
                        raise
                    machine.reset()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(random.Random(seed * THREADS + n),)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "an operation hangs"
    if failures:
        raise failures[0]


def look(machine: Machine, vcpu: int) -> None:
    """A sync, and an NMI where somebody stands: what the app does under its lock."""
    with machine._lock:
        machine.pause()
        if not machine.vcpus[vcpu].running:
            synchronize(machine, vcpu)
            if vcpu:
                nmi(machine, machine.vcpus[vcpu])


def arrives(machine: Machine) -> None:
    machine.pause()
    machine.reset()
    machine.write_memory(AP_ADDRESS, AP_CODE)
    machine.write_memory(AP_COUNT, bytes(2))
    machine.run()
    until(lambda: word(machine, AP_COUNT) > 0, 60)

    def all_there() -> bool:
        machine.pause()
        states = []
        for index in range(1, VCPUS):
            synchronize(machine, index)
            states.append(MpState.from_buffer_copy(machine.vcpus[index].copy["mp_state"]).mp_state)
        machine.run()
        return all(state == MP_STATE_RUNNABLE for state in states)

    until(all_there, 60)
    machine.pause()
    assert machine.status.phase is Phase.PAUSED
    assert not any(vcpu.running for vcpu in machine.vcpus)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
