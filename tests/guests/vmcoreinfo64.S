# vmcoreinfo64 - flat64 at 0x100000, one VCPU. Offers its VMCOREINFO through fw_cfg as Linux's driver does.
#
# Looks for the signature and the DMA feature through the data port, reads the file directory by DMA, and writes where
# its note is into etc/vmcoreinfo by DMA. Exits with 0, or with the number of the check that failed.

.intel_syntax noprefix
.code64
.set SELECTOR, 0x510
.set DATA, 0x511
.set DMA_HIGH, 0x514
.set DMA_LOW, 0x518
.set EXIT, 0xf4
.set DIRECTORY, 0x180000
.set ENTRY, 64
.set READ_DIRECTORY, 0x19000a           # select, read
.set WRITE_SELECTED, 0x18               # select, write

.globl _start
_start:
    mov esp, 0x90000
    mov ebx, 1                          # the signature
    xor eax, eax
    call item
    cmp eax, 0x554d4551                 # "QEMU"
    jne failed
    inc ebx                             # DMA
    mov eax, 1
    call item
    test al, 2
    jz failed

    inc ebx                             # the directory: how many, then all of them
    mov eax, READ_DIRECTORY
    mov ecx, 4
    mov edi, DIRECTORY
    call dma
    mov ecx, [DIRECTORY]
    bswap ecx
    jecxz failed
    mov ebp, ecx
    shl ecx, 6
    add ecx, 4
    mov eax, READ_DIRECTORY
    call dma

    inc ebx                             # the file: 16 bytes long
    mov edx, DIRECTORY + 4
find:
    lea rsi, [rdx + 8]
    lea rdi, [rip + file]
    mov ecx, offset file_end - file
    repe cmpsb
    je found
    add edx, ENTRY
    dec ebp
    jnz find
    jmp failed
found:
    cmp dword ptr [rdx], 0x10000000
    jne failed

    inc ebx                             # the offer
    movzx eax, word ptr [rdx + 4]
    xchg al, ah
    shl eax, 16
    or eax, WRITE_SELECTED
    mov ecx, 16
    lea rdi, [rip + offer]
    lea rdx, [rip + note]
    mov [rdi + 8], rdx
    call dma
    xor ebx, ebx
failed:
    mov al, bl
    out EXIT, al
1:  hlt
    jmp 1b

item:                                   # EAX: the first four bytes of item AX
    mov edx, SELECTOR
    out dx, ax
    inc edx
    mov ecx, 4
1:  in al, dx
    ror eax, 8
    dec ecx
    jnz 1b
    ret

dma:                                    # control EAX, ECX bytes at RDI; to failed on an error
    lea rsi, [rip + descriptor]
    bswap eax
    bswap ecx
    mov [rsi], eax
    mov [rsi + 4], ecx
    mov rax, rdi
    bswap rax
    mov [rsi + 8], rax
    mov rax, rsi
    shr rax, 32
    bswap eax
    mov edx, DMA_HIGH
    out dx, eax
    mov eax, esi
    bswap eax
    mov edx, DMA_LOW
    out dx, eax
1:  mov eax, [rsi]
    bswap eax
    test eax, 0xfffffffe
    jnz 1b
    test al, al
    jz 2f
    pop rax
    jmp failed
2:  ret

.balign 8
descriptor: .zero 16
offer:                                  # host's format, guest's format (ELF), size, address
    .word 0, 1
    .long note_end - note
    .quad 0
file: .asciz "etc/vmcoreinfo"
file_end:
.balign 4
note:                                   # what debuggers want to know first; symbols that there would be
    .long 11, text_end - text, 0
    .asciz "VMCOREINFO"
    .balign 4
text:
    .ascii "OSRELEASE=6.18.0-vmdeck\n"
    .ascii "PAGESIZE=4096\n"
    .ascii "SYMBOL(init_uts_ns)=ffffffff82a1a900\n"
    .ascii "SYMBOL(_stext)=ffffffff81000000\n"
    .ascii "SYMBOL(swapper_pg_dir)=ffffffff82a0a000\n"
    .ascii "NUMBER(phys_base)=0\n"
    .ascii "NUMBER(pgtable_l5_enabled)=0\n"
    .ascii "KERNELOFFSET=0\n"
text_end:
    .balign 4
note_end:
    .zero 64
