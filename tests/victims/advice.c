/*
 * Memory of which the program has said something by madvise, before anybody merged it.
 *
 *   advice [reversed]
 *
 * `unforked`, `moved`, `backwards` and the first half of `halves` are kept from children (MADV_DONTFORK): a
 * child that touches them must get SIGSEGV, merged or not.  All else it must be able to read.  Of `nohuge`
 * nothing is said of the second half; merged, both are alike.  `backwards` is in another order if that is
 * asked for.
 */
#include "actions.h"

#define PAGES 64

static struct area unforked, plain, halves, moved, huge, nohuge, mergeable, backwards;
static char *other; /* plain memory where `moved` was */

static void expect_in_child(struct area *area, size_t first, size_t count, int is_there)
{
	for (size_t p = first; p < first + count; p++) {
		char value;
		int number = try_access(area->at + p * PAGE, 0, &value);
		if (is_there && !number)
			check_page(area->at + p * PAGE, area->keys[p], area->name);
		else if (is_there || number != SIGSEGV)
			failed("%s page %zu in a child: signal %d", area->name, p, number);
	}
}

static void child(void)
{
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		expect_in_child(&unforked, 0, PAGES, 0);
		expect_in_child(&moved, 0, PAGES, 0);
		expect_in_child(&backwards, 0, PAGES, 0);
		expect_in_child(&halves, 0, PAGES, 0);
		expect_in_child(&halves, PAGES, PAGES, 1);
		expect_in_child(&plain, 0, PAGES, 1);
		expect_in_child(&huge, 0, PAGES, 1);
		if (other)
			for (size_t p = 0; p < PAGES; p++)
				check_page(other + p * PAGE, 4000 + p, "other");
		_exit(0);
	}
	int status = child_status(child);
	if (status)
		failed("child ended with %d", status);
	say("OK");
}

static void write_some(void)
{
	for (size_t p = 0; p < PAGES; p += 3) {
		area_set(&unforked, p, 1 + p);
		area_set(&halves, PAGES - 1 - p / 3, 70 + p);
		area_set(&halves, PAGES + p, 80 + p);
	}
	say("OK");
}

static void discard(void)
{
	must(!madvise(unforked.at + 5 * PAGE, 9 * PAGE, MADV_DONTNEED));
	area_zeroed(&unforked, 5, 9);
	must(!madvise(halves.at + (PAGES - 4) * PAGE, 8 * PAGE, MADV_DONTNEED));
	area_zeroed(&halves, PAGES - 4, 8);
	must(!madvise(huge.at + 7 * PAGE, 9 * PAGE, MADV_DONTNEED));
	area_zeroed(&huge, 7, 9);
	say("OK");
}

/* What moves takes its advice along; what comes to lie in its old place has none of it. */
static void move(void)
{
	char *at = map_anonymous(PAGES * PAGE, PROT_NONE), *old = moved.at;
	must(mremap(old, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at);
	moved.at = at;
	other = mmap(old, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	must(other == old);
	for (size_t p = 0; p < PAGES; p++)
		fill_page(other + p * PAGE, 4000 + p);
	say("OK moved=%p:%lu other=%p:%lu", moved.at, PAGES + 0ul, other, PAGES + 0ul);
}

int main(int argc, char **argv)
{
	victim_start();
	struct area *areas[] = {&unforked, &plain, &halves, &moved, &huge, &nohuge, &mergeable, &backwards};
	const char *names[] = {"unforked", "plain", "halves", "moved", "huge", "nohuge", "mergeable", "backwards"};
	for (int i = 0; i < 8; i++) {
		*areas[i] = area_new(names[i], areas[i] == &halves || areas[i] == &nohuge ? 2 * PAGES : PAGES,
				     60000 + i * 1000, 1);
		area_known(areas[i]);
	}
	int reversed = argc > 1 && !strcmp(argv[1], "reversed");
	for (size_t p = 0; reversed && p < PAGES; p++)
		area_set(&backwards, p, 50000 + PAGES - p);
	for (size_t p = 0; !reversed && p < PAGES; p++)
		area_set(&backwards, p, 50001 + p);
	must(!madvise(backwards.at, PAGES * PAGE, MADV_DONTFORK));
	must(!madvise(unforked.at, PAGES * PAGE, MADV_DONTFORK));
	must(!madvise(moved.at, PAGES * PAGE, MADV_DONTFORK));
	must(!madvise(halves.at, PAGES * PAGE, MADV_DONTFORK));
	/* A kernel without huge pages, or without KSM, refuses. */
	madvise(huge.at, PAGES * PAGE, MADV_HUGEPAGE);
	madvise(nohuge.at, PAGES * PAGE, MADV_NOHUGEPAGE);
	madvise(mergeable.at, PAGES * PAGE, MADV_MERGEABLE);
	say_ready();
	const struct action actions[] = {
		{"child", child}, {"write", write_some}, {"discard", discard}, {"move", move}, {0},
	};
	return serve(actions);
}
