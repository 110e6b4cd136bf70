/*
 * mremap, munmap and realloc on areas that were merged meanwhile.
 *
 *   growth PAGES
 *
 * Memory that appears by growth reads zeros, or the call fails; what was there
 * before stays.  PAGES (at most 32) is how much of each area this victim has: a
 * victim with fewer pages than its siblings gets runs that are only a part of
 * what is kept for theirs.
 * A growth that is refused by EFAULT is allowed: a range of several mappings
 * cannot grow.  The replies tell how many growths really happened.
 */
#include "actions.h"

#define ROOM 64
#define HEAP_PAGES 200ul /* more than malloc's mmap threshold */

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

static size_t pages;
static struct area in_place, reserved, shrunk, moved, kept, fixed, over, tail, part, piece, again, step;
static char *heap_block;

/* Frees the address space behind an area, so that it can grow where it is. */
static void make_room(struct area *area)
{
	must(!munmap(area->at + area->pages * PAGE, ROOM * PAGE));
}

/* Grows pages [from, from + old) of an area, its last ones, in place to `new`; 1 when it happened. */
static int grow(struct area *area, size_t from, size_t old, size_t new)
{
	char *at = area->at + from * PAGE;
	char *result = mremap(at, old * PAGE, new * PAGE, 0);
	if (result == MAP_FAILED) {
		must(errno == EFAULT || errno == ENOMEM);
		area_check(area);
		return 0;
	}
	must(result == at);
	area->pages = from + new;
	area_zeroed(area, from + old, new - old);
	area_check(area);
	area_set(area, from + new - 1, 4711);
	area_check(area);
	return 1;
}

static void shrink(struct area *area, size_t new)
{
	must(mremap(area->at, area->pages * PAGE, new * PAGE, 0) == area->at);
	area->pages = new;
	area_check(area);
}

static void grow_in_place(void)
{
	say("OK grown=%d", grow(&in_place, 0, pages, pages + 16));
}

static void grow_into_reserved(void)
{
	make_room(&reserved);
	say("OK grown=%d", grow(&reserved, 0, pages, pages + 16));
}

/* realloc 17 -> 8 -> 16 pages, in general; then growth behind pages never merged. */
static void shrink_then_grow(void)
{
	make_room(&shrunk);
	shrink(&shrunk, pages / 2);
	int grown = grow(&shrunk, 0, pages / 2, pages - 1);
	shrink(&shrunk, 1);
	grown += grow(&shrunk, 0, 1, pages);
	say("OK grown=%d", grown);
}

/* One page at a time: every growth borders what the last one left. */
static void shrink_and_grow_by_steps(void)
{
	make_room(&step);
	int grown = 0;
	for (size_t p = pages - 1; p > pages / 2; p--)
		shrink(&step, p);
	for (size_t p = pages / 2 + 1; p < pages; p++)
		grown += grow(&step, 0, p, p + 1);
	say("OK grown=%d", grown);
}

static void grow_by_move(void)
{
	void *old = moved.at;
	char *result = mremap(old, pages * PAGE, (pages + 20) * PAGE, MREMAP_MAYMOVE);
	int grown = result != MAP_FAILED;
	must(grown || errno == EFAULT);
	if (grown) {
		char value;
		must(result != old); /* inaccessible pages stand behind it */
		must(try_access(old, 0, &value) == SIGSEGV);
		moved.at = result;
		moved.pages = pages + 20;
		area_zeroed(&moved, pages, 20);
		area_check(&moved);
		area_set(&moved, pages + 19, 4712);
	}
	area_check(&moved);
	say("OK grown=%d", grown);
}

static void move_and_keep(void)
{
	char *old = kept.at;
	char *result = mremap(old, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
	int done = result != MAP_FAILED;
	must(done || errno == EFAULT || errno == EINVAL);
	if (done) {
		for (size_t p = 0; p < pages; p++)
			check_page(old + p * PAGE, 0, "place left by MREMAP_DONTUNMAP");
		fill_page(old, 99);
		kept.at = result;
	}
	area_check(&kept);
	say("OK grown=%d", done);
}

/* To a given place, over an area that was merged too. */
static void move_over(void)
{
	char *result = mremap(fixed.at, pages * PAGE, (pages + 4) * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, over.at);
	int done = result != MAP_FAILED;
	must(done || errno == EFAULT);
	if (done) {
		fixed.at = over.at;
		fixed.pages = pages + 4;
		over.pages = 0;
		area_zeroed(&fixed, pages, 4);
	}
	area_check(&fixed);
	say("OK grown=%d", done);
}

static void cut_tail_then_grow(void)
{
	make_room(&tail);
	must(!munmap(tail.at + (pages - 3) * PAGE, 3 * PAGE));
	tail.pages = pages - 3;
	area_check(&tail);
	say("OK grown=%d", grow(&tail, 0, pages - 3, pages + 5));
}

/* Only the last pages of the mapping are named. */
static void grow_a_part(void)
{
	make_room(&part);
	int grown = grow(&part, pages - 2, 2, 9);
	say("OK grown=%d", grown);
}

/* Four pages out of the middle move away and grow there. */
static void move_a_piece_and_grow_it(void)
{
	char *room = map_anonymous(ROOM * PAGE, PROT_NONE);
	must(!munmap(room, ROOM * PAGE));
	char *result = mremap(piece.at + 2 * PAGE, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
	must(result == room);
	for (size_t p = 0; p < 4; p++)
		check_page(room + p * PAGE, piece.keys[p + 2], "moved piece");
	char *grown = mremap(room, 4 * PAGE, 12 * PAGE, 0);
	must(grown == room || errno == EFAULT || errno == ENOMEM);
	if (grown == room)
		for (size_t p = 4; p < 12; p++)
			check_page(room + p * PAGE, 0, "growth of a moved piece");
	/* and new memory in the gap it left */
	must(mmap(piece.at + 2 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
		  0) != MAP_FAILED);
	area_zeroed(&piece, 2, 4);
	area_check(&piece);
	say("OK grown=%d", grown == room);
}

/* Away and back again, twice. */
static void move_and_return(void)
{
	char *home = again.at, *room = map_anonymous(pages * PAGE, PROT_NONE);
	for (int round = 0; round < 2; round++) {
		char *away = mremap(home, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
		if (away == MAP_FAILED) {
			must(errno == EFAULT);
			area_check(&again);
			say("OK grown=0");
			return;
		}
		again.at = room;
		area_check(&again);
		must(mremap(room, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, home) == home);
		again.at = home;
		area_check(&again);
		area_set(&again, round, 600 + round);
	}
	area_check(&again);
	say("OK grown=1");
}

/* The C library's own way: realloc of a large block, free, calloc of as much. */
static char *aligned_inside(char *block)
{
	return (char *)(((uintptr_t)block + PAGE - 1) & ~(PAGE - 1));
}

static void through_malloc(void)
{
	const size_t inside = HEAP_PAGES - 1;
	for (size_t p = 0; p < inside; p++)
		check_page(aligned_inside(heap_block) + p * PAGE, 60000 + p, "malloc block");
	heap_block = realloc(heap_block, 2 * HEAP_PAGES * PAGE);
	must(heap_block);
	for (size_t p = 0; p < inside; p++)
		check_page(aligned_inside(heap_block) + p * PAGE, 60000 + p, "block after realloc");
	heap_block = realloc(heap_block, HEAP_PAGES * PAGE / 2);
	must(heap_block);
	heap_block = realloc(heap_block, HEAP_PAGES * PAGE);
	must(heap_block);
	for (size_t p = 0; p < HEAP_PAGES / 2 - 1; p++)
		check_page(aligned_inside(heap_block) + p * PAGE, 60000 + p, "block after shrinking");
	free(heap_block);
	for (int round = 0; round < 3; round++) {
		uint64_t *zeros = calloc(HEAP_PAGES, PAGE);
		must(zeros);
		for (size_t w = 0; w < HEAP_PAGES * WORDS; w++)
			if (zeros[w])
				corrupt("calloc: word %zu is %016lx", w, zeros[w]);
		memset(zeros, 0x5a, HEAP_PAGES * PAGE);
		free(zeros);
	}
	say("OK grown=1");
}

int main(int count, char **arguments)
{
	victim_start();
	must(count == 2);
	pages = strtoul(arguments[1], 0, 0);
	must(pages >= 8 && pages <= 32);
	struct area *areas[] = {&in_place, &reserved, &shrunk, &moved, &kept, &fixed, &over, &tail, &part, &piece, &again,
				&step};
	const char *names[] = {"in_place", "reserved", "shrunk", "moved", "kept", "fixed", "over", "tail", "part",
			       "piece", "again", "step"};
	for (int i = 0; i < 12; i++) {
		*areas[i] = area_new(names[i], pages, 30000 + i * 1000, ROOM);
		area_known(areas[i]);
	}
	make_room(&in_place);
	heap_block = malloc(HEAP_PAGES * PAGE);
	must(heap_block);
	memset(heap_block, 1, HEAP_PAGES * PAGE);
	for (size_t p = 0; p < HEAP_PAGES - 1; p++)
		fill_page(aligned_inside(heap_block) + p * PAGE, 60000 + p);
	say_ready();
	const struct action actions[] = {
		{"in_place", grow_in_place}, {"reserved", grow_into_reserved}, {"shrunk", shrink_then_grow},
		{"step", shrink_and_grow_by_steps}, {"moved", grow_by_move}, {"kept", move_and_keep},
		{"over", move_over}, {"tail", cut_tail_then_grow}, {"part", grow_a_part},
		{"piece", move_a_piece_and_grow_it}, {"again", move_and_return}, {"malloc", through_malloc}, {0},
	};
	return serve(actions);
}
