"""Where everything lies in a guest's physical address space: the one map that loaders, memory and devices share.

All values are bytes. What a loader places lies below 640 KiB, out of the way of kernels, which are linked at 1 MiB.
"""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# -- the first MiB, as every PC has it --------------------------------------------------------------------------------
BIOS_DATA = 0x400
"""Real mode's interrupt vectors below, the BIOS data area (256 bytes) from here."""

# Placed by vmdeck for guests entered in 32- or 64-bit mode; real-mode guests and firmware find zeros here.
BOOT_GDT = 0x500
"""Null, 32-bit code (0x08), data (0x10), 64-bit code (0x18): 32 bytes."""
BOOT_PML4 = 0x1000
BOOT_PDPT = 0x2000
BOOT_PAGE_DIRECTORIES = 0x3000
"""Four, one a GiB: 0–4 GiB identity-mapped in 2 MiB pages, for guests entered in 64-bit mode."""
BOOT_TABLES_END = 0x7000

BOOT_SECTOR = 0x7C00
"""The boot sector, and the top of a real-mode guest's stack."""

MULTIBOOT_INFO = 0x9000
"""Multiboot's information structure with its memory map and strings, within one page."""
MULTIBOOT_INFO_END = 0xA000

LINUX_BOOT_PARAMS = 0xA000
"""Linux' struct boot_params, the "zero page"."""
LINUX_COMMAND_LINE = 0xB000
LINUX_COMMAND_LINE_END = 0x10000

BOOT_STACK = 0x9F000
"""The top of the stack of guests entered in 32- or 64-bit mode."""

LOW_RAM_END = 0x9FC00
"""639 KiB: memory maps call what is below usable; the last KiB is the extended BIOS data area."""
VIDEO_MEMORY = 0xA0000
ACPI_TABLES = 0xE0000
"""Where kernels look for them, and memory maps say that nobody may write: the first of them, RSDP, then the others."""
BIOS_END = 0x100000
BIOS_COPY = 0x20000
"""The end of a firmware image, at most so much of it, is also found in RAM below 1 MiB."""

# -- above ------------------------------------------------------------------------------------------------------------
KERNEL = 0x100000
"""Where 32- and 64-bit flat binaries go unless told otherwise."""

MMIO_HOLE = 3 * GIB
"""RAM stops here at the latest; the rest of it goes on at ``HIGH_RAM``."""
IOAPIC = 0xFEC00000
LAPIC = 0xFEE00000
KVM_IDENTITY_MAP = 0xFEFFC000
"""One page that KVM on Intel hosts takes for real mode, three at ``KVM_TSS``; below the largest ROM, as in QEMU."""
KVM_TSS = 0xFEFFD000
MAX_ROM = 16 * MIB
ROM_END = 4 * GIB
"""A firmware image ends here: the reset vector is 16 bytes below."""
HIGH_RAM = 4 * GIB

MIN_MEMORY = 1 * MIB
MAX_MEMORY = 1024 * GIB - MMIO_HOLE
"""With it guest-physical addresses stay well below 2^40, which every x86-64 processor has."""

# -- ports: those that a board and the tables that describe it must agree on ------------------------------------------
FW_CFG_PORTS = 0x510
POWER_PORTS = 0x600
"""ACPI's PM1 event and control registers: 6 bytes."""
RESET_PORT = 0xCF9
COM1, COM1_IRQ = 0x3F8, 4


def ram(memory: int) -> tuple[tuple[int, int], ...]:
    """The (address, size) of each RAM range of a machine with ``memory`` bytes, ascending."""
    low = min(memory, MMIO_HOLE)
    return ((0, low),) if memory == low else ((0, low), (HIGH_RAM, memory - low))


def memory_map(memory: int) -> tuple[tuple[int, int, bool], ...]:
    """The (address, size, usable) map that a PC's firmware would report, ascending; what it leaves out is no memory."""
    low, *high = ram(memory)
    return (
        (0, LOW_RAM_END, True),
        (LOW_RAM_END, VIDEO_MEMORY - LOW_RAM_END, False),
        (BIOS_END - BIOS_COPY, BIOS_COPY, False),
        *(((BIOS_END, low[1] - BIOS_END, True),) if low[1] > BIOS_END else ()),
        (IOAPIC, ROM_END - IOAPIC, False),
        *((address, size, True) for address, size in high),
    )
