"""A VCPU as its pane draws it, made of what the machine knows without asking anybody."""

from __future__ import annotations

import time

from app.code import instruction_at
from kvm.machine import Activity, Machine, Phase, VcpuView
from widgets.frame import Changes, VcpuFrame

STALE_NS = 1_000_000_000
"""A running VCPU's sample older than this says so."""


def make_frame(machine: Machine, index: int, changes: Changes, *, detailed: bool) -> VcpuFrame:
    """The newest of this VCPU. ``detailed``: with the instruction, which is read from the guest's memory."""
    view = machine.view(index)
    running = machine.status.phase is Phase.RUNNING
    changed = changes.observe(view.regs, view.sregs, running=running, now_ns=time.monotonic_ns())
    return VcpuFrame(
        index=index,
        activity=view.activity.value,
        reason=view.reason,
        dirty=view.dirty,
        last_put=view.last_put.name if view.last_put else "",
        regs=view.regs,
        sregs=view.sregs,
        insn=instruction_at(machine, view.regs, view.sregs) if detailed and view.regs and view.sregs else None,
        changed=changed,
        age=age_of(view, running=running),
    )


def age_of(view: VcpuView, *, running: bool) -> int:
    """Whole seconds since a running VCPU's registers were sampled; 0 while they're fresh, or exact."""
    ages = running and view.activity is not Activity.STOPPED and view.regs and not view.from_copy
    age = time.monotonic_ns() - view.time_ns if ages else 0
    return age // 1_000_000_000 if age > STALE_NS else 0
