# dirty64 - flat64 at 0x100000, one VCPU. Makes a known set of pages dirty, over and over. For dirty logs and restore.
#
# Parameters, read at the start; the test writes them before it runs the machine:
#   0x8000  quadword  pages to touch, not 0
#   0x8008  quadword  stride in bytes from one to the next, a multiple of 8
# In loop n, n from 1 on, it writes n to the first quadword of each, from 0x200000 up, then n's low byte to port 0x80.
# Nothing else is written: RBX is n. Self-check: each quadword still holds n - 1 (0 before the first loop); if not,
# "page" on port 0xe9 with RDI at it, and exit 1.

.intel_syntax noprefix
.code64
.set PAGES, 0x8000
.set STRIDE, 0x8008
.set FIRST, 0x200000

.globl _start
_start:
    mov rsi, [PAGES]
    mov rdx, [STRIDE]
    xor ebx, ebx
again:
    inc rbx
    mov edi, FIRST
    mov rcx, rsi
    lea rbp, [rbx - 1]
touch:
    cmp [rdi], rbp
    jne fail
    mov [rdi], rbx
    add rdi, rdx
    dec rcx
    jnz touch
    mov al, bl
    out 0x80, al
    jmp again
fail:
    .irp letter, 'p', 'a', 'g', 'e', 10
    mov al, \letter
    out 0xe9, al
    .endr
    mov al, 1
    out 0xf4, al
    hlt
