/* The floors that vmdeck is measured against: the bare ioctls, in a C loop on one thread, and nothing else.
 *
 *   floor hooks VCPUS   median µs of a get of all substates, a put at RESET, a put at FULL, over all VCPUs
 *   floor pio           median µs of a port write exit
 *   floor pages         median µs of going back by dirty log, 128 MiB: 10, 1,000 and all pages
 *   floor restore VCPUS median µs of going back by dirty log plus the FULL put of all VCPUs and the irqchips
 *   floor threads VCPUS the same, but each VCPU runs and is put on a thread of its own, as the contract has it
 *   floor loop PAGES    median µs of that with one VCPU, 64 bytes of input and KVM_RUN to the next port write
 *
 * Prints one JSON object. The substates are those of kvm/x86/substates.py, in its order.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define MEMORY (128ul << 20)
#define PAGE 4096ul
#define MAX_VCPUS 64
#define ROUNDS 301

static int kvm, vm, vcpus[MAX_VCPUS];
static struct kvm_run *runs[MAX_VCPUS];
static uint8_t *ram, *saved;
static struct { struct kvm_msrs head; struct kvm_msr_entry e[512]; } msrs, reset_msrs, deadline;

static int call(int fd, unsigned long request, void *argument, const char *what)
{
	int result = ioctl(fd, request, argument);
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}
#define CALL(fd, request, argument) call(fd, request, (void *)(uintptr_t)(argument), #request)

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static double median(double *values, int count)
{
	qsort(values, count, sizeof *values, ascending);
	return values[count / 2];
}

static int in_reset_group(uint32_t index)
{
	return index == 0x10 || index == 0x3b || index == 0x34 || index == 0x3a || index == 0x11 || index == 0x12 ||
	       (index >= 0x4b564d00 && index < 0x4b564d09) || (index >= 0x40000000 && index < 0x40000200) ||
	       (index >= 0xc1 && index < 0xc9) || (index >= 0x186 && index < 0x18e) ||
	       (index >= 0x309 && index < 0x30d) || (index >= 0x38d && index < 0x391);
}

static void list_msrs(void)
{
	static struct { struct kvm_msr_list head; uint32_t index[512]; } list;
	static const uint32_t mtrrs[] = { 0x2ff, 0x250, 0x258, 0x259 };
	list.head.nmsrs = 512;
	CALL(kvm, KVM_GET_MSR_INDEX_LIST, &list);
	for (unsigned i = 0; i < list.head.nmsrs; i++) {
		uint32_t index = list.index[i];
		if (index == 0x6e0)
			deadline.e[deadline.head.nmsrs++].index = index;
		else if (in_reset_group(index) && index != 0x4b564d07)
			reset_msrs.e[reset_msrs.head.nmsrs++].index = index;
		else if (index != 0x10a && index != 0x345 && index != 0xce && index != 0x8b && index != 0x4b564d07)
			msrs.e[msrs.head.nmsrs++].index = index;
	}
	for (unsigned i = 0; i < 4; i++)
		reset_msrs.e[reset_msrs.head.nmsrs++].index = mtrrs[i];
	for (uint32_t i = 0x200; i < 0x210; i++)
		reset_msrs.e[reset_msrs.head.nmsrs++].index = i;
	for (uint32_t i = 0x268; i < 0x270; i++)
		reset_msrs.e[reset_msrs.head.nmsrs++].index = i;
}

static void build(int count)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0) {
		perror("/dev/kvm");
		exit(1);
	}
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	CALL(vm, KVM_CREATE_IRQCHIP, 0);
	struct kvm_pit_config config = { 0 };
	CALL(vm, KVM_CREATE_PIT2, &config);
	ram = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	saved = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(ram, 0, MEMORY);
	memset(saved, 0, MEMORY);
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY, .userspace_addr = (uintptr_t)ram,
						      .flags = KVM_MEM_LOG_DIRTY_PAGES };
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
	int size = CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	for (int i = 0; i < count; i++) {
		vcpus[i] = CALL(vm, KVM_CREATE_VCPU, i);
		runs[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpus[i], 0);
	}
	list_msrs();
}

static struct kvm_vcpu_events events;
static struct kvm_mp_state mp_state;
static struct kvm_regs regs;
static struct kvm_xsave xsave;
static struct kvm_xcrs xcrs;
static struct kvm_sregs2 sregs;
static struct kvm_lapic_state lapic;
static struct kvm_debugregs debugregs;

static uint64_t tsc_offset;
static struct kvm_device_attr offset_attribute = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET };
static int has_offsets;

static void find_offsets(void)
{
	offset_attribute.addr = (uintptr_t)&tsc_offset;
	has_offsets = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_VCPU_ATTRIBUTES) > 0;
}

static void get(int fd)
{
	CALL(fd, KVM_GET_VCPU_EVENTS, &events);
	CALL(fd, KVM_GET_MP_STATE, &mp_state);
	CALL(fd, KVM_GET_REGS, &regs);
	CALL(fd, KVM_GET_XSAVE2, &xsave);
	CALL(fd, KVM_GET_XCRS, &xcrs);
	CALL(fd, KVM_GET_SREGS2, &sregs);
	CALL(fd, KVM_GET_MSRS, &msrs);
	CALL(fd, KVM_GET_MSRS, &reset_msrs);
	if (has_offsets)
		CALL(fd, KVM_GET_DEVICE_ATTR, &offset_attribute);
	CALL(fd, KVM_GET_LAPIC, &lapic);
	if (deadline.head.nmsrs)
		CALL(fd, KVM_GET_MSRS, &deadline);
	CALL(fd, KVM_GET_DEBUGREGS, &debugregs);
}

/* RESET and FULL differ by CPUID (once) and the TSC frequency alone: the same ioctls where the kernel can't scale it. */
static void put(int fd)
{
	CALL(fd, KVM_SET_SREGS2, &sregs);
	CALL(fd, KVM_SET_REGS, &regs);
	CALL(fd, KVM_SET_XSAVE, &xsave);
	CALL(fd, KVM_SET_XCRS, &xcrs);
	CALL(fd, KVM_SET_LAPIC, &lapic);
	CALL(fd, KVM_SET_MSRS, &msrs);
	CALL(fd, KVM_SET_MSRS, &reset_msrs);
	if (has_offsets)
		CALL(fd, KVM_SET_DEVICE_ATTR, &offset_attribute);
	CALL(fd, KVM_SET_VCPU_EVENTS, &events);
	CALL(fd, KVM_SET_MP_STATE, &mp_state);
	if (deadline.head.nmsrs)
		CALL(fd, KVM_SET_MSRS, &deadline);
	CALL(fd, KVM_SET_DEBUGREGS, &debugregs);
}

/* Before a put of all VCPUs: what the first one's TSC is now, from which all offsets follow. */
static void read_tsc(void)
{
	if (has_offsets) {
		CALL(vcpus[0], KVM_GET_MSRS, &reset_msrs);
		CALL(vcpus[0], KVM_GET_DEVICE_ATTR, &offset_attribute);
	}
}

static void hooks(int count)
{
	static double gets[ROUNDS], puts[ROUNDS];
	build(count);
	find_offsets();
	for (int round = 0; round < ROUNDS; round++) {
		double start = now();
		for (int i = 0; i < count; i++)
			get(vcpus[i]);
		double between = now();
		read_tsc();
		for (int i = 0; i < count; i++)
			put(vcpus[i]);
		puts[round] = now() - between;
		gets[round] = between - start;
	}
	printf("{\"get\": %.2f, \"put\": %.2f}\n", median(gets, ROUNDS), median(puts, ROUNDS));
}

/* Real mode: out 0x80, al; jmp to it. */
static void pio(void)
{
	static double times[20001];
	build(1);
	memcpy(ram + 0x1000, "\xe6\x80\xeb\xfc", 4);
	get(vcpus[0]);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CALL(vcpus[0], KVM_SET_SREGS2, &sregs);
	regs.rip = 0x1000;
	CALL(vcpus[0], KVM_SET_REGS, &regs);
	CALL(vcpus[0], KVM_RUN, 0);
	for (int i = 0; i < 20001; i++) {
		double start = now();
		CALL(vcpus[0], KVM_RUN, 0);
		times[i] = now() - start;
		if (runs[0]->exit_reason != KVM_EXIT_IO)
			exit(1);
	}
	printf("{\"exit\": %.3f}\n", median(times, 20001));
}

/* Real mode can reach the first MiB: 32-bit protected mode, flat, writes a byte to each of ECX pages, then out 0x80. */
static const uint8_t dirtier[] = {
	0xbf, 0x00, 0x00, 0x20, 0x00,             /* mov edi, 0x200000 */
	0xb9, 0, 0, 0, 0,                         /* mov ecx, pages */
	0xfe, 0x07,                               /* inc byte [edi] */
	0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,       /* add edi, 4096 */
	0xe2, 0xf6,                               /* loop */
	0xe6, 0x80,                               /* out 0x80, al */
	0xeb, 0xe8,                               /* jmp to the start */
};

static void go_back(uint64_t *bitmap)
{
	struct kvm_dirty_log log = { .dirty_bitmap = bitmap };
	CALL(vm, KVM_GET_DIRTY_LOG, &log);
	for (unsigned long word = 0; word < MEMORY / PAGE / 64; word++)
		for (uint64_t bits = bitmap[word]; bits; bits &= bits - 1) {
			unsigned long page = word * 64 + __builtin_ctzl(bits);
			memcpy(ram + page * PAGE, saved + page * PAGE, PAGE);
		}
}

/* The machine's own part of a restore: both 8259s, the I/O APIC, the PIT, the clock. */
static struct kvm_irqchip chips[3] = { { .chip_id = 0 }, { .chip_id = 1 }, { .chip_id = 2 } };
static struct kvm_pit_state2 pit;
static struct kvm_clock_data kvmclock;

static void get_machine(void)
{
	for (int i = 0; i < 3; i++)
		CALL(vm, KVM_GET_IRQCHIP, &chips[i]);
	CALL(vm, KVM_GET_PIT2, &pit);
	CALL(vm, KVM_GET_CLOCK, &kvmclock);
	kvmclock.flags = 0;
}

static void put_machine(void)
{
	for (int i = 0; i < 3; i++)
		CALL(vm, KVM_SET_IRQCHIP, &chips[i]);
	CALL(vm, KVM_SET_PIT2, &pit);
	CALL(vm, KVM_SET_CLOCK, &kvmclock);
}

/* Work for the first `count` VCPUs: one after the other here, or all at once, each on a thread of its own. */
typedef void work_on(int vcpu);

static void here(int count, work_on *work)
{
	for (int i = 0; i < count; i++)
		work(vcpus[i]);
}

static work_on *asked;
static sem_t ask[MAX_VCPUS], done;

static void *own_thread(void *number)
{
	int i = (int)(intptr_t)number;

	for (;;) {
		sem_wait(&ask[i]);
		asked(vcpus[i]);
		sem_post(&done);
	}
	return NULL;
}

static void start_threads(int count)
{
	pthread_t thread;

	sem_init(&done, 0, 0);
	for (int i = 0; i < count; i++) {
		sem_init(&ask[i], 0, 0);
		if (pthread_create(&thread, NULL, own_thread, (void *)(intptr_t)i))
			exit(1);
	}
}

static void on_threads(int count, work_on *work)
{
	asked = work;
	for (int i = 0; i < count; i++)
		sem_post(&ask[i]);
	for (int i = 0; i < count; i++)
		sem_wait(&done);
}

static void run_to_out(int vcpu)
{
	CALL(vcpu, KVM_RUN, 0);
	if (runs[0]->exit_reason != KVM_EXIT_IO) {
		fprintf(stderr, "exit %u\n", runs[0]->exit_reason);
		exit(1);
	}
	get(vcpu);
}

/* What the dirtying guest has to do to dirty all but its own page and what lies below it. */
#define ALL_PAGES (MEMORY / PAGE - 512)

static uint64_t bitmap[MEMORY / PAGE / 64];

static double pages(int count, uint32_t dirty, void (*on_all)(int, work_on *))
{
	double times[101];
	memcpy(ram + 0x1000, dirtier, sizeof dirtier);
	memcpy(ram + 0x1000 + 6, &dirty, 4);
	memcpy(saved, ram, MEMORY);
	get(vcpus[0]);
	struct kvm_segment flat = { .limit = 0xffffffff, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1, .selector = 16 };
	sregs.ds = sregs.es = sregs.ss = flat;
	flat.type = 11;
	flat.selector = 8;
	sregs.cs = flat;
	sregs.cr0 |= 1;
	CALL(vcpus[0], KVM_SET_SREGS2, &sregs);
	regs.rip = 0x1000;
	CALL(vcpus[0], KVM_SET_REGS, &regs);
	const int rounds = dirty < ALL_PAGES ? 101 : 15;
	for (int round = 0; round < rounds; round++) {
		on_all(1, run_to_out);
		get_machine();
		double start = now();
		go_back(bitmap);
		if (count) {
			put_machine();
			read_tsc();
			on_all(count, put);
		}
		times[round] = now() - start;
	}
	return median(times, rounds);
}

/* What a fuzzer does, over and over; pages() has left the guest at its port write, and the state as it was there. */
static double loop(uint32_t dirty)
{
	static double times[ROUNDS];
	static const char input[64];
	pages(1, dirty, here);
	for (int round = 0; round < ROUNDS; round++) {
		double start = now();
		go_back(bitmap);
		put_machine();
		read_tsc();
		put(vcpus[0]);
		memcpy(ram + 0x8000, input, sizeof input);
		CALL(vcpus[0], KVM_RUN, 0);
		if (runs[0]->exit_reason != KVM_EXIT_IO)
			exit(1);
		times[round] = now() - start;
	}
	return median(times, ROUNDS);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	int count = argc > 2 ? atoi(argv[2]) : 0;
	if (!strcmp(what, "hooks") && count >= 1 && count <= MAX_VCPUS)
		hooks(count);
	else if (!strcmp(what, "pio"))
		pio();
	else if (!strcmp(what, "pages") ||
		 ((!strcmp(what, "restore") || !strcmp(what, "threads")) && count >= 1 && count <= MAX_VCPUS)) {
		void (*on_all)(int, work_on *) = what[0] == 't' ? on_threads : here;

		build(count ? count : 1);
		find_offsets();
		if (what[0] == 't')
			start_threads(count);
		double few = pages(count, 10, on_all), many = pages(count, 1000, on_all);
		printf("{\"10\": %.2f, \"1000\": %.2f, \"all\": %.2f}\n", few, many, pages(count, ALL_PAGES, on_all));
	} else if (!strcmp(what, "loop") && count >= 1 && count <= 1000) {
		build(1);
		find_offsets();
		printf("{\"execution\": %.2f}\n", loop(count));
	} else {
		fprintf(stderr, "usage: floor hooks VCPUS | pio | pages | restore VCPUS | threads VCPUS | loop PAGES\n");
		return 2;
	}
	return 0;
}
