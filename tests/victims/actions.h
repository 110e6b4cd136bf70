/*
 * Victims that are a table of actions, each on an area of its own.
 *
 * Areas are made in `main` before READY, so that all of them can be merged by
 * one scan; `run NAME` then performs one action on its area.  `verify` checks
 * every area, also those whose action is still to come.
 */
#ifndef ACTIONS_H
#define ACTIONS_H
#include "victim.h"

struct action {
	const char *name;
	void (*perform)(void); /* says OK itself */
};

#define MAX_AREAS 64
static struct area *all_areas[MAX_AREAS];
static int area_count;

UNUSED static void area_known(struct area *area)
{
	must(area_count < MAX_AREAS);
	all_areas[area_count++] = area;
}

UNUSED static void check_all_areas(void)
{
	for (int i = 0; i < area_count; i++)
		area_check(all_areas[i]);
}

/* READY with the place of every area, as `name=address:pages`. */
UNUSED static void say_ready(void)
{
	char line[4096] = "READY";
	size_t length = 5;
	for (int i = 0; i < area_count; i++)
		length += snprintf(line + length, sizeof line - length, " %s=%p:%zu", all_areas[i]->name,
				   all_areas[i]->at, all_areas[i]->pages);
	line[length++] = '\n';
	must(write(1, line, length) == (ssize_t)length);
}

/* The action that `run NAME` asks for. */
UNUSED static void perform(const struct action *action, const char *line)
{
	while (action->name && (strncmp(line, "run ", 4) || strcmp(action->name, line + 4)))
		action++;
	if (!action->name)
		failed("unknown command %s", line);
	action->perform();
}

UNUSED static int serve(const struct action *actions)
{
	for (char *line; (line = command());) {
		if (!strcmp(line, "verify")) {
			check_all_areas();
			say("OK areas=%d", area_count);
			continue;
		}
		perform(actions, line);
	}
	return 0;
}

/*
 * Performs a read or a write that may be refused: the signal it raised, or 0.
 * The value read goes to *value.
 */
static sigjmp_buf access_jump;

static void access_refused(int number)
{
	siglongjmp(access_jump, number);
}

UNUSED static int try_access(volatile char *at, int write_it, char *value)
{
	struct sigaction action = {.sa_handler = access_refused}, old_segv, old_bus;
	sigaction(SIGSEGV, &action, &old_segv);
	sigaction(SIGBUS, &action, &old_bus);
	int number = sigsetjmp(access_jump, 1);
	if (!number) {
		if (write_it)
			*at = *value;
		else
			*value = *at;
	}
	sigaction(SIGSEGV, &old_segv, NULL);
	sigaction(SIGBUS, &old_bus, NULL);
	return number;
}
#endif
