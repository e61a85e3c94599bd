# smp64 - flat64 at 0x100000, any number of VCPUs up to 32. For INIT and SIPI.
#
# VCPU 0 sends INIT, SIPI, SIPI to all others; each counts itself in at 0x8ff8 (lock xadd), notes the APIC id that its
# CPUID reports in the bits at 0x8ffc, and halts in real mode. VCPU 0 waits for as many as CPUID leaf 1 counts, prints a
# digit or letter for their number on port 0xe9 ("4\n" for four VCPUs) and exits with 0.
# Self-check: every id from 1 on answered, and as many as counted; if not, exit 1.

.intel_syntax noprefix
.set TRAMPOLINE, 0x8000
.set COUNT, 0x8ff8
.set IDS, 0x8ffc
.set ICR, 0xfee00300

.code64
.globl _start
_start:
    cld
    mov qword ptr [COUNT], 0
    lea rsi, [rip + ap_start]
    mov edi, TRAMPOLINE
    mov ecx, ap_end - ap_start
    rep movsb
    mov eax, 1
    cpuid
    mov r8d, 1                          # VCPUs
    bt edx, 28                          # HTT: EBX[23:16] counts
    jnc 1f
    shr ebx, 16
    movzx r8d, bl
1:  mov edi, ICR
    mov dword ptr [rdi + 0x10], 0
    mov dword ptr [rdi], 0xc4500        # to all but this one: INIT, SIPI, SIPI
    mov dword ptr [rdi], 0xc4608
    mov dword ptr [rdi], 0xc4608
2:  pause
    mov eax, [COUNT]
    inc eax
    cmp eax, r8d
    jb 2b
    mov eax, [COUNT]
    inc eax
    mov bl, 1
    cmp eax, r8d
    jne 3f
    mov ecx, r8d
    mov edx, 1
    shl rdx, cl
    sub edx, 2                          # bits 1 to VCPUs - 1
    cmp edx, [IDS]
    jne 3f
    xor ebx, ebx
3:  mov al, [digits + rax]
    out 0xe9, al
    mov al, 10
    out 0xe9, al
    mov al, bl
    out 0xf4, al
    hlt
digits: .ascii "0123456789abcdefghijklmnopqrstuvw"

.code16
ap_start:
    cli
    xor ax, ax
    mov ds, ax
    mov eax, 1
    cpuid
    shr ebx, 24
    lock bts dword ptr [IDS], ebx
    mov eax, 1
    lock xadd dword ptr [COUNT], eax
1:  hlt
    jmp 1b
ap_end:
