# registers - a 64 KiB firmware image that brings the processor into one of several states, with known values in every
# register, and stays there. The byte at 8 says which; the places where it stays are fixed, at the end.
#
#   0 real mode            3 32-bit code in long mode          6 HLT in 64-bit mode, interrupts off
#   1 32-bit, no paging    4 64-bit, CPL3, x87 and SSE         7 APs started by INIT and SIPI, in real mode
#   2 64-bit, CPL0         5 as 4, with XCR0 (its low byte) from the byte at 9; the byte at 10: load 1 YMM, 2 also ZMM
#
# RAM used: page tables at 0x1000-0x3fff, descriptors at 0x6000, TSS at 0x6800, stack below 0x8000.

.intel_syntax noprefix
.set BASE, 0xf0000
.set TABLES, 0x6000
.set TSS, 0x6800
.set STACK, 0x8000
.set CODE32, 0x08
.set DATA, 0x10
.set CODE64, 0x18
.set USER_DATA, 0x20 | 3
.set USER_CODE, 0x28 | 3
.set DOWN16, 0x30
.set READ_ONLY, 0x38
.set LDT, 0x40
.set TASK, 0x50
.set FLAGS, 0xcd7                       # DF OF SF ZF AF PF CF, not IF

.macro known size
    mov \size\()ax, 0xa1a2a3a4
    mov \size\()bx, 0xb1b2b3b4
    mov \size\()cx, 0xc1c2c3c4
    mov \size\()dx, 0xd1d2d3d4
    mov \size\()si, 0x51525354
    mov \size\()di, 0x61626364
    mov \size\()bp, 0x71727374
.endm
.macro known64
1000:
    .irp register, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
    movabs \register, 0x1122334455667788 + (. - 1000b) * 0x100000001
    .endr
.endm
.macro far_jump selector, target         # with a 32-bit offset in 16-bit code
    .byte 0x66, 0xea
    .long \target
    .word \selector
.endm

.globl _start
.code16
_start:                                 # the page that the SIPI names
    jmp ap
.org 8
stage: .byte 0
xcr0: .byte 7
wide: .byte 0

start:
    cli
    cs cmp byte ptr [stage - BASE], 0
    jne leave_real
    xor ax, ax
    mov ss, ax
    mov sp, STACK
    mov ax, 0x1234
    mov ds, ax
    mov ax, 0x2345
    mov es, ax
    mov ax, 0x3456
    mov fs, ax
    mov ax, 0x4567
    mov gs, ax
    pushw FLAGS
    popfw
    known e
    jmp spin16

ap: cli
    mov ax, 0x5678
    mov ds, ax
    known e
    jmp spin16

leave_real:
    mov ax, 0xf000
    mov ds, ax
    xor ax, ax
    mov es, ax
    mov ss, ax
    mov esp, STACK
    cld
    mov si, offset descriptors - BASE
    mov di, TABLES
    mov cx, descriptors_end - descriptors
    rep movsb
    lgdt [gdtr - BASE]
    lidt [idtr - BASE]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    far_jump CODE32, protected

.code32
protected:
    mov ax, DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov al, [stage]
    cmp al, 7
    je start_ap
    mov ax, TASK
    ltr ax
    mov ax, LDT
    lldt ax
    mov eax, 0x11223344
    mov dr0, eax
    mov eax, 0x22334455
    mov dr1, eax
    mov eax, 0x33445566
    mov dr2, eax
    mov eax, 0x44556677
    mov dr3, eax
    mov eax, 0xffff4ff0                 # BS
    mov dr6, eax
    mov eax, 0x000f0400                 # lengths and kinds, none enabled
    mov dr7, eax
    mov eax, 0x00abcdef
    mov cr2, eax
    mov al, [stage]
    cmp al, 1
    jne to_long
    mov eax, 0x00005018                 # PWT and PCD too
    mov cr3, eax
    mov eax, 0x608                      # OSXMMEXCPT OSFXSR DE
    mov cr4, eax
known32:
    mov ax, DOWN16
    mov es, ax
    mov ax, READ_ONLY
    mov fs, ax
    xor ax, ax
    mov gs, ax
    push FLAGS
    popfd
    known e
    jmp spin32

start_ap:                               # the three messages of SDM vol. 3, 9.4.4; the AP's state tells if they came
    mov dword ptr [0xfee000f0], 0x1ff
    mov dword ptr [0xfee00300], 0xc4500 # to all but this one
    mov ecx, 100000
1:  dec ecx
    jnz 1b
    mov dword ptr [0xfee00300], 0xc46f0
    jmp known32

to_long:
    mov dword ptr [0x1000], 0x2007      # user pages too
    mov dword ptr [0x2000], 0x3007
    mov dword ptr [0x3000], 0xe7        # 2 MiB, accessed and dirty
    mov eax, 0x1000
    mov cr3, eax
    mov eax, 0x628                      # OSXMMEXCPT OSFXSR PAE DE
    mov cr4, eax
    mov ecx, 0xc0000080
    mov eax, 0x901                      # NXE LME SCE
    xor edx, edx
    wrmsr
    mov eax, cr0
    and eax, 0x9fffffff                 # caches on
    or eax, 0x80010000                  # PG WP
    mov cr0, eax
    mov al, [stage]
    cmp al, 3
    je known32
    .byte 0xea
    .long long_mode
    .word CODE64

.code64
long_mode:
    mov ecx, 0xc0000100                 # FS_BASE
    mov eax, 0x11112222
    mov edx, 0x00003333
    wrmsr
    inc ecx                             # GS_BASE
    mov edx, 0xffff8888
    wrmsr
    xor eax, eax
    mov ds, eax
    mov es, eax
    movabs rax, 0x0000123456789abc
    mov cr2, rax
    mov al, [stage]
    cmp al, 4
    jae user
    push FLAGS
    popfq
    known64
    jmp spin64

user:
    cmp al, 6
    je halt
    cmp al, 5
    jne 1f
    mov rax, cr4
    or eax, 0x40000                     # OSXSAVE
    mov cr4, rax
    movzx eax, byte ptr [xcr0]
    xor ecx, ecx
    xor edx, edx
    xsetbv
1:  push USER_DATA
    push STACK
    push 2
    push USER_CODE
    push offset at_cpl3
    iretq

at_cpl3:
    fninit
    fldpi
    fld1
    fldl2e
    ldmxcsr [mxcsr]
    lea rsi, [rip + vectors]
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movdqu xmm\number, [rsi + \number]
    .endr
    cmp byte ptr [wide], 1
    jb 2f
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu ymm\number, [rsi + \number]
    .endr
    je 2f
    .irp number, 0, 7, 15, 16, 23, 31
    vmovdqu64 zmm\number, [rsi + 2 * \number]
    .endr
    mov eax, 0x1234
    kmovw k1, eax
    kmovw k7, eax
2:  push 0xcd5
    popfq
    known64
    jmp spin64

halt:
    known64
    jmp halt64

.align 16
descriptors:                            # accessed, and the data the TSS and LDT need
    .quad 0
    .quad 0x00cf9b000000ffff            # CODE32
    .quad 0x00cf93000000ffff            # DATA
    .quad 0x00af9b000000ffff            # CODE64
    .quad 0x00cff3000000ffff            # USER_DATA
    .quad 0x00affb000000ffff            # USER_CODE
    .quad 0x0000970000000fff            # DOWN16: expand-down, 16-bit
    .quad 0x0010b10000001234            # READ_ONLY: DPL 1, AVL, 16-bit, base 0
    .quad 0x0000e20070000fff, 0         # LDT: DPL 3, base 0x7000; in 64-bit mode 16 bytes
    .quad 0x0000890068000067, 0         # TASK
descriptors_end:
gdtr:
    .word descriptors_end - descriptors - 1
    .long TABLES
idtr:
    .word 0x7ff
    .long 0x7800
mxcsr: .long 0x3f80                     # rounding down
vectors:
    .irp value, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    .quad 0x0f1e2d3c4b5a6978 * (2 * \value + 1)
    .endr

.org 0xff00
.code16
spin16: jmp spin16
.org 0xff10
.code32
spin32: jmp spin32
.org 0xff20
.code64
spin64: jmp spin64
.org 0xff30
halt64: hlt
    jmp halt64
.org 0xfff0
.code16
    .byte 0xea                          # the reset vector
    .word start - BASE
    .word 0xf000
.org 0x10000
