/*
 * The plainest way to read memory of other processes: process_vm_readv in a loop.
 *
 *   readers THREADS CHUNK
 *
 * Standard input: a line `PID ADDRESS BYTES` for each range, until its end. THREADS threads
 * then read all of it, CHUNK bytes at a time, each into a buffer of its own, and that is
 * all that is timed. Answers `OK bytes=... seconds=...`.
 */
#include "../../tests/victims/victim.h"
#include <stdatomic.h>
#include <sys/uio.h>

struct piece {
	pid_t pid;
	uintptr_t at;
	size_t bytes;
};

struct reader {
	pthread_t thread;
	double began, ended; /* seconds */
};

static struct piece *pieces;
static size_t count, chunk;
static _Atomic size_t next;
static pthread_barrier_t start;

static void cut(pid_t pid, uintptr_t at, size_t bytes)
{
	while (bytes) {
		size_t part = bytes < chunk ? bytes : chunk;
		if (!(count & (count - 1))) /* full at each power of two */
			must(pieces = realloc(pieces, (count ? 2 * count : 1) * sizeof *pieces));
		pieces[count++] = (struct piece){pid, at, part};
		at += part;
		bytes -= part;
	}
}

static void *read_on(void *argument)
{
	struct reader *reader = argument;
	char *buffer = map_anonymous(chunk, PROT_READ | PROT_WRITE);
	memset(buffer, 1, chunk);
	pthread_barrier_wait(&start);
	reader->began = now_seconds();
	for (size_t i; (i = atomic_fetch_add(&next, 1)) < count;) {
		struct iovec here = {buffer, pieces[i].bytes}, there = {(void *)pieces[i].at, pieces[i].bytes};
		must(process_vm_readv(pieces[i].pid, &here, 1, &there, 1, 0) == (ssize_t)pieces[i].bytes);
	}
	reader->ended = now_seconds();
	return NULL;
}

int main(int arguments, char **words)
{
	victim_start();
	must(arguments == 3);
	unsigned threads = strtoul(words[1], 0, 0);
	must(threads);
	must(chunk = strtoul(words[2], 0, 0));
	size_t total = 0;
	unsigned long pid, at, bytes;
	while (scanf("%lu %lu %lu", &pid, &at, &bytes) == 3) {
		cut(pid, at, bytes);
		total += bytes;
	}
	struct reader *readers = calloc(threads, sizeof *readers);
	must(readers);
	pthread_barrier_init(&start, NULL, threads);
	for (unsigned t = 0; t < threads; t++)
		must(!pthread_create(&readers[t].thread, NULL, read_on, &readers[t]));
	double began = 0, ended = 0;
	for (unsigned t = 0; t < threads; t++) {
		must(!pthread_join(readers[t].thread, NULL));
		if (!t || readers[t].began < began)
			began = readers[t].began;
		if (readers[t].ended > ended)
			ended = readers[t].ended;
	}
	say("OK bytes=%zu seconds=%.6f", total, ended - began);
	return 0;
}
