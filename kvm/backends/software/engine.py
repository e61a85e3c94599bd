"""One Unicorn instance: runs a number of instructions and says why it stopped.

Everything outside a run happens on ``engine.cpu``, the saved context; ``commit`` gives it back. Inside a run only port
I/O and MMIO come out, through ``ports`` and ``mmio``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from unicorn import unicorn_const as const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.arch.types import uc_context
from unicorn.unicorn_py3.unicorn import Uc, uclib

from kvm.backends.software import context
from kvm.backends.software.calibration import counter_offsets
from kvm.backends.software.context import Context

os.environ.setdefault("UC_IGNORE_REG_BREAK", "1")

PHYSICAL_BITS = context.PHYSICAL_BITS + 1
"""Width of a guest-physical address in the emulator."""

_PORT_REGISTERS = (context.RAX, context.RCX, context.RSI, context.RDI)
"""What IN, OUT and their string forms change, besides RIP."""

NOTHING = -1
"""The run ended with its budget, or was cut."""
GENERAL_PROTECTION = 13
SYSCALL, SYSENTER, GAVE_UP, BREAKPOINT = 0x10000, 0x10001, 0x10002, 0x10003
INTERCEPT = 0x100
"""Added to an SVM exit code: the instruction stands at RIP and has not been run."""

_SVM_FIRST = 0x60
RDTSC, POPF, CPUID, IRET, PAUSE, HLT, MSR, RDTSCP = 0x6E, 0x71, 0x72, 0x74, 0x77, 0x78, 0x7C, 0x87
MONITOR, MWAIT, MWAIT_ARMED = 0x8A, 0x8B, 0x8C
READ_CR8, WRITE_CR8 = 0x08, 0x18


def _bits(*codes: int) -> int:
    return sum(1 << code - _SVM_FIRST for code in codes)


ALWAYS = _bits(RDTSC, CPUID, PAUSE, HLT, MSR, RDTSCP, MONITOR, MWAIT, MWAIT_ARMED)
"""Instructions that always come out to us."""
IF_MAY_RISE = _bits(POPF, IRET)
"""Instructions that come out while an interrupt waits for IF."""
NMI_RETURN = _bits(IRET)

_NOT_BEGUN = frozenset((NOTHING, BREAKPOINT, INTERCEPT + POPF, INTERCEPT + IRET))
"""Ends that the last instruction counted comes after."""

_HIDDEN = (1 << PHYSICAL_BITS) - 2 * mmap.PAGESIZE
"""Two pages at the end of physical space: a VMCB, of which the emulator reads the MSR bitmap's address only, and that
bitmap, all ones. The guest is told of one physical address bit less than the emulator has, so it can't reach them."""
_VMCB_MSRPM = 0x48

MAPPED_END = 1 << (PHYSICAL_BITS - 1)
"""Physical addresses from here on do not exist for the guest."""


class Outside(Protocol):
    """What a run reaches beyond memory."""

    def port_in(self, port: int, size: int) -> int: ...
    def port_out(self, port: int, size: int, value: int) -> None: ...
    def mmio_read(self, address: int, size: int) -> int: ...
    def mmio_write(self, address: int, size: int, value: int) -> None: ...
    def readonly_write(self, address: int, size: int, value: int) -> None: ...


def _hidden_pages() -> tuple[mmap.mmap, int]:
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    pages[mmap.PAGESIZE :] = b"\xff" * mmap.PAGESIZE
    pages[_VMCB_MSRPM : _VMCB_MSRPM + 8] = (_HIDDEN + mmap.PAGESIZE).to_bytes(8, "little")
    return pages, ctypes.addressof(ctypes.c_char.from_buffer(pages))


_HIDDEN_PAGES, _HIDDEN_POINTER = _hidden_pages()


class Engine:
    """One emulated CPU. Not thread-safe: one thread at a time, though ``cut`` may come from any."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._open()
        self._saved: Any = uc_context()
        uclib.uc_context_alloc(self._handle, ctypes.byref(self._saved))
        self.cpu = Context.from_address(int(self._saved.value or 0) + context.HEADER)
        self._event = NOTHING
        self.error = ""
        """Why the emulator gave up, after a run that ended with GAVE_UP."""
        self._breakpoints: list[Any] = []
        self._addresses: tuple[int, ...] = ()
        self._mapped = False
        self._readonly: list[tuple[int, int, int]] = []
        self._unprotected: dict[int, tuple[int, bytes]] = {}
        self._failure: BaseException | None = None
        self._refused: tuple[int, list[int]] | None = None
        uclib.uc_context_save(self._handle, self._saved)
        self.cpu.vmcb = _HIDDEN
        self.cpu.intercept = ALWAYS
        self.cpu.intercept_cr_read = self.cpu.intercept_cr_write = 1 << 8
        self.cpu.old_exception = -1

    def _open(self) -> None:
        self._uc: Any = Uc(const.UC_ARCH_X86, const.UC_MODE_64)
        self._handle: Any = self._uc._uch
        self._counter, self._budget = (
            ctypes.c_uint64.from_address(int(self._handle.value or 0) + offset) for offset in counter_offsets()
        )
        uclib.uc_mem_map_ptr(self._handle, _HIDDEN, 2 * mmap.PAGESIZE, const.UC_PROT_READ, _HIDDEN_POINTER)
        # An `until` address that isn't mapped would corrupt CR2: no exits, the budget alone ends a run.
        self._uc.ctl_exits_enabled(True)
        self._uc.ctl_set_exits([])
        self._hook()

    def _hook(self) -> None:
        hook, insn = self._uc.hook_add, const.UC_HOOK_INSN
        outside, guard = self._outside, self._guarded
        port_in, port_out = outside.port_in, outside.port_out
        hook(const.UC_HOOK_INTR, lambda uc, number, _: self._stop(number))
        hook(insn, lambda uc, port, size, _: guard(port_in, port, size), None, 1, 0, x86.UC_X86_INS_IN)
        hook(insn, lambda uc, port, size, value, _: guard(port_out, port, size, value), None, 1, 0, x86.UC_X86_INS_OUT)
        hook(insn, lambda uc, _: self._stop(SYSCALL), None, 1, 0, x86.UC_X86_INS_SYSCALL)
        hook(insn, lambda uc, _: self._stop(SYSENTER), None, 1, 0, x86.UC_X86_INS_SYSENTER)
        hook(const.UC_HOOK_MEM_WRITE_PROT, self._write_protected)

    def _stop(self, event: int) -> None:
        self._event = event
        uclib.uc_emu_stop(self._handle)

    def _guarded(self, function: Callable[..., Any], *arguments: int) -> Any:
        """An exception must not cross the emulator: keep it, end the run, raise it there."""
        try:
            return function(*arguments)
        except BaseException as error:
            self._failure = self._failure or error
            self.cut()
            return 0

    def cut(self) -> None:
        """End the run before its next instruction. Safe inside every hook, where stopping the emulator is not."""
        self._budget.value = 0

    def look(self) -> None:
        """Inside a port hook: make ``cpu`` what it is now, RIP on the instruction; not RFLAGS' arithmetic flags."""
        uclib.uc_context_save(self._handle, self._saved)

    def refuse(self) -> None:
        """Inside a port hook, after ``look``: let the instruction have been a general protection fault.

        The emulator goes on to the instruction's end, and INS writes what the hook returns to memory once.
        """
        self._refused = self.cpu.rip, [self.cpu.regs[number] for number in _PORT_REGISTERS]
        self.cut()

    def spend(self, instructions: int) -> None:
        """Take so many off what is left of the run."""
        self._budget.value = max(0, self._budget.value - instructions)

    @property
    def count(self) -> int:
        """Instructions begun in this run so far."""
        return self._counter.value

    def run(self, count: int) -> tuple[int, int]:
        """Run up to ``count`` instructions from ``cpu``; what happened, and how many instructions were begun."""
        self._event = NOTHING
        status = uclib.uc_emu_start(self._handle, self.cpu.rip, 0, 0, count)
        uclib.uc_context_save(self._handle, self._saved)
        if self._unprotected:
            self._protect_again()
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise error
        event = self._event
        if status:
            if status == const.UC_ERR_INSN_INVALID:
                event = 6
            else:
                event = GAVE_UP
                self.error = uclib.uc_strerror(status).decode()
        begun = self._counter.value - (event in _NOT_BEGUN)
        if self._refused is not None:
            (self.cpu.rip, values), self._refused = self._refused, None
            for number, value in zip(_PORT_REGISTERS, values, strict=True):
                self.cpu.regs[number] = value
            self.cpu.error_code = 0
            event = GENERAL_PROTECTION
        return event, begun

    def commit(self, *, flush: bool = False) -> None:
        """Give the changed ``cpu`` back; ``flush`` when paging has changed."""
        uclib.uc_context_restore(self._handle, self._saved)
        if flush:
            self._uc.ctl(const.UC_CTL_TLB_FLUSH, const.UC_CTL_IO_WRITE)

    def commit_fpu(self) -> None:
        """As ``commit`` after the FPU or SSE control words changed: the emulator derives its rounding modes."""
        self.commit()
        self._uc.reg_write(x86.UC_X86_REG_FPCW, self.cpu.fpuc)
        self._uc.reg_write(x86.UC_X86_REG_MXCSR, self.cpu.mxcsr)
        uclib.uc_context_save(self._handle, self._saved)

    def flush_code(self) -> None:
        """Forget translated code: somebody else has written it."""
        self._uc.ctl_flush_tb()

    def break_at(self, addresses: Iterable[int]) -> None:
        """Stop with BREAKPOINT before the instructions at these linear addresses, and at no others."""
        self._addresses = tuple(addresses)
        for hook in self._breakpoints:
            self._uc.hook_del(hook)
        self._breakpoints = [
            self._uc.hook_add(const.UC_HOOK_CODE, lambda *_: self._at_breakpoint(), None, address, address)
            for address in self._addresses
        ]
        self.flush_code()

    def _at_breakpoint(self) -> None:
        if self._counter.value > 1:  # where a run begins is the caller's to look at, RF and all
            self._stop(BREAKPOINT)

    def map(self, memory: Iterable[tuple[int, int, int, bool]]) -> None:
        """Lay out physical memory: (address, size, host pointer, readonly), ascending; all between is MMIO."""
        if self._mapped:
            # Unicorn unmaps page by page, which takes seconds for the MMIO up to the end: a new instance takes 3 ms.
            self._discard()
            self._open()
            self._breakpoints = []
            self.break_at(self._addresses)
        self._mapped = True
        self._readonly.clear()
        end = 0
        for address, size, pointer, readonly in memory:
            self._map_mmio(end, address)
            rights = const.UC_PROT_READ | const.UC_PROT_EXEC | (0 if readonly else const.UC_PROT_WRITE)
            status = uclib.uc_mem_map_ptr(self._handle, address, size, rights, pointer)
            if status:
                raise RuntimeError(f"{address:#x}+{size:#x}: {uclib.uc_strerror(status).decode()}")
            if readonly:
                self._readonly.append((address, size, pointer))
            end = address + size
        self._map_mmio(end, MAPPED_END)
        self.commit(flush=True)

    def _map_mmio(self, first: int, end: int) -> None:
        if first >= end:
            return
        read, write, guard = self._outside.mmio_read, self._outside.mmio_write, self._guarded
        self._uc.mmio_map(
            first,
            end - first,
            lambda uc, offset, size, _: guard(read, first + offset, size),
            None,
            lambda uc, offset, size, value, _: guard(write, first + offset, size, value),
            None,
        )

    def _write_protected(self, uc: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        """Let the one instruction write, and take it back before the next: the emulator knows no ignored write."""
        for first, length, pointer in self._readonly:
            if first <= address < first + length:
                if first not in self._unprotected:
                    self._unprotected[first] = pointer, ctypes.string_at(pointer, length)
                    uc.mem_protect(first, length, const.UC_PROT_ALL)
                self._guarded(self._outside.readonly_write, address, size, value & (1 << 8 * size) - 1)
                self.cut()
                return True
        return False

    def _protect_again(self) -> None:
        for first, (pointer, contents) in self._unprotected.items():
            ctypes.memmove(pointer, contents, len(contents))
            self._uc.mem_protect(first, len(contents), const.UC_PROT_READ | const.UC_PROT_EXEC)
        self._unprotected.clear()

    def _discard(self) -> None:
        # Its callbacks hold the object, so it would stay, with its code buffer, until a collection of cycles.
        self._counter = self._budget = ctypes.c_uint64()
        self._uc._Uc__finalizer()
        self._uc = None

    def close(self) -> None:
        """Free the instance; ``cpu`` must not be touched any more."""
        if self._uc is not None:
            self._discard()
            uclib.uc_context_free(self._saved)
