"""The machine: memory, VCPUs and devices, and what can be done with them as a whole.

Operations come from any thread and are serialised by one lock. VCPU threads never take it: what they and the devices
have to say goes into the inbox of the supervisor thread, which acts on it like any other caller.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

from kvm import sync
from kvm.backends.interface import Exit, ExitKind, System
from kvm.boot.image import BootImage
from kvm.chips import Chips
from kvm.config import MachineConfig
from kvm.devices.board import Board
from kvm.errors import KvmError, MachineError, MemoryAccessError, VmdeckError
from kvm.ledger import Ledger
from kvm.memory import Memory
from kvm.snapshot.chain import Chain, open_chain
from kvm.snapshot.checkpoints import Checkpoints
from kvm.snapshot.contents import Contents
from kvm.snapshot.file import Progress, Snapshot, Written
from kvm.snapshot.files import MachineFiles, Mapped
from kvm.snapshot.pages import PageStore
from kvm.snapshot.replace import StrPath
from kvm.snapshot.state import Checkpoint, MachineState, check
from kvm.status import Phase, Status
from kvm.supervisor import Act, Supervisor
from kvm.vcpu import WAIT_LIMIT, Activity, Reply, Vcpu, VcpuView, step_control
from kvm.x86 import cpuid, dump, registers, reset
from kvm.x86.paging import Piece, linear_bits, pieces
from kvm.x86.structs import Regs, Sregs, Sregs2
from kvm.x86.substates import vcpu_table

__all__ = ["Activity", "Checkpoint", "Machine", "MachineConfig", "Phase", "Status", "VcpuView"]

STEP_LIMIT = 0.1
"""Seconds that one instruction may take before it's asked whether the VCPU waits: in HLT, or for a SIPI."""


class Machine:
    """A machine, initialised (hooks at FULL) and paused. A context manager; ``close`` it in any case.

    Raises ConfigError, KvmError or MemoryAccessError where it can't be built.
    """

    def __init__(
        self, system: System, image: BootImage, config: MachineConfig, *, ram: Sequence[mmap.mmap] = ()
    ) -> None:
        """``ram``: its RAM, mapped from the file that is loaded next; the image isn't put into it."""
        config.check(system.caps)
        self.system = system
        self.image = image
        self.config = config
        self.ledger = Ledger()
        self.vcpus: tuple[Vcpu, ...] = ()
        self._status = Status(Phase.PAUSED, "not started yet")
        self._listeners: list[Callable[[Status], None]] = []
        self._lock = threading.RLock()
        self._changed = threading.Condition()
        self._orders = threading.Lock()
        """Keeps orders to all VCPUs whole: a stop that comes half before a resume would leave some standing."""
        self._checkpoints = Checkpoints()
        self._half_done = ""
        """The reset or load that is under way, or that failed half-way: the machine is neither the old nor the new one
        then, and the guest must not run on that."""
        self._ran = False
        self._vm = system.create_vm()
        try:
            self._build(ram)
        except BaseException:
            self._free()
            raise
        self._supervisor = Supervisor(self._lock, self._act)

    def _build(self, ram: Sequence[mmap.mmap]) -> None:
        caps = self.system.caps
        # Memory first: creating the irqchip leaves the kernel with a grace period (SRCU) under way, and a slot that is
        # set after it waits for that, 5 ms.
        self.memory = Memory(self._vm, self.config.memory, self.image.rom, ram)
        self._vm.create_irqchip()
        self._pages = PageStore(self.memory)
        self.board = Board(self, memory=self.config.memory, vcpus=self.config.vcpus)
        for port, size in self.board.coalesced_ports:
            self._vm.coalesce(port, size)
        self.table = vcpu_table(caps, self.system.msr_list())
        self.chips = Chips(self._vm, caps)
        self.files = MachineFiles(self.config, self.memory, self._pages, self.table, self.chips.rows)
        control = step_control(caps["KVM_CAP_SET_GUEST_DEBUG2"])
        for index in range(self.config.vcpus):
            fd = self._vm.create_vcpu(index)
            self.vcpus += (Vcpu(fd, self.table, self.board.bus, self.ledger, self._vcpu_stopped, control),)
        if not ram:
            self._load_image()
        self._power_on()

    def _power_on(self) -> None:
        """Machine init: what fresh VCPUs and chips hold is the base of every later reset."""
        supported = self.system.cpuid()
        deadline = self.system.caps["KVM_CAP_TSC_DEADLINE_TIMER"] > 0
        for vcpu in self.vcpus:
            vcpu.copy["cpuid"] = cpuid.for_vcpu(supported, vcpu.index, len(self.vcpus), tsc_deadline=deadline)
        # Before the first read: it decides what else there is, and which MSRs KVM lets be read (before Linux 6.13).
        sync.cpu_synchronize_all_post_init(self.vcpus, ledger=self.ledger, caller="init")
        sync.cpu_synchronize_all_states(self.vcpus, ledger=self.ledger, caller="init", chips=self.chips)
        self._fresh = MachineState(tuple(dict(vcpu.copy) for vcpu in self.vcpus), self.chips.copy, self.board.save())
        self._reset_copies()
        sync.cpu_synchronize_all_post_init(self.vcpus, ledger=self.ledger, caller="init")

    # What is known

    @property
    def status(self) -> Status:
        """Any thread; never blocks."""
        return self._status

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Oldest first. Any thread; never blocks."""
        return self._checkpoints.kept

    @property
    def came_from(self) -> int | None:
        """The number of the checkpoint that was taken or restored last; None since a reset or load. Any thread."""
        return self._checkpoints.came_from

    def subscribe(self, listener: Callable[[Status], None]) -> None:
        """Call this at every change of status, on the thread that made it; it must not block."""
        self._listeners.append(listener)

    def wait(self, *phases: Phase, timeout: float | None = None) -> Status:
        """Wait until the machine is in one of these phases; the status then, or at the end of ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._status.phase in phases, timeout)
            return self._status

    def request_samples(self) -> None:
        """Ask every running VCPU for a sample and hand coalesced output on. Any thread; never blocks on a VCPU."""
        for vcpu in self.vcpus:
            if vcpu.running:
                vcpu.request_sample()
        self._vm.drain(self.board.bus)

    def view(self, vcpu: int) -> VcpuView:
        """What is known of a VCPU; never synchronises, never blocks. Any thread."""
        return self.vcpus[vcpu].view()

    # Operations

    def run(self) -> None:
        """Let the guest run on. Raises MachineError after a triple fault: only a reset or a restore helps then."""
        with self._lock, _Operation(self, "run", whole=True):
            if self._status.exit is not None and self._status.exit.kind is ExitKind.SHUTDOWN:
                raise MachineError(
                    "Can't run: the guest has shut down (triple fault). Reset it or restore a checkpoint."
                )
            self._resume()

    def pause(self) -> None:
        """Stop every VCPU. Raises MachineError naming a VCPU that doesn't stop."""
        with self._lock, _Operation(self, "pause"):
            if self._status.phase is Phase.RUNNING:
                self._stop_all()
                self._set_status(Status(Phase.PAUSED, "paused"))

    def step(self, vcpu: int | None = None) -> tuple[Exit, ...]:
        """Execute one instruction on one VCPU, or one on each, all at once; pauses first.

        A VCPU that waits (HLT, wait-for-SIPI) doesn't step: its exit is KICKED. Raises MachineError, KvmError.
        """
        with self._lock, _Operation(self, "step", whole=True):
            if "guest_debug" not in self.table.by_name:
                raise MachineError("Can't step: this KVM lacks single step (KVM_CAP_SET_GUEST_DEBUG).")
            self._stop_all()
            self._ran = True
            targets = self.vcpus if vcpu is None else (self.vcpus[vcpu],)
            epoch = self._supervisor.epoch
            try:
                replies = [(target, target.step()) for target in targets]
                patience = time.monotonic() + STEP_LIMIT  # all wait at once
                outcomes = [self._stepped(target, reply, patience) for target, reply in replies]
            except BaseException:  # none may go on stepping, least of all in a HLT
                for target in targets:
                    target.interrupt_step()
                raise
            exits = [outcome() for outcome in outcomes]  # it may raise: only when none of them steps any more
            self._set_status(Status(Phase.PAUSED, "stepped"))
            for target, ended in zip(targets, exits, strict=True):
                if ended.kind is ExitKind.KICKED:
                    target.stop_reason = "waits, nothing to step"
                elif ended.kind is ExitKind.DEBUG:
                    target.stop_reason = "stepped"
                elif epoch == self._supervisor.epoch:
                    self._guest_stopped(target, ended)
            return tuple(exits)

    @staticmethod
    def _stepped(vcpu: Vcpu, reply: Reply[Exit], patience: float) -> Callable[[], Exit]:
        """Its step's outcome; one that waits when ``patience`` is over (time.monotonic()) is interrupted. That the host
        doesn't let it run isn't waiting."""
        end = time.monotonic() + WAIT_LIMIT
        while True:
            try:
                return reply.outcome(max(patience - time.monotonic(), 0))
            except MachineError:
                patience = time.monotonic() + STEP_LIMIT
                if vcpu.fd.waiting() is not False or time.monotonic() > end:
                    vcpu.interrupt_step()
                    return reply.outcome()

    def settle(self) -> None:
        """Wait until what the guest has asked for in its steps, a reset or its end, is done. Raises MachineError."""
        with self._lock, _Operation(self, "settle"):
            done = self._supervisor.caught_up()
        if not done.wait(WAIT_LIMIT):
            raise MachineError(f"The machine did not settle within {WAIT_LIMIT:g} s: its supervisor hangs.")

    def reset(self) -> None:
        """A system reset: devices, VCPUs, and the image as it was loaded; the guest goes on if it ran."""
        with self._lock, _Operation(self, "reset"):
            was_running = self._status.phase is Phase.RUNNING
            skew = self._stop_all()
            sync.cpu_synchronize_all_states(self.vcpus, ledger=self.ledger, caller="reset", skew_us=skew)
            self._supervisor.epoch += 1
            self._forget_reasons()
            self._half_done = "reset"
            self.board.reset()
            self._load_image()
            self._reset_copies()
            self.chips.copy = self._fresh.machine
            sync.cpu_synchronize_all_post_reset(self.vcpus, ledger=self.ledger, caller="reset", chips=self.chips)
            self._half_done = ""
            self._checkpoints.came_from = None
            self._set_status(Status(Phase.PAUSED, "reset"))
            if was_running:
                self._resume()

    def save(self) -> MachineState:
        """The state without memory; pauses, and leaves the machine paused. Devices first, then the VCPUs."""
        with self._lock, _Operation(self, "save", whole=True):
            return self._save(self._pause_for("save"))

    def load(self, state: MachineState) -> None:
        """Take a state (memory is the caller's matter); leaves the machine paused.

        Raises MachineError or VmdeckError, nothing changed, if it doesn't fit; KvmError if a put fails: the machine is
        then STOPPED, its copies still hold the state, and another load or a reset mends it.
        """
        with self._lock, _Operation(self, "load"):
            check(state, self.table, self.chips.rows, len(self.vcpus))
            self.board.check(state.devices)
            self._load(state, self._pause_for("load"))
            self._set_status(Status(Phase.PAUSED, "loaded"))

    def checkpoint(self, name: str = "") -> Checkpoint:
        """Keep the whole machine as it is now, in memory; the guest goes on if it ran. Raises MachineError."""
        with self._lock, _Operation(self, "checkpoint", whole=True):
            was_running = self._status.phase is Phase.RUNNING
            ahead = self._get_ready()
            state = self._save(self._stop_all())
            index, pages = self._pages.take()
            checkpoint = self._checkpoints.add(name, state, index, ahead + pages)
            if was_running:
                self._resume()
            if ahead:
                self._free_pages()
            return checkpoint

    def restore(self, checkpoint: Checkpoint) -> int:
        """Go back to a checkpoint of this machine; the guest goes on if it ran. How many pages were copied for it.

        Raises MachineError, KvmError.
        """
        with self._lock, _Operation(self, "restore"):
            checkpoint = self._checkpoints.find(checkpoint)
            was_running = self._status.phase is Phase.RUNNING
            skew = self._stop_all()
            pages = self._load(checkpoint.state, skew, lambda: self._pages.put_back(checkpoint.index))
            self._checkpoints.came_from = checkpoint.number
            self._set_status(Status(Phase.PAUSED, f"restored {checkpoint.name}"))
            if was_running:
                self._resume()
            return pages

    def forget(self, checkpoint: Checkpoint) -> None:
        """Free what only this checkpoint holds. Raises MachineError if it's gone already."""
        with self._lock, _Operation(self, "forget"):
            self._checkpoints.remove(checkpoint)
            self._free_pages()

    def rename(self, checkpoint: Checkpoint, name: str, note: str = "") -> Checkpoint:
        """Give a checkpoint another name and note; the one it was still stands for it. Raises MachineError."""
        with self._lock, _Operation(self, "rename"):
            return self._checkpoints.rename(checkpoint, name, note)

    @contextmanager
    def held(self, checkpoint: Checkpoint | None = None) -> Iterator[tuple[MachineState, Contents]]:
        """A checkpoint's state and RAM, or the machine's own as they are now, to be looked at until the block ends.

        Nothing that happens to the machine meanwhile changes them; the guest goes on if it ran. Raises MachineError.
        """
        with self._lock, _Operation(self, "look at the machine", whole=checkpoint is None):
            if checkpoint is not None:
                kept = self._checkpoints.find(checkpoint)
                state, contents = kept.state, self._pages.hold(kept.index)
            else:
                state, contents = self._copy()
        try:
            yield state, contents
        finally:
            self._let_go(contents)

    def save_file(
        self,
        path: StrPath,
        *,
        name: str = "",
        note: str = "",
        why: str = "asked for",
        incremental: bool = False,
        progress: Progress = lambda done, total: None,
        cancel: threading.Event | None = None,
        taken: Callable[[], None] = lambda: None,
    ) -> Written:
        """Save the machine to a file, an ELF core (kvm/snapshot/FORMAT.md). The guest stands only while its state and
        the pages that it has changed are copied; it runs on while they are written.

        ``incremental``: only what changed since the file that the machine was last saved to or loaded from. ``taken``
        is called when they are copied: what is done with the machine from then on isn't in the file.
        Raises SnapshotError, SnapshotCancelled: what was at ``path`` is as it was.
        """
        with self._lock, _Operation(self, "save to a file", whole=True):
            self.files.check_target(path, incremental=incremental)
            parent = self.files.saved if incremental else None
            self._get_ready()
            state, contents = self._copy()
            snapshot = Snapshot(
                self.config.memory, self.system.name, time.time(), why, name, note, state, contents, self.memory.rom,
                self.image,
            )  # fmt: skip
        try:
            taken()
            return self.files.write(path, snapshot, parent, progress, cancel, self._lock)
        finally:
            self._let_go(contents)

    def load_file(
        self,
        path: StrPath,
        *,
        drop: bool = False,
        verify: bool = False,
        progress: Progress = lambda done, total: None,
        cancel: threading.Event | None = None,
    ) -> tuple[str, ...]:
        """Become the machine in a file; the guest goes on if it ran. What was lost on the way, if ``drop`` allows that.

        Memory is mapped, and checked meanwhile (the machine stops if it's damaged), or before all if ``verify``.
        Raises SnapshotError, SnapshotMismatch, KvmError: the machine is as it was.
        """
        return self._load_chain(open_chain(path), drop=drop, verify=verify, progress=progress, cancel=cancel)

    def _load_chain(
        self, chain: Chain, *, drop: bool, verify: bool, progress: Progress, cancel: threading.Event | None
    ) -> tuple[str, ...]:
        """``load_file``, once the file is open. Closes it, now or when its memory is checked."""
        with ExitStack() as stack:
            stack.enter_context(chain)
            if verify:
                chain.verify(progress, cancel)
            with self._lock, _Operation(self, "load a file"):
                told = [vcpu.copy["cpuid"] for vcpu in self.vcpus] if self._ran else None
                state, losses = self.files.fit(chain, self._fresh, told=told, drop=drop)
                mapped = self.files.map(chain)
                was_running = self._status.phase is Phase.RUNNING
                self._take(mapped, state)
                self._set_status(Status(Phase.PAUSED, f"loaded {chain.path.name}"))
                if not verify:
                    self.files.check_later(chain, self._file_damaged)
                    stack.pop_all()
                if was_running:
                    self._resume()
            return losses

    @classmethod
    def from_file(
        cls,
        system: System,
        path: StrPath,
        *,
        drop: bool = False,
        verify: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> tuple[Machine, tuple[str, ...]]:
        """A machine as the file's configuration says, loaded, paused; and what was lost. Raises as ``load_file``."""
        with ExitStack() as stack:
            chain = stack.enter_context(open_chain(path))
            machine = cls(system, chain.image(), MachineConfig(chain.head.vcpus, chain.head.memory), ram=chain.ram)
            stack.pop_all()  # the chain is the machine's from here on
        try:
            return machine, machine._load_chain(chain, drop=drop, verify=verify, progress=progress, cancel=None)
        except BaseException:
            machine.close()
            raise

    def edit(self, vcpu: int, register: str, value: int) -> None:
        """Set one register ("rax", "cr3", "cs.base"…) of a VCPU's copy; it reaches the guest when it runs on.

        Pauses the machine. Raises ConfigError for a register or value that there isn't.
        """
        with self._lock, _Operation(self, "edit"):
            registers.check(register, value)
            self._pause_for("edit")
            target = self.vcpus[vcpu]
            sync.cpu_synchronize_state(target, ledger=self.ledger, caller="edit")
            registers.write(target.copy, register, value)

    def dump_registers(self) -> str:
        """All VCPUs' registers as QEMU's ``info registers -a`` prints them; the guest goes on if it ran.

        Raises MachineError, KvmError.
        """
        with self._lock, _Operation(self, "dump registers"):
            was_running = self._status.phase is Phase.RUNNING
            self._stop_all()
            for vcpu in self.vcpus:
                sync.cpu_synchronize_state(vcpu, ledger=self.ledger, caller="dump")
            text = dump.dump([vcpu.copy for vcpu in self.vcpus])
            if was_running:
                self._resume()
            return text

    def read_memory(self, address: int, size: int) -> bytes:
        """Guest-physical memory; while the guest runs it may change under the read. Raises MemoryAccessError."""
        return self.memory.read(address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        """Write guest-physical memory; pauses the machine. Raises MemoryAccessError."""
        with self._lock, _Operation(self, "write memory"):
            self._pause_for("write memory")
            self.memory.write(address, data)

    def write_linear(self, vcpu: int, address: int, data: bytes) -> tuple[Piece, ...]:
        """Write at a linear address of a VCPU, through its page tables whatever they allow; pauses the machine.

        Where it went, page by page. Raises MemoryAccessError, nothing written, where one isn't mapped or isn't memory.
        """
        with self._lock, _Operation(self, "write memory"):
            self._pause_for("write memory")
            sregs = Sregs.from_buffer_copy(self.view(vcpu).sregs)  # exact: it stands
            went = tuple(pieces(sregs, address, len(data), self.memory.peek))
            for piece in went:
                if piece.physical is None or not self.memory.peek(piece.physical, piece.size):
                    why = f"VCPU {vcpu} has no page mapped there"
                    if piece.physical is not None:
                        why = f"it is mapped to guest-physical {piece.physical:#x}, where there is no memory"
                    raise MemoryAccessError(f"Can't write at linear {piece.linear:#x}: {why}. Nothing is written.")
            for piece in went:
                assert piece.physical is not None
                offset = piece.linear - address & (1 << linear_bits(sregs)) - 1
                self.memory.write(piece.physical, data[offset : offset + piece.size])
            return went

    def find_memory(
        self,
        data: bytes,
        start: int = 0,
        progress: Progress = lambda done, total: None,
        cancel: threading.Event | None = None,
    ) -> int | None:
        """The guest-physical address where ``data`` next lies, from ``start`` on, in RAM or ROM; None if it doesn't.

        The guest runs on and may change what is searched. Raises CalledOff once ``cancel`` is set.
        """
        return self.memory.find(data, start, progress, cancel)

    def close(self) -> None:
        """End the threads and free everything. Can be called again."""
        with self._lock:
            if self._status.phase is Phase.CLOSED:
                return
            self._supervisor.epoch += 1
            self._set_status(Status(Phase.CLOSED, "closed"))
        self.files.stop_checking()
        self._supervisor.close()
        self._free()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What devices ask for (kvm.devices.platform), on VCPU threads

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set an interrupt line."""
        self._vm.irq_line(gsi, level)

    def request_reset(self, why: str) -> None:
        """The guest wants a reset: stop it where it stands; the supervisor resets."""
        self._stop_soon(lambda: self._guest_reset(why))

    def request_exit(self, code: int) -> None:
        """The guest ended itself: stop it where it stands."""
        self._stop_soon(lambda: self._guest_exited(f"the guest ended itself with {code:#x}", code))

    def request_power_off(self) -> None:
        """The guest switched the machine off: stop it where it stands."""
        self._stop_soon(lambda: self._guest_exited("the guest switched the machine off", None))

    def dma_read(self, address: int, size: int) -> bytes | None:
        """RAM, for a device."""
        return self.memory.dma_read(address, size)

    def dma_write(self, address: int, data: bytes) -> bool:
        """Write RAM for a device."""
        return self.memory.dma_write(address, data)

    # Inside

    def _after_failure(self, operation: str, error: BaseException) -> None:
        """The status must say how an operation that failed has left the machine."""
        vcpu = error.vcpu if isinstance(error, KvmError) else None
        if self._half_done:
            self._set_status(Status(Phase.STOPPED, f"{operation} failed half-way: {error}", vcpu))
        elif self._status.phase is Phase.RUNNING and not any(each.running for each in self.vcpus):
            self._set_status(Status(Phase.PAUSED, f"{operation} failed: {error}", vcpu))

    def _set_status(self, status: Status) -> None:
        with self._changed:
            self._status = status
            self._changed.notify_all()
        for listener in tuple(self._listeners):
            listener(status)

    def _resume(self) -> None:
        self._ran = True
        self._set_status(Status(Phase.RUNNING))
        with self._orders:
            for vcpu in self.vcpus:
                vcpu.resume()

    def _stop_all(self) -> float:
        """Stop every VCPU; the skew between the first and the last, in microseconds. Status stays as it is."""
        stood = [reply.outcome()() for reply in [vcpu.stop() for vcpu in self.vcpus if vcpu.running]]
        self._vm.drain(self.board.bus)
        return (max(stood) - min(stood)) / 1000 if stood else 0.0

    def _pause_for(self, operation: str) -> float:
        skew = self._stop_all()
        if self._status.phase is Phase.RUNNING:
            self._set_status(Status(Phase.PAUSED, f"paused to {operation}"))
        return skew

    def _copy(self) -> tuple[MachineState, Contents]:
        """State and RAM as they are now, to ``_let_go`` of in the end; the guest goes on if it ran."""
        was_running = self._status.phase is Phase.RUNNING
        state = self._save(self._stop_all())
        index, _ = self._pages.take()
        contents = self._pages.hold(index)
        if was_running:
            self._resume()
        return state, contents

    def _let_go(self, contents: Contents) -> None:
        with self._lock:
            self._pages.release(contents.index)
            self._free_pages()

    def _get_ready(self) -> int:
        """Do what of a checkpoint or save can be done while the guest runs on; the number of pages stored."""
        return self._pages.get_ready(ahead=self._status.phase is Phase.RUNNING and self._vm.exact_log)

    def _free_pages(self) -> None:
        self._pages.keep_only(self._checkpoints.indices)

    def _take(self, mapped: Mapped, state: MachineState) -> None:
        """Become what the file holds, or stay what it is: memory first, as a put can make the kernel write to it."""
        self.board.check(state.devices)
        epoch, status, half_done = self._supervisor.epoch, self._status, self._half_done
        before = self._save(self._stop_all())
        put_memory_back = self.files.put_behind(mapped)
        try:
            self.files.fill_in(mapped)
            self._load(state)
        except BaseException:
            put_memory_back()
            self._load(before)
            self._supervisor.epoch, self._half_done = epoch, half_done
            self._set_status(status)
            if status.phase is Phase.RUNNING:
                self._resume()
            raise
        self.image = mapped.image
        self.files.adopt(mapped)
        if not self._pages.files <= mapped.sources.keys():
            self._free_pages()  # files that only what was there before needed
        self._checkpoints.came_from = None

    def _file_damaged(self, error: VmdeckError) -> None:
        """Memory that the guest may have used already isn't what was saved."""
        self._stop_soon(lambda: self._set_status(Status(Phase.STOPPED, str(error))))

    def _save(self, skew_us: float) -> MachineState:
        """All stand: devices first, so that what they still owe a VCPU is in its state."""
        devices = self.board.save()
        sync.cpu_synchronize_all_states(
            self.vcpus, ledger=self.ledger, caller="save", skew_us=skew_us, chips=self.chips
        )
        return MachineState(tuple(dict(vcpu.copy) for vcpu in self.vcpus), self.chips.copy, devices)

    def _load(self, state: MachineState, skew_us: float = 0.0, put_memory_back: Callable[[], int] = lambda: 0) -> int:
        """All stand, the state fits; returns what ``put_memory_back`` does. Memory first: KVM may look at it while it
        takes a VCPU's state (PDPTEs). The machine's rows go in before any VCPU runs (Cloud Hypervisor #7932).
        """
        self._supervisor.epoch += 1
        self._forget_reasons()
        self._half_done = "load"
        reading = sync.cpu_synchronize_all_pre_loadvm(self.vcpus, ledger=self.ledger, caller="load", skew_us=skew_us)
        pages = put_memory_back()
        self.board.load(state.devices)
        for vcpu, copy in zip(self.vcpus, state.vcpus, strict=True):
            vcpu.copy.update(copy)
        self.chips.copy = state.machine
        sync.cpu_synchronize_all_post_init(
            self.vcpus, ledger=self.ledger, caller="load", chips=self.chips, reading=reading
        )
        self._half_done = ""
        return pages

    def _forget_reasons(self) -> None:
        """Why a VCPU stopped is over with the state that it stopped in."""
        for vcpu in self.vcpus:
            vcpu.stop_reason = ""

    def _load_image(self) -> None:
        for segment in self.image.segments:
            self.memory.write(segment.address, segment.data)
            self.memory.zero(segment.address + len(segment.data), segment.size - len(segment.data))

    def _reset_copies(self) -> None:
        """Every copy to its reset value, the BSP then to what the image's format promises at entry."""
        for vcpu, fresh in zip(self.vcpus, self._fresh.vcpus, strict=True):
            vcpu.copy.update({**reset.reset_state(fresh, vcpu.index), "cpuid": vcpu.copy["cpuid"]})
        bsp = self.vcpus[0].copy
        kind = Sregs2 if self.table.by_name["sregs"].struct is Sregs2 else Sregs
        regs, sregs = Regs.from_buffer_copy(bsp["regs"]), kind.from_buffer_copy(bsp["sregs"])
        self.image.entry.apply(regs, sregs)
        bsp["regs"], bsp["sregs"] = bytes(regs), bytes(sregs)

    # The supervisor, and who writes to it

    def _vcpu_stopped(self, vcpu: Vcpu, ended: Exit | VmdeckError) -> None:
        """On the VCPU's thread: its guest can't go on."""
        self._stop_soon(lambda: self._guest_stopped(vcpu, ended))

    def _stop_soon(self, act: Callable[[], None]) -> None:
        """From a VCPU's thread: have every VCPU stop where it stands, without waiting, and the supervisor act."""
        with self._orders:
            for vcpu in self.vcpus:
                vcpu.stop()
            self._supervisor.tell(act)

    def _act(self, act: Act) -> None:
        """The supervisor's, under the lock."""
        try:
            self._stop_all()
            act()
        except VmdeckError as error:
            self._set_status(Status(Phase.STOPPED, str(error)))

    def _guest_reset(self, why: str) -> None:
        was_running = self._status.phase is Phase.RUNNING
        self.reset()
        if not was_running:
            self._set_status(Status(Phase.PAUSED, f"the guest asked for a reset ({why})"))

    def _guest_exited(self, reason: str, code: int | None) -> None:
        self._set_status(Status(Phase.EXITED, reason, code=code))

    def _guest_stopped(self, vcpu: Vcpu, ended: Exit | VmdeckError) -> None:
        if isinstance(ended, VmdeckError):
            vcpu.stop_reason = str(ended)
            self._set_status(Status(Phase.STOPPED, str(ended), vcpu.index))
            return
        vcpu.stop_reason = ended.kind.value
        phase = Phase.PAUSED if ended.kind is ExitKind.DEBUG else Phase.STOPPED
        detail = f": {ended.detail}" if ended.detail else ""
        self._set_status(Status(phase, f"VCPU {vcpu.index}: {ended.kind.value}{detail}", vcpu.index, ended))

    def _free(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self._vm.close()


class _Operation:
    """Round what is done with the machine, under its lock: can it be, and what does a failure mean?"""

    def __init__(self, machine: Machine, name: str, *, whole: bool = False) -> None:
        """``whole``: it makes no sense on what a reset or load that failed has left."""
        self._machine, self._name, self._whole = machine, name, whole

    def __enter__(self) -> None:
        half_done = self._machine._half_done
        if self._machine.status.phase is Phase.CLOSED:
            raise MachineError(f"Can't {self._name}: the machine is closed.")
        if self._whole and half_done:
            raise MachineError(
                f"Can't {self._name}: the last {half_done} failed half-way. Reset the machine, or load or restore "
                "a state."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._machine._after_failure(self._name, error)
