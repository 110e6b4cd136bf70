/*
 * What starting threads, processes and programs, and a signal, take this process.
 *
 *   tasks MIB
 *
 * Fills MIB MiB with content that is the same in every copy, prints READY.  For each line on
 * stdin it prints one: thread, fork, program (system) and signal, each median and longest of
 * `ROUNDS` in microseconds.  Every byte is checked at the end of each line; CORRUPT if one is wrong.
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

#define ROUNDS 101

static double samples[ROUNDS];

static void *nothing(void *argument) { return argument; }

static void start_thread(void)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, nothing, NULL) || pthread_join(thread, NULL))
		abort();
}

static void start_process(void)
{
	pid_t child = fork();
	if (!child)
		_exit(0);
	if (waitpid(child, NULL, 0) != child)
		abort();
}

static void start_program(void)
{
	if (system("true"))
		abort();
}

static void ignore(int signal) { (void)signal; }

static void take_signal(void) { raise(SIGUSR1); }

static int ascending(const void *a, const void *b)
{
	double difference = *(const double *)a - *(const double *)b;
	return (difference > 0) - (difference < 0);
}

static void measure(const char *name, void (*what)(void))
{
	for (int i = 0; i < ROUNDS; i++) {
		double began = now_us();
		what();
		samples[i] = now_us() - began;
	}
	qsort(samples, ROUNDS, sizeof samples[0], ascending);
	printf("%s=%.0f,%.0f ", name, samples[ROUNDS / 2], samples[ROUNDS - 1]);
}

int main(int count, char **arguments)
{
	size_t words = count > 1 ? (size_t)atol(arguments[1]) << 17 : 0;
	uint64_t *memory = mmap(NULL, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!words || memory == MAP_FAILED)
		return 2;
	for (size_t i = 0; i < words; i++)
		memory[i] = i / 512 * 77 + 3;
	signal(SIGUSR1, ignore);
	puts("READY");
	fflush(stdout);
	while (getchar() != EOF) {
		measure("thread", start_thread);
		measure("fork", start_process);
		measure("program", start_program);
		measure("signal", take_signal);
		for (size_t i = 0; i < words; i++)
			if (memory[i] != i / 512 * 77 + 3) {
				puts("CORRUPT");
				return 1;
			}
		puts("");
		fflush(stdout);
	}
	return 0;
}
