/*
 * A process with seccomp filters.
 *
 *   sandbox KIND
 *
 * KIND:
 *   plain       none
 *   container   refuses what container runtimes refuse by default (EPERM), userfaultfd among it
 *   deadly      is killed for socketpair
 *   harmless    refuses ptrace
 * `run lock` lays a filter on all of its threads (TSYNC) that kills it for ioctl, mremap, mprotect and
 * mmap at a fixed place; the agent is one of its threads.  `run shut` lays one that kills it for what only
 * an agent does that has just been started.  `run discard` reads zeros after MADV_DONTNEED,
 * `run child` lets a child discard and write, `run grandchild` a child of that as well,
 * `run reads` a child only look and write.
 */
#include "actions.h"
#include <linux/filter.h>
#include <linux/seccomp.h>

#define PAGES 256
#define COUNT(array) (sizeof(array) / sizeof(array[0]))
#define NUMBER BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0)
#define ANSWER(number, answer) BPF_JUMP(BPF_JMP | BPF_JEQ, number, 0, 1), BPF_STMT(BPF_RET, answer)
#define REFUSED(number) ANSWER(number, SECCOMP_RET_ERRNO | EPERM)
#define DEADLY(number) ANSWER(number, SECCOMP_RET_KILL_PROCESS)
#define ALLOWED BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW)

static struct area memory, left;
static size_t next;

static void install(struct sock_filter *code, unsigned short count, unsigned flags)
{
	struct sock_fprog program = {count, code};
	must(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	must(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program));
}

static void lock(void)
{
	struct sock_filter code[] = {
		NUMBER, DEADLY(SYS_ioctl), DEADLY(SYS_mprotect),
		BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_mmap, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 40), /* flags */
		BPF_JUMP(BPF_JMP | BPF_JSET, MAP_FIXED, 0, 1),
		BPF_STMT(BPF_RET, SECCOMP_RET_KILL_PROCESS),
		ALLOWED,
	};
	install(code, COUNT(code), SECCOMP_FILTER_FLAG_TSYNC);
	say("OK");
}

static void shut(void)
{
	struct sock_filter code[] = {
		NUMBER, DEADLY(SYS_capset), DEADLY(SYS_recvmsg), DEADLY(SYS_sendmsg), DEADLY(SYS_userfaultfd), ALLOWED,
	};
	install(code, COUNT(code), SECCOMP_FILTER_FLAG_TSYNC);
	say("OK");
}

static void discard_some(struct area *area, size_t first)
{
	must(!madvise(area->at + first * PAGE, 8 * PAGE, MADV_DONTNEED));
	area_zeroed(area, first, 8);
	area_check(area);
}

static void discard(void)
{
	discard_some(&memory, next);
	next += 8;
	for (size_t p = 200; p < 210; p++)
		area_set(&memory, p, 90000 + next + p);
	area_check(&memory);
	say("OK");
}

static void use_up(int depth)
{
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		area_check(&memory);
		discard_some(&memory, 100);
		area_set(&memory, 150, 12345);
		usleep(200000); /* until somebody has found it */
		discard_some(&memory, 120);
		if (depth)
			use_up(depth - 1);
		area_check(&memory);
		_exit(0);
	}
	must(!child_status(child));
	area_check(&memory);
}

static void child(void)
{
	use_up(0);
	say("OK");
}

static void child_reads(void)
{
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		area_check(&memory);
		area_set(&memory, 150, 54321);
		area_check(&memory);
		_exit(0);
	}
	must(!child_status(child));
	area_check(&memory);
	say("OK");
}

static void grandchild(void)
{
	use_up(1);
	say("OK");
}

int main(int count, char **arguments)
{
	victim_start();
	must(count == 2);
	memory = area_new("memory", PAGES, 61000, 1);
	left = area_new("left", PAGES, 62000, 1);
	area_known(&memory);
	area_known(&left);
	struct sock_filter container[] = {
		NUMBER, REFUSED(SYS_userfaultfd), REFUSED(SYS_process_vm_readv), REFUSED(SYS_process_vm_writev),
		REFUSED(SYS_kcmp), REFUSED(SYS_ptrace), REFUSED(SYS_bpf), REFUSED(SYS_perf_event_open),
		REFUSED(SYS_mount), REFUSED(SYS_unshare), REFUSED(SYS_move_pages), REFUSED(SYS_mbind), ALLOWED,
	};
	struct sock_filter deadly[] = {NUMBER, DEADLY(SYS_socketpair), ALLOWED};
	struct sock_filter harmless[] = {NUMBER, REFUSED(SYS_ptrace), ALLOWED};
	if (!strcmp(arguments[1], "harmless"))
		install(harmless, COUNT(harmless), 0);
	else if (!strcmp(arguments[1], "container"))
		install(container, COUNT(container), 0);
	else if (!strcmp(arguments[1], "deadly"))
		install(deadly, COUNT(deadly), 0);
	else
		must(!strcmp(arguments[1], "plain"));
	say_ready();
	const struct action actions[] = {
		{"lock", lock}, {"shut", shut}, {"discard", discard}, {"child", child}, {"grandchild", grandchild},
		{"reads", child_reads}, {0},
	};
	return serve(actions);
}
