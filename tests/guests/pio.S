# pio - flat16 at 0x7c00, one VCPU. For the cost of a port exit, and for stops within one.
#
# Writes AL to port 0x80 for ever, AL counting up from 0. ECX counts the writes; its low byte is AL.
# Self-check: AL is CL before each write; if not, exit 1.

.intel_syntax noprefix
.code16
.globl _start
_start:
    xor eax, eax
    xor ecx, ecx
again:
    cmp al, cl
    jne fail
    out 0x80, al
    inc al
    inc ecx
    jmp again
fail:
    mov al, 1
    out 0xf4, al
    hlt
