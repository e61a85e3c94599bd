# The demo guest: a kernel that keeps every VCPU visibly busy, knows what its own state should be, and says when it isn't.
#
# Multiboot 1, ELF32, at 1 MiB; needs 2 MiB of RAM, a local APIC, the 8259s and COM1. The README says how to rebuild it.
#
# VCPU n is the one with local APIC id n. VCPU 0 runs the rounds and the serial monitor, and alone writes to the serial
# port. In a round every VCPU repeats its unit of work, by n mod 4, until VCPU 0's timer ticks, checks itself, and
# halts until the next round; then VCPU 0 prints one line. What it prints depends on the round's number and the number
# of VCPUs only, so that a machine taken back to a snapshot prints the same again.
#
#   n mod 4  unit          CPL  result
#   0        unit_primes   0    how many primes are below 1000 + 64 * (round mod 16): a sieve
#   1        user_sum      3    the sum over this VCPU's data page from word 2 * (round mod 16) on
#   2        unit_fib      0    fib(10 + round mod 4), by recursion
#   3        unit_lock     0    32 times through the critical section that all VCPUs share
#
# At CPL 0 only what KVM's instruction emulator knows: no SSE or x87 arithmetic, popcnt, cmpxchg16b, int n, rdtscp.
# R12-R15 hold their own number in every byte but the lowest, which is the VCPU's, for ever. XMM8-XMM15: own number, VCPU.

.intel_syntax noprefix

# -- numbers ----------------------------------------------------------------------------------------------------------
.set MAX_CPUS, 32
.set COM1, 0x3f8
.set LAPIC, 0xfee00000
.set TRAMPOLINE, 0x8000                 # where APs start: SIPI vector 8, real mode
.set CODE64, 0x08
.set DATA, 0x10
.set CODE32, 0x18
.set USER_DATA, 0x23
.set USER_CODE, 0x2b
.set TSS, 0x30                         # VCPU n's is TSS + 16 n
.set VECTOR_UART, 0x24                  # IRQ 4
.set VECTOR_TIMER, 0x30
.set VECTOR_WAKE, 0x31
.set VECTOR_SPURIOUS, 0xff
.set TICK, 6250000                      # 100 ms: the local APIC timer of KVM and QEMU counts 1 GHz / 16
.set USER_EXIT, 0xc0ffee0000            # CPL 3 leaves by a page fault at this address
.set STACK_STRIDE, 0x3000               # a guard page, two pages of stack
.set CANARY, 0x5afe57ac4b000000         # "safe stack": below every stack
.set FRAME, 0xf4a3ef4a3ef4a3e0          # "frame": in every frame of the recursion
.set DATA_FIRST, 0xda7ada7ada7a0000     # the data page is an arithmetic progression
.set DATA_STEP, 0x100000001
.set LOCKS_A_UNIT, 32
.set DOOR, 0x10000                      # in cpus_joined: VCPU 0 has stopped counting, latecomers park
.set LINE_SIZE, 64

.set ABSENT, 0                          # CPU_STATE
.set IDLE, 1
.set WORKING, 2
.set CRASHED, 3

.set MODE_WORK, 0
.set MODE_CHECK, 1

# A VCPU's own page, at GS base.
.struct 0
CPU_SELF:       .quad 0                 # this page's address
CPU_ID:         .quad 0
CPU_STATE:      .quad 0
CPU_ROUNDS:     .quad 0                 # rounds worked
CPU_SEQUENCE:   .quad 0                 # the last release seen
CPU_TICKS:      .quad 0
CPU_TICKS_SEEN: .quad 0
CPU_TICKLESS:   .quad 0                 # rounds in a row without a tick
CPU_TSC:        .quad 0
CPU_NMIS:       .quad 0
CPU_ORDER:      .quad 0                 # do this at the start of the next round: an index into orders
CPU_UNITS:      .quad 0                 # units done in this round
CPU_RESULT:     .quad 0
CPU_FIXUP:      .quad 0                 # a fault at CPL 0 goes on here, if not 0
CPU_CHECKS:     .quad 0                 # checks made by the last run_checks
CPU_REPAIR:     .quad 0                 # a check has failed: write the patterns again
CPU_DATA:       .quad 0                 # the data page that CPL 3 reads, or the sieve
CPU_FAILURES:   .quad 0
CPU_FAILURE:    .skip 8 * 24            # name, expected, got
CPU_CRASH:      .skip 4 * 8             # vector, error code, RIP, CR2
CPU_REPORTED:   .quad 0
CPU_TSS:        .skip 104
.balign 16
CPU_XMM:        .skip 8 * 16            # what XMM8-XMM15 hold
CPU_SCRATCH:    .skip 16
CPU_FIELDS_END:
.set CPU_PAGE, 4096                     # the rest of it: IST stacks for NMI (from 3072 down) and #DF (from 4096 down)
.set TSS_RSP0, CPU_TSS + 4

# -- macros -----------------------------------------------------------------------------------------------------------
.macro FUNCTION name
    .globl \name
    .type \name, @function
\name:
.endm

.macro POST code
    mov al, \code
    out 0x80, al
.endm

.macro SAY text:vararg
    .pushsection .text, 1
.Lsay\@:
    .asciz \text
    .popsection
    lea rsi, [rip + .Lsay\@]
    call put_string
.endm

.macro CHECK name, function
    .pushsection .text, 1
.Lname\@:
    .asciz "\name"
    .popsection
    .long .Lname\@, \function
.endm

.macro MSR_CHECK name, index, value, own
    .pushsection .text, 1
.Lname\@:
    .asciz "\name"
    .popsection
    .long .Lname\@, \index
    .quad \value, \own
.endm

.macro COMMAND name, function, help
    .pushsection .text, 1
.Lname\@:
    .asciz "\name"
.Lhelp\@:
    .asciz "\help"
    .popsection
    .long .Lname\@, .Lhelp\@, \function
.endm

# -- 32-bit entry: page tables, then long mode ----------------------------------------------------------------------
.text 0
.code32
text_start:
    .balign 4
    .long 0x1badb002, 3, -(0x1badb002 + 3)

FUNCTION _start
    cli
    cld
    lgdt [gdt_pointer]
    POST 0x01
    # Everything starts from zero, whether or not a reset loaded the image again.
    mov edi, offset variables
    mov ecx, (variables_end - variables) / 4
    xor eax, eax
    rep stosd
    mov edx, offset cpu_pages
1:  mov edi, edx
    mov ecx, CPU_FIELDS_END / 4
    rep stosd
    add edx, CPU_PAGE
    cmp edx, offset cpu_pages + MAX_CPUS * CPU_PAGE
    jb 1b

FUNCTION build_page_tables              # 0-4 GiB identity-mapped; the first 2 MiB in 4 KiB pages
    mov edi, offset page_directories    # 2 MiB each, uncached from 0xfe000000 on
    mov eax, 0x83
    mov ecx, 2048
1:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add eax, 0x200000
    cmp eax, 0xfe000083
    jne 2f
    or eax, 0x10
2:  add edi, 8
    dec ecx
    jnz 1b
    mov dword ptr [page_directories], offset page_table + 7
    mov edi, offset pdpt
    mov eax, offset page_directories + 7
    mov ecx, 4
3:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add eax, 4096
    add edi, 8
    dec ecx
    jnz 3b
    mov edi, offset pml4
    mov ecx, 1024
    xor eax, eax
    rep stosd
    mov dword ptr [pml4], offset pdpt + 7
    mov esi, offset page_ranges
4:  mov eax, [esi]                      # from, to, flags
    mov edi, eax
    shr edi, 9
    add edi, offset page_table
    or eax, [esi + 8]
5:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add edi, 8
    add eax, 4096
    cmp eax, [esi + 4]
    jb 5b
    add esi, 12
    cmp esi, offset page_ranges_end
    jb 4b
    mov edi, offset stacks              # a guard page below each stack
    mov ecx, MAX_CPUS
6:  mov eax, edi
    shr eax, 9
    mov dword ptr [page_table + eax], 0
    add edi, STACK_STRIDE
    dec ecx
    jnz 6b

    mov esi, offset ap_start
    mov edi, TRAMPOLINE
    mov ecx, ap_start_end - ap_start
    rep movsb
    POST 0x02
    mov ebp, 1                          # this is the bootstrap processor
    jmp enter_long_mode

FUNCTION ap_entry32
    xor ebp, ebp
enter_long_mode:
    mov ax, DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, 0x100                      # EFER.LME
    xor edx, edx
    wrmsr
    mov eax, 0x80010033                 # PG, WP, NE, ET, MP, PE; caches on
    mov cr0, eax
    .byte 0xea                          # jmp CODE64:cpu_entry
    .long cpu_entry
    .word CODE64

.code16
ap_start:                               # copied to TRAMPOLINE
    cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x66                          # all 32 bits of the base
    lgdt [TRAMPOLINE + ap_gdt_pointer - ap_start]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                    # jmp CODE32:ap_entry32
    .long ap_entry32
    .word CODE32
    .balign 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_start_end:

# -- every VCPU's way up ----------------------------------------------------------------------------------------------
.code64
FUNCTION cpu_entry
    mov eax, LAPIC + 0x20
    mov ebx, [rax]
    shr ebx, 24
    cmp ebx, MAX_CPUS
    jae park
    imul esp, ebx, STACK_STRIDE
    add rsp, offset stacks + STACK_STRIDE
    call init_cpu
    test ebp, ebp
    mov ebp, 0
    jnz boot

    mov eax, 1
    lock xadd [cpus_joined], eax
    cmp eax, DOOR
    jae park
    mov qword ptr gs:[CPU_STATE], IDLE

FUNCTION ap_loop
    cli                                 # STI's shadow covers HLT: a wake-up can't fall between the test and it
    mov rax, [sequence]
    cmp rax, gs:[CPU_SEQUENCE]
    jne 1f
    sti
    hlt
    jmp ap_loop
1:  sti
    mov gs:[CPU_SEQUENCE], rax
    call work_a_round
    call arrive
    jmp ap_loop

FUNCTION park                           # too many VCPUs, or too late
    cli
    hlt
    jmp park

FUNCTION arrive                         # the last one wakes VCPU 0
    mov eax, 1
    lock xadd [arrived], eax
    inc eax
    cmp eax, [active]
    jne 1f
    mov edx, LAPIC
    mov dword ptr [rdx + 0x310], 0
    mov dword ptr [rdx + 0x300], 0x4000 + VECTOR_WAKE
1:  ret

FUNCTION init_cpu                       # EBX: its number
    mov esi, ebx
    shl esi, 12
    add rsi, offset cpu_pages
    mov [rsi + CPU_SELF], rsi
    mov [rsi + CPU_ID], rbx
    lea rax, [rsi + CPU_PAGE]
    mov [rsi + CPU_TSS + 0x24], rax     # IST1: #DF
    sub rax, 1024
    mov [rsi + CPU_TSS + 0x2c], rax     # IST2: NMI
    mov word ptr [rsi + CPU_TSS + 0x66], 104

    lea rdx, [rsi + CPU_TSS]            # the TSS descriptor, available
    mov eax, edx
    and eax, 0xffffff
    shl rax, 16
    mov ecx, edx
    shr ecx, 24
    shl rcx, 56
    or rax, rcx
    movabs rcx, 0x0000890000000067
    or rax, rcx
    mov ecx, ebx
    shl ecx, 4
    mov [gdt + TSS + rcx], rax
    mov qword ptr [gdt + TSS + 8 + rcx], 0

    mov ax, USER_DATA                   # what CPL 3 may keep: IRET would clear a CPL 0 selector
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    mov ax, DATA
    mov ss, ax
    mov ecx, 0xc0000101                 # GS base
    mov rax, rsi
    xor edx, edx
    wrmsr
    test ebx, ebx
    jnz 1f
    call build_idt
1:  lidt [idt_pointer]
    mov eax, ebx
    shl eax, 4
    add eax, TSS
    ltr ax

    mov edi, ebx
    shl edi, 12
    add rdi, offset user_data
    mov gs:[CPU_DATA], rdi
    mov eax, ebx
    and eax, 3
    cmp eax, 1
    jne 3f
    movabs rax, DATA_FIRST
    movabs rdx, DATA_STEP
    mov ecx, 512
2:  mov [rdi], rax
    add rax, rdx
    add rdi, 8
    dec ecx
    jnz 2b
3:  call arm_state
    jmp arm_lapic

FUNCTION build_idt
    mov edi, offset idt
    mov r8d, offset exceptions
    xor ecx, ecx
1:  mov eax, r8d
    xor edx, edx                        # IST
    cmp ecx, 2
    jne 2f
    mov edx, 2
2:  cmp ecx, 8
    jne 3f
    mov edx, 1
3:  cmp ecx, 32
    jb 4f
    mov eax, offset unexpected_interrupt
4:  call set_gate
    add r8d, 16
    inc ecx
    cmp ecx, 256
    jb 1b
    xor edx, edx
    mov ecx, VECTOR_UART
    mov eax, offset uart_interrupt
    call set_gate
    mov ecx, VECTOR_TIMER
    mov eax, offset timer_interrupt
    call set_gate
    mov ecx, VECTOR_WAKE
    mov eax, offset wake_interrupt
    call set_gate
    mov ecx, VECTOR_SPURIOUS
    mov eax, offset spurious_interrupt
    call set_gate
    mov ecx, 0x27                       # the 8259s' own spurious interrupts
    call set_gate
    mov ecx, 0x2f

set_gate:                               # ECX: vector, EAX: handler, EDX: IST
    mov edi, ecx
    shl edi, 4
    add rdi, offset idt
    mov [rdi], ax
    mov word ptr [rdi + 2], CODE64
    mov [rdi + 4], dl
    mov byte ptr [rdi + 5], 0x8e
    mov r9d, eax
    shr r9d, 16
    mov [rdi + 6], r9w
    mov qword ptr [rdi + 8], 0
    ret

# -- VCPU 0: devices, the other VCPUs, rounds -------------------------------------------------------------------------
FUNCTION boot
    POST 0x03
    mov qword ptr gs:[CPU_STATE], IDLE
    mov dword ptr [quiet], 1
    mov esi, offset port_setup          # 8259s and UART
    xor edx, edx
1:  mov dx, [rsi]
    mov al, [rsi + 2]
    out dx, al
    add rsi, 3
    cmp rsi, offset port_setup_end
    jb 1b
    POST 0x04
    call start_aps
    POST 0x06
    sti

    mov esi, offset debug_banner
2:  lodsb
    out 0xe9, al
    cmp al, 10
    jne 2b
    mov byte ptr [printing], 1
    SAY "\r\nvmdeck demo: "
    mov eax, [cpus_online]
    call put_decimal
    SAY " cpus in long mode, work at CPL 0 and CPL 3\r\n"
    mov eax, [cpus_online]
    cmp eax, [cpus_expected]
    je 3f
    SAY "CPUID counts "
    mov eax, [cpus_expected]
    call put_decimal
    SAY "\r\n"
3:  SAY "Type help and Enter.\r\n> "
    call end_output
    POST 0x10

FUNCTION round_loop
    cli
    cmp byte ptr [line_ready], 0
    jne 1f
    cmp byte ptr [check_wanted], 0
    jne check_round
    cmp byte ptr [stopped], 0
    je 2f
1:  call wait_once
    jmp round_loop
2:  sti
    mov eax, MODE_WORK
    call run_round
    call print_round
    call report
    mov rbx, gs:[CPU_TICKS]             # a rest: rounds come at two ticks each, at most
3:  cli
    cmp gs:[CPU_TICKS], rbx
    jne 4f
    call wait_once
    jmp 3b
4:  sti
    jmp round_loop

check_round:
    sti
    mov byte ptr [check_wanted], 0
    mov eax, MODE_CHECK
    call run_round
    call report
    call begin_line
    SAY "checked "
    mov eax, [active]
    inc eax
    call put_decimal
    SAY " cpus, "
    mov rax, gs:[CPU_CHECKS]
    call put_decimal
    SAY " values each"
    call end_line
    jmp round_loop

FUNCTION wait_once                      # IF = 0 and nothing to do: a command, or HLT until an interrupt; IF = 1
    cmp byte ptr [line_ready], 0
    jne 1f
    sti
    hlt
    ret
1:  sti
    jmp run_command

FUNCTION run_round                      # EAX: MODE_...; back when every VCPU has arrived
    mov [mode], eax
    xor eax, eax
    mov [arrived], eax
    mov [lock_total], eax
    mov byte ptr [round_over], al
    mov byte ptr [cut_short], al
    mov r8d, 1                          # active VCPUs: all, the others, those of kind 3
    xor r9d, r9d
    mov ecx, 1
    mov edx, offset cpu_pages + CPU_PAGE
1:  cmp qword ptr [rdx + CPU_STATE], IDLE
    jne 2f
    inc r8d
    mov eax, ecx
    and eax, 3
    cmp eax, 3
    jne 2f
    inc r9d
2:  add edx, CPU_PAGE
    inc ecx
    cmp ecx, MAX_CPUS
    jb 1b
    imul r9d, r9d, LOCKS_A_UNIT
    add r9d, r8d
    mov [lock_expected], r9d
    dec r8d
    mov [active], r8d
    cmp dword ptr [mode], MODE_WORK
    jne 3f
    inc qword ptr [round_number]
3:  inc qword ptr [sequence]
    test r8d, r8d
    jz 4f
    mov edx, LAPIC                      # wake all but this one
    mov dword ptr [rdx + 0x310], 0
    mov dword ptr [rdx + 0x300], 0xc4000 + VECTOR_WAKE
4:  call work_a_round
5:  cli
    mov eax, [arrived]
    cmp eax, [active]
    je 6f
    call wait_once
    jmp 5b
6:  sti
    cmp dword ptr [mode], MODE_WORK
    jne 7f
    cmp byte ptr [cut_short], 0
    jne 7f
    mov eax, [lock_total]
    mov edx, [lock_expected]
    mov esi, offset name_lock_total
    call compare
7:  mov eax, [lock_word]
    xor edx, edx
    mov esi, offset name_lock_word
    jmp compare

FUNCTION start_aps
    POST 0x05
    mov eax, 1
    cpuid
    mov ecx, 1
    bt edx, 28                          # HTT: EBX[23:16] is the number of logical processors
    jnc 1f
    shr ebx, 16
    movzx ecx, bl
1:  mov [cpus_expected], ecx
    mov edi, LAPIC
    mov dword ptr [rdi + 0x310], 0
    mov dword ptr [rdi + 0x300], 0xc4500 # INIT, to all but this one
    call delay
    mov dword ptr [rdi + 0x300], 0xc4600 + TRAMPOLINE / 4096
    call delay
    mov dword ptr [rdi + 0x300], 0xc4600 + TRAMPOLINE / 4096
    # Who answers counts. Done a little after CPUID's number of them is here, or long after the last one came.
    xor r8d, r8d
2:  xor ecx, ecx
3:  pause
    mov eax, [rdi + 0x30]               # costs a microsecond or more on any hypervisor
    inc ecx
    mov eax, [cpus_joined]
    cmp eax, r8d
    mov r8d, eax
    jne 2b
    mov edx, 1 << 20
    inc eax
    cmp eax, [cpus_expected]
    jb 4f
    mov edx, 1 << 12
4:  cmp ecx, edx
    jb 3b
    mov eax, DOOR
    lock xadd [cpus_joined], eax
    inc eax
    mov [cpus_online], eax
5:  pause                               # those let in say so
    xor ecx, ecx
    mov edx, offset cpu_pages
6:  cmp qword ptr [rdx + CPU_STATE], IDLE
    sete al
    movzx eax, al
    add ecx, eax
    add edx, CPU_PAGE
    cmp edx, offset cpu_pages + MAX_CPUS * CPU_PAGE
    jb 6b
    cmp ecx, [cpus_online]
    jne 5b
    ret

FUNCTION delay
    mov ecx, 256
1:  mov eax, [rdi + 0x30]
    dec ecx
    jnz 1b
    ret

# -- a VCPU's part in a round -----------------------------------------------------------------------------------------
FUNCTION work_a_round
    push rbx
    mov qword ptr gs:[CPU_STATE], WORKING
    mov rax, gs:[CPU_ORDER]
    test rax, rax
    jz 1f
    mov qword ptr gs:[CPU_ORDER], 0
    call [orders + rax * 8 - 8]
1:  cmp dword ptr [mode], MODE_WORK
    jne 5f
    inc qword ptr gs:[CPU_ROUNDS]
    mov qword ptr gs:[CPU_UNITS], 0
    mov rbx, gs:[CPU_TICKS]
2:  mov ecx, gs:[CPU_ID]
    and ecx, 3
    mov rdi, [round_number]
    call [units + rcx * 8]
    mov gs:[CPU_RESULT], rax
    call check_result
    call check_patterns
    inc qword ptr gs:[CPU_UNITS]
    cmp qword ptr gs:[CPU_UNITS], 1
    jne 3f
    mov edi, offset lock_total          # once a round each
    call count_under_lock
3:  cmp qword ptr gs:[CPU_ID], 0
    jne 4f
    cmp gs:[CPU_TICKS], rbx             # VCPU 0's next tick ends the round
    je 2b
    mov byte ptr [round_over], 1
4:  cmp byte ptr [round_over], 0
    je 2b
5:  call run_checks
    mov qword ptr gs:[CPU_STATE], IDLE
    pop rbx
    ret

# RDI: the round's number; result in RAX.
FUNCTION unit_primes
    mov r8, rdi
    and r8d, 15
    shl r8d, 6
    add r8d, 1000                       # the limit
    mov rdi, gs:[CPU_DATA]
    mov rdx, rdi
    lea rcx, [r8 + 7]
    shr rcx, 3
    xor eax, eax
    rep stosq
    mov rdi, rdx
    mov esi, 2                          # the prime
1:  mov rax, rsi
    imul rax, rsi
    cmp rax, r8
    jae 4f
    cmp byte ptr [rdi + rsi], 0
    jne 3f
2:  mov byte ptr [rdi + rax], 1
    add rax, rsi
    cmp rax, r8
    jb 2b
3:  inc rsi
    jmp 1b
4:  mov esi, 2
    xor eax, eax
5:  cmp byte ptr [rdi + rsi], 1         # carry: not struck out
    adc rax, 0
    inc rsi
    cmp rsi, r8
    jb 5b
    ret

FUNCTION unit_sum
    mov esi, edi
    and esi, 15
    add esi, esi
    mov rdi, gs:[CPU_DATA]
    mov r8d, offset round_over
    mov eax, offset user_sum

enter_user:                             # EAX: where; comes back by USER_EXIT with user code's RAX
    push rbx
    push rbp
    mov ecx, gs:[CPU_ID]
    inc ecx
    shl ecx, 12
    add rcx, offset user_stacks
    mov gs:[TSS_RSP0], rsp
    push USER_DATA
    push rcx
    push 0x202
    push USER_CODE
    push rax
    iretq

user_exit:                              # from the page fault's handler: RAX
    mov rsp, gs:[TSS_RSP0]
    mov ecx, DATA                       # coming from CPL 3 made SS null
    mov ss, ecx
    sti
    pop rbp
    pop rbx
    ret

FUNCTION unit_fib
    and edi, 3
    add edi, 10
    movabs r10, FRAME
FUNCTION fib                            # fib(RDI), R10 = FRAME
    push rbp
    mov rbp, rsp
    push rbx
    push r10
    mov rax, rdi
    cmp rdi, 2
    jb 1f
    mov rbx, rdi
    lea rdi, [rbx - 1]
    call fib
    push rax
    lea rdi, [rbx - 2]
    call fib
    pop rdx
    add rax, rdx
1:  pop rdx
    cmp rdx, r10
    jne 2f
    pop rbx
    pop rbp
    ret
2:  push rax
    mov rax, rdx
    mov rdx, r10
    mov esi, offset name_frame
    call compare
    pop rax
    pop rbx
    pop rbp
    ret

FUNCTION unit_lock
    push rbx
    mov ebx, LOCKS_A_UNIT
1:  mov edi, offset lock_total          # the first unit counts for the line that is printed
    cmp qword ptr gs:[CPU_UNITS], 0
    je 2f
    mov edi, offset lock_spare
2:  call count_under_lock
    dec ebx
    jnz 1b
    mov eax, LOCKS_A_UNIT
    pop rbx
    ret

FUNCTION count_under_lock               # increments [RDI] inside the critical section that all share
    mov ecx, gs:[CPU_ID]
    inc ecx                             # the lock holds its holder's number + 1
1:  mov eax, ecx
    xchg [lock_word], eax
    test eax, eax
    jz 3f
2:  pause
    cmp dword ptr [lock_word], 0
    jne 2b
    jmp 1b
3:  mov eax, [lock_owner]               # nobody else is in here
    xor edx, edx
    mov [lock_owner], ecx
    mov r8d, [rdi]
    mov r9d, 8                          # long enough for another to get in, if it could
4:  dec r9d
    jnz 4b
    inc r8d
    mov [rdi], r8d
    cmp [lock_owner], ecx
    je 5f
    mov eax, [lock_owner]
    mov edx, ecx
5:  mov dword ptr [lock_owner], 0
    mov dword ptr [lock_word], 0
    mov esi, offset name_lock_owner
    jmp compare

# CPL 3. RDI: data, RSI: first word, R8: round_over. Repeats the sum until the round is over; RAX.
.text 3
.balign 4096
user_text:
FUNCTION user_sum
    xor ebx, ebx                        # passes
1:  mov rcx, rsi
    pxor xmm0, xmm0
2:  movdqu xmm2, [rdi + rcx * 8]
    paddq xmm0, xmm2
    add rcx, 2
    cmp rcx, 512
    jb 2b
    movdqa xmm1, xmm0
    psrldq xmm1, 8
    paddq xmm0, xmm1
    movq rax, xmm0
    test rbx, rbx
    cmovz r9, rax
    inc rbx
    cmp rax, r9                         # every pass must agree with the first
    jne 3f
    cmp byte ptr [r8], 0
    je 1b
3:  movabs rdx, USER_EXIT
    mov [rdx], rax
    .balign 4096
user_text_end:
.text 0

# -- self-checks ------------------------------------------------------------------------------------------------------
FUNCTION compare                        # RAX: got, RDX: expected, RSI: name; a difference is put on this VCPU's list
    inc qword ptr gs:[CPU_CHECKS]
    cmp rax, rdx
    je 1f
    mov qword ptr gs:[CPU_REPAIR], 1
    xor ecx, ecx
2:  cmp rcx, gs:[CPU_FAILURES]
    jae 3f
    imul r9d, ecx, 24
    cmp gs:[CPU_FAILURE + r9], rsi      # once a round is enough
    je 1f
    inc ecx
    cmp ecx, 8
    jb 2b
    ret
3:  inc qword ptr gs:[CPU_FAILURES]
    imul ecx, ecx, 24
    mov gs:[CPU_FAILURE + rcx], rsi
    mov gs:[CPU_FAILURE + rcx + 8], rdx
    mov gs:[CPU_FAILURE + rcx + 16], rax
1:  ret

FUNCTION check_result                   # RAX against the same computed another way
    mov r8, rax
    mov ecx, gs:[CPU_ID]
    and ecx, 3
    call [expectations + rcx * 8]
    mov rdx, rax
    mov rax, r8
    mov esi, [result_names + rcx * 4]
    jmp compare

# The expected result of this round in RAX; RCX and R8 are kept.
expect_primes:
    mov eax, [round_number]
    and eax, 15
    movzx eax, word ptr [primes_below + rax * 2]
    ret

expect_sum:                             # n words from the s-th on: n FIRST + STEP (s + 511) n / 2
    mov eax, [round_number]
    and eax, 15
    add eax, eax
    mov edx, 512
    sub edx, eax
    add eax, 511
    imul eax, edx
    shr eax, 1
    movabs r9, DATA_STEP
    imul rax, r9
    movabs r9, DATA_FIRST
    imul rdx, r9
    add rax, rdx
    ret

expect_fib:
    mov edx, [round_number]
    and edx, 3
    add edx, 10
    xor eax, eax
    mov r9d, 1
1:  xadd rax, r9                        # (a, b) becomes (a + b, a)
    dec edx
    jnz 1b
    ret

expect_lock:
    mov eax, LOCKS_A_UNIT
    ret

FUNCTION check_patterns
    .irp register, 12, 13, 14, 15
    movabs rdx, 0x0101010101010100 * 0x\register
    or rdx, gs:[CPU_ID]
    mov rax, r\register
    mov esi, offset name_r\register
    call compare
    .endr
    ret

FUNCTION run_checks
    push rbx
    mov qword ptr gs:[CPU_CHECKS], 0
    call check_patterns
    mov ebx, offset checks
1:  mov eax, [rbx + 4]
    call rax
    mov esi, [rbx]
    call compare
    add ebx, 8
    cmp ebx, offset checks_end
    jb 1b
    mov ebx, offset msr_checks
2:  mov ecx, [rbx + 4]
    rdmsr
    shl rdx, 32
    or rax, rdx
    mov rdx, gs:[CPU_ID]
    imul rdx, [rbx + 16]
    or rdx, [rbx + 8]
    mov esi, [rbx]
    call compare
    call next_msr
    jb 2b
    .irp register, 8, 9, 10, 11, 12, 13, 14, 15
    movdqu xmmword ptr gs:[CPU_SCRATCH], xmm\register
    mov esi, offset name_xmm\register
    mov rax, gs:[CPU_SCRATCH]
    mov rdx, gs:[CPU_XMM + (\register - 8) * 16]
    call compare
    mov rax, gs:[CPU_SCRATCH + 8]
    mov rdx, gs:[CPU_XMM + (\register - 8) * 16 + 8]
    call compare
    .endr
    pop rbx
    cmp qword ptr gs:[CPU_REPAIR], 0    # said once; then as it should be again
    je 3f
    mov qword ptr gs:[CPU_REPAIR], 0
    call arm_state
    call arm_lapic
3:  ret

next_msr:                               # EBX to the next row; carry: there is one
    add ebx, 24
    mov eax, offset msr_checks_end
    cmp byte ptr [has_tsc_aux], 0
    jne 1f
    sub eax, 24                         # the last row
1:  cmp ebx, eax
    ret

FUNCTION arm_state                      # write every pattern that the checks look for
    push rbx
    mov eax, 0x80000001
    cpuid
    bt edx, 27                          # RDTSCP, and so TSC_AUX
    setc byte ptr [has_tsc_aux]
    .irp register, 12, 13, 14, 15
    movabs r\register, 0x0101010101010100 * 0x\register
    or r\register, gs:[CPU_ID]
    .endr
    mov ebx, offset msr_checks
1:  mov ecx, [rbx + 4]
    mov rax, gs:[CPU_ID]
    imul rax, [rbx + 16]
    or rax, [rbx + 8]
    mov rdx, rax
    shr rdx, 32
    wrmsr
    call next_msr
    jb 1b
    .irp register, 8, 9, 10, 11, 12, 13, 14, 15
    movabs rax, 0x0101010101010101 * \register
    mov gs:[CPU_XMM + (\register - 8) * 16], rax
    mov rax, gs:[CPU_ID]
    mov gs:[CPU_XMM + (\register - 8) * 16 + 8], rax
    movdqu xmm\register, xmmword ptr gs:[CPU_XMM + (\register - 8) * 16]
    .endr
    .irp register, 0, 1, 2, 3           # no breakpoints: DR7 enables none
    mov eax, 0xd0d0d000 + \register * 0x100
    or rax, gs:[CPU_ID]
    mov dr\register, rax
    .endr
    mov eax, 0x400
    mov dr7, rax
    call stack_bottom
    movabs rax, CANARY
    or rax, gs:[CPU_ID]
    mov [rdx], rax
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov gs:[CPU_TSC], rax
    pop rbx
    ret

FUNCTION arm_lapic
    mov edi, LAPIC
    mov dword ptr [rdi + 0x80], 0       # TPR
    mov dword ptr [rdi + 0xf0], 0x100 + VECTOR_SPURIOUS
    mov eax, 0x10000                    # LINT0 masked; VCPU 0 takes the 8259s' interrupts there
    cmp qword ptr gs:[CPU_ID], 0
    jne 1f
    mov eax, 0x700
1:  mov [rdi + 0x350], eax
    mov dword ptr [rdi + 0x3e0], 3      # divide by 16
    mov dword ptr [rdi + 0x320], 0x20000 + VECTOR_TIMER
    mov dword ptr [rdi + 0x380], TICK
    ret

stack_bottom:                           # RDX
    mov edx, gs:[CPU_ID]
    imul edx, edx, STACK_STRIDE
    add rdx, offset stacks + 0x1000
    ret

# Each returns what it found in RAX and what it should have found in RDX.
check_canary:
    call stack_bottom
    mov rax, [rdx]
    movabs rdx, CANARY
    or rdx, gs:[CPU_ID]
    ret

check_stack:                            # RSP is in its stack's upper page
    call stack_bottom
    lea rax, [rsp - 0x1000]
    and rax, -0x1000
    ret

check_gs_base:
    mov ecx, 0xc0000101
    rdmsr
    shl rdx, 32
    or rax, rdx
    mov edx, gs:[CPU_ID]
    shl edx, 12
    add rdx, offset cpu_pages
    ret

check_gs_data:
    mov rax, gs:[CPU_SELF]
    mov edx, gs:[CPU_ID]
    shl edx, 12
    add rdx, offset cpu_pages
    ret

check_cr0:
    mov rax, cr0
    mov edx, 0x80010033
    ret

check_cr3:
    mov rax, cr3
    mov edx, offset pml4
    ret

check_cr4:
    mov rax, cr4
    mov edx, 0x620
    ret

check_efer:
    mov ecx, 0xc0000080
    rdmsr
    shl rdx, 32
    or rax, rdx
    mov edx, 0x500                      # LME, LMA
    ret

check_flags:                            # IF on; DF, TF, NT, AC, IOPL off
    pushfq
    pop rax
    and eax, 0x47702
    mov edx, 0x202
    ret

check_selectors:                        # CS, SS, DS, ES, FS, GS: a byte each, GS lowest
    xor eax, eax
    .irp register, cs, ss, ds, es, fs, gs
    mov ecx, \register
    shl rax, 8
    or rax, rcx
    .endr
    movabs rdx, (CODE64 << 40) + (DATA << 32) + USER_DATA * 0x01010101
    ret

check_tr:
    xor eax, eax
    str ax
    mov edx, gs:[CPU_ID]
    shl edx, 4
    add edx, TSS
    ret

check_gdt:
    sub rsp, 16
    sgdt [rsp]
    mov rax, [rsp + 2]
    add rsp, 16
    mov edx, offset gdt
    ret

check_idt:
    sub rsp, 16
    sidt [rsp]
    mov rax, [rsp + 2]
    add rsp, 16
    mov edx, offset idt
    ret

.irp register, 0, 1, 2, 3
check_dr\register:
    mov rax, dr\register
    mov edx, 0xd0d0d000 + \register * 0x100
    or rdx, gs:[CPU_ID]
    ret
.endr

check_dr7:
    mov rax, dr7
    mov edx, 0x400
    ret

check_lapic_id:
    mov eax, LAPIC
    mov eax, [rax + 0x20]
    shr eax, 24
    mov rdx, gs:[CPU_ID]
    ret

check_lapic_svr:
    mov eax, LAPIC
    mov eax, [rax + 0xf0]
    mov edx, 0x100 + VECTOR_SPURIOUS
    ret

check_lapic_tpr:
    mov eax, LAPIC
    mov eax, [rax + 0x80]
    xor edx, edx
    ret

check_lapic_lint0:                      # without delivery status and remote IRR
    mov eax, LAPIC
    mov eax, [rax + 0x350]
    and eax, 0x187ff
    mov edx, 0x10000
    cmp qword ptr gs:[CPU_ID], 0
    jne 1f
    mov edx, 0x700
1:  ret

check_lapic_timer:
    mov eax, LAPIC
    mov eax, [rax + 0x320]
    and eax, 0x700ff
    mov edx, 0x20000 + VECTOR_TIMER
    ret

check_lapic_period:
    mov eax, LAPIC
    mov eax, [rax + 0x380]
    mov edx, TICK
    ret

check_ticks:                            # they go forward: not one in 32 rounds means a dead timer
    mov rax, gs:[CPU_TICKS]
    mov rdx, gs:[CPU_TICKS_SEEN]
    mov gs:[CPU_TICKS_SEEN], rax
    cmp rax, rdx
    ja 1f
    jb 2f
    inc qword ptr gs:[CPU_TICKLESS]
    cmp qword ptr gs:[CPU_TICKLESS], 32
    lea rdx, [rax + 1]                  # expected: more
    jae 2f
    mov rdx, rax
    ret
1:  mov rdx, rax
2:  mov qword ptr gs:[CPU_TICKLESS], 0
    ret

check_tsc:                              # never back
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rdx, gs:[CPU_TSC]
    mov gs:[CPU_TSC], rax
    cmp rax, rdx
    jb 1f
    mov rdx, rax
1:  ret

check_rounds:
    mov rax, gs:[CPU_ROUNDS]
    mov rdx, [round_number]
    mov gs:[CPU_ROUNDS], rdx
    ret

check_code:                             # every fourth round each, and whenever asked
    mov eax, [round_number]
    add eax, gs:[CPU_ID]
    and eax, 3
    jz 1f
    cmp dword ptr [mode], MODE_CHECK
    je 1f
    xor eax, eax
    xor edx, edx
    ret
1:  mov esi, offset text_start
    xor eax, eax
2:  rol rax, 1
    add rax, [rsi]
    add esi, 8
    cmp esi, offset text_end
    jb 2b
    mov rdx, [code_sum]
    mov [code_sum], rax
    test rdx, rdx
    jnz 3f
    mov rdx, rax                        # the first time
3:  ret

# -- interrupts and exceptions ----------------------------------------------------------------------------------------
.macro END_OF_INTERRUPT
    mov eax, LAPIC
    mov dword ptr [rax + 0xb0], 0
.endm

FUNCTION timer_interrupt
    push rax
    inc qword ptr gs:[CPU_TICKS]
    END_OF_INTERRUPT
    pop rax
    iretq

FUNCTION wake_interrupt
    push rax
    END_OF_INTERRUPT
    pop rax
    iretq

FUNCTION spurious_interrupt
    iretq

FUNCTION uart_interrupt                 # all that has come goes into the ring
    .irp register, rax, rcx, rdx, rsi, rdi, r8
    push \register
    .endr
1:  mov edx, COM1 + 5
    in al, dx
    test al, 1
    jz 2f
    mov edx, COM1
    in al, dx
    movzx ecx, byte ptr [ring_head]
    mov [ring + rcx], al
    inc cl
    cmp cl, [ring_tail]                 # full: the newest is lost
    je 1b
    mov [ring_head], cl
    jmp 1b
2:  cmp byte ptr [printing], 0
    jne 3f
    call edit_line
3:  mov al, 0x20
    out 0x20, al
    .irp register, r8, rdi, rsi, rdx, rcx, rax
    pop \register
    .endr
    iretq

.balign 16
exceptions:
.set vector, 0
.rept 32
    .balign 16
    .if (vector == 8) | ((vector >= 10) & (vector <= 14)) | (vector == 17) | (vector == 21)
    .else
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
.endr
.balign 16
unexpected_interrupt:
    push 0
    push 256

FUNCTION exception                      # on the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS
    push rax
    push rcx
    push rdx
    mov rax, [rsp + 24]
    cmp eax, 2
    jne 1f
    inc qword ptr gs:[CPU_NMIS]
    jmp 3f
1:  mov rdx, cr2
    test byte ptr [rsp + 48], 3         # from CPL 3?
    jz 2f
    cmp eax, 14
    jne crash
    movabs rcx, USER_EXIT
    cmp rdx, rcx
    jne crash
    mov rax, [rsp + 16]
    jmp user_exit
2:  mov rcx, gs:[CPU_FIXUP]
    test rcx, rcx
    jz crash
    mov [rsp + 40], rcx
    mov qword ptr gs:[CPU_FIXUP], 0
3:  pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

FUNCTION crash                          # RAX: vector, RDX: CR2; this VCPU says so and halts
    mov gs:[CPU_CRASH], rax
    mov rcx, [rsp + 32]
    mov gs:[CPU_CRASH + 8], rcx
    mov rcx, [rsp + 40]
    mov gs:[CPU_CRASH + 16], rcx
    mov gs:[CPU_CRASH + 24], rdx
    mov qword ptr gs:[CPU_STATE], CRASHED
    cmp qword ptr gs:[CPU_ID], 0
    je 1f
    mov byte ptr [cut_short], 1
    call arrive                         # the round goes on without it
    jmp 2f
1:  POST 0xee
    mov rbx, gs:[CPU_SELF]
    SAY "\r\n"
    call put_crash
    SAY "\r\n"
2:  cli
    hlt
    jmp 2b

# -- output: VCPU 0 only ----------------------------------------------------------------------------------------------
FUNCTION put_char                       # AL; keeps all registers
    push rdx
    push rax
    cmp byte ptr [fifo_room], 0
    jne 2f
    mov edx, COM1 + 5
1:  in al, dx
    test al, 0x20                       # the FIFO is empty: 16 bytes fit
    jz 1b
    mov byte ptr [fifo_room], 16
2:  dec byte ptr [fifo_room]
    mov rax, [rsp]
    mov edx, COM1
    out dx, al
    inc dword ptr [column]
    cmp al, 13
    jne 3f
    mov dword ptr [column], 0
3:  pop rax
    pop rdx
    ret

FUNCTION put_string                     # RSI, up to a zero
    push rax
1:  mov al, [rsi]
    inc rsi
    test al, al
    jz 2f
    call put_char
    jmp 1b
2:  pop rax
    ret

FUNCTION put_decimal                    # RAX; keeps all registers
    push rax
    push rcx
    push rdx
    mov ecx, 10
    xor edx, edx
    div rcx
    test rax, rax
    jz 1f
    call put_decimal
1:  lea eax, [rdx + '0']
    call put_char
    pop rdx
    pop rcx
    pop rax
    ret

FUNCTION put_hex                        # RAX, 16 digits
    mov ecx, 16
put_hex_digits:                         # ECX digits of RAX, from the left
    push rdx
    mov rdx, rax
1:  rol rdx, 4
    mov eax, edx
    and eax, 15
    mov al, [hex_digits + rax]
    call put_char
    dec ecx
    jnz 1b
    pop rdx
    ret

FUNCTION begin_line                     # a line of its own, above what is being typed
    cli
    cmp byte ptr [line_ready], 0
    jne 1f
    mov byte ptr [printing], 1
    sti
    mov al, 13
    jmp put_char
1:  sti                                 # a line that is entered is no longer being typed: its command comes first
    push rdx
    call run_command
    pop rdx
    jmp begin_line

FUNCTION end_line
    mov eax, [line_length]              # wipe the rest of the line that was being typed, and draw it again below
    add eax, 2
    cmp [column], eax
    jae 2f
    mov al, ' '
    call put_char
    jmp end_line
2:  SAY "\r\n> "
    mov esi, offset line
    mov ecx, [line_length]
3:  test ecx, ecx
    jz end_output
    lodsb
    call put_char
    dec ecx
    jmp 3b

FUNCTION end_output                     # now what was typed meanwhile
    cli
    mov byte ptr [printing], 0
    call edit_line
    sti
    ret

FUNCTION print_round
    mov rax, [round_number]
    xor edx, edx
    mov ecx, [quiet]
    div rcx
    test rdx, rdx
    jz 1f
    ret
1:  push rbx
    call begin_line
    SAY "round "
    mov rax, [round_number]
    call put_decimal
    xor ebx, ebx                        # the kind of work; the lock's result is the total
2:  call summarise
    test ecx, ecx
    jz 3f
    mov esi, [result_labels + rbx * 4]
    call put_string
    call [result_printers + rbx * 8]
    SAY " x"
    mov eax, r9d
    call put_decimal
    call put_verdict
3:  inc ebx
    cmp ebx, 3
    jb 2b
    SAY "  lock "
    mov eax, [lock_total]
    call put_decimal
    cmp byte ptr [cut_short], 0
    jne 4f
    cmp eax, [lock_expected]
    sete r10b
    call put_verdict
4:  pop rbx
    jmp end_line

put_verdict:                            # R10B
    test r10b, r10b
    jnz 1f
    SAY " WRONG"
    ret
1:  SAY " ok"
    ret

summarise:                              # EBX: kind. ECX, R9D: VCPUs of that kind; RAX: the first one's result; R10B: all right
    mov rcx, rbx
    call [expectations + rbx * 8]
    mov rsi, rax
    xor r9d, r9d
    mov r10b, 1
    mov ecx, ebx
1:  mov edx, ecx
    shl edx, 12
    add rdx, offset cpu_pages
    cmp qword ptr [rdx + CPU_STATE], IDLE
    jne 3f
    cmp [rdx + CPU_RESULT], rsi
    je 2f
    mov rax, [rdx + CPU_RESULT]
    xor r10d, r10d
2:  inc r9d
3:  add ecx, 4
    cmp ecx, MAX_CPUS
    jb 1b
    mov ecx, r9d
    ret

put_short_hex:
    mov ecx, 8
    shl rax, 32
    jmp put_hex_digits

FUNCTION report                         # every VCPU's failed checks and crashes
    push rbx
    mov ebx, offset cpu_pages
1:  cmp qword ptr [rbx + CPU_FAILURES], 0
    je 3f
    xor edx, edx
2:  call begin_line
    imul r8d, edx, 24
    SAY "SELF-CHECK FAILED: "
    mov rsi, [rbx + CPU_FAILURE + r8]
    call put_string
    SAY " cpu "
    mov rax, [rbx + CPU_ID]
    call put_decimal
    SAY " expected "
    mov rax, [rbx + CPU_FAILURE + r8 + 8]
    call put_hex
    SAY " got "
    mov rax, [rbx + CPU_FAILURE + r8 + 16]
    call put_hex
    push rdx
    call end_line
    pop rdx
    inc edx
    cmp rdx, [rbx + CPU_FAILURES]
    jb 2b
    mov qword ptr [rbx + CPU_FAILURES], 0
3:  cmp qword ptr [rbx + CPU_STATE], CRASHED
    jne 4f
    cmp qword ptr [rbx + CPU_REPORTED], 0
    jne 4f
    mov qword ptr [rbx + CPU_REPORTED], 1
    call begin_line
    call put_crash
    call end_line
4:  add ebx, CPU_PAGE
    cmp ebx, offset cpu_pages + MAX_CPUS * CPU_PAGE
    jb 1b
    pop rbx
    ret

put_crash:                              # RBX: the VCPU's page
    SAY "EXCEPTION "
    mov rax, [rbx + CPU_CRASH]
    call put_decimal
    SAY " cpu "
    mov rax, [rbx + CPU_ID]
    call put_decimal
    SAY " error "
    mov rax, [rbx + CPU_CRASH + 8]
    call put_short_hex
    SAY " rip "
    mov rax, [rbx + CPU_CRASH + 16]
    call put_hex
    SAY " cr2 "
    mov rax, [rbx + CPU_CRASH + 24]
    call put_hex
    ret

# -- the monitor ------------------------------------------------------------------------------------------------------
FUNCTION edit_line                      # IF = 0: what is in the ring goes into the line, with echo
1:  cmp byte ptr [line_ready], 0
    jne 9f
    movzx ecx, byte ptr [ring_tail]
    cmp cl, [ring_head]
    je 9f
    mov al, [ring + rcx]
    inc byte ptr [ring_tail]
    mov dl, [last_char]
    mov [last_char], al
    mov ecx, [line_length]
    cmp al, 10
    jne 2f
    cmp dl, 13                          # LF after CR
    je 1b
    jmp 3f
2:  cmp al, 13
    jne 4f
3:  mov byte ptr [line + rcx], 0
    mov byte ptr [line_ready], 1
    SAY "\r\n"
    ret
4:  cmp al, 8
    je 5f
    cmp al, 127
    jne 6f
5:  test ecx, ecx
    jz 1b
    dec dword ptr [line_length]
    SAY "\b \b"
    jmp 1b
6:  cmp al, 32
    jb 1b
    cmp al, 126
    ja 1b
    cmp ecx, LINE_SIZE - 1
    jae 1b
    mov [line + rcx], al
    inc dword ptr [line_length]
    call put_char
    jmp 1b
9:  ret

FUNCTION run_command
    push rbx
    mov byte ptr [printing], 1
    mov esi, offset line
    call skip_spaces
    cmp byte ptr [rsi], 0
    je 4f
    mov ebx, offset commands
1:  mov edi, [rbx]
    call match_word
    je 2f
    add ebx, 12
    cmp ebx, offset commands_end
    jb 1b
    SAY "no such command; help lists them\r\n"
    jmp 4f
2:  mov eax, [rbx + 8]
    call rax
4:  mov dword ptr [line_length], 0
    SAY "> "
    mov byte ptr [line_ready], 0
    pop rbx
    jmp end_output

skip_spaces:                            # RSI
    cmp byte ptr [rsi], ' '
    jne 1f
    inc rsi
    jmp skip_spaces
1:  ret

match_word:                             # RSI: typed, RDI: a word. Zero flag: the same, and RSI stands behind it
    mov rdx, rsi
1:  mov al, [rdx]
    cmp byte ptr [rdi], 0
    je 2f
    cmp al, [rdi]
    jne 3f
    inc rdx
    inc rdi
    jmp 1b
2:  test al, al
    jz 4f
    cmp al, ' '
    jne 3f
4:  mov rsi, rdx
    cmp al, al
3:  ret

parse_number:                           # RSI: decimal, or hexadecimal behind 0x; RAX. Carry: not a number
    call skip_spaces
    xor eax, eax
    mov ecx, 10
    cmp byte ptr [rsi], 0
    je 4f
    cmp word ptr [rsi], 0x7830          # "0x"
    jne 1f
    mov ecx, 16
    add rsi, 2
1:  movzx edx, byte ptr [rsi]
    test edx, edx
    jz 3f
    cmp edx, ' '
    je 3f
    inc rsi
    sub edx, '0'
    cmp edx, 10
    jb 2f
    or edx, 32
    sub edx, 'a' - '0'
    cmp edx, 5
    ja 4f
    add edx, 10
2:  cmp edx, ecx
    jae 4f
    imul rax, rcx
    add rax, rdx
    jmp 1b
3:  clc
    ret
4:  stc
    ret

command_help:
    push rbx
    mov ebx, offset commands
1:  mov esi, [rbx]
    mov dword ptr [column], 0
    call put_string
2:  mov al, ' '
    call put_char
    cmp dword ptr [column], 12
    jb 2b
    mov esi, [rbx + 4]
    call put_string
    SAY "\r\n"
    add ebx, 12
    cmp ebx, offset commands_end
    jb 1b
    pop rbx
    ret

command_cpus:
    push rbx
    mov ebx, offset cpu_pages
1:  mov rdx, [rbx + CPU_STATE]
    test rdx, rdx
    jz 2f
    SAY "cpu "
    mov rax, [rbx + CPU_ID]
    call put_decimal
    mov ecx, eax
    and ecx, 3
    mov esi, [work_names + rcx * 4]
    call put_string
    SAY "  rounds "
    mov rax, [rbx + CPU_ROUNDS]
    call put_decimal
    mov esi, [state_names + rdx * 4]
    call put_string
    SAY "\r\n"
2:  add ebx, CPU_PAGE
    cmp ebx, offset cpu_pages + MAX_CPUS * CPU_PAGE
    jb 1b
    pop rbx
    ret

command_stop:
    mov byte ptr [stopped], 1
    ret

command_go:
    mov byte ptr [stopped], 0
    ret

command_quiet:
    call parse_number
    jc bad_number
    test rax, rax
    jz bad_number
    mov [quiet], eax
    ret

bad_number:
    SAY "a number, please: 12 or 0x1f\r\n"
    ret

command_peek:
    call parse_number
    jc bad_number
    push rbx
    mov rbx, rax
    call put_hex
    mov qword ptr gs:[CPU_FIXUP], offset 2f
    mov rdx, [rbx]
    mov r8, [rbx + 8]
    mov qword ptr gs:[CPU_FIXUP], 0
    SAY ": "
    mov rax, rdx
    call put_hex
    SAY " "
    mov rax, r8
    call put_hex
1:  SAY "\r\n"
    pop rbx
    ret
2:  SAY ": not mapped"
    jmp 1b

command_check:                          # in round_loop: a VCPU that doesn't come back must not take the monitor with it
    mov byte ptr [check_wanted], 1
    ret

command_crash:
    call skip_spaces
    mov ecx, 1
1:  mov edi, [order_names + rcx * 4 - 4]
    call match_word
    je give_order
    inc ecx
    cmp ecx, 5
    jb 1b
    SAY "crash ud|de|pf|triple [CPU]\r\n"
    ret

command_hang:
    mov ecx, 5
give_order:                             # ECX: order; a VCPU's number may follow
    call skip_spaces
    cmp byte ptr [rsi], 0
    je 1f
    push rcx
    call parse_number
    pop rcx
    jc bad_number
    test rax, rax
    jz 1f
    cmp rax, MAX_CPUS
    jae bad_number
    shl eax, 12
    mov [cpu_pages + CPU_ORDER + rax], rcx
    SAY "at its next round\r\n"
    ret
1:  jmp [orders + rcx * 8 - 8]

FUNCTION order_ud
    ud2
FUNCTION order_de
    xor ecx, ecx
    xor edx, edx
    div ecx
FUNCTION order_pf
    movabs rax, 0xdead0000
    shl rax, 8
    mov [rax], rax
FUNCTION order_triple
    lidt [no_idt_pointer]
    ud2
FUNCTION order_hang
    cli
1:  pause
    jmp 1b

command_regs:
    push rbx
    sub rsp, 8
    .irp register, r12, r13, r14, r15, rsp, cr0, cr2, cr3, cr4
    SAY "\register "
    mov rax, \register
    call put_hex
    SAY "\r\n"
    .endr
    add rsp, 8
    pop rbx
    ret

command_exit:
    call parse_number
    jc bad_number
    out 0xf4, al
    ret

command_reboot:
    mov al, 0xfe
    out 0x64, al
    ret

# -- constants --------------------------------------------------------------------------------------------------------
.text 1
hex_digits: .ascii "0123456789abcdef"
debug_banner: .ascii "vmdeck demo guest: serial monitor on COM1\n"
name_lock_total: .asciz "lock total"
name_lock_word: .asciz "lock word"
name_lock_owner: .asciz "lock owner"
name_frame: .asciz "stack frame"
name_primes: .asciz "primes"
name_sum: .asciz "sum"
name_fib: .asciz "fib"
name_lock: .asciz "lock count"
.irp register, 12, 13, 14, 15
name_r\register: .asciz "R\register"
.endr
.irp register, 8, 9, 10, 11, 12, 13, 14, 15
name_xmm\register: .asciz "XMM\register"
.endr
label_primes: .asciz "  primes "
label_sum: .asciz "  sum "
label_fib: .asciz "  fib "
work_primes: .asciz "  primes at CPL 0"
work_sum: .asciz "  sum    at CPL 3"
work_fib: .asciz "  fib    at CPL 0"
work_lock: .asciz "  lock   at CPL 0"
state_idle: .asciz "  idle"
state_working: .asciz "  working"
state_crashed: .asciz "  crashed"
order_name_ud: .asciz "ud"
order_name_de: .asciz "de"
order_name_pf: .asciz "pf"
order_name_triple: .asciz "triple"

.text 2
.balign 8
units: .quad unit_primes, unit_sum, unit_fib, unit_lock
expectations: .quad expect_primes, expect_sum, expect_fib, expect_lock
result_printers: .quad put_decimal, put_short_hex, put_decimal
orders: .quad order_ud, order_de, order_pf, order_triple, order_hang
result_names: .long name_primes, name_sum, name_fib, name_lock
result_labels: .long label_primes, label_sum, label_fib
work_names: .long work_primes, work_sum, work_fib, work_lock
state_names: .long 0, state_idle, state_working, state_crashed
order_names: .long order_name_ud, order_name_de, order_name_pf, order_name_triple
primes_below: .word 168, 179, 188, 195, 204, 215, 221, 229, 240, 248, 259, 266, 274, 282, 290, 297

checks:
    CHECK "stack canary", check_canary
    CHECK "RSP", check_stack
    CHECK "GS base", check_gs_base
    CHECK "GS data", check_gs_data
    CHECK "CR0", check_cr0
    CHECK "CR3", check_cr3
    CHECK "CR4", check_cr4
    CHECK "EFER", check_efer
    CHECK "RFLAGS", check_flags
    CHECK "selectors", check_selectors
    CHECK "TR", check_tr
    CHECK "GDT", check_gdt
    CHECK "IDT", check_idt
    CHECK "DR0", check_dr0
    CHECK "DR1", check_dr1
    CHECK "DR2", check_dr2
    CHECK "DR3", check_dr3
    CHECK "DR7", check_dr7
    CHECK "LAPIC id", check_lapic_id
    CHECK "LAPIC SVR", check_lapic_svr
    CHECK "LAPIC TPR", check_lapic_tpr
    CHECK "LAPIC LINT0", check_lapic_lint0
    CHECK "LAPIC timer", check_lapic_timer
    CHECK "LAPIC period", check_lapic_period
    CHECK "ticks", check_ticks
    CHECK "TSC", check_tsc
    CHECK "rounds", check_rounds
    CHECK "code", check_code
checks_end:

.balign 8
msr_checks:                             # name, index, value; 1: the VCPU's number is in it
    MSR_CHECK "KERNEL_GS_BASE", 0xc0000102, 0x0000020202020200, 1
    MSR_CHECK "FS_BASE", 0xc0000100, 0x00005f5f5f5f5f00, 1
    MSR_CHECK "STAR", 0xc0000081, 0x0013000800000000, 0
    MSR_CHECK "LSTAR", 0xc0000082, 0xffff828282828200, 1
    MSR_CHECK "CSTAR", 0xc0000083, 0xffff838383838300, 1
    MSR_CHECK "FMASK", 0xc0000084, 0x0000000000040700, 0
    MSR_CHECK "SYSENTER_CS", 0x174, 0x0000000000000008, 0
    MSR_CHECK "SYSENTER_ESP", 0x175, 0x0000757575757500, 1
    MSR_CHECK "SYSENTER_EIP", 0x176, 0x0000767676767600, 1
    MSR_CHECK "PAT", 0x277, 0x0007010600070106, 0
    MSR_CHECK "TSC_AUX", 0xc0000103, 0x00000000a0a0a000, 1
msr_checks_end:

commands:
    COMMAND "help", command_help, "this list"
    COMMAND "cpus", command_cpus, "a line for every VCPU"
    COMMAND "stop", command_stop, "let all VCPUs halt after this round"
    COMMAND "go", command_go, "go on"
    COMMAND "quiet", command_quiet, "N: print every Nth round"
    COMMAND "check", command_check, "check the state of every VCPU now"
    COMMAND "regs", command_regs, "some of VCPU 0's registers"
    COMMAND "peek", command_peek, "ADDRESS: 16 bytes of memory"
    COMMAND "crash", command_crash, "ud|de|pf|triple [CPU]: an exception that nobody expects"
    COMMAND "hang", command_hang, "[CPU]: loop for ever with interrupts off"
    COMMAND "exit", command_exit, "N: leave by isa-debug-exit"
    COMMAND "reboot", command_reboot, "reset by the keyboard controller"
commands_end:

page_ranges:                            # from, to, flags: 1 present, 2 writable, 4 for CPL 3; later rows win
    .long 0x1000, 0x200000, 3
    .long text_start, user_text, 1
    .long user_text, user_text_end, 5
    .long user_pages, user_pages_end, 7
page_ranges_end:

port_setup:                             # port, value
    .irp setup, 0x2011, 0x2120, 0x2104, 0x2101, 0xa011, 0xa128, 0xa102, 0xa101, 0x21ef, 0xa1ff
    .word \setup >> 8                   # 8259s: vectors 0x20 and 0x28, all masked but IRQ 4
    .byte \setup & 0xff
    .endr
    .irp setup, 0x180, 0x001, 0x100, 0x303, 0x207, 0x40b, 0x101
    .word COM1 + (\setup >> 8)          # UART: 115200 8N1, FIFOs, OUT2, receive interrupt
    .byte \setup & 0xff
    .endr
port_setup_end:

.balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 4095
    .quad idt
no_idt_pointer:
    .word 0
    .quad 0
.balign 8
text_end:
.text 3                                 # user text: above

.data
.balign 16
gdt:                                    # accessed already, so that a VCPU writes nothing here but its TSS's busy bit
    .quad 0
    .quad 0x00af9b000000ffff            # CODE64
    .quad 0x00cf93000000ffff            # DATA
    .quad 0x00cf9b000000ffff            # CODE32
    .quad 0x00cff3000000ffff            # USER_DATA
    .quad 0x00affb000000ffff            # USER_CODE
    .skip MAX_CPUS * 16                 # TSS
gdt_end:

# -- memory -----------------------------------------------------------------------------------------------------------
.bss
.balign 4096
pml4: .skip 4096
pdpt: .skip 4096
page_directories: .skip 4 * 4096
page_table: .skip 4096
idt: .skip 4096
variables:
round_number: .quad 0
sequence: .quad 0                       # a change releases the other VCPUs
code_sum: .quad 0
mode: .long 0
arrived: .long 0
active: .long 0                         # VCPUs in this round without VCPU 0
cpus_joined: .long 0
cpus_online: .long 0
cpus_expected: .long 0
lock_total: .long 0
lock_expected: .long 0
lock_spare: .long 0
quiet: .long 0
line_length: .long 0
column: .long 0
stopped: .byte 0
check_wanted: .byte 0
cut_short: .byte 0                      # a VCPU has crashed in this round
printing: .byte 0                       # the receive interrupt leaves the echo to end_output
line_ready: .byte 0
last_char: .byte 0
fifo_room: .byte 0
has_tsc_aux: .byte 0
ring_head: .byte 0
ring_tail: .byte 0
line: .skip LINE_SIZE
ring: .skip 256
.balign 64
lock_word: .long 0
lock_owner: .long 0
.balign 64
variables_end:
.balign 4096
cpu_pages: .skip MAX_CPUS * CPU_PAGE
stacks: .skip MAX_CPUS * STACK_STRIDE
user_pages:
round_over: .skip 4096                  # CPL 3 reads it
user_data: .skip MAX_CPUS * 4096
user_stacks: .skip MAX_CPUS * 4096
user_pages_end:
