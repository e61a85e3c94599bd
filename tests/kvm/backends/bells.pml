/*
 * The bells of kvm/backends/kernel/shim.c, for spin: one VCPU's thread that waits, and two others that post mail, hand
 * jobs over, and wait for the answers or give up. Each statement, or atomic block, is one atomic operation of the C code
 * (all are sequentially consistent) or one system call; a futex may wake up for nothing or for a signal.
 *
 * What it proves (test_bells_model.py): no ring and no job is lost; each job is made once, and before its answer is
 * rung; mail is read after what was handed over before it; the shim looks at no job that nobody keeps any more.
 */
#define SILENT 0
#define RUNG 1
#define AWAITED 2
#ifndef JOBS
#define JOBS 2	/* numbered from 1, as their answers' bells are; bell 0 is the VCPU's. 3: a minute, and 2 GB */
#endif
#ifndef ODDITIES
#define ODDITIES 1	/* wake-ups for nothing, and signals */
#endif

byte state[JOBS + 1];
bool asleep[JOBS + 1];
byte finished;
byte slot;		/* bell 0's job */
byte made[JOBS + 1];
bool heard[JOBS + 1];	/* answered or given up: from then on only FutexBell keeps it */
bool gone[JOBS + 1];	/* its memory is freed */
chan mail = [JOBS + 3] of { byte };	/* each with the job that waited when it was posted */
byte oddities = ODDITIES;
byte oldest, older, newer;	/* FutexBell._handed */

/* FUTEX_WAKE and FUTEX_WAIT */
#define WAKE(b) asleep[b] = false
inline futex_wait(b, failed)
{
	atomic {
		if
		:: state[b] == AWAITED -> asleep[b] = true
		:: else -> failed = true	/* EAGAIN */
		fi
	}
	if
	:: failed
	:: !failed ->
		if
		:: atomic { !asleep[b] }
		:: atomic { asleep[b] && oddities > 0 -> oddities--; asleep[b] = false }
		:: atomic { asleep[b] && oddities > 0 -> oddities--; asleep[b] = false; failed = true }	/* EINTR */
		fi
	fi
}

inline ring(b)
{
	assert(!gone[b]);	/* note_cores */
	atomic { assert(!gone[b]); was = state[b]; state[b] = RUNG }
	if
	:: was == AWAITED -> WAKE(b)	/* of the address only: the memory may be gone */
	:: else
	fi
}

inline hand(j, taken)
{
	atomic {
		if
		:: slot == 0 -> slot = j; taken = true
		:: else -> taken = false
		fi
	}
	if
	:: taken ->
		atomic {
			if
			:: state[0] == AWAITED -> state[0] = SILENT; was = AWAITED
			:: else -> was = SILENT
			fi
		}
		if
		:: was == AWAITED -> WAKE(0)
		:: else
		fi
	:: else
	fi
}

/* vd_bell_wait: until it returns 1 (0 only makes the caller call again). */
inline wait(b, mine)
{
	slept = false;
	do
	:: true ->
		atomic { job = (mine -> slot : 0) };
		if
		:: job != 0 ->
			make(job);
			slept = false
		:: else ->
			atomic {
				if
				:: state[b] == RUNG -> state[b] = SILENT; break
				:: else
				fi
			}
			if
			:: slept -> slept = false	/* returns 0; called again */
			:: else ->
				atomic {
					was = state[b];
					if
					:: was == SILENT -> state[b] = AWAITED
					:: else
					fi
				}
				if
				:: was == SILENT ->
#ifndef SLEEPS_BLINDLY
					atomic { job = (mine -> slot : 0) };
#endif
					if
					:: job == 0 -> futex_wait(b, slept)
					:: else
					fi
				:: else
				fi;
				atomic {
					if
					:: state[b] == AWAITED -> state[b] = SILENT
					:: else
					fi
				}
			fi
		fi
	od
}

inline make(j)
{
	assert(!gone[j]);
	made[j]++;
	assert(made[j] == 1);
	atomic { slot = 0 };
	ring(j)
}

inline post()
{
	mail!slot;
	ring(0)
}

/* Vcpu._work, for ever */
active proctype vcpu()
{
	byte was, job; bool slept;
	do
	:: nempty(mail) ->
#ifndef MAIL_OVERTAKES
		atomic { job = slot };
		if
		:: job != 0 -> make(job)
		:: else
		fi;
#endif
		atomic {
			mail?job;
			assert(job == 0 || made[job] == 1);	/* what was handed over before it was posted */
			job = 0
		}
	:: empty(mail) ->		wait(0, true)
	od
}

inline keep(j)
{
	atomic {
		if
		:: oldest != 0 && heard[oldest] -> gone[oldest] = true
		:: else
		fi;
		oldest = older; older = newer; newer = j
	}
}
inline unkeep(j)	/* refused: not kept any more */
{
	atomic {
		if
		:: newer == j -> newer = older; older = oldest; oldest = 0
		:: older == j -> older = oldest; oldest = 0
		:: oldest == j -> oldest = 0
		:: else
		fi
	}
}
/* Vcpu.make and Reply.outcome, one caller at a time per job; GIVES_UP: it may raise instead of waiting. */
inline ask(j)
{
	keep(j);
	hand(j, taken);
	if
	:: taken
	:: else -> unkeep(j)
	fi;
	if
	:: taken ->
		if
		:: true -> wait(j, false); assert(made[j] == 1)
		:: true	/* a time-out, or ctrl-c */
		fi;
		heard[j] = true
	:: else -> post()	/* made by the VCPU's thread from its mailbox */
	fi
}

active proctype one()
{
	byte was, job; bool slept, taken;
	ask(1);
#if JOBS > 2
	ask(2);
#endif
	post();
	finished++
}

active proctype two()
{
	byte was, job; bool slept, taken;
	post();
	ask(JOBS);
	finished++
}

/* In the end all mail is read, and no job waits. */
active proctype end_state()
{
	atomic { timeout -> assert(empty(mail) && slot == 0 && finished == 2) }
}
