# deadline64 - flat64 at 0x100000, one VCPU. A local APIC timer in TSC-deadline mode, armed anew by its own handler.
#
# The ticks are counted at 0x190000. A deadline that is lost is the last: nothing else arms the timer.

.intel_syntax noprefix
.code64
.set LAPIC, 0xfee00000
.set VECTOR, 0x30
.set DELTA, 2000000
.set IDT, 0x180000
.set TICKS, 0x190000

.globl _start
_start:
    lea rax, [rip + tick]
    mov edi, IDT + VECTOR * 16
    mov [rdi], ax
    mov word ptr [rdi + 2], 0x18
    mov word ptr [rdi + 4], 0x8e00
    shr eax, 16
    mov [rdi + 6], rax
    lidt [rip + idt_pointer]
    mov edi, LAPIC
    mov dword ptr [rdi + 0xf0], 0x1ff
    mov dword ptr [rdi + 0x320], 0x40000 + VECTOR
    call arm
again:
    sti
    hlt
    jmp again
arm:
    rdtsc
    shl rdx, 32
    add rax, rdx
    add rax, DELTA
    mov rdx, rax
    shr rdx, 32
    mov ecx, 0x6e0
    wrmsr
    ret
tick:
    inc dword ptr [TICKS]
    call arm
    mov dword ptr [rdi + 0xb0], 0
    iretq
idt_pointer:
    .word 0xfff
    .quad IDT
