/*
 * Processes that are not like others; each keeps 256 pages every sibling has too.
 *
 *   odd KIND [ARGUMENT]
 *
 * KIND
 *   plain       nothing odd
 *   sibling     a process that shares this memory (CLONE_VM without CLONE_THREAD) keeps writing to it
 *   churn       threads are created and exit all the time
 *   exits MS, execs MS     ends, or becomes /bin/cat, after MS milliseconds
 *   seccomp     has a filter that kills on socketpair
 *   locked      its memory is mlocked
 *   uffd        has a userfaultfd of its own on its memory
 *   undumpable  prctl(PR_SET_DUMPABLE, 0)
 *   shared      its memory is MAP_SHARED
 *   wiped       its memory is MADV_WIPEONFORK
 *   undumped    its memory is MADV_DONTDUMP
 *   stack       its memory grows downwards
 *   headless    on `run leave` the first thread ends by SYS_exit, another one answers from then on
 *   privileged  on `run drop` it gives up root with setuid
 * Commands: `verify`, and the two named above.
 */
#include "actions.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/ioctl.h>

#define PAGES 256

static struct area memory;
static const char *argument = "";
static volatile long odd_count;

/* Pages 0 to 7 belong to the sibling: it restamps one every 200 us and checks it first. */
static int sibling(void UNUSED *unused)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (uint64_t turn = 1;; turn++) {
		size_t page = turn % 8;
		if (wrong_word(memory.at + page * PAGE, memory.keys[page]) >= 0) {
			odd_count = -1;
			return 0;
		}
		uint64_t key = 56000 + page + turn % 3 * 100;
		memory.keys[page] = key;
		fill_page(memory.at + page * PAGE, key);
		odd_count = turn;
		usleep(turn % 64 ? 200 : 300000); /* rests, so that its pages look calm now and then */
	}
}

static void start_sibling(void)
{
	char *stack = map_anonymous(1 << 16, PROT_READ | PROT_WRITE);
	must(clone(sibling, stack + (1 << 16), CLONE_VM | CLONE_FILES | SIGCHLD, NULL) > 0);
}

static void *short_lived(void *page)
{
	size_t p = (size_t)page;
	check_page(memory.at + p * PAGE, memory.keys[p], "page of a short-lived thread");
	area_set(&memory, p, 56000 + p + (memory.keys[p] - 56000 - p + 1000) % 3000);
	return NULL;
}

static void *churn(void UNUSED *unused)
{
	for (uint64_t turn = 0;; turn += 4) {
		pthread_t threads[4];
		for (size_t t = 0; t < 4; t++)
			must(!pthread_create(&threads[t], NULL, short_lived, (void *)((turn + t) % 16)));
		for (size_t t = 0; t < 4; t++)
			pthread_join(threads[t], NULL);
		odd_count += 4;
	}
	return NULL;
}

static void *end_later(void UNUSED *unused)
{
	usleep(atoi(argument) * 1000);
	char *const cat[] = {"/bin/cat", NULL};
	if (odd_count)
		execv(cat[0], cat);
	_exit(0);
}

static void start_thread(void *(*body)(void *))
{
	pthread_t thread;
	must(!pthread_create(&thread, NULL, body, NULL));
}

static void filter_socketpair(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_socketpair, 0, 1),
		BPF_STMT(BPF_RET, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {4, code};
	must(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	must(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}

static void own_userfaultfd(void)
{
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	must(fd >= 0);
	struct uffdio_api api = {.api = UFFD_API};
	must(!ioctl(fd, UFFDIO_API, &api));
	struct uffdio_register wanted = {.range = {(uintptr_t)memory.at, PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	must(!ioctl(fd, UFFDIO_REGISTER, &wanted));
}

static void replace_memory(int flags)
{
	must(mmap(memory.at, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED | flags, -1, 0) == memory.at);
	for (size_t p = 0; p < PAGES; p++)
		area_set(&memory, p, memory.keys[p]);
}

static void drop_privileges(void)
{
	must(!setgid(65534) && !setuid(65534));
	int uid = getuid();
	area_check(&memory);
	for (size_t p = 0; p < PAGES; p += 5)
		area_set(&memory, p, 31 + p);
	area_check(&memory);
	/* Nothing foreign in this process may be written to and then run by it. */
	FILE *maps = fopen("/proc/self/maps", "r");
	int writable = 0;
	if (maps) { /* not readable any more for some who drop privileges */
		char line[512];
		while (fgets(line, sizeof line, maps)) {
			unsigned long start, end;
			char perms[5];
			if (sscanf(line, "%lx-%lx %4s", &start, &end, perms) == 3 && perms[3] == 's' && perms[2] == 'x')
				writable++;
		}
		fclose(maps);
	}
	say("OK uid=%d shared_executable=%d", uid, writable);
}

static void *answer_without_leader(void UNUSED *unused)
{
	const struct action actions[] = {{0}};
	usleep(50000);
	say("OK");
	serve(actions);
	syscall(SYS_exit, 0); /* the last thread of the process ends like a thread */
	return NULL;
}

static void leave(void)
{
	start_thread(answer_without_leader);
	syscall(SYS_exit, 0);
}

static void become(const char *kind)
{
	if (!strcmp(kind, "sibling"))
		start_sibling();
	else if (!strcmp(kind, "churn"))
		start_thread(churn);
	else if (!strcmp(kind, "seccomp"))
		filter_socketpair();
	else if (!strcmp(kind, "locked"))
		must(!mlock(memory.at, PAGES * PAGE));
	else if (!strcmp(kind, "uffd"))
		own_userfaultfd();
	else if (!strcmp(kind, "undumpable"))
		must(!prctl(PR_SET_DUMPABLE, 0));
	else if (!strcmp(kind, "shared"))
		replace_memory(MAP_SHARED | MAP_ANONYMOUS);
	else if (!strcmp(kind, "stack"))
		replace_memory(MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN);
	else if (!strcmp(kind, "wiped"))
		must(!madvise(memory.at, PAGES * PAGE, MADV_WIPEONFORK));
	else if (!strcmp(kind, "undumped"))
		must(!madvise(memory.at, PAGES * PAGE, MADV_DONTDUMP));
	else
		must(strstr("plain exits execs headless privileged", kind));
}

int main(int count, char **arguments)
{
	victim_start();
	must(count >= 2);
	const char *kind = arguments[1];
	argument = count > 2 ? arguments[2] : "";
	memory = area_new("memory", PAGES, 56000, 1);
	area_known(&memory);
	become(kind);
	say_ready();
	if (!strcmp(kind, "exits") || !strcmp(kind, "execs")) {
		odd_count = !strcmp(kind, "execs");
		start_thread(end_later);
	}
	const struct action actions[] = {{"drop", drop_privileges}, {"leave", leave}, {0}};
	if (strcmp(kind, "sibling") && strcmp(kind, "churn"))
		return serve(actions);
	/* Pages that others write are theirs to check: here only the rest. */
	size_t busy = !strcmp(kind, "sibling") ? 8 : 16;
	while (command()) {
		for (size_t p = busy; p < PAGES; p++)
			check_page(memory.at + p * PAGE, memory.keys[p], "quiet page");
		if (odd_count < 0)
			corrupt("page of the sibling");
		say("OK count=%ld", odd_count);
	}
	return 0;
}
