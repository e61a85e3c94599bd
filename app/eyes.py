"""Through whom memory is looked at: a VCPU, its registers as they are known, without asking anybody."""

from __future__ import annotations

from dataclasses import dataclass

from app.frames import age_of
from app.space import Space
from kvm.machine import Machine, Phase
from kvm.x86 import decode
from kvm.x86.structs import Regs, Sregs


@dataclass(frozen=True, slots=True)
class Eyes:
    """A VCPU's view at one moment. ``note`` warns of registers that are old."""

    machine: Machine
    vcpu: int
    regs: Regs
    sregs: Sregs
    running: bool
    note: str = ""

    @property
    def mode(self) -> decode.Mode:
        """What its code is taken for."""
        return decode.mode(self.sregs, self.regs.rflags)

    def space(self, *, physical: bool = False) -> Space:
        """What lies at linear addresses, or at physical ones."""
        return Space(self.machine, None if physical else self.sregs)


def eyes_of(machine: Machine, vcpu: int) -> Eyes | None:
    """A VCPU's; None while nothing is known of it. Never synchronises, never blocks."""
    view = machine.view(vcpu)
    if not view.regs or not view.sregs:
        return None
    running = machine.status.phase is Phase.RUNNING
    age = age_of(view, running=running)
    regs, sregs = Regs.from_buffer_copy(view.regs), Sregs.from_buffer_copy(view.sregs)
    return Eyes(machine, vcpu, regs, sregs, running, f"registers {age} s old" if age else "")
