/* What build_ffi.py declares to Python; see shim.c. */
#ifndef VMDECK_SHIM_H
#define VMDECK_SHIM_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__)
#error "vmdeck's kernel backend is for x86-64"
#endif
#if !defined(KVM_CAP_DISABLE_QUIRKS2) || !defined(KVM_GET_XSAVE2)
#error "linux/kvm.h is too old: install the headers of Linux 5.18 or newer (Debian: linux-libc-dev)"
#endif

/* One row of a batch: an ioctl whose argument lies at `offset` in the batch's buffer. */
struct vd_call {
	uint64_t request;
	uint32_t offset;
	uint32_t flags;
	int32_t result;
	int32_t error; /* errno; 0 with a counted row that moved too few entries */
};

#define VD_TAKES_VALUE 1 /* the argument is the 32-bit number at `offset` itself */
#define VD_GIVES_VALUE 2 /* the ioctl's result is the number: stored at `offset` */
#define VD_COUNTED 4     /* the result counts entries; fewer than the u32 at `offset` is a failure */
#define VD_TOLERATED 8   /* a failure doesn't stop the batch */
#define VD_TSC_OFFSET 16 /* the argument is that device attribute, whose 64-bit value lies at `offset` */

int vd_ioctl(int fd, unsigned long request, void *argument);
int vd_ioctl_value(int fd, unsigned long request, unsigned long value);
int vd_batch(int fd, char *buffer, struct vd_call *calls, int count);
int vd_irq_line(int fd, uint32_t gsi, uint32_t level);

struct vd_job;

#define VD_RUNG 1 /* a bell's state: nobody has heard it yet */

/* Where one thread waits. Both all zero at first. */
struct vd_bell {
	uint32_t state;
	int32_t rung_on; /* the core that it was rung on last, from 1 on; 0: unknown */
	int32_t waits_on; /* and the one that it is awaited on */
	struct vd_job *job; /* handed over, and not done yet */
};

/* A batch to be made on another thread. It and what it points to must stay until its own bell has been rung. */
struct vd_job {
	struct vd_bell answer;
	int32_t fd;
	int32_t count;
	char *buffer;
	struct vd_call *calls;
	int64_t began_ns; /* CLOCK_MONOTONIC, and so the end */
	int64_t ended_ns;
	uint64_t thread; /* pthread_self() of the one that made it */
	int32_t done;    /* what vd_batch returned */
};

void vd_make(struct vd_job *job);
void vd_bell_ring(struct vd_bell *bell);
int vd_bell_hand(struct vd_bell *bell, struct vd_job *job);
int vd_bell_make(struct vd_bell *bell);
int vd_bell_wait(struct vd_bell *bell, int64_t timeout_ns);

struct vd_sample {
	uint64_t sequence;
	int64_t time_ns;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_vcpu_events events;
};

#define VD_KICKED 0x8000     /* beyond every KVM_EXIT_* */
#define VD_RING_WAITS 0x10000 /* or'ed in: the coalesced ring must be drained before this exit is served */

struct vd_vcpu;
int vd_install_handler(void);
struct vd_vcpu *vd_vcpu_open(int fd, size_t size, int sync_regs, int ring_page);
void vd_vcpu_close(struct vd_vcpu *v);
char *vd_vcpu_page(struct vd_vcpu *v);
void vd_bind(struct vd_vcpu *v);
int vd_run(struct vd_vcpu *v);
void vd_publish(struct vd_vcpu *v);
void vd_publish_anew(struct vd_vcpu *v);
int vd_sample(struct vd_vcpu *v, struct vd_sample *out);
void vd_request_sample(struct vd_vcpu *v);
void vd_kick(struct vd_vcpu *v);
void vd_clear_kick(struct vd_vcpu *v);

#define VD_RING_BYTES 4096
int vd_ring_copy(struct vd_vcpu *v, char *out);
void vd_ring_release(struct vd_vcpu *v, int count);

int64_t vd_dirty_pages(int fd, uint32_t slot, uint64_t *bitmap, int64_t words, int64_t *out);
int64_t vd_copy_pages(char *to, const int64_t *to_pages, int64_t to_count, const char *from,
		      const int64_t *from_pages, int64_t from_count, int64_t n);
int64_t vd_go_back(int fd, uint32_t slot, uint64_t *bitmap, int64_t count, const int64_t *marks, int64_t marked, char *to,
		   const char *from, const int64_t *places, int64_t from_count);

#endif
