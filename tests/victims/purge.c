/*
 * Memory given back with madvise, in every way allocators do it.
 *
 *   purge SEED
 *
 * After MADV_DONTNEED a page must read zeros at once; pages that were not named
 * keep their content; what is written afterwards stays.  In the area `span` the
 * middle third differs in every victim, so that once merged it is merged /
 * anonymous / merged.
 */
#include "actions.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#define PAGES 48

static struct area one, bulk, span, many, same, arena, lazy, other_process, removed, advice, locked, loop, refused, gap;

static void drop(struct area *area, size_t first, size_t count)
{
	must(!madvise(area->at + first * PAGE, count * PAGE, MADV_DONTNEED));
	area_zeroed(area, first, count);
}

/* Write what was dropped, look, drop it again: now from private memory. */
static void refill_and_drop(struct area *area, size_t first, size_t count, uint64_t key)
{
	for (size_t p = first; p < first + count; p++)
		area_set(area, p, key + p);
	area_check(area);
	drop(area, first, count);
	area_check(area);
}

static void drop_one(void)
{
	drop(&one, 5, 1);
	area_check(&one);
	refill_and_drop(&one, 5, 1, 77);
	drop(&one, 0, 1);
	drop(&one, PAGES - 1, 1);
	area_check(&one);
	say("OK");
}

static void drop_bulk(void)
{
	drop(&bulk, 0, PAGES);
	refill_and_drop(&bulk, 0, PAGES, 78);
	say("OK");
}

static void drop_span(void)
{
	drop(&span, 4, PAGES - 8);
	area_check(&span);
	refill_and_drop(&span, 2, PAGES - 4, 79);
	say("OK");
}

static struct {
	struct area *area;
	pthread_barrier_t barrier;
	int threads, together;
} crowd;

static void *crowd_member(void *argument)
{
	size_t self = (size_t)argument, threads = crowd.threads;
	size_t first = crowd.together ? 0 : self, step = crowd.together ? 1 : threads;
	for (size_t p = first; p < PAGES; p += step) {
		pthread_barrier_wait(&crowd.barrier);
		must(!madvise(crowd.area->at + p * PAGE, PAGE, MADV_DONTNEED));
		check_page(crowd.area->at + p * PAGE, 0, crowd.area->name);
		if (crowd.together)
			continue;
		area_set(crowd.area, p, 900 + p);
		check_page(crowd.area->at + p * PAGE, 900 + p, crowd.area->name);
	}
	return NULL;
}

static void drop_in_crowd(struct area *area, int together)
{
	pthread_t handles[6];
	crowd.area = area;
	crowd.threads = 6;
	crowd.together = together;
	pthread_barrier_init(&crowd.barrier, NULL, 6);
	for (size_t t = 0; t < 6; t++)
		must(!pthread_create(&handles[t], NULL, crowd_member, (void *)t));
	for (size_t t = 0; t < 6; t++)
		pthread_join(handles[t], NULL);
	if (together)
		area_zeroed(area, 0, PAGES);
	area_check(area);
	say("OK");
}

static void drop_many(void)
{
	drop_in_crowd(&many, 0);
}

static void drop_same(void)
{
	drop_in_crowd(&same, 1);
}

/* What a purging allocator does: extents are dropped, then handed out as calloc memory. */
static void drop_arena(void)
{
	uint64_t state = 4242;
	for (int round = 0; round < 40; round++) {
		size_t first = random_next(&state) % PAGES, count = 1 + random_next(&state) % (PAGES - first);
		drop(&arena, first, count);
		size_t used = 1 + random_next(&state) % count;
		for (size_t p = first; p < first + used; p++)
			area_set(&arena, p, random_next(&state) | 1);
		area_check(&arena);
	}
	say("OK");
}

/* MADV_FREE may be refused on merged memory; each page keeps its content or reads zeros. */
static void free_lazily(void)
{
	int refused = madvise(lazy.at, PAGES * PAGE, MADV_FREE) ? errno : 0;
	must(!refused || refused == EINVAL);
	for (size_t p = 0; p < PAGES; p++)
		if (wrong_word(lazy.at + p * PAGE, lazy.keys[p]) >= 0)
			area_zeroed(&lazy, p, 1);
	for (size_t p = 0; p < PAGES; p++)
		area_set(&lazy, p, 333 + p);
	area_check(&lazy);
	say("OK refused=%d", refused);
}

static void drop_by_process_madvise(void)
{
	int self = syscall(SYS_pidfd_open, getpid(), 0);
	must(self >= 0);
	struct iovec {
		void *at;
		size_t bytes;
	} parts[] = {
		{other_process.at + 2 * PAGE, 3 * PAGE},
		{other_process.at + 10 * PAGE, PAGE},
		{other_process.at + 20 * PAGE, 9 * PAGE},
	};
	long done = syscall(SYS_process_madvise, self, parts, 3, MADV_DONTNEED, 0);
	int number = errno;
	close(self);
	if (done < 0) { /* before Linux 6.13 a process could not do this even to itself */
		must(number == EINVAL || number == ENOSYS);
		area_check(&other_process);
		say("OK unsupported=1");
		return;
	}
	must(done == 13 * (long)PAGE);
	for (int i = 0; i < 3; i++)
		area_zeroed(&other_process, ((char *)parts[i].at - other_process.at) / PAGE, parts[i].bytes / PAGE);
	area_check(&other_process);
	refill_and_drop(&other_process, 0, PAGES, 80);
	say("OK unsupported=0");
}

static void remove_is_refused(void)
{
	int refused = madvise(removed.at, PAGES * PAGE, MADV_REMOVE) ? errno : 0;
	must(refused);
	area_check(&removed);
	say("OK errno=%d", refused);
}

static void harmless_advice(void)
{
	const int harmless[] = {MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_COLD, MADV_PAGEOUT,
				MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE, MADV_UNMERGEABLE};
	for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
		madvise(advice.at, PAGES * PAGE, harmless[i]);
		area_check(&advice);
	}
	must(!madvise(advice.at, PAGES * PAGE, 22 /* MADV_POPULATE_READ */));
	area_check(&advice);
	must(!madvise(advice.at, PAGES * PAGE, 23 /* MADV_POPULATE_WRITE */));
	area_check(&advice);
	refill_and_drop(&advice, 0, PAGES, 81);
	say("OK");
}

/* A page that is locked refuses: what lies before it is dropped, what lies behind it is kept. */
static void drop_refused(void)
{
	must(!mlock(refused.at + 20 * PAGE, 2 * PAGE));
	must(madvise(refused.at, PAGES * PAGE, MADV_DONTNEED) == -1 && errno == EINVAL);
	area_zeroed(&refused, 0, 20);
	area_check(&refused);
	must(!munlock(refused.at + 20 * PAGE, 2 * PAGE));
	refill_and_drop(&refused, 0, PAGES, 83);
	say("OK");
}

/* A gap in the range: an error, but all that is mapped is dropped. */
static void drop_across_a_gap(void)
{
	char *at = gap.at + 20 * PAGE;
	must(!munmap(at, 2 * PAGE));
	must(madvise(gap.at, PAGES * PAGE, MADV_DONTNEED) == -1 && errno == ENOMEM);
	must(mmap(at, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
	area_zeroed(&gap, 0, PAGES);
	refill_and_drop(&gap, 0, PAGES, 84);
	say("OK");
}

static void drop_locked(void)
{
	must(!madvise(locked.at + PAGE, 7 * PAGE, MADV_DONTNEED_LOCKED));
	area_zeroed(&locked, 1, 7);
	area_check(&locked);
	refill_and_drop(&locked, 0, PAGES, 82);
	say("OK");
}

/* Drops one page after the other and times the slowest, for as long as nobody says otherwise. */
static void drop_loop(void)
{
	double slowest = 0;
	for (size_t p = 0; p < PAGES; p++) {
		double start = now_seconds();
		drop(&loop, p, 1);
		double took = now_seconds() - start;
		slowest = took > slowest ? took : slowest;
	}
	area_check(&loop);
	say("OK slowest_us=%ld", (long)(slowest * 1e6));
}

/* Everything again gets its first content, so that it can be merged once more. */
static void refill(void)
{
	for (int i = 0; i < area_count; i++)
		for (size_t p = 0; p < PAGES; p++)
			area_set(all_areas[i], p, 20000 + i * 1000 + p);
	check_all_areas();
	say("OK");
}

int main(int count, char **arguments)
{
	victim_start();
	must(count == 2);
	struct area *areas[] = {&one, &bulk, &span, &many, &same, &arena, &lazy, &other_process, &removed, &advice,
				&locked, &loop, &refused, &gap};
	const char *names[] = {"one", "bulk", "span", "many", "same", "arena", "lazy", "process_madvise", "remove",
			       "advice", "locked", "loop", "refused", "gap"};
	for (int i = 0; i < 14; i++) {
		*areas[i] = area_new(names[i], PAGES, 20000 + i * 1000, 1);
		area_known(areas[i]);
	}
	for (size_t p = PAGES / 3; p < 2 * PAGES / 3; p++)
		area_set(&span, p, mix(strtoul(arguments[1], 0, 0)) + p);
	say_ready();
	const struct action actions[] = {
		{"one", drop_one}, {"bulk", drop_bulk}, {"span", drop_span}, {"many", drop_many},
		{"same", drop_same}, {"arena", drop_arena}, {"lazy", free_lazily},
		{"process_madvise", drop_by_process_madvise}, {"remove", remove_is_refused},
		{"advice", harmless_advice}, {"locked", drop_locked}, {"loop", drop_loop}, {"refused", drop_refused},
		{"gap", drop_across_a_gap}, {"refill", refill}, {0},
	};
	return serve(actions);
}
