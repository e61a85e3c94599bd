"""Builds the extension ``kvm.backends.kernel._kvm``: what Python may call, with kvm.h read by the compiler.

setup.py hands this file to cffi, which executes it by its path: nothing of the package may be imported here.
``VMDECK_WERROR=1`` makes a warning, or a failed build, an error; otherwise the package installs without it.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).parent

IOCTLS = (
    # system
    "KVM_GET_API_VERSION", "KVM_CREATE_VM", "KVM_CHECK_EXTENSION", "KVM_GET_VCPU_MMAP_SIZE",
    "KVM_GET_MSR_INDEX_LIST", "KVM_GET_SUPPORTED_CPUID",
    # VM
    "KVM_ENABLE_CAP", "KVM_SET_TSS_ADDR", "KVM_SET_IDENTITY_MAP_ADDR", "KVM_CREATE_IRQCHIP", "KVM_CREATE_PIT2",
    "KVM_CREATE_VCPU", "KVM_SET_USER_MEMORY_REGION", "KVM_GET_DIRTY_LOG", "KVM_IRQ_LINE",
    "KVM_REGISTER_COALESCED_MMIO", "KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP", "KVM_GET_PIT2", "KVM_SET_PIT2",
    "KVM_GET_CLOCK", "KVM_SET_CLOCK",
    # VCPU
    "KVM_RUN", "KVM_NMI", "KVM_GET_STATS_FD", "KVM_KVMCLOCK_CTRL", "KVM_SET_CPUID2", "KVM_SET_GUEST_DEBUG",
    "KVM_GET_REGS", "KVM_SET_REGS", "KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_GET_SREGS2", "KVM_SET_SREGS2",
    "KVM_GET_FPU", "KVM_SET_FPU", "KVM_GET_XSAVE", "KVM_GET_XSAVE2", "KVM_SET_XSAVE", "KVM_GET_XCRS", "KVM_SET_XCRS",
    "KVM_GET_LAPIC", "KVM_SET_LAPIC", "KVM_GET_MSRS", "KVM_SET_MSRS", "KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS",
    "KVM_GET_MP_STATE", "KVM_SET_MP_STATE", "KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS", "KVM_GET_TSC_KHZ",
    "KVM_SET_TSC_KHZ", "KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE", "KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR",
)  # fmt: skip

_CONSTANTS = (
    *IOCTLS,
    *runpy.run_path(str(_HERE / "capabilities.py"))["CAPABILITIES"],
    "KVM_API_VERSION", "KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY", "KVM_PIT_SPEAKER_DUMMY",
    "KVM_X86_QUIRK_FIX_HYPERCALL_INSN", "KVM_SYNC_X86_VALID_FIELDS", "KVM_CAP_SPLIT_IRQCHIP",
    "KVM_EXIT_UNKNOWN", "KVM_EXIT_IO", "KVM_EXIT_DEBUG", "KVM_EXIT_HLT", "KVM_EXIT_MMIO", "KVM_EXIT_SHUTDOWN",
    "KVM_EXIT_FAIL_ENTRY", "KVM_EXIT_INTERNAL_ERROR", "KVM_EXIT_SYSTEM_EVENT",
    "VD_KICKED", "VD_RING_WAITS", "VD_RING_BYTES", "VD_TAKES_VALUE", "VD_GIVES_VALUE", "VD_COUNTED", "VD_TOLERATED",
    "VD_TSC_OFFSET", "VD_RUNG",
)  # fmt: skip

_FUNCTIONS = """
struct vd_call { uint64_t request; uint32_t offset; uint32_t flags; int32_t result; int32_t error; };
struct vd_sample { uint64_t sequence; int64_t time_ns; ...; };
struct vd_vcpu;
struct vd_job;
struct vd_bell { uint32_t state; struct vd_job *job; ...; };
struct vd_job {
    struct vd_bell answer; int32_t fd; int32_t count; char *buffer; struct vd_call *calls;
    int64_t began_ns; int64_t ended_ns; uint64_t thread; int32_t done;
};

int vd_ioctl(int fd, unsigned long request, void *argument);
int vd_ioctl_value(int fd, unsigned long request, unsigned long value);
int vd_batch(int fd, char *buffer, struct vd_call *calls, int count);
int vd_irq_line(int fd, uint32_t gsi, uint32_t level);
void vd_make(struct vd_job *job);
void vd_bell_ring(struct vd_bell *bell);
int vd_bell_hand(struct vd_bell *bell, struct vd_job *job);
int vd_bell_make(struct vd_bell *bell);
int vd_bell_wait(struct vd_bell *bell, int64_t timeout_ns);
int vd_install_handler(void);
struct vd_vcpu *vd_vcpu_open(int fd, size_t size, int sync_regs, int ring_page);
void vd_vcpu_close(struct vd_vcpu *v);
char *vd_vcpu_page(struct vd_vcpu *v);
void vd_bind(struct vd_vcpu *v);
int vd_run(struct vd_vcpu *v);
void vd_publish(struct vd_vcpu *v);
void vd_publish_anew(struct vd_vcpu *v);
int vd_sample(struct vd_vcpu *v, struct vd_sample *out);
void vd_request_sample(struct vd_vcpu *v);
void vd_kick(struct vd_vcpu *v);
void vd_clear_kick(struct vd_vcpu *v);
int vd_ring_copy(struct vd_vcpu *v, char *out);
void vd_ring_release(struct vd_vcpu *v, int count);
int64_t vd_dirty_pages(int fd, uint32_t slot, uint64_t *bitmap, int64_t words, int64_t *out);
int64_t vd_copy_pages(char *to, const int64_t *to_pages, int64_t to_count, const char *from,
                      const int64_t *from_pages, int64_t from_count, int64_t n);
int64_t vd_go_back(int fd, uint32_t slot, uint64_t *bitmap, int64_t count, const int64_t *marks, int64_t marked,
                   char *to, const char *from, const int64_t *places, int64_t from_count);
"""

_werror = os.environ.get("VMDECK_WERROR") == "1"

ffi = FFI()
ffi.cdef("".join(f"#define {name} ...\n" for name in _CONSTANTS) + _FUNCTIONS)
ffi.set_source(
    "kvm.backends.kernel._kvm",
    '#include "shim.h"',
    sources=[os.path.relpath(_HERE / "shim.c")],
    depends=[os.path.relpath(_HERE / "shim.h")],
    include_dirs=[os.path.relpath(_HERE)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", *(["-Werror"] if _werror else [])],
    optional=not _werror,
)
