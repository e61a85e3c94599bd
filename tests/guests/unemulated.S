# unemulated - flat64 at 0x100000, one VCPU. An instruction that KVM's emulator doesn't know: POPCNT at CPL 0.
#
# Prints "popcnt" on port 0xe9. Where CPL 0 is emulated KVM stops with an internal error, suberror 1, RIP at the symbol
# `unknown` (f3 48 0f b8 c3); elsewhere it exits with 0. Self-check: the result is 32, or exit 1.

.intel_syntax noprefix
.code64
.globl _start
_start:
    .irp letter, 'p', 'o', 'p', 'c', 'n', 't', 10
    mov al, \letter
    out 0xe9, al
    .endr
    movabs rbx, 0x00ff00ff00ff00ff
unknown:
    popcnt rax, rbx
    sub al, 32
    setne al
    out 0xf4, al
    hlt
