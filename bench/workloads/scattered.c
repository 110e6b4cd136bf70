/*
 * Pages that are equal in every process, in an order of its own, and how long this process stands still.
 *
 *   scattered PAGES STEP
 *
 * Page i has the content of key i * STEP % PAGES; prints READY.  A thread wakes every half
 * millisecond.  For each word on stdin one line comes: `gap`, the longest time since the last
 * `gap` in which that thread did not run, in microseconds; `fork`, what a fork takes, in
 * microseconds, the child living for 0.2 s; `check`, OK, or CORRUPT where a byte is wrong.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

static _Atomic long longest_us;

static void *watch(void *argument)
{
	double last = now_us();
	for (;;) {
		usleep(500);
		double now = now_us();
		if (now - last > longest_us)
			longest_us = now - last;
		last = now;
	}
	return argument;
}

static double fork_us(void)
{
	double began = now_us();
	pid_t child = fork();
	if (!child) {
		usleep(200000);
		_exit(0);
	}
	double took = now_us() - began;
	if (waitpid(child, NULL, 0) != child)
		abort();
	return took;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	uint64_t pages = strtoull(argv[1], NULL, 10), step = strtoull(argv[2], NULL, 10);
	char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t thread;
	if (memory == MAP_FAILED || madvise(memory, pages * PAGE, MADV_NOHUGEPAGE) ||
	    pthread_create(&thread, NULL, watch, NULL))
		return 1;
	for (uint64_t page = 0; page < pages; page++)
		write_page((uint64_t *)(memory + page * PAGE), page * step % pages);
	puts("READY");
	fflush(stdout);
	char word[16];
	uint64_t expected[PAGE / 8];
	while (scanf("%15s", word) == 1) {
		if (!strcmp(word, "gap")) {
			printf("%ld\n", longest_us);
			longest_us = 0;
		} else if (!strcmp(word, "fork")) {
			printf("%.0f\n", fork_us());
		} else {
			int wrong = 0;
			for (uint64_t page = 0; page < pages; page++) {
				write_page(expected, page * step % pages);
				wrong |= memcmp(memory + page * PAGE, expected, PAGE);
			}
			puts(wrong ? "CORRUPT" : "OK");
		}
		fflush(stdout);
	}
	return 0;
}
