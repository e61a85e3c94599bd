/*
 * The part of the kernel backend that must be C: ioctls in batches, the KVM_RUN loop, pages. Everything here runs
 * without the GIL (cffi releases it around each call) and holds no lock. Policy is in Python.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096

/* Python reads these by offset (exits.py, vcpu.py). */
_Static_assert(offsetof(struct kvm_run, io) == 32, "kvm_run's union");
_Static_assert(offsetof(struct kvm_run, io.data_offset) == 40, "kvm_run.io");
_Static_assert(offsetof(struct kvm_run, mmio.is_write) == 52, "kvm_run.mmio");
_Static_assert(offsetof(struct kvm_run, debug.arch.dr6) == 48, "kvm_run.debug");
_Static_assert(offsetof(struct kvm_run, emulation_failure.insn_size) == 48, "kvm_run.emulation_failure");
_Static_assert(sizeof(struct kvm_coalesced_mmio) == 24, "coalesced entry");
_Static_assert(sizeof(struct vd_sample) == 16 + 144 + 312 + 64, "sample");

/* --- ioctls ----------------------------------------------------------------------------------------------- */

/* The result, or -errno. EINTR is retried: none of the ioctls made through here waits for anything. */
int vd_ioctl(int fd, unsigned long request, void *argument)
{
	int result;

	do
		result = ioctl(fd, request, argument);
	while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : result;
}

int vd_ioctl_value(int fd, unsigned long request, unsigned long value)
{
	return vd_ioctl(fd, request, (void *)value);
}

/* Make the calls in order up to the first failure that isn't tolerated; returns how many succeeded before it. */
int vd_batch(int fd, char *buffer, struct vd_call *calls, int count)
{
	for (int i = 0; i < count; i++) {
		struct vd_call *call = &calls[i];
		char *argument = buffer + call->offset;
		struct kvm_device_attr tsc_offset = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET };
		uint32_t number;

		memcpy(&number, argument, sizeof(number)); /* rows are packed: not always aligned */
		if (call->flags & VD_TAKES_VALUE)
			argument = (char *)(uintptr_t)number;
		if (call->flags & VD_TSC_OFFSET) {
			tsc_offset.addr = (uintptr_t)argument;
			argument = (char *)&tsc_offset;
		}
		call->result = vd_ioctl(fd, call->request, argument);
		call->error = call->result < 0 ? -call->result : 0;
		if (call->result >= 0 && (call->flags & VD_GIVES_VALUE))
			memcpy(buffer + call->offset, &call->result, sizeof(call->result));
		if (call->result < 0 || ((call->flags & VD_COUNTED) && (uint32_t)call->result < number))
			if (!(call->flags & VD_TOLERATED))
				return i;
	}
	return count;
}

int vd_irq_line(int fd, uint32_t gsi, uint32_t level)
{
	struct kvm_irq_level line = { .irq = gsi, .level = level };

	return vd_ioctl(fd, KVM_IRQ_LINE, &line);
}

/* --- Bells ------------------------------------------------------------------------------------------------- */

enum { SILENT, RUNG = VD_RUNG, AWAITED };

/*
 * A thread that waits spins first, as the kernel's haltpoll does (guest-halt-polling.rst): waking a core that sleeps
 * takes longer than most of what threads wait for here. Only while every VCPU's thread and one more have a core each,
 * not on the core of the thread that is waited for, and for a while not where that came to nothing, each time for
 * longer, or where the core was away for as long as busy threads have it: they want it then, and who sleeps gets it
 * back sooner than who has spun.
 */
#define SPIN_NS 200000
#define AWAY_NS 500000
#define SHORT_WHILE_NS 1000000
#define LONG_WHILE_NS 64000000
static _Thread_local int64_t no_spin_until, next_while = SHORT_WHILE_NS;
static _Thread_local int32_t waited_for; /* the core, from 1 on, of the thread that this one has roused last; 0: unknown */
static int cores;
static atomic_int vcpus;

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Each says where one thread was a moment ago: nothing hangs on its being true still. */
static int32_t core(int32_t *place)
{
	return atomic_load_explicit((_Atomic int32_t *)place, memory_order_relaxed);
}

static void note_core(int32_t *place)
{
	atomic_store_explicit((_Atomic int32_t *)place, sched_getcpu() + 1, memory_order_relaxed);
}

static void note_cores(struct vd_bell *bell)
{
	waited_for = core(&bell->waits_on);
	note_core(&bell->rung_on);
}

void vd_bell_ring(struct vd_bell *bell)
{
	note_cores(bell);
	if (atomic_exchange((_Atomic uint32_t *)&bell->state, RUNG) == AWAITED)
		syscall(SYS_futex, &bell->state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

void vd_make(struct vd_job *job)
{
	job->thread = (uint64_t)pthread_self();
	job->began_ns = now_ns();
	job->done = vd_batch(job->fd, job->buffer, job->calls, job->count);
	job->ended_ns = now_ns();
}

/* Have the thread that waits at the bell make the job, and ring the job's own bell. 0: another one is under way. */
int vd_bell_hand(struct vd_bell *bell, struct vd_job *job)
{
	uint32_t awaited = AWAITED;
	struct vd_job *none = NULL;

	note_cores(bell);
	if (!atomic_compare_exchange_strong((struct vd_job *_Atomic *)&bell->job, &none, job))
		return 0;
	if (atomic_compare_exchange_strong((_Atomic uint32_t *)&bell->state, &awaited, SILENT))
		syscall(SYS_futex, &bell->state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	return 1;
}

/* Did a job come, or a ring, before it was time to sleep? */
static int spin(struct vd_bell *bell, int64_t timeout_ns)
{
	int32_t rung_on = core(&bell->rung_on), other = rung_on ? rung_on : waited_for;
	int64_t now = now_ns(), before = now;
	int64_t end = now + (timeout_ns < 0 || timeout_ns > SPIN_NS ? SPIN_NS : timeout_ns);

	if (!timeout_ns || now < no_spin_until || atomic_load(&vcpus) >= cores || other == core(&bell->waits_on))
		return 0;
	for (; now < end; before = now, now = now_ns()) {
		if (atomic_load((struct vd_job *_Atomic *)&bell->job) ||
		    atomic_load((_Atomic uint32_t *)&bell->state) == RUNG) {
			next_while = SHORT_WHILE_NS;
			return 1;
		}
		__builtin_ia32_pause();
	}
	if (now - before > AWAY_NS)
		next_while = LONG_WHILE_NS;
	no_spin_until = now + next_while;
	next_while = 2 * next_while < LONG_WHILE_NS ? 2 * next_while : LONG_WHILE_NS;
	return 0;
}

/* By the thread that waits at the bell: make the job that was handed over, if there is one; was there? */
int vd_bell_make(struct vd_bell *bell)
{
	struct vd_job *_Atomic *slot = (struct vd_job *_Atomic *)&bell->job;
	struct vd_job *job = atomic_load(slot);

	if (!job)
		return 0;
	vd_make(job);
	atomic_store(slot, NULL); /* first: who hears the ring may hand over the next */
	vd_bell_ring(&job->answer);
	return 1;
}

/*
 * 1 once it is rung, which silences it; 0 after timeout_ns (negative: never) or a signal. One thread waits; jobs that
 * it is handed meanwhile it makes here.
 */
int vd_bell_wait(struct vd_bell *bell, int64_t timeout_ns)
{
	_Atomic uint32_t *state = (_Atomic uint32_t *)&bell->state;
	struct vd_job *_Atomic *slot = (struct vd_job *_Atomic *)&bell->job;
	struct timespec limit = { timeout_ns / 1000000000, timeout_ns % 1000000000 };

	for (int slept = 0;; ) {
		uint32_t rung = RUNG, silent = SILENT, awaited = AWAITED;

		note_core(&bell->waits_on);
		if (vd_bell_make(bell)) {
			slept = 0;
			continue;
		}
		if (atomic_compare_exchange_strong(state, &rung, SILENT))
			return 1;
		if (slept)
			return 0;
		if (spin(bell, timeout_ns))
			continue;
		/* Who hands a job over sees AWAITED, or we see the job. */
		if (atomic_compare_exchange_strong(state, &silent, AWAITED) && !atomic_load(slot))
			slept = syscall(SYS_futex, state, FUTEX_WAIT_PRIVATE, AWAITED,
					timeout_ns < 0 ? NULL : &limit, NULL, 0) != 0;
		atomic_compare_exchange_strong(state, &awaited, SILENT);
	}
}

/* --- VCPUs ------------------------------------------------------------------------------------------------ */

#define ALL_REGS (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS)

struct vd_vcpu {
	int fd;
	int sync_regs; /* the kernel has KVM_CAP_SYNC_REGS for all three */
	size_t size;
	struct kvm_run *run;
	struct kvm_coalesced_mmio_ring *ring; /* NULL without the capability */
	_Atomic pid_t tid;
	atomic_int stop;
	atomic_int want_sample;
	_Atomic uint64_t sequence; /* of the newest sample; it is in samples[sequence & 1] */
	struct vd_sample samples[2];
};

static int kick_signal;

static void do_nothing(int signal)
{
	(void)signal;
}

/* The kick's signal only has to interrupt KVM_RUN; without SA_RESTART, so that it does. */
int vd_install_handler(void)
{
	struct sigaction action = { .sa_handler = do_nothing };
	cpu_set_t ours;

	cores = sched_getaffinity(0, sizeof(ours), &ours) ? 1 : CPU_COUNT(&ours);
	kick_signal = SIGRTMIN + 1;
	sigemptyset(&action.sa_mask);
	return sigaction(kick_signal, &action, NULL) ? -errno : 0;
}

/* Map the VCPU's pages. NULL and errno on failure. The fd stays the caller's. */
struct vd_vcpu *vd_vcpu_open(int fd, size_t size, int sync_regs, int ring_page)
{
	struct vd_vcpu *v = calloc(1, sizeof(*v));
	void *page;

	if (!v)
		return NULL;
	page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (page == MAP_FAILED) {
		int error = errno;

		free(v);
		errno = error;
		return NULL;
	}
	atomic_fetch_add(&vcpus, 1);
	v->fd = fd;
	v->size = size;
	v->sync_regs = sync_regs;
	v->run = page;
	if (ring_page)
		v->ring = (void *)((char *)page + (size_t)ring_page * PAGE);
	return v;
}

void vd_vcpu_close(struct vd_vcpu *v)
{
	munmap(v->run, v->size);
	free(v);
	atomic_fetch_sub(&vcpus, 1);
}

char *vd_vcpu_page(struct vd_vcpu *v)
{
	return (char *)v->run;
}

/*
 * The calling thread is the one that kicks go to. Where it's woken on the core of the thread that woke it, it must not
 * take that core at once, least of all for a busy guest: a batch thread waits for its turn (sched(7)). One that was
 * given another policy (chrt) keeps it, and a refusal (seccomp) costs nothing but time.
 */
void vd_bind(struct vd_vcpu *v)
{
	struct sched_param param = { 0 };
	sigset_t set;

	if (sched_getscheduler(0) == SCHED_OTHER)
		sched_setscheduler(0, SCHED_BATCH, &param);
	sigemptyset(&set);
	sigaddset(&set, kick_signal);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	atomic_store(&v->tid, (pid_t)syscall(SYS_gettid));
}

static void set_immediate_exit(struct vd_vcpu *v, __u8 value)
{
	atomic_store((_Atomic __u8 *)&v->run->immediate_exit, value);
}

static void ask_for_regs(struct vd_vcpu *v)
{
	if (v->sync_regs)
		atomic_store((_Atomic __u64 *)&v->run->kvm_valid_regs, ALL_REGS);
}

static void interrupt(struct vd_vcpu *v)
{
	pid_t tid = atomic_load(&v->tid);

	ask_for_regs(v);
	set_immediate_exit(v, 1);
	if (tid)
		syscall(SYS_tgkill, getpid(), tid, kick_signal);
}

/*
 * A flag is raised before immediate_exit. vd_run clears immediate_exit before it looks at the flags, and looks at
 * them before each entry: so a flag raised after the look finds an immediate_exit that nobody clears any more.
 */
void vd_kick(struct vd_vcpu *v)
{
	atomic_store(&v->stop, 1);
	interrupt(v);
}

void vd_request_sample(struct vd_vcpu *v)
{
	/* One that is still wanted has its signal under way. */
	if (v->sync_regs && !atomic_exchange(&v->want_sample, 1))
		interrupt(v);
}

/* immediate_exit stays: if it was a kick's, one KVM_RUN comes back early and vd_run enters again. */
void vd_clear_kick(struct vd_vcpu *v)
{
	atomic_store(&v->stop, 0);
}

static int enter(struct vd_vcpu *v)
{
	/* Bit 1 of RFLAGS is always set: zero tells that the kernel stored no registers on this exit. */
	v->run->s.regs.regs.rflags = 0;
	return ioctl(v->fd, KVM_RUN, 0);
}

/*
 * Publish the registers as they are now, after an exit with no I/O pending. If that exit didn't store them, one
 * more KVM_RUN that doesn't enter the guest does (api.rst, KVM_CAP_SYNC_REGS; immediate_exit).
 */
void vd_publish(struct vd_vcpu *v)
{
	struct kvm_sync_regs *regs = &v->run->s.regs;
	uint64_t next = atomic_load(&v->sequence) + 1;
	struct vd_sample *sample = &v->samples[next & 1];

	if (!v->sync_regs)
		return;
	if (!regs->regs.rflags) {
		ask_for_regs(v);
		set_immediate_exit(v, 1);
		enter(v);
		set_immediate_exit(v, 0);
		if (!regs->regs.rflags)
			return;
	}
	sample->sequence = next;
	sample->time_ns = now_ns();
	sample->regs = regs->regs;
	sample->sregs = regs->sregs;
	sample->events = regs->events;
	atomic_store(&v->sequence, next);
}

/* The same where the registers have been written since: what the exit stored of them is no more. */
void vd_publish_anew(struct vd_vcpu *v)
{
	v->run->s.regs.regs.rflags = 0;
	vd_publish(v);
}

/*
 * Copy the newest sample; 0 if there is none. Two slots rather than a seqlock: a reader never waits for a VCPU
 * thread that was preempted in mid-write, and retries only if a whole new sample came meanwhile.
 */
int vd_sample(struct vd_vcpu *v, struct vd_sample *out)
{
	for (;;) {
		uint64_t sequence = atomic_load(&v->sequence);

		if (!sequence)
			return 0;
		*out = v->samples[sequence & 1];
		atomic_thread_fence(memory_order_acquire);
		if (atomic_load(&v->sequence) == sequence)
			return 1;
	}
}

static int ring_waits(const struct vd_vcpu *v)
{
	return v->ring && *(volatile __u32 *)&v->ring->first != *(volatile __u32 *)&v->ring->last;
}

/*
 * Run the guest until Python must see to something: KVM_EXIT_*, perhaps | VD_RING_WAITS; VD_KICKED; or -errno.
 * After VD_KICKED no I/O is pending: it came with EINTR, and KVM_RUN completes I/O before it returns that.
 */
int vd_run(struct vd_vcpu *v)
{
	struct kvm_run *run = v->run;

	for (;;) {
		int wanted, stop;

		if (atomic_load(&v->stop) || atomic_load(&v->want_sample))
			set_immediate_exit(v, 1);
		if (enter(v) == 0) {
			int reason = (int)run->exit_reason;

			if (reason == KVM_EXIT_INTR)
				continue;
			/* Storing the registers costs each exit something: only while they are asked for. */
			if (run->kvm_valid_regs && (reason == KVM_EXIT_IO || reason == KVM_EXIT_MMIO))
				run->kvm_valid_regs = 0;
			return ring_waits(v) ? reason | VD_RING_WAITS : reason;
		}
		if (errno == EAGAIN) /* an AP has got its SIPI: api.rst leaves entering it to the next KVM_RUN */
			continue;
		if (errno != EINTR)
			return -errno;
		set_immediate_exit(v, 0);
		wanted = atomic_exchange(&v->want_sample, 0);
		stop = atomic_load(&v->stop);
		if (wanted || stop)
			vd_publish(v);
		if (stop)
			return ring_waits(v) ? VD_KICKED | VD_RING_WAITS : VD_KICKED;
	}
}

/* --- The coalesced ring: one a VM, seen through each VCPU's mapping. One consumer at a time. --------------- */

#define RING_SLOTS ((PAGE - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio))

/* Copy the waiting entries to `out` (VD_RING_BYTES), oldest first; returns how many. They stay in the ring. */
int vd_ring_copy(struct vd_vcpu *v, char *out)
{
	int count = 0;
	uint32_t slot, last;

	if (!v->ring)
		return 0;
	last = atomic_load_explicit((_Atomic __u32 *)&v->ring->last, memory_order_acquire);
	for (slot = v->ring->first; slot != last; slot = (slot + 1) % RING_SLOTS)
		memcpy(out + sizeof(struct kvm_coalesced_mmio) * (size_t)count++, &v->ring->coalesced_mmio[slot],
		       sizeof(struct kvm_coalesced_mmio));
	return count;
}

/* The oldest `count` entries have been served. */
void vd_ring_release(struct vd_vcpu *v, int count)
{
	atomic_store_explicit((_Atomic __u32 *)&v->ring->first, (v->ring->first + (uint32_t)count) % RING_SLOTS,
			      memory_order_release);
}

/* --- Pages ------------------------------------------------------------------------------------------------ */

/*
 * Take a slot's dirty log; the numbers of its dirty pages go to `out` (room for 64 * words). Returns how many, or
 * -errno.
 */
int64_t vd_dirty_pages(int fd, uint32_t slot, uint64_t *bitmap, int64_t words, int64_t *out)
{
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = bitmap };
	int64_t count = 0;
	int result = vd_ioctl(fd, KVM_GET_DIRTY_LOG, &log);

	if (result < 0)
		return result;
	for (int64_t word = 0; word < words; word++)
		for (uint64_t bits = bitmap[word]; bits; bits &= bits - 1)
			out[count++] = word * 64 + __builtin_ctzll(bits);
	return count;
}

/*
 * Copy n pages. The page numbers say which of `to`'s and `from`'s pages (NULL: 0, 1, 2…), each checked against how
 * many there are; returns n, or the place of the first number out of range, with the pages before it copied.
 */
int64_t vd_copy_pages(char *to, const int64_t *to_pages, int64_t to_count, const char *from,
		      const int64_t *from_pages, int64_t from_count, int64_t n)
{
	for (int64_t i = 0; i < n; i++) {
		int64_t target = to_pages ? to_pages[i] : i;
		int64_t source = from_pages ? from_pages[i] : i;

		if (target < 0 || target >= to_count || source < 0 || source >= from_count)
			return i;
		memcpy(to + target * PAGE, from + source * PAGE, PAGE);
	}
	return n;
}

/*
 * Take a slot's dirty log, and give its dirty pages, and those that `marks` numbers, the contents that `places` has for
 * them: which of the `from_count` pages of `from`. Returns how many pages that were, or -errno: -ERANGE where a number
 * is out of range, with the pages before it filled.
 */
int64_t vd_go_back(int fd, uint32_t slot, uint64_t *bitmap, int64_t count, const int64_t *marks, int64_t marked, char *to,
		   const char *from, const int64_t *places, int64_t from_count)
{
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = bitmap };
	int64_t filled = 0;
	int result = vd_ioctl(fd, KVM_GET_DIRTY_LOG, &log);

	if (result < 0)
		return result;
	for (int64_t i = 0; i < marked; i++) {
		if (marks[i] < 0 || marks[i] >= count)
			return -ERANGE;
		bitmap[marks[i] / 64] |= UINT64_C(1) << marks[i] % 64;
	}
	for (int64_t word = 0; word < (count + 63) / 64; word++)
		for (uint64_t bits = bitmap[word]; bits; bits &= bits - 1) {
			int64_t page = word * 64 + __builtin_ctzll(bits);

			if (page >= count || places[page] < 0 || places[page] >= from_count)
				return -ERANGE;
			memcpy(to + page * PAGE, from + places[page] * PAGE, PAGE);
			filled++;
		}
	return filled;
}
