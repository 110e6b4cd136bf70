/*
 * One area whose pages all have one content, and what KSM's own tests do to such memory.
 *
 *   ksm PAGES KEY
 *
 * Commands: `verify`, `fill KEY` (all pages), `write PAGE KEY`, `byte PAGE` (changes one byte of it
 * through the mapping, verified before and after), `drop FIRST COUNT` (MADV_DONTNEED), `none`, `rw`
 * (protection of all), `poke PAGE KEY` (writes the page by /proc/self/mem), `move` (mremap to another
 * place), `child` (forks; the child checks, writes and drops, then the parent checks), `exec` (becomes a
 * fresh `ksm` with the same arguments and inherited descriptors), `watch` (registers the area with a
 * userfaultfd of its own), `lock`, `unlock` (mlockall), `huge` (MADV_COLLAPSE), `futex` (threads hand a
 * word of each of four pages to and fro with FUTEX_WAIT and FUTEX_WAKE), `robust` (a thread dies with a
 * robust lock in a page), `limit PAGES` and `unlimit` (RLIMIT_AS to what is used now and so
 * many pages more), `ramp KEY` (page p becomes KEY + p).
 */
#include "victim.h"
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/resource.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

static struct area memory;

static void fill(uint64_t key)
{
	for (size_t p = 0; p < memory.pages; p++)
		area_set(&memory, p, key);
}

static void poke(size_t page, uint64_t key)
{
	int file = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	must(file >= 0);
	static char content[PAGE];
	fill_page(content, key);
	must(pwrite(file, content, PAGE, (off_t)(memory.at + page * PAGE)) == (ssize_t)PAGE);
	memory.keys[page] = key;
	close(file);
}

static void move(void)
{
	char *place = map_anonymous((memory.pages + 2) * PAGE, PROT_NONE) + PAGE;
	void *got = mremap(memory.at, memory.pages * PAGE, memory.pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
	int refused = got == MAP_FAILED ? errno : 0;
	if (!refused)
		memory.at = place;
	area_check(&memory);
	say("OK memory=%p:%zu errno=%d", memory.at, memory.pages, refused);
}

static void one_byte(size_t page)
{
	check_page(memory.at + page * PAGE, memory.keys[page], "before the byte changes");
	memory.at[page * PAGE + 77] ^= 1;
	must(wrong_word(memory.at + page * PAGE, memory.keys[page]) == 77 / 8);
	for (size_t other = 0; other < memory.pages; other++)
		if (other != page)
			check_page(memory.at + other * PAGE, memory.keys[other], "beside the byte");
	memory.at[page * PAGE + 77] ^= 1;
}

static void child(void)
{
	pid_t pid = fork();
	must(pid >= 0);
	if (!pid) {
		area_check(&memory);
		for (size_t p = 0; p < memory.pages / 2; p++) {
			fill_page(memory.at + p * PAGE, 4000 + p);
			check_page(memory.at + p * PAGE, 4000 + p, "written by the child");
		}
		if (madvise(memory.at, PAGE * 4, MADV_DONTNEED))
			_exit(3);
		for (size_t p = 0; p < 4; p++)
			check_page(memory.at + p * PAGE, 0, "dropped by the child");
		for (size_t p = memory.pages / 2; p < memory.pages; p++)
			check_page(memory.at + p * PAGE, memory.keys[p], "not written by the child");
		_exit(0);
	}
	int status = child_status(pid);
	if (status)
		failed("child ended with %d", status);
	area_check(&memory);
}

static void watch(void)
{
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	must(fd >= 0);
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
	must(!ioctl(fd, UFFDIO_API, &api));
	struct uffdio_register range = {.range = {(uintptr_t)memory.at, memory.pages * PAGE},
					.mode = UFFDIO_REGISTER_MODE_WP};
	must(!ioctl(fd, UFFDIO_REGISTER, &range));
}

#define TURNS 300
static _Atomic int *words[4];

static void *answer_turns(void *word_)
{
	_Atomic int *word = word_;
	for (int turn = 1; turn < TURNS; turn += 2) {
		int seen;
		while ((seen = atomic_load(word)) != turn)
			syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
		atomic_store(word, turn + 1);
		syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	}
	return NULL;
}

/* The first write to each word copies its page while the other thread may be waiting on it. */
static void futexes(void)
{
	pthread_t threads[4];
	for (int i = 0; i < 4; i++) {
		words[i] = (_Atomic int *)(memory.at + i * PAGE);
		atomic_store(words[i], 0);
		must(!pthread_create(&threads[i], NULL, answer_turns, (void *)words[i]));
	}
	for (int i = 0; i < 4; i++) {
		for (int turn = 0; turn < TURNS; turn += 2) {
			int seen;
			while ((seen = atomic_load(words[i])) != turn)
				syscall(SYS_futex, words[i], FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
			atomic_store(words[i], turn + 1);
			syscall(SYS_futex, words[i], FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
		}
		pthread_join(threads[i], NULL);
		must(atomic_load(words[i]) == TURNS);
		area_set(&memory, i, memory.keys[i]);
	}
}

static void *die_with_lock(void *lock)
{
	must(!pthread_mutex_lock(lock));
	return NULL;
}

static void robust(void)
{
	pthread_mutexattr_t attributes;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_t *lock = (pthread_mutex_t *)(memory.at + 5 * PAGE);
	pthread_mutex_init(lock, &attributes);
	pthread_t thread;
	must(!pthread_create(&thread, NULL, die_with_lock, lock));
	must(!pthread_join(thread, NULL));
	must(pthread_mutex_lock(lock) == EOWNERDEAD);
	must(!pthread_mutex_consistent(lock));
	must(!pthread_mutex_unlock(lock));
	must(!pthread_mutex_destroy(lock));
	area_set(&memory, 5, memory.keys[5]);
}

static void limit(size_t more)
{
	unsigned long pages = 0;
	FILE *file = fopen("/proc/self/statm", "r");
	must(file && fscanf(file, "%lu", &pages) == 1);
	fclose(file);
	struct rlimit space = {(pages + more) * PAGE, RLIM_INFINITY};
	must(!setrlimit(RLIMIT_AS, &space));
}

int main(int count, char **arguments)
{
	victim_start();
	must(count == 3);
	memory = area_new("memory", strtoul(arguments[1], 0, 0), 0, 1);
	fill(strtoul(arguments[2], 0, 0));
	say("READY memory=%p:%zu", memory.at, memory.pages);
	for (char *line; (line = command());) {
		unsigned long first, second;
		if (sscanf(line, "fill %lu", &first) == 1) {
			fill(first);
		} else if (sscanf(line, "write %lu %lu", &first, &second) == 2) {
			area_set(&memory, first, second);
		} else if (sscanf(line, "byte %lu", &first) == 1) {
			one_byte(first);
		} else if (sscanf(line, "drop %lu %lu", &first, &second) == 2) {
			must(!madvise(memory.at + first * PAGE, second * PAGE, MADV_DONTNEED));
			area_zeroed(&memory, first, second);
		} else if (!strcmp(line, "none")) {
			must(!mprotect(memory.at, memory.pages * PAGE, PROT_NONE));
			say("OK");
			continue;
		} else if (!strcmp(line, "rw")) {
			must(!mprotect(memory.at, memory.pages * PAGE, PROT_READ | PROT_WRITE));
		} else if (sscanf(line, "poke %lu %lu", &first, &second) == 2) {
			poke(first, second); /* the area may be PROT_NONE: `rw` looks at it */
			say("OK");
			continue;
		} else if (!strcmp(line, "move")) {
			move();
			continue;
		} else if (!strcmp(line, "child")) {
			child();
		} else if (!strcmp(line, "exec")) {
			execv("/proc/self/exe", arguments);
			failed("exec: %s", strerror(errno));
		} else if (!strcmp(line, "watch")) {
			watch();
		} else if (!strcmp(line, "lock")) {
			must(!mlockall(MCL_CURRENT | MCL_FUTURE));
		} else if (!strcmp(line, "unlock")) {
			must(!munlockall());
		} else if (!strcmp(line, "huge")) {
			int refused = madvise(memory.at, memory.pages * PAGE, MADV_COLLAPSE) ? errno : 0;
			area_check(&memory);
			say("OK errno=%d", refused);
			continue;
		} else if (!strcmp(line, "futex")) {
			futexes();
		} else if (!strcmp(line, "robust")) {
			robust();
		} else if (sscanf(line, "limit %lu", &first) == 1) {
			limit(first);
		} else if (!strcmp(line, "unlimit")) {
			must(!setrlimit(RLIMIT_AS, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY}));
		} else if (sscanf(line, "ramp %lu", &first) == 1) {
			for (size_t p = 0; p < memory.pages; p++)
				area_set(&memory, p, first + p);
		} else if (strcmp(line, "verify")) {
			failed("unknown command %s", line);
		}
		area_check(&memory);
		say("OK");
	}
	return 0;
}
