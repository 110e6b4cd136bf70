/*
 * Performs the memory operations it is told and says what every page contains; whether
 * that is right is for tests/model/ to know.
 *
 * A line of commands `NAME arguments;NAME arguments;...` is answered by one line with
 * one word a command, `result,errno,report`.  The report has nine characters a page:
 * eight of a hash and how the page could be read (`r` by a load, `n` through
 * /proc/self/mem only, `u` not mapped, `h` left alone since a thread writes to it).
 * A command after `q` is followed by a report only when it failed.
 *
 * Pages have numbers: the arena, which lies far from where the kernel places mappings
 * by itself; `away`, the last mapping that mremap moved to a place of its own choice;
 * the heap of brk.
 */
#include "victim.h"
#include <malloc.h>
#include <sys/time.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#define ARENA_AT ((char *)0x200000000000ul)
#define ARENA 64
#define AWAY 32
#define HEAP 16
#define PAGES (ARENA + AWAY + HEAP)
#define MAX_WRITERS 2

struct writer {
	pthread_t thread;
	int page;
	uint64_t key;
	volatile int stop, wrong;
};

static struct writer writers[MAX_WRITERS];
static char *away, *heap;
static int away_pages, heap_pages, memory, hot[PAGES];
static char output[1 << 17];
static size_t output_length;
static sigjmp_buf access_jump;
static volatile sig_atomic_t expecting;
static volatile long ticks;
static char **own_arguments;

static void refused(int number)
{
	if (!expecting)
		_exit(100 + number);
	siglongjmp(access_jump, 1);
}

static void tick(int number)
{
	(void)number;
	ticks++;
}

static void put(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	output_length += vsnprintf(output + output_length, sizeof output - output_length, format, arguments);
	va_end(arguments);
	must(output_length < sizeof output - 2048);
}

static void flush(void)
{
	for (size_t done = 0; done < output_length;) {
		ssize_t got = write(1, output + done, output_length - done);
		if (got < 0 && errno != EINTR)
			_exit(7);
		done += got > 0 ? got : 0;
	}
	output_length = 0;
}

static char *page_at(int page)
{
	if (page < ARENA)
		return ARENA_AT + page * PAGE;
	return page < ARENA + AWAY ? away + (page - ARENA) * PAGE : heap + (page - ARENA - AWAY) * PAGE;
}

static int exists(int page)
{
	if (page < ARENA)
		return 1;
	return page < ARENA + AWAY ? page - ARENA < away_pages : page - ARENA - AWAY < heap_pages;
}

static unsigned hash_page(const void *at)
{
	const uint64_t *words = at;
	uint64_t hash = 0;
	for (size_t w = 0; w < WORDS; w++) {
		hash = (hash ^ words[w]) * 0x9E3779B97F4A7C15ull;
		hash ^= hash >> 29;
	}
	return hash >> 32;
}

static void report_page(int page)
{
	static char copy[PAGE];
	if (hot[page]) {
		put("********h");
		return;
	}
	if (!exists(page)) {
		put("--------u");
		return;
	}
	unsigned hash = 0;
	volatile int readable = 0;
	expecting = 1;
	if (!sigsetjmp(access_jump, 0)) {
		hash = hash_page(page_at(page));
		readable = 1;
	}
	expecting = 0;
	if (readable)
		put("%08xr", hash);
	else if (pread(memory, copy, PAGE, (off_t)page_at(page)) == (ssize_t)PAGE)
		put("%08xn", hash_page(copy));
	else
		put("--------u");
}

static void report(void)
{
	for (int page = 0; page < PAGES; page++)
		report_page(page);
}

/* Writes as many pages as let themselves be written; bit p of the result says that page p was refused. */
static long fill(int first, int count, uint64_t key, int same)
{
	volatile unsigned long bad = 0;
	for (volatile int p = 0; p < count; p++) {
		expecting = 1;
		if (sigsetjmp(access_jump, 0))
			bad |= 1ul << p;
		else
			fill_page(page_at(first + p), same ? key : key + p);
		expecting = 0;
	}
	return (long)bad;
}

static long remap(int from, int old, int new, int flags, int to)
{
	char *result = mremap(page_at(from), old * PAGE, new * PAGE, flags, page_at(to));
	if (result == MAP_FAILED)
		return -1;
	if (flags & MREMAP_FIXED)
		return to;
	if (result == page_at(from))
		return from;
	if (away_pages)
		failed("moved although something is away");
	away = result;
	away_pages = new;
	return ARENA;
}

static long set_break(int pages)
{
	int done = brk(heap + pages * PAGE);
	if (!done)
		heap_pages = pages;
	return done;
}

static void *write_for_ever(void *data)
{
	struct writer *writer = data;
	for (uint64_t turn = 0; !writer->stop; turn++) {
		uint64_t key = writer->key + (turn & 1);
		fill_page(page_at(writer->page), key);
		usleep(20);
		writer->wrong |= wrong_word(page_at(writer->page), key) >= 0;
	}
	return NULL;
}

static long start_writer(int index, int page, uint64_t key)
{
	struct writer *writer = &writers[index];
	*writer = (struct writer){.page = page, .key = key};
	hot[page] = 1;
	return pthread_create(&writer->thread, NULL, write_for_ever, writer);
}

static long stop_writer(int index)
{
	struct writer *writer = &writers[index];
	writer->stop = 1;
	pthread_join(writer->thread, NULL);
	hot[writer->page] = 0;
	return writer->wrong;
}

static long set_timer(int on)
{
	struct itimerval timer = {.it_interval.tv_usec = on * 700, .it_value.tv_usec = on * 700};
	return setitimer(ITIMER_REAL, &timer, NULL);
}

/* The child reports, purges, reports again and ends. */
static long fork_once(int first, int count)
{
	flush();
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC); /* the other one shows the parent's */
		report();
		put(",");
		if (count)
			madvise(page_at(first), count * PAGE, MADV_DONTNEED);
		report();
		put(",");
		flush();
		_exit(0);
	}
	return child_status(child);
}

/* The child goes on in our place; we do when it leaves. */
static long push(void)
{
	flush();
	pid_t child = fork();
	must(child >= 0);
	if (child)
		return child_status(child) ? -2 : 0;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(memory);
	memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	return getpid();
}

static void start_again(void)
{
	flush();
	execv("/proc/self/exe", own_arguments);
	_exit(7);
}

static long perform(const char *name, const long *a)
{
	char *at = page_at(a[0]);
	size_t size = a[1] * PAGE;
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	switch (name[0]) {
	case 'v': return 0;
	case 'm': return mmap(at, size, a[2], flags, -1, 0) == MAP_FAILED ? -1 : 0;
	case 'u': return munmap(at, size);
	case 'w': return fill(a[0], a[1], a[2], a[3]);
	case 'r': return remap(a[0], a[1], a[2], a[3], a[4]);
	case 'p': return mprotect(at, size, a[2]);
	case 'a': return madvise(at, size, a[2]);
	case 'l': return mlock(at, size);
	case 'k': return munlock(at, size);
	case 'b': return set_break(a[0]);
	case 'f': return fork_once(a[0], a[1]);
	case 't': return start_writer(a[0], a[1], a[2]);
	case 's': return stop_writer(a[0]);
	case 'i': return set_timer(a[0]);
	case 'P': return push();
	case 'Q': _exit(0);
	case 'x': start_again(); return 0;
	case 'g': away_pages = 0; return 0; /* everything that was away is gone */
	}
	failed("unknown command %s", name);
}

static char *next_line(void)
{
	static char line[1 << 15];
	static size_t length;
	for (;;) {
		ssize_t got = read(0, line + length, sizeof line - 1 - length);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return NULL;
		length += got;
		if (line[length - 1] == '\n') { /* the driver waits for each answer */
			line[length - 1] = 0;
			length = 0;
			return line;
		}
	}
}

int main(int count, char **arguments)
{
	(void)count;
	own_arguments = arguments;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_DUMPABLE, 1);
	/* The C library's own heap lies below ours and never grows or shrinks. */
	mallopt(M_TRIM_THRESHOLD, 1 << 30);
	void *volatile block = malloc(1);
	free(block);
	heap = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1));
	must(!brk(heap));
	memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	must(memory >= 0);
	struct sigaction action = {.sa_handler = refused, .sa_flags = SA_NODEFER};
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	action = (struct sigaction){.sa_handler = tick, .sa_flags = SA_RESTART};
	sigaction(SIGALRM, &action, NULL);
	say("READY pid=%d", getpid());
	for (char *line; (line = next_line()) && strcmp(line, "quit");) {
		char *rest = line;
		for (char *word; (word = strsep(&rest, ";"));) {
			int quiet = word[0] == 'q';
			char *name = word + quiet;
			long values[5] = {0};
			sscanf(name + 1, "%ld %ld %ld %ld %ld", &values[0], &values[1], &values[2], &values[3], &values[4]);
			errno = 0;
			long result = perform(name, values);
			put("%ld,%d,", result, result == -1 ? errno : 0);
			if (!quiet || result == -1)
				report();
			put(rest ? " " : "\n");
		}
		flush();
	}
	return 0;
}
