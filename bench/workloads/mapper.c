/*
 * Memory of which a quarter is equal in every process, and how long this process waits to map more.
 *
 *   mapper MIB SEED MERGEABLE
 *
 * All of it is one mapping of small pages, MADV_MERGEABLE if MERGEABLE is 1; page i has SEED in it unless it
 * is of the first quarter.  Prints READY.  One thread maps a page, writes it and unmaps it, five thousand
 * times a second; another wakes as often.  For each word on stdin one line comes: `gap`, the longest time since
 * the last `gap` that the one took for it and that the other did not run, in microseconds; `check`, OK, or CORRUPT
 * where a byte is wrong.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common.h"

#define PAUSE_US 200

static _Atomic long mapping_us, still_us;

static char *map(size_t size)
{
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		abort();
	return memory;
}

static void *keep_mapping(void *argument)
{
	for (;;) {
		double began = now_us();
		char *page = map(PAGE);
		*page = 1;
		munmap(page, PAGE);
		note(&mapping_us, began);
		usleep(PAUSE_US);
	}
	return argument;
}

static void *watch(void *argument)
{
	for (;;) {
		double began = now_us();
		usleep(PAUSE_US);
		note(&still_us, began + PAUSE_US);
	}
	return argument;
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	uint64_t pages = strtoull(argv[1], NULL, 10) << 8, seed = strtoull(argv[2], NULL, 10);
	char *memory = map(pages * PAGE);
	if (madvise(memory, pages * PAGE, MADV_NOHUGEPAGE) ||
	    (*argv[3] == '1' && madvise(memory, pages * PAGE, MADV_MERGEABLE)))
		return 1;
	uint64_t expected[PAGE / 8];
	for (uint64_t page = 0; page < pages; page++)
		write_page((uint64_t *)(memory + page * PAGE), page < pages / 4 ? page : page + seed * pages);
	pthread_t thread;
	if (pthread_create(&thread, NULL, keep_mapping, NULL) || pthread_create(&thread, NULL, watch, NULL))
		return 1;
	puts("READY");
	fflush(stdout);
	char word[16];
	while (scanf("%15s", word) == 1) {
		if (!strcmp(word, "gap")) {
			printf("%ld %ld\n", mapping_us, still_us);
			mapping_us = still_us = 0;
		} else {
			int wrong = 0;
			for (uint64_t page = 0; page < pages; page++) {
				write_page(expected, page < pages / 4 ? page : page + seed * pages);
				wrong |= memcmp(memory + page * PAGE, expected, PAGE);
			}
			puts(wrong ? "CORRUPT" : "OK");
		}
		fflush(stdout);
	}
	return 0;
}
