# timer64 - flat64 at 0x100000, one VCPU. For the local APIC's timer: does it live on after pause, reset, restore?
#
# A periodic timer of 10 ms (1 GHz bus clock, divided by 16); each time it is woken it prints how many ticks there have
# been, one line each, in hexadecimal: "tick 00000001". For ever.
# Self-check, at every tick: the timer's registers are as written; if not, "timer" and exit 1.

.intel_syntax noprefix
.code64
.set LAPIC, 0xfee00000
.set VECTOR, 0x30
.set PERIOD, 625000
.set IDT, 0x180000

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
    mov dword ptr [rdi + 0x3e0], 3
    mov dword ptr [rdi + 0x320], 0x20000 + VECTOR
    mov dword ptr [rdi + 0x380], PERIOD
    xor ebx, ebx                        # ticks
    xor ebp, ebp                        # printed
wait:
    cli
    cmp ebx, ebp
    jne 1f
    sti
    hlt
    jmp wait
1:  sti
    mov ebp, ebx
    lea rsi, [rip + tick_text]
    call print
    mov ecx, 8
    mov edx, ebp
2:  rol edx, 4
    mov eax, edx
    and eax, 15
    mov al, [digits + rax]
    out 0xe9, al
    loop 2b
    mov al, 10
    out 0xe9, al
    cmp dword ptr [rdi + 0x380], PERIOD
    jne fail
    mov eax, [rdi + 0x320]
    and eax, 0x700ff
    cmp eax, 0x20000 + VECTOR
    je wait
fail:
    lea rsi, [rip + fail_text]
    call print
    mov al, 1
    out 0xf4, al
print:
    lodsb
    out 0xe9, al
    cmp al, ' '
    ja print
    ret
tick:
    inc ebx
    mov dword ptr [rdi + 0xb0], 0
    iretq
tick_text: .ascii "tick "
fail_text: .ascii "timer\n"
digits: .ascii "0123456789abcdef"
idt_pointer:
    .word 0xfff
    .quad IDT
