# parser64 - flat64 at 0x100000, one VCPU. What a fuzzer fuzzes: a parser of records, with a bug.
#
# When it's ready it writes READY to isa-debug-exit: there a checkpoint is taken. The input lies at 0x8000, a quadword of
# length, then so many bytes, at most 2,000. A record is its type, its length (a byte) and so many bytes:
#   'N'  a name, copied to a buffer of 16 bytes on the stack; longer ones are refused
#   'S'  numbers, a byte each, whose sum is kept
# Ends with exit code OK and the sum in the quadword at 0x9000, with REFUSED where a record isn't one of these.
# The bug: the name's length is compared as a signed byte. From 128 on it goes on, over the return address.

.intel_syntax noprefix
.code64
.set INPUT, 0x8000
.set SUM, 0x9000
.set EXIT, 0xf4
.set READY, 0x52
.set OK, 0
.set REFUSED, 1

.globl _start
_start:
    mov esp, 0x90000
    mov al, READY
    out EXIT, al
    mov rbp, [INPUT]
    mov esi, INPUT + 8
    add rbp, rsi                        # the input's end
    xor ebx, ebx
record:
    cmp rsi, rbp
    jae done
    movzx eax, word ptr [rsi]
    add rsi, 2
    movzx ecx, ah
    lea rdx, [rsi + rcx]
    cmp rdx, rbp
    ja refused
    cmp al, 'S'
    je numbers
    cmp al, 'N'
    jne refused
    call name
    jc refused
    jmp record
numbers:
    jecxz record
    movzx eax, byte ptr [rsi]
    add rbx, rax
    inc rsi
    dec ecx
    jmp numbers
done:
    mov [SUM], rbx
    mov al, OK
    out EXIT, al
    hlt
refused:
    mov al, REFUSED
    out EXIT, al
    hlt

name:                                   # ECX bytes at RSI; carry: refused
    sub rsp, 16
    cmp cl, 16
    jg 1f                               # ja it should be
    mov rdi, rsp
    rep movsb
    add rsp, 16
    clc
    ret
1:  add rsp, 16
    stc
    ret
