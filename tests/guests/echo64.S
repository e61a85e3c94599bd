# echo64 - flat64 at 0x100000, one VCPU. For the UART's receive interrupt: IRQ 4, 8259, LINT0 in virtual wire mode.
#
# Prints "ready\n" on COM1, then sends back what it receives, lower-case letters as capitals. 4 (ctrl-d) exits with 0.
# Halted in between. Self-check: a byte lost for want of room (overrun) exits with 1. An interrupt that finds no byte is
# nothing wrong: the one before read what came while it was being served.

.intel_syntax noprefix
.code64
.set COM1, 0x3f8
.set LAPIC, 0xfee00000
.set VECTOR, 0x24
.set IDT, 0x180000

.globl _start
_start:
    lea rax, [rip + received]
    mov edi, IDT + VECTOR * 16
    mov [rdi], ax
    mov word ptr [rdi + 2], 0x18
    mov word ptr [rdi + 4], 0x8e00
    shr eax, 16
    mov [rdi + 6], rax
    lidt [rip + idt_pointer]
    mov edi, LAPIC
    mov dword ptr [rdi + 0xf0], 0x1ff
    mov dword ptr [rdi + 0x350], 0x700  # LINT0: ExtINT
    lea rsi, [rip + setup]
1:  mov dx, [rsi]
    mov al, [rsi + 2]
    out dx, al
    add rsi, 3
    lea rax, [rip + ready]
    cmp rsi, rax
    jb 1b
2:  lodsb
    mov edx, COM1
    out dx, al
    cmp al, 10
    jne 2b
3:  sti
    hlt
    jmp 3b

received:
    mov edx, COM1 + 5
    in al, dx
    mov bl, al
    and bl, 2                           # overrun
    jnz exit
    test al, 1
    jz 3f
    mov edx, COM1
    in al, dx
    cmp al, 4
    je exit
    cmp al, 'a'
    jb 2f
    cmp al, 'z'
    ja 2f
    sub al, 32
2:  out dx, al
    jmp received
3:  mov al, 0x20
    out 0x20, al
    iretq
exit:
    mov al, bl
    out 0xf4, al
    hlt

setup:                                  # port, value: 8259s, all masked but IRQ 4; UART with FIFOs, OUT2, receive interrupt
    .irp setup, 0x2011, 0x2120, 0x2104, 0x2101, 0xa011, 0xa128, 0xa102, 0xa101, 0x21ef, 0xa1ff
    .word \setup >> 8
    .byte \setup & 0xff
    .endr
    .irp setup, 0x180, 0x001, 0x100, 0x303, 0x207, 0x40b, 0x101
    .word COM1 + (\setup >> 8)
    .byte \setup & 0xff
    .endr
ready: .ascii "ready\n"
idt_pointer:
    .word 0xfff
    .quad IDT
