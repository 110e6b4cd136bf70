/*
 * Threads that write, check and take signals without a break.
 *
 *   writers PAGES THREADS PAUSE_US [IDLE_US]
 *
 * Thread t owns the pages p with p % THREADS == t.  It checks random pages of
 * its own all the time and restamps one every PAUSE_US: mostly one of a small hot
 * set, sometimes any, so that most pages come to rest between two writes.  The
 * few versions of a page are the same in every sibling: a restamped page can be
 * merged again.  An interval timer and one POSIX timer per thread keep signals
 * coming.  With IDLE_US a thread sleeps so long after each look.  Commands: `report` (so far), `stop` (join all, verify all, report).
 */
#include "victim.h"
#include <stdatomic.h>
#include <sys/time.h>

static struct area area;
static size_t threads;
static double pause_seconds;
static useconds_t idle;
static atomic_bool stopping;
static atomic_long writes, checks, signals_taken, longest_gap_us;

static void tick(int UNUSED number)
{
	atomic_fetch_add_explicit(&signals_taken, 1, memory_order_relaxed);
}

static void start_thread_timer(void)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 3};
	event._sigev_un._tid = syscall(SYS_gettid);
	timer_t timer;
	must(!timer_create(CLOCK_MONOTONIC, &event, &timer));
	struct itimerspec every = {{0, 7000000}, {0, 7000000}};
	must(!timer_settime(timer, 0, &every, NULL));
}

static void *writer(void *argument)
{
	size_t self = (size_t)argument, mine = area.pages / threads;
	uint64_t state = self * 104729 + getpid();
	double last_turn = now_seconds(), next_write = last_turn;
	start_thread_timer();
	while (!stopping) {
		size_t page = (random_next(&state) % mine) * threads + self;
		check_page(area.at + page * PAGE, area.keys[page], "restamped page");
		atomic_fetch_add_explicit(&checks, 1, memory_order_relaxed);
		if (idle)
			usleep(idle);
		double turn = now_seconds();
		long gap = (long)((turn - last_turn) * 1e6), longest = longest_gap_us;
		while (gap > longest && !atomic_compare_exchange_weak(&longest_gap_us, &longest, gap))
			;
		last_turn = turn;
		if (turn < next_write)
			continue;
		next_write = turn + pause_seconds;
		if (random_next(&state) % 16)
			page = (page / threads % (mine / 16 + 1)) * threads + self;
		check_page(area.at + page * PAGE, area.keys[page], "page before a restamp");
		area_set(&area, page, 5000000 + page * 3 + random_next(&state) % 3);
		atomic_fetch_add_explicit(&writes, 1, memory_order_relaxed);
	}
	return NULL;
}

int main(int count, char **arguments)
{
	victim_start();
	must(count == 4 || count == 5);
	idle = count == 5 ? strtoul(arguments[4], 0, 0) : 0;
	size_t pages = strtoul(arguments[1], 0, 0);
	threads = strtoul(arguments[2], 0, 0);
	pause_seconds = strtoul(arguments[3], 0, 0) * 1e-6;
	area = area_new("stamps", pages - pages % threads, 5000000, 1);
	for (size_t p = 0; p < area.pages; p++)
		area_set(&area, p, 5000000 + p * 3);
	struct sigaction action = {.sa_handler = tick, .sa_flags = SA_RESTART};
	sigaction(SIGALRM, &action, NULL);
	sigaction(SIGRTMIN + 3, &action, NULL);
	struct itimerval every = {{0, 3000}, {0, 3000}};
	setitimer(ITIMER_REAL, &every, NULL);
	pthread_t handles[64];
	must(threads <= 64);
	for (size_t t = 0; t < threads; t++)
		must(!pthread_create(&handles[t], NULL, writer, (void *)t));
	say("READY at=%p:%zu", area.at, area.pages);
	for (char *line; (line = command());) {
		if (!strcmp(line, "stop")) {
			stopping = 1;
			for (size_t t = 0; t < threads; t++)
				pthread_join(handles[t], NULL);
			area_check(&area);
		} else if (strcmp(line, "report")) {
			failed("unknown command %s", line);
		}
		say("OK writes=%ld checks=%ld signals=%ld longest_gap_us=%ld", (long)writes, (long)checks,
		    (long)signals_taken, atomic_exchange(&longest_gap_us, 0));
	}
	return 0;
}
