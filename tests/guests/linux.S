# linux - the protected-mode part of a bzImage (position-independent), entered at its first byte in 32-bit mode or at 0x200
# in 64-bit mode, one VCPU.
#
# Checks what the boot protocol promises at entry, prints the command line, a newline and the initrd on port 0xe9, and exits
# with the end of the RAM that begins at 1 MiB, in MiB. Self-checks, in this order, each with its exit code if it fails:
# 0x101 segments, 0x102 they can be loaded again, 0x103 interrupts off, 0x104 the setup header in boot_params, 0x105 the type
# of loader, 0x106 RSDP, 0x107 there is RAM at 1 MiB.

.intel_syntax noprefix

.macro entered bits
    mov ax, cs
    mov ebx, 0x101
    cmp ax, 0x10
    jne fail\bits
    mov ax, ds
    cmp ax, 0x18
    jne fail\bits
    mov ax, es
    cmp ax, 0x18
    jne fail\bits
    mov ax, ss
    cmp ax, 0x18
    jne fail\bits

    mov ds, ax
    mov es, ax
    mov ss, ax
.if \bits == 64
    lea rax, [rip + 2f]
    push 0x10
    push rax
    retfq
.else
    call 1f
1:  pop eax
    add eax, offset 2f - 1b
    push 0x10
    push eax
    retf
.endif
2:  mov ax, cs
    mov ebx, 0x102
    cmp ax, 0x10
    jne fail\bits

    mov ebx, 0x103
.if \bits == 64
    pushfq
    pop rax
.else
    pushfd
    pop eax
.endif
    test eax, 0x200
    jnz fail\bits

    mov edx, esi                        # boot_params
    mov ebx, 0x104
    cmp dword ptr [edx + 0x202], 0x53726448
    jne fail\bits
    mov ebx, 0x105
    cmp byte ptr [edx + 0x210], 0xff
    jne fail\bits

    mov ebx, 0x106
    mov eax, [edx + 0x70]
    cmp dword ptr [eax], 0x20445352     # "RSD "
    jne fail\bits
    cmp dword ptr [eax + 4], 0x20525450 # "PTR "
    jne fail\bits

    mov esi, [edx + 0x228]              # the command line
3:  mov al, [esi]
    add esi, 1
    test al, al
    jz 4f
    out 0xe9, al
    jmp 3b
4:  mov al, 10
    out 0xe9, al

    mov esi, [edx + 0x218]              # the initrd
    mov ecx, [edx + 0x21c]
5:  test ecx, ecx
    jz 6f
    mov al, [esi]
    out 0xe9, al
    add esi, 1
    sub ecx, 1
    jmp 5b

6:  movzx ecx, byte ptr [edx + 0x1e8]   # the memory map
    lea esi, [edx + 0x2d0]
7:  mov ebx, 0x107
    test ecx, ecx
    jz fail\bits
    cmp dword ptr [esi], 0x100000
    jne 8f
    cmp dword ptr [esi + 4], 0
    jne 8f
    cmp dword ptr [esi + 16], 1
    jne 8f
    mov ebx, [esi + 8]
    add ebx, 0x100000
    shr ebx, 20
    jmp fail\bits
8:  add esi, 20
    sub ecx, 1
    jmp 7b

fail\bits:
    mov eax, ebx
    out 0xf4, eax
    hlt
    jmp fail\bits
.endm

.globl _start
_start:
.code32
    entered 32
    .org 0x200
.code64
    entered 64
