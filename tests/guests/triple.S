# triple - flat64 at 0x100000, one VCPU. Prints "triple" on port 0xe9 and triple-faults at the symbol `fault`.
#
# An interrupt table without entries, then an undefined instruction. Self-check: should it go on behind it, exit 1.

.intel_syntax noprefix
.code64
.globl _start
_start:
    .irp letter, 't', 'r', 'i', 'p', 'l', 'e', 10
    mov al, \letter
    out 0xe9, al
    .endr
    lidt [rip + no_idt]
fault:
    ud2
    mov al, 1
    out 0xf4, al
    hlt
no_idt:
    .word 0
    .quad 0
