/*
 * fork, vfork, exec and posix_spawn of a process with merged memory.
 *
 *   forks
 *
 * A child sees its parent's content, reads zeros after MADV_DONTNEED, keeps its
 * own writes to itself, and so do its children, whoever dies first.
 * `run orphan` leaves the victim's pipes to a child and ends the parent: all
 * later commands are answered by a child that outlived it.
 */
#include "actions.h"
#include <spawn.h>

#define PAGES 48

static struct area seen, dropped, written, deep, late, during;
extern char **environ;

static pid_t fork_checked(void)
{
	pid_t child = fork();
	must(child >= 0);
	if (!child)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return child;
}

static void must_end_well(pid_t child, const char *what)
{
	int status = child_status(child);
	if (status)
		failed("%s: child ended with %d", what, status);
}

static void drop(struct area *area, size_t first, size_t count)
{
	must(!madvise(area->at + first * PAGE, count * PAGE, MADV_DONTNEED));
	area_zeroed(area, first, count);
}

/* All a process may do to an area, each time looking at everything. */
static void use_up(struct area *area, uint64_t salt)
{
	check_all_areas();
	drop(area, 3, 1);
	area_set(area, 3, salt);
	drop(area, 8, 12);
	for (size_t p = 6; p < 14; p++)
		area_set(area, p, salt + p);
	drop(area, 10, 2);
	area_set(area, PAGES - 1, salt);
	check_all_areas();
}

static void child_reads(void)
{
	pid_t child = fork_checked();
	if (!child) {
		check_all_areas();
		_exit(0);
	}
	must_end_well(child, "reads");
	check_all_areas();
	say("OK");
}

static void child_drops(void)
{
	pid_t child = fork_checked();
	if (!child) {
		drop(&dropped, 0, 1);
		drop(&dropped, 7, 20);
		check_all_areas();
		drop(&dropped, 0, PAGES);
		_exit(0);
	}
	must_end_well(child, "drops");
	area_check(&dropped);
	drop(&dropped, 2, 30);
	check_all_areas();
	say("OK");
}

static void child_writes(void)
{
	pid_t child = fork_checked();
	if (!child) {
		use_up(&written, 801);
		_exit(0);
	}
	use_up(&written, 802);
	must_end_well(child, "writes");
	check_all_areas();
	say("OK");
}

static void descend(int depth)
{
	if (depth) {
		pid_t child = fork_checked();
		if (!child) {
			descend(depth - 1);
			_exit(0);
		}
		use_up(&deep, 810 + depth);
		must_end_well(child, "descends");
	}
	use_up(&deep, 820 + depth);
}

static void grandchildren(void)
{
	descend(3);
	say("OK");
}

static void orphan(void)
{
	pid_t parent = getpid(), child = fork();
	must(child >= 0);
	if (child)
		_exit(0);
	alarm(120);
	while (getppid() == parent)
		usleep(1000);
	check_all_areas();
	say("OK pid=%d", getpid());
}

/* For the child that outlived its parent, and for its own children. */
static void use_up_late(void)
{
	pid_t child = fork_checked();
	if (!child) {
		use_up(&late, 831);
		_exit(0);
	}
	must_end_well(child, "late");
	use_up(&late, 832);
	say("OK");
}

static void vfork_child(void)
{
	static char *const arguments[] = {"/bin/true", NULL};
	for (volatile int i = 0; i < 20; i++) {
		pid_t child = vfork();
		if (!child) {
			if (i % 2)
				execve(arguments[0], arguments, environ);
			_exit(i % 2);
		}
		must(child > 0);
		must_end_well(child, "vfork");
	}
	check_all_areas();
	say("OK");
}

/* A vfork child that sleeps keeps its parent where no freeze can reach it. */
static void vfork_sleeper(void)
{
	pid_t child = vfork();
	if (!child) {
		struct timespec wait = {2, 0};
		syscall(SYS_nanosleep, &wait, NULL);
		_exit(0);
	}
	must(child > 0);
	must_end_well(child, "vfork sleeper");
	check_all_areas();
	say("OK");
}

static void spawn_and_exec(void)
{
	char *const arguments[] = {"/bin/true", NULL};
	for (int i = 0; i < 20; i++) {
		pid_t child;
		must(!posix_spawn(&child, arguments[0], NULL, NULL, arguments, environ));
		must_end_well(child, "posix_spawn");
		child = fork_checked();
		if (!child) {
			execve(arguments[0], arguments, environ);
			_exit(1);
		}
		must_end_well(child, "exec");
	}
	must(!system("true"));
	check_all_areas();
	say("OK");
}

/* Children come and go all the time while somebody merges; started and ended by commands. */
static volatile int storming;
static pthread_t storm_thread;
static long storm_children;

static void *storm(void UNUSED *argument)
{
	while (storming) {
		pid_t child = fork_checked();
		if (!child) {
			struct area mine = during;
			use_up(&mine, 840);
			_exit(0);
		}
		must_end_well(child, "storm");
		storm_children++;
	}
	return NULL;
}

static void storm_start(void)
{
	storming = 1;
	must(!pthread_create(&storm_thread, NULL, storm, NULL));
	say("OK");
}

static void storm_stop(void)
{
	storming = 0;
	pthread_join(storm_thread, NULL);
	check_all_areas();
	say("OK children=%ld", storm_children);
}

int main(void)
{
	victim_start();
	struct area *areas[] = {&seen, &dropped, &written, &deep, &late, &during};
	const char *names[] = {"seen", "dropped", "written", "deep", "late", "during"};
	for (int i = 0; i < 6; i++) {
		*areas[i] = area_new(names[i], PAGES, 70000 + i * 1000, 1);
		area_known(areas[i]);
	}
	say_ready();
	const struct action actions[] = {
		{"reads", child_reads}, {"drops", child_drops}, {"writes", child_writes},
		{"grandchildren", grandchildren}, {"orphan", orphan}, {"late", use_up_late},
		{"vfork", vfork_child}, {"vfork_sleeper", vfork_sleeper}, {"spawn", spawn_and_exec},
		{"storm_start", storm_start}, {"storm_stop", storm_stop}, {0},
	};
	return serve(actions);
}
