/*
 * What every self-checking victim shares: the line protocol, page patterns and
 * areas of memory that know what they must contain.
 *
 * Protocol: the victim prints one line `READY name=value ...`, then answers each
 * line of its standard input with exactly one line: `OK name=value ...` when all
 * it looked at was right, `CORRUPT what` (and exit status 9) when a byte was not,
 * `FAILED what` (and exit status 8) when something else went wrong.  It ends at
 * `quit`, at end of file, and with its parent.
 *
 * Every area keeps one key per page, the key of the content the page must have;
 * 0 stands for zeros.  Whoever changes a page changes its key, so that one
 * function can check everything at any time.
 */
#ifndef VICTIM_H
#define VICTIM_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / 8)
#define UNUSED __attribute__((unused))

UNUSED static void say(const char *format, ...)
{
	char line[1024];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	line[length++] = '\n';
	/* One write: a line is never mixed with that of another thread or child. */
	if (write(1, line, length) != length)
		_exit(7);
}

#define corrupt(...) do { say("CORRUPT " __VA_ARGS__); _exit(9); } while (0)
#define failed(...) do { say("FAILED " __VA_ARGS__); _exit(8); } while (0)
#define must(condition) do { if (!(condition)) \
	failed("%s:%d %s: %s", __FILE__, __LINE__, #condition, strerror(errno)); } while (0)

UNUSED static double now_seconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

UNUSED static uint64_t mix(uint64_t x) /* splitmix64's finalizer */
{
	x += 0x9E3779B97F4A7C15ull;
	x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
	x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
	return x ^ (x >> 31);
}

UNUSED static uint64_t random_next(uint64_t *state)
{
	return mix((*state)++);
}

static inline uint64_t pattern(uint64_t key, uint64_t word)
{
	return key ? mix(key) + word * 0xD6E8FEB86659FD93ull : 0;
}

UNUSED static void fill_page(void *page, uint64_t key)
{
	uint64_t *words = page;
	for (uint64_t w = 0; w < WORDS; w++)
		words[w] = pattern(key, w);
}

/* Index of the first wrong word of a page, or -1. */
UNUSED static int wrong_word(const void *page, uint64_t key)
{
	const uint64_t *words = page;
	uint64_t difference = 0;
	for (uint64_t w = 0; w < WORDS; w++)
		difference |= words[w] ^ pattern(key, w);
	if (!difference)
		return -1;
	for (uint64_t w = 0; w < WORDS; w++)
		if (words[w] != pattern(key, w))
			return (int)w;
	return -1; /* it was wrong and is right again: the caller re-reads */
}

UNUSED static void check_page(const void *page, uint64_t key, const char *what)
{
	int w = wrong_word(page, key);
	if (w >= 0)
		corrupt("%s: page %p word %d is %016lx, must be %016lx", what, page, w,
			((const uint64_t *)page)[w], pattern(key, w));
}

/*
 * What a victim knows about its memory must not be merged itself: memory and
 * knowledge that are wrong in the same way would look right.
 */
struct area {
	char *at;
	size_t pages;
	uint64_t *keys;
	const char *name;
};

UNUSED static void *map_anonymous(size_t bytes, int prot)
{
	void *at = mmap(NULL, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	must(at != MAP_FAILED);
	return at;
}

/* Zeroed memory that is left alone by everybody who merges (MADV_DONTDUMP, see `odd undumped`). */
UNUSED static void *map_knowledge(size_t bytes)
{
	void *at = map_anonymous(bytes, PROT_READ | PROT_WRITE);
	must(!madvise(at, bytes, MADV_DONTDUMP));
	return at;
}

/*
 * An area of `pages` pages whose page p has key `key + p`, alone in its mapping:
 * inaccessible pages stand before it and `behind` of them behind it, so that
 * areas never join and what follows is known.
 */
UNUSED static struct area area_new(const char *name, size_t pages, uint64_t key, size_t behind)
{
	struct area area = {.pages = pages, .name = name};
	char *reserved = map_anonymous((pages + behind + 1) * PAGE, PROT_NONE);
	area.at = reserved + PAGE;
	must(!mprotect(area.at, pages * PAGE, PROT_READ | PROT_WRITE));
	area.keys = map_knowledge((pages + behind) * 8);
	for (size_t p = 0; p < pages; p++) {
		area.keys[p] = key + p;
		fill_page(area.at + p * PAGE, area.keys[p]);
	}
	return area;
}

UNUSED static void area_set(struct area *area, size_t page, uint64_t key)
{
	area->keys[page] = key;
	fill_page(area->at + page * PAGE, key);
}

UNUSED static void area_check(const struct area *area)
{
	for (size_t p = 0; p < area->pages; p++) {
		int w = wrong_word(area->at + p * PAGE, area->keys[p]);
		if (w >= 0)
			corrupt("%s: page %zu of %zu word %d is %016lx, must be %016lx", area->name, p, area->pages, w,
				((uint64_t *)(area->at + p * PAGE))[w], pattern(area->keys[p], w));
	}
}

/* Pages [first, first + count) must read zeros now and from now on. */
UNUSED static void area_zeroed(struct area *area, size_t first, size_t count)
{
	for (size_t p = first; p < first + count; p++) {
		area->keys[p] = 0;
		check_page(area->at + p * PAGE, 0, area->name);
	}
}

/* The next line of standard input in a static buffer, or NULL at its end. */
UNUSED static char *command(void)
{
	static char line[512];
	size_t length = 0;
	while (length < sizeof line - 1) {
		ssize_t got = read(0, line + length, 1);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return NULL;
		if (line[length] == '\n') {
			line[length] = 0;
			return strcmp(line, "quit") ? line : NULL;
		}
		length++;
	}
	return NULL;
}

/* Called first of all: die with the parent, whatever happens to it, and never outlive ten minutes. */
UNUSED static void victim_start(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() == 1)
		_exit(7);
	alarm(600);
}

/* The exit status of a child that must end by itself. */
UNUSED static int child_status(pid_t child)
{
	int status;
	while (waitpid(child, &status, 0) < 0)
		must(errno == EINTR);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
#endif
