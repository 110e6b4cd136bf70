/*
 * Protections, replaced mappings and the heap's end, before and after merging.
 *
 *   protect
 *
 * `readonly` and `hidden` are filled, then made PROT_READ and PROT_NONE before
 * anybody can merge them; the first write or read of such a page must raise
 * SIGSEGV afterwards as before.
 */
#include "actions.h"

#define PAGES 48

static struct area readonly, hidden, changed, split, replaced, replaced_part, heap, advised, churned, executable,
	swapped;

static void expect_refused(struct area *area, size_t page, int write_it)
{
	char value = 1;
	int number = try_access(area->at + page * PAGE, write_it, &value);
	if (number != SIGSEGV)
		failed("%s page %zu: %s raised %d, not SIGSEGV", area->name, page, write_it ? "write" : "read", number);
}

static void protect(struct area *area, size_t first, size_t count, int prot)
{
	must(!mprotect(area->at + first * PAGE, count * PAGE, prot));
}

static void protection_kept(void)
{
	for (size_t p = 0; p < PAGES; p++) {
		expect_refused(&readonly, p, 1);
		expect_refused(&hidden, p, 0);
		expect_refused(&hidden, p, 1);
	}
	area_check(&readonly);
	say("OK");
}

static void unprotect(void)
{
	protect(&readonly, 0, PAGES, PROT_READ | PROT_WRITE);
	protect(&hidden, 0, PAGES, PROT_READ | PROT_WRITE);
	area_check(&readonly);
	area_check(&hidden);
	for (size_t p = 0; p < PAGES; p += 3) {
		area_set(&readonly, p, 1 + p);
		area_set(&hidden, p, 2 + p);
	}
	area_check(&readonly);
	area_check(&hidden);
	protect(&hidden, 0, PAGES, PROT_NONE);
	expect_refused(&hidden, 4, 0);
	protect(&hidden, 0, PAGES, PROT_READ | PROT_WRITE);
	area_check(&hidden);
	protect(&hidden, 0, PAGES, PROT_NONE);
	say("OK");
}

static void change_merged(void)
{
	protect(&changed, 0, PAGES, PROT_READ);
	expect_refused(&changed, 7, 1);
	area_check(&changed);
	protect(&changed, 0, PAGES, PROT_NONE);
	expect_refused(&changed, 7, 0);
	protect(&changed, 0, PAGES, PROT_READ | PROT_WRITE);
	area_check(&changed);
	for (size_t p = 0; p < PAGES; p++)
		area_set(&changed, p, 3 + p);
	area_check(&changed);
	say("OK");
}

static void change_parts(void)
{
	protect(&split, 10, 5, PROT_READ);
	protect(&split, 20, 1, PROT_NONE);
	expect_refused(&split, 12, 1);
	expect_refused(&split, 20, 0);
	area_set(&split, 9, 4);
	area_set(&split, 15, 5);
	must(!madvise(split.at + 12 * PAGE, 2 * PAGE, MADV_DONTNEED));
	area_zeroed(&split, 12, 2);
	protect(&split, 0, PAGES, PROT_READ | PROT_WRITE);
	area_check(&split);
	say("OK");
}

static void make_executable(void)
{
	protect(&executable, 0, PAGES, PROT_READ | PROT_EXEC);
	area_check(&executable);
	expect_refused(&executable, 1, 1);
	protect(&executable, 0, PAGES, PROT_READ | PROT_WRITE);
	static const unsigned char code[] = {0xb8, 42, 0, 0, 0, 0xc3}; /* mov $42, %eax; ret */
	memcpy(executable.at + 5 * PAGE, code, sizeof code);
	protect(&executable, 0, PAGES, PROT_READ | PROT_EXEC);
	must(((int (*)(void))(executable.at + 5 * PAGE))() == 42);
	protect(&executable, 0, PAGES, PROT_READ | PROT_WRITE);
	area_set(&executable, 5, executable.keys[5]);
	area_check(&executable);
	say("OK");
}

/* Other content at the same place: by munmap + mmap, and by mmap alone. */
static void replace(struct area *area, size_t first, size_t count, int unmap_first, uint64_t key)
{
	char *at = area->at + first * PAGE;
	if (unmap_first)
		must(!munmap(at, count * PAGE));
	must(mmap(at, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
	area_zeroed(area, first, count);
	for (size_t p = first; p < first + count; p++)
		area_set(area, p, key + p);
	area_check(area);
}

static void replace_mappings(void)
{
	replace(&replaced, 0, PAGES, 1, 5000);
	replace(&replaced, 0, PAGES, 0, 6000);
	replace(&replaced_part, 11, 9, 1, 5000);
	replace(&replaced_part, 30, 1, 0, 6000);
	area_check(&replaced);
	area_check(&replaced_part);
	say("OK");
}

/* Two pages change places by three moves: neither is written, both have other content afterwards. */
static void swap_pages(struct area *area, size_t first, size_t second)
{
	char *spare = map_anonymous(PAGE, PROT_NONE), *a = area->at + first * PAGE, *b = area->at + second * PAGE;
	char *const moves[][2] = {{a, spare}, {b, a}, {spare, b}};
	for (int i = 0; i < 3; i++)
		must(mremap(moves[i][0], PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moves[i][1]) == moves[i][1]);
	uint64_t key = area->keys[first];
	area->keys[first] = area->keys[second];
	area->keys[second] = key;
}

static void swap_merged(void)
{
	for (size_t p = 0; p + 1 < PAGES; p += 3)
		swap_pages(&swapped, p, PAGES - 1 - p / 2);
	area_check(&swapped);
	for (size_t p = 0; p < PAGES; p += 5)
		area_set(&swapped, p, 9000 + p);
	area_check(&swapped);
	say("OK");
}

/* The heap's end goes down, up again and beyond: what comes back reads zeros. */
static void move_break(void)
{
	must(sbrk(0) == heap.at + heap.pages * PAGE);
	must(sbrk(-(long)(PAGES / 2 * PAGE)) != (void *)-1);
	heap.pages -= PAGES / 2;
	area_check(&heap);
	must(sbrk(PAGES * PAGE) != (void *)-1);
	heap.pages += PAGES;
	area_zeroed(&heap, heap.pages - PAGES, PAGES);
	area_check(&heap);
	for (size_t p = heap.pages - PAGES; p < heap.pages; p++)
		area_set(&heap, p, 7000 + p);
	must(sbrk(-(long)(PAGES * PAGE)) != (void *)-1);
	heap.pages -= PAGES;
	area_check(&heap);
	say("OK");
}

static void fork_advice(void)
{
	int wipe = madvise(advised.at, 8 * PAGE, MADV_WIPEONFORK) ? errno : 0;
	must(!wipe || wipe == EINVAL);
	must(!madvise(advised.at + 8 * PAGE, 8 * PAGE, MADV_DONTFORK));
	must(!madvise(advised.at + 16 * PAGE, 8 * PAGE, MADV_DONTDUMP));
	area_check(&advised);
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		char value;
		for (size_t p = 0; p < 8; p++)
			check_page(advised.at + p * PAGE, wipe ? advised.keys[p] : 0, "wiped on fork");
		must(try_access(advised.at + 8 * PAGE, 0, &value) == SIGSEGV);
		_exit(0);
	}
	int status = child_status(child);
	if (status)
		failed("child ended with %d", status);
	area_check(&advised);
	say("OK wipe_errno=%d", wipe);
}

/* Mappings are replaced all the time while somebody merges. */
static volatile int churning;
static pthread_t churn_thread;
static long churn_rounds;

static void *churn(void UNUSED *argument)
{
	uint64_t state = 99;
	while (churning) {
		uint64_t choice = random_next(&state), first = choice % PAGES, count = 1 + (choice >> 20) % (PAGES - first);
		uint64_t key = 90000 + (choice >> 40) % 3 * 100; /* few contents: they can be merged again */
		area_check(&churned);
		switch ((choice >> 10) % 5) {
		case 4:
			if (first != count - 1)
				swap_pages(&churned, first, count - 1);
			break;
		case 0:
			replace(&churned, first, count, 0, key);
			break;
		case 1:
			must(!madvise(churned.at + first * PAGE, count * PAGE, MADV_DONTNEED));
			area_zeroed(&churned, first, count);
			break;
		case 2:
			protect(&churned, first, count, PROT_READ);
			area_check(&churned);
			protect(&churned, first, count, PROT_READ | PROT_WRITE);
			break;
		default:
			for (size_t p = first; p < first + count; p++)
				area_set(&churned, p, key + p);
		}
		churn_rounds++;
		usleep((choice >> 50) % 2000);
	}
	return NULL;
}

static void churn_start(void)
{
	churning = 1;
	must(!pthread_create(&churn_thread, NULL, churn, NULL));
	say("OK");
}

static void churn_stop(void)
{
	churning = 0;
	pthread_join(churn_thread, NULL);
	area_check(&churned);
	say("OK rounds=%ld", churn_rounds);
}

static void make_heap_area(void)
{
	uintptr_t end = (uintptr_t)sbrk(0), aligned = (end + PAGE - 1) & ~(PAGE - 1);
	must(sbrk(aligned - end + PAGES * PAGE) != (void *)-1);
	heap = (struct area){.at = (char *)aligned, .pages = PAGES, .name = "heap"};
	heap.keys = map_knowledge(4 * PAGES * 8);
	for (size_t p = 0; p < PAGES; p++)
		area_set(&heap, p, 88000 + p);
	area_known(&heap);
}

int main(void)
{
	victim_start();
	struct area *areas[] = {&readonly, &changed, &split, &replaced, &replaced_part, &advised, &executable, &swapped,
				&hidden, &churned};
	const char *names[] = {"readonly", "changed", "split", "replaced", "replaced_part", "advised", "executable", "swapped", "hidden",
			       "churned"};
	for (int i = 0; i < 10; i++) {
		*areas[i] = area_new(names[i], PAGES, 80000 + i * 1000, 1);
		if (areas[i] != &hidden && areas[i] != &churned)
			area_known(areas[i]);
	}
	make_heap_area();
	protect(&readonly, 0, PAGES, PROT_READ);
	protect(&hidden, 0, PAGES, PROT_NONE);
	say_ready();
	const struct action actions[] = {
		{"kept", protection_kept}, {"unprotect", unprotect}, {"changed", change_merged}, {"split", change_parts},
		{"replaced", replace_mappings}, {"break", move_break}, {"advised", fork_advice},
		{"executable", make_executable}, {"swapped", swap_merged}, {"churn_start", churn_start}, {"churn_stop", churn_stop}, {0},
	};
	return serve(actions);
}
