/*
 * One process of a workload: pages that every process of it has, then pages of its own.
 *
 *   pages KIND SHARED OWN NUMBER
 *
 * SHARED and OWN in pages; NUMBER tells the processes apart. KIND says what the shared
 * pages are: `mix` (each its own content, in the same order everywhere), `scattered` (in
 * an order of this process's own), `zeros`, `constant` (one content in all of them).
 *
 * Commands: `mergeable` (MADV_MERGEABLE), `write RATE` (a thread begins to rewrite own
 * pages, RATE times a second, 0: as often as it can), `reset` (count anew), `count`,
 * `halt` (the thread ends), `rewrite PERCENT` (once, that share of all its pages, of its
 * own ones; while no thread writes), `aio` (makes a context for asynchronous I/O), `check`
 * (all bytes). It knows what each page must contain and keeps that where nobody merges.
 */
#include "../../tests/victims/victim.h"
#include <stdatomic.h>
#include <stdbool.h>

#define PAGES_PER_EVENT 8

static struct area memory;
static size_t shared, own;
static uint64_t own_key;

static pthread_t writer;
static double period; /* seconds; 0: without a break */
static atomic_bool halted, starting_anew;
static _Atomic uint64_t events;
static _Atomic double began, last, longest; /* seconds */

static void shuffle(uint64_t *keys, size_t count, uint64_t seed)
{
	for (size_t left = count; left > 1; left--) {
		size_t other = random_next(&seed) % left;
		uint64_t key = keys[left - 1];
		keys[left - 1] = keys[other];
		keys[other] = key;
	}
}

static void fill(const char *kind, uint64_t number)
{
	bool same = !strcmp(kind, "zeros") || !strcmp(kind, "constant");
	uint64_t first = !strcmp(kind, "zeros") ? 0 : 1;
	own_key = (number + 1) << 48;
	memory.name = kind;
	memory.pages = shared + own;
	memory.at = map_anonymous(memory.pages * PAGE, PROT_READ | PROT_WRITE);
	memory.keys = map_knowledge(memory.pages * 8);
	for (size_t p = 0; p < memory.pages; p++)
		memory.keys[p] = p >= shared ? own_key + p : same ? first : first + p;
	if (!strcmp(kind, "scattered"))
		shuffle(memory.keys, shared, own_key);
	for (size_t p = 0; p < memory.pages; p++)
		fill_page(memory.at + p * PAGE, memory.keys[p]);
}

static void renew(size_t first)
{
	for (size_t p = first; p < first + PAGES_PER_EVENT; p++)
		area_set(&memory, p, own_key + p);
}

static void event(uint64_t *state)
{
	size_t first = shared + random_next(state) % (own - PAGES_PER_EVENT + 1);
	own_key += 1ul << 20; /* a content that no page has had */
	renew(first);
}

/* The pages come in groups, as far apart as there is room; their number. */
static size_t rewrite(unsigned long percent)
{
	static uint64_t state;
	size_t groups = memory.pages * percent / 100 / PAGES_PER_EVENT;
	if (!groups)
		return 0;
	must(groups * PAGES_PER_EVENT <= own);
	own_key += 1ul << 20;
	size_t shift = random_next(&state) % (own / groups - PAGES_PER_EVENT + 1);
	for (size_t g = 0; g < groups; g++)
		renew(shared + own * g / groups + shift);
	return groups * PAGES_PER_EVENT;
}

static void *write_on(void *unused)
{
	(void)unused;
	uint64_t state = own_key;
	double due = now_seconds();
	while (!atomic_load(&halted)) {
		event(&state);
		double now = now_seconds();
		if (atomic_exchange(&starting_anew, false)) {
			began = now;
			longest = 0;
			events = 0;
		} else {
			if (now - last > longest)
				longest = now - last;
			events++;
		}
		last = now;
		/* An event that is late is not made up for: then the rate falls. */
		due = due + period > now ? due + period : now;
		if (due > now) {
			struct timespec until = {(time_t)due, (long)((due - (time_t)due) * 1e9)};
			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
		}
	}
	return NULL;
}

static void start_anew(void)
{
	atomic_store(&starting_anew, true);
	while (atomic_load(&starting_anew))
		usleep(200);
}

static void halt(void)
{
	atomic_store(&halted, true);
	must(!pthread_join(writer, NULL));
}

int main(int count, char **arguments)
{
	victim_start();
	must(count == 5);
	shared = strtoul(arguments[2], 0, 0);
	own = strtoul(arguments[3], 0, 0);
	fill(arguments[1], strtoul(arguments[4], 0, 0));
	say("READY memory=%lu", (uintptr_t)memory.at);
	for (char *line; (line = command());) {
		unsigned long rate, percent;
		if (!strcmp(line, "mergeable")) {
			must(!madvise(memory.at, memory.pages * PAGE, MADV_MERGEABLE));
		} else if (sscanf(line, "write %lu", &rate) == 1) {
			must(own >= PAGES_PER_EVENT);
			period = rate ? 1.0 / rate : 0;
			must(!pthread_create(&writer, NULL, write_on, NULL));
			start_anew();
		} else if (!strcmp(line, "reset")) {
			start_anew();
		} else if (!strcmp(line, "count")) {
			double now = now_seconds(), gap = now - last;
			say("OK events=%lu seconds=%.6f longest=%.6f", events, now - began, gap > longest ? gap : longest);
			continue;
		} else if (!strcmp(line, "halt")) {
			halt();
		} else if (sscanf(line, "rewrite %lu", &percent) == 1) {
			say("OK pages=%zu", rewrite(percent));
			continue;
		} else if (!strcmp(line, "aio")) {
			unsigned long context = 0;
			must(!syscall(SYS_io_setup, 1, &context));
		} else if (!strcmp(line, "check")) {
			area_check(&memory);
		} else {
			failed("unknown command %s", line);
		}
		say("OK");
	}
	return 0;
}
