/*
 * 32 MiB that are equal in every process, in a process that forks and gives memory back, and how long that takes.
 *
 *   bystander MERGEABLE
 *
 * All of it is one mapping, MADV_MERGEABLE if MERGEABLE is 1.  Prints READY.  After the word `begin` one thread
 * forks a child that ends at once, another has the next page of the second half discarded (MADV_DONTNEED), five
 * hundred times a second each.  For each word on stdin one line comes: `gap`, the longest time since the last `gap` that a
 * fork and a discard took, in microseconds; `check`, OK, or CORRUPT where a byte is wrong, discarded pages being zeros.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

#define PAGES 8192
#define PAUSE_US 2000

static _Atomic long fork_us, discard_us;
static int discarded;
static pthread_mutex_t checking = PTHREAD_MUTEX_INITIALIZER;
static char *memory;

static void *keep_forking(void *argument)
{
	for (;;) {
		double began = now_us();
		pid_t child = fork();
		if (!child)
			_exit(0);
		note(&fork_us, began);
		if (waitpid(child, NULL, 0) != child)
			abort();
		usleep(PAUSE_US);
	}
	return argument;
}

static void *keep_discarding(void *argument)
{
	for (; discarded < PAGES / 2; usleep(PAUSE_US)) {
		pthread_mutex_lock(&checking);
		double began = now_us();
		if (madvise(memory + (PAGES - 1 - discarded) * PAGE, PAGE, MADV_DONTNEED))
			abort();
		note(&discard_us, began);
		discarded++;
		pthread_mutex_unlock(&checking);
	}
	return argument;
}

static int is_wrong(void)
{
	static uint64_t zeros[PAGE / 8], expected[PAGE / 8];
	for (int page = 0; page < PAGES; page++) {
		write_page(expected, page);
		if (memcmp(memory + page * PAGE, page < PAGES - discarded ? expected : zeros, PAGE))
			return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 2;
	memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || madvise(memory, PAGES * PAGE, MADV_NOHUGEPAGE) ||
	    (*argv[1] == '1' && madvise(memory, PAGES * PAGE, MADV_MERGEABLE)))
		return 1;
	for (int page = 0; page < PAGES; page++)
		write_page((uint64_t *)(memory + page * PAGE), page);
	puts("READY");
	fflush(stdout);
	char word[16];
	pthread_t thread;
	while (scanf("%15s", word) == 1) {
		if (!strcmp(word, "gap")) {
			printf("%ld %ld\n", fork_us, discard_us);
			fork_us = discard_us = 0;
		} else if (!strcmp(word, "begin")) {
			if (pthread_create(&thread, NULL, keep_forking, NULL) ||
			    pthread_create(&thread, NULL, keep_discarding, NULL))
				return 1;
			puts("OK");
		} else {
			pthread_mutex_lock(&checking);
			puts(is_wrong() ? "CORRUPT" : "OK");
			pthread_mutex_unlock(&checking);
		}
		fflush(stdout);
	}
	return 0;
}
