"""What KVM's single step leaves undone.

KVM steps by the trap flag in the guest's own RFLAGS. Three things come of it that the guest must not be left with:

* HLT: KVM's emulator notes that the VCPU is to halt, and the step is over before the note is read. The VCPU goes on,
  and halts behind whatever is emulated next, for ever where that is an interrupt's handler. So KVM doesn't get to step
  a HLT. (Linux x86.c, halt_request; a processor's own HLT, with VMX or SVM, comes to the same.)
* In long mode an exception or interrupt that is delivered during the step may push RFLAGS with the flag set: when its
  handler returns, the guest traps, and there is nobody who steps it. The flag is taken out of what was pushed. (With
  VMX or SVM the step itself ends by that trap, and nothing is left.)
* PVM gives the trap of a step at CPL 3 to the guest's own handler of #DB. A breakpoint on that handler stops it there,
  and the delivery is undone. IRETQ is made here: its step by PVM would end behind the next instruction.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from kvm.backends.kernel.fd import Fd
from kvm.backends.kernel.library import ffi
from kvm.x86 import decode, gates
from kvm.x86.decode import EFER_LMA
from kvm.x86.paging import is_linear, pieces
from kvm.x86.structs import (
    EVENT_VALID_SHADOW,
    GUESTDBG_USE_HW_BP,
    MP_STATE_HALTED,
    MP_STATE_RUNNABLE,
    DebugRegs,
    GuestDebug,
    MpState,
    Regs,
    Segment,
    Sregs,
    VcpuEvents,
)

if TYPE_CHECKING:
    from kvm.backends.kernel.vm import KernelVm

S = TypeVar("S", bound=ctypes.Structure)

_TF, _NT, _RF = 1 << 8, 1 << 14, 1 << 16
_IRET_FLAGS = 0x3D7FD5
"""All that IRETQ loads: not VM."""
_ACCESSED, _WRITABLE, _CONFORMING, _CODE = 1, 2, 4, 8
"""Bits of a segment's type."""
_PUSHED = 8
"""Bytes that an instruction pushes or pops, mostly: less than a frame."""
_DB = 1
"""The vector of #DB."""
_GATE, _PRESENT = 16, 0x80
"""Bytes of a gate; its bit that says that there is one, in the byte at 5 (SDM vol. 3A, 6.14.1)."""
_DR7_EXEC_0 = 0x401
"""DR0 holds an address that is not to be executed (SDM vol. 3B, 18.2.4)."""
_PUSHF = b"\x9c"
_DR6_BS = 1 << 14
"""A single step."""
_TSS_RSP0, _TSS_ISTS, _ISTS = 4, 36, 7
_FRAME = struct.Struct("<5Q")  # RIP, CS, RFLAGS, RSP, SS (SDM vol. 3A, 6.14.2)


class Step:
    """One step of a VCPU, from before KVM_RUN to after it, for its owner. Raises KvmError."""

    def __init__(self, fd: Fd, vm: KernelVm, debug: GuestDebug) -> None:
        """``debug``: what KVM was told last."""
        self._fd, self._vm, self._debug = fd, vm, debug
        self._regs, self._sregs = self._get("KVM_GET_REGS", Regs), self._get("KVM_GET_SREGS", Sregs)
        self.cpl = decode.cpl(self._sregs, self._regs.rflags)
        self._code = self._read(decode.linear_rip(self._sregs, self._regs.rip, self._regs.rflags), 2)
        self._handler = 0
        """The guest's handler of #DB, while there is a breakpoint on it."""
        self._lent: list[tuple[int, bytes]] = []
        """Where the guest's memory is used for the step, and what stood there."""

    def made(self) -> str:
        """If the next instruction is one that KVM isn't to step, it's made now; its name."""
        regs, code = self._regs, self._code
        if self.cpl or regs.rflags & _TF:
            return ""
        found = next((each for each in self._MADE if code.startswith(each[0])), None)
        if found is None:
            return ""
        _, name, make = found
        state, events = self._get("KVM_GET_MP_STATE", MpState), self._get("KVM_GET_VCPU_EVENTS", VcpuEvents)
        first = (
            events.exception_injected or events.exception_pending or events.interrupt_injected
            or events.nmi_injected or events.nmi_pending or events.smi_pending
        )  # fmt: skip
        if first or state.mp_state != MP_STATE_RUNNABLE or not make(self, regs, events):
            return ""
        # What another VCPU may be sending meanwhile, an NMI, stays the kernel's.
        events.interrupt_shadow, events.flags = 0, EVENT_VALID_SHADOW
        self._put("KVM_SET_REGS", regs)
        self._put("KVM_SET_VCPU_EVENTS", events)
        self._put("KVM_SET_GUEST_DEBUG", self._debug)  # the next step starts here
        return name

    def _halt(self, regs: Regs, events: VcpuEvents) -> bool:
        regs.rip += 1
        regs.rflags &= ~_RF
        self._put("KVM_SET_MP_STATE", MpState(MP_STATE_HALTED))
        return True

    def _return(self, regs: Regs, events: VcpuEvents) -> bool:
        """IRETQ from CPL 0 to CPL 0 or 3; False where it would fault, or does more than usual (SDM vol. 2A, IRET)."""
        sregs, frame = self._sregs, self._read(regs.rsp, _FRAME.size)
        if not (sregs.efer & EFER_LMA and sregs.cs.l) or len(frame) < _FRAME.size or regs.rflags & _NT:
            return False
        rip, cs, rflags, rsp, ss = _FRAME.unpack(frame)
        code, stack = self._segment(cs, _CODE), self._segment(ss, _WRITABLE)
        if code is None or stack is None or ss & 3 != cs & 3 or not is_linear(sregs, rip):
            return False
        for selector in (cs, ss):
            self._mark_accessed(selector)
        sregs.cs, sregs.ss = code, stack
        for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs):
            if (
                not segment.unusable
                and segment.dpl < cs & 3
                and segment.type & (_CODE | _CONFORMING) != _CODE | _CONFORMING
            ):
                segment.selector, segment.unusable, segment.present = 0, 1, 0
        regs.rip, regs.rsp, regs.rflags = rip, rsp, rflags & _IRET_FLAGS | 2
        events.nmi_masked = 0
        self._put("KVM_SET_SREGS", sregs)
        return True

    _MADE: tuple[tuple[bytes, str, Callable[[Step, Regs, VcpuEvents], bool]], ...] = (
        (b"\xf4", "HLT", _halt), (b"\x48\xcf", "IRETQ", _return),
    )  # fmt: skip

    def _segment(self, selector: int, kind: int) -> Segment | None:
        """What the GDT has for it, accessed: a segment for code (_CODE) or a stack (_WRITABLE) at the selector's own
        level. None where that's not so."""
        if not selector and kind == _WRITABLE:
            return Segment(unusable=1)
        table, at = self._sregs.gdt, selector & ~7
        raw = self._read(table.base + at, 8) if at and at + 7 <= table.limit and not selector & 4 else b""
        if len(raw) < 8:
            return None
        word = int.from_bytes(raw, "little") | _ACCESSED << 40
        segment = Segment(
            base=word >> 16 & 0xFFFFFF | word >> 56 << 24, limit=word & 0xFFFF | word >> 32 & 0xF0000,
            selector=selector, type=word >> 40 & 15, s=word >> 44 & 1, dpl=word >> 45 & 3, present=word >> 47 & 1,
            avl=word >> 52 & 1, l=word >> 53 & 1, db=word >> 54 & 1, g=word >> 55 & 1,
        )  # fmt: skip
        fits = segment.s and segment.present and segment.dpl == selector & 3
        if not fits or segment.type & (_CODE | kind) != kind:
            return None
        if segment.g:
            segment.limit = segment.limit << 12 | 0xFFF
        return segment

    def _mark_accessed(self, selector: int) -> None:
        if selector:
            at = self._sregs.gdt.base + (selector & ~7) + 5
            self._write(at, bytes([self._read(at, 1)[0] | _ACCESSED]))

    def begin(self) -> None:
        """Before KVM_RUN."""
        if self.cpl != 3 or not self._sregs.efer & EFER_LMA or self._regs.rflags & _TF:
            return
        idt = self._sregs.idt
        own = self._read(idt.base + _DB * _GATE, _GATE) if idt.limit >= (_DB + 1) * _GATE - 1 else b""
        gate = own if len(own) < _GATE or own[5] & _PRESENT else self._any_gate()
        if len(gate) < _GATE:
            return
        ist = gate[4] & 7
        tss = self._read(self._sregs.tr.base, _TSS_ISTS + 8 * _ISTS)
        top = _stack(tss, _TSS_ISTS + 8 * (ist - 1) if ist else _TSS_RSP0)
        for at, size in ((idt.base + _DB * _GATE, _GATE), (top - _FRAME.size, _FRAME.size)):
            self._lent.append((at, self._read(at, size)))
        if gate is not own:
            self._write(idt.base + _DB * _GATE, gate)
        self._handler = gates.offset(gate)
        stop = GuestDebug.from_buffer_copy(bytes(self._debug))
        stop.control |= GUESTDBG_USE_HW_BP
        stop.debugreg[0], stop.debugreg[7] = self._handler, _DR7_EXEC_0
        self._put("KVM_SET_GUEST_DEBUG", stop)

    def _any_gate(self) -> bytes:
        """The first that is present in the IDT; empty if none is."""
        idt = self._read(self._sregs.idt.base, self._sregs.idt.limit + 1)
        each = (idt[at : at + _GATE] for at in range(0, len(idt) - _GATE + 1, _GATE))
        return next((gate for gate in each if gate[5] & _PRESENT), b"")

    def end(self) -> bool:
        """After it: was a trap taken back that the guest had got? It has made its step then."""
        regs = self._get("KVM_GET_REGS", Regs)
        if self._handler and self._lift(regs):
            return True
        pushed = abs(regs.rsp - self._regs.rsp) > _PUSHED
        if pushed and self._sregs.efer & EFER_LMA and not self._regs.rflags & _TF:
            self._clear_pushed_flag(regs)
        return False

    def _lift(self, regs: Regs) -> bool:
        """Lift the breakpoint, and give back what was lent for it. Was it the step's own trap that came to it?"""
        try:
            taken_back = regs.rip == self._handler and self._take_back(regs)
        finally:
            self._put("KVM_SET_GUEST_DEBUG", self._debug)
        for at, was in self._lent if taken_back else self._lent[:1]:
            self._write(at, was)
        if taken_back and self._code.removeprefix(b"\x66")[:1] == _PUSHF:
            self._write(regs.rsp + 1, bytes([self._read(regs.rsp + 1, 1)[0] & ~(_TF >> 8)]))
        return taken_back

    def _take_back(self, regs: Regs) -> bool:
        """The guest is about to handle an exception: undo its delivery, if it's the step's own trap."""
        sregs, debug = self._get("KVM_GET_SREGS", Sregs), self._get("KVM_GET_DEBUGREGS", DebugRegs)
        pushed = self._read(regs.rsp, _FRAME.size)
        if decode.cpl(sregs, regs.rflags) == 3 or len(pushed) < _FRAME.size:
            return False
        rip, cs, rflags, rsp, ss = _FRAME.unpack(pushed)
        if (cs, ss) != (self._sregs.cs.selector, self._sregs.ss.selector) or not rflags & _TF:
            return False
        regs.rip, regs.rflags, regs.rsp = rip, rflags & ~_TF, rsp
        sregs.cs, sregs.ss = self._sregs.cs, self._sregs.ss
        debug.dr6 &= ~_DR6_BS
        self._put("KVM_SET_SREGS", sregs)
        self._put("KVM_SET_REGS", regs)
        self._put("KVM_SET_DEBUGREGS", debug)
        return True

    def _clear_pushed_flag(self, after: Regs) -> None:
        """If what was executed was a handler's first instruction: no trap when it returns."""
        regs, sregs = self._regs, self._sregs
        tss = self._read(sregs.tr.base, _TSS_ISTS + 8 * _ISTS)
        own = _stack(tss, _TSS_RSP0) if self.cpl else regs.rsp & ~15
        for top in (own, *(_stack(tss, _TSS_ISTS + 8 * ist) for ist in range(_ISTS))):
            at = top - _FRAME.size
            pushed = self._read(at, _FRAME.size) if 0 < after.rsp <= top else b""
            if len(pushed) == _FRAME.size:
                rip, cs, rflags, rsp, ss = _FRAME.unpack(pushed)
                if rflags & _TF and (cs, rsp, ss) == (sregs.cs.selector, regs.rsp, sregs.ss.selector):
                    self._write(at, _FRAME.pack(rip, cs, rflags & ~_TF, rsp, ss))

    # The guest's memory, at linear addresses

    def _read(self, linear: int, size: int) -> bytes:
        """Shorter where it isn't mapped, or goes on in another page that isn't."""
        return b"".join(self._vm.read(physical, count) for physical, count in self._physical(linear, size))

    def _write(self, linear: int, data: bytes) -> None:
        for physical, count in self._physical(linear, len(data)):
            self._vm.write(physical, data[:count])
            data = data[count:]

    def _physical(self, linear: int, size: int) -> Iterator[tuple[int, int]]:
        for piece in pieces(self._sregs, linear, size, self._vm.read):
            if piece.physical is None:
                return
            yield piece.physical, piece.size

    def _get(self, ioctl: str, kind: type[S]) -> S:
        value = kind()
        self._fd.call(ioctl, ffi.from_buffer(value))
        return value

    def _put(self, ioctl: str, value: ctypes.Structure) -> None:
        self._fd.call(ioctl, ffi.from_buffer(value))


def _stack(tss: bytes, at: int) -> int:
    """Where a stack begins that the TSS names there, as the processor aligns it; 0 if it names none."""
    return int.from_bytes(tss[at : at + 8], "little") & ~15
