# hello16 - boot sector (512 bytes, 0x55aa at its end) at 0x7c00, real mode, one VCPU.
#
# Prints "hello from 0x7c00" on port 0xe9 and exits with 0. Self-check: it runs at 0000:7c00, or exits with 1.

.intel_syntax noprefix
.code16
.globl _start
_start:
    cli
    cld
    call 1f
1:  pop bx
    mov dl, 1
    cmp bx, offset 1b
    jne end
    mov ax, cs
    test ax, ax
    jnz end
    mov ds, ax
    mov si, offset text
2:  lodsb
    test al, al
    jz 3f
    out 0xe9, al
    jmp 2b
3:  xor dl, dl
end:
    mov al, dl
    out 0xf4, al
    hlt
text: .asciz "hello from 0x7c00\n"
    .org 510
    .word 0xaa55
