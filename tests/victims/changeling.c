/*
 * A process that forks at SIGUSR1 and calls exec at SIGUSR2, whatever it is doing, while a thread writes.
 *
 *   changeling PAGES [GENERATION]
 *
 * `still` is never changed by the process itself: a child sees all of it, writes to some,
 * drops some and reads zeros there, and ends.  `dropped` is for `drop TAG`, `busy` belongs to
 * the thread.  A command that was under way at an exec gets no answer: the new
 * program, which begins with fresh areas, says AGAIN, and answers carry the
 * command's TAG.
 */
#include "victim.h"
#include <stdatomic.h>

#define MAX_CHILDREN 4096

static struct area still, dropped, busy;
static char **own_arguments;
static pid_t children[MAX_CHILDREN];
static atomic_int child_count;
static atomic_long writes;

static void child_life(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	area_check(&still);
	area_set(&still, 1, 901);
	must(!madvise(still.at + 4 * PAGE, (still.pages / 2) * PAGE, MADV_DONTNEED));
	area_zeroed(&still, 4, still.pages / 2);
	area_set(&still, 5, 902);
	area_check(&still);
	_exit(0);
}

static void fork_now(int UNUSED number)
{
	int saved = errno;
	pid_t child = fork();
	must(child >= 0);
	if (!child)
		child_life();
	must(child_count < MAX_CHILDREN);
	children[child_count++] = child;
	errno = saved;
}

static void exec_now(int UNUSED number)
{
	char *arguments[] = {own_arguments[0], own_arguments[1], "again", NULL};
	execv("/proc/self/exe", arguments);
	failed("exec: %s", strerror(errno));
}

static void *write_all_the_time(void UNUSED *argument)
{
	uint64_t state = getpid();
	for (;;) {
		size_t page = random_next(&state) % busy.pages;
		check_page(busy.at + page * PAGE, busy.keys[page], "page of the writing thread");
		area_set(&busy, page, 45000 + page * 2 + random_next(&state) % 2);
		writes++;
		usleep(400);
	}
	return NULL;
}

static void look(void)
{
	area_check(&still);
	area_check(&dropped);
	for (int i = 0; i < child_count; i++) {
		if (children[i] && child_status(children[i]))
			failed("a child ended badly");
		children[i] = 0;
	}
}

int main(int count, char **arguments)
{
	victim_start();
	must(count == 2 || count == 3);
	own_arguments = arguments;
	sigset_t none;
	sigemptyset(&none);
	must(!sigprocmask(SIG_SETMASK, &none, NULL)); /* exec was called by a handler */
	size_t pages = strtoul(arguments[1], 0, 0);
	still = area_new("still", pages, 43000, 1);
	dropped = area_new("dropped", pages, 44000, 1);
	busy = area_new("busy", pages / 2, 45000, 1);
	for (size_t p = 0; p < busy.pages; p++)
		area_set(&busy, p, 45000 + p * 2);
	struct sigaction at_fork = {.sa_handler = fork_now, .sa_flags = SA_RESTART};
	struct sigaction at_exec = {.sa_handler = exec_now, .sa_flags = SA_RESTART};
	must(!sigaction(SIGUSR1, &at_fork, NULL) && !sigaction(SIGUSR2, &at_exec, NULL));
	pthread_t thread;
	must(!pthread_create(&thread, NULL, write_all_the_time, NULL));
	if (count == 3)
		say("AGAIN");
	else
		say("READY still=%p:%zu dropped=%p:%zu", still.at, still.pages, dropped.at, dropped.pages);
	for (char *line; (line = command());) {
		char word[32];
		unsigned long tag;
		must(sscanf(line, "%31s %lu", word, &tag) == 2);
		if (!strcmp(word, "drop")) {
			must(!madvise(dropped.at + 2 * PAGE, (pages - 4) * PAGE, MADV_DONTNEED));
			area_zeroed(&dropped, 2, pages - 4);
		} else if (!strcmp(word, "refill")) {
			for (size_t p = 0; p < pages; p++)
				area_set(&dropped, p, 44000 + p);
		} else if (strcmp(word, "verify")) {
			failed("unknown command %s", line);
		}
		look();
		say("OK tag=%lu children=%d writes=%ld", tag, child_count, (long)writes);
	}
	return 0;
}
