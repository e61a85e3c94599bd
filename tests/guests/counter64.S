# counter64 - flat64 at 0x100000, one VCPU or more (only VCPU 0 runs). For pause, step, sampling, checkpoints.
#
# RAX counts for ever, the quadword at 0x180000 with it: at any instruction boundary RAX - memory is 0 or 1.
# R8-R15 hold their own number in every byte. Needs 2 MiB.
# Self-check, every time round: memory is RAX, R8 is as set. If not: "counter" or "register" on port 0xe9 and exit 1.

.intel_syntax noprefix
.code64
.set COUNTER, 0x180000

.globl _start
_start:
    .irp register, 8, 9, 10, 11, 12, 13, 14, 15
    movabs r\register, 0x0101010101010101 * \register
    .endr
    xor eax, eax
    mov [COUNTER], rax
    movabs rbx, 0x0808080808080808
count:
    inc rax
    mov [COUNTER], rax
check:
    lea rsi, [rip + counter_text]
    cmp [COUNTER], rax
    jne fail
    lea rsi, [rip + register_text]
    cmp r8, rbx
    je count
fail:
    lodsb
    test al, al
    jz 1f
    out 0xe9, al
    jmp fail
1:  mov al, 1
    out 0xf4, al
    hlt
counter_text: .asciz "counter\n"
register_text: .asciz "register\n"
