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
 *   threads     is killed for clone but as the C library starts threads, and forks; and for unshare
 * `run lock` lays a filter on all of its threads (TSYNC) that kills it for ioctl, mremap, mprotect and
 * mmap at a fixed place; the agent is one of its threads.  `run shut` lays one that kills it for what only
 * an agent does that has just been started.  `run discard` reads zeros after MADV_DONTNEED,
 * `run child` lets a child discard and write, `run grandchild` a child of that as well,
 * `run reads` a child only look and write.  `run keep` moves memory whose place stays mapped, `run grow`
 * a half of an area, which grows by that; `run again` discards what came to show zeros then, and writes
 * there; `run apart` lets a child do all of this.
 */
#include "actions.h"
#include <linux/filter.h>
#include <linux/seccomp.h>

#define PAGES 256
#define MOVED 16ul
#define COUNT(array) (sizeof(array) / sizeof(array[0]))
#define NUMBER BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0)
#define ANSWER(number, answer) BPF_JUMP(BPF_JMP | BPF_JEQ, number, 0, 1), BPF_STMT(BPF_RET, answer)
#define REFUSED(number) ANSWER(number, SECCOMP_RET_ERRNO | EPERM)
#define DEADLY(number) ANSWER(number, SECCOMP_RET_KILL_PROCESS)
#define ALLOWED BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW)

static struct area memory, left, kept, grown, kept_away, grown_away;
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

/* What is at `to` now: `pages` of `area`, and zeros behind them. */
static struct area arrived(const struct area *area, char *to, size_t pages)
{
	struct area new = {.at = to, .pages = MOVED, .keys = map_knowledge(MOVED * 8), .name = "moved"};
	memcpy(new.keys, area->keys, pages * 8);
	area_zeroed(&new, pages, MOVED - pages);
	area_check(&new);
	return new;
}

static void move_and_keep(void)
{
	char *to = mremap(kept.at, MOVED * PAGE, MOVED * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	must(to != MAP_FAILED);
	kept_away = arrived(&kept, to, MOVED);
	area_known(&kept_away);
	area_zeroed(&kept, 0, MOVED);
}

static void move_and_grow(void)
{
	char *room = map_anonymous((MOVED + 2) * PAGE, PROT_NONE) + PAGE;
	char *to = mremap(grown.at, MOVED / 2 * PAGE, MOVED * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
	must(to == room);
	grown_away = arrived(&grown, to, MOVED / 2);
	area_known(&grown_away);
	grown.at += MOVED / 2 * PAGE;
	grown.keys += MOVED / 2;
	grown.pages -= MOVED / 2;
}

static void discard_zeros(void)
{
	struct area *shown[] = {&kept, &grown_away};
	for (int i = 0; i < 2; i++) {
		must(!madvise(shown[i]->at + MOVED / 2 * PAGE, MOVED / 2 * PAGE, MADV_DONTNEED));
		area_zeroed(shown[i], MOVED / 2, MOVED / 2);
		area_set(shown[i], MOVED - 2, 77000 + i);
		area_check(shown[i]);
	}
}

static void keep(void)
{
	move_and_keep();
	say("OK");
}

static void grow(void)
{
	move_and_grow();
	say("OK");
}

static void again(void)
{
	discard_zeros();
	say("OK");
}

static void apart(void)
{
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		move_and_keep();
		move_and_grow();
		check_all_areas();
		discard_zeros();
		check_all_areas();
		_exit(0);
	}
	must(!child_status(child));
	check_all_areas();
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
	kept = area_new("kept", MOVED, 63000, 1);
	grown = area_new("grown", MOVED, 64000, 1);
	area_known(&kept);
	area_known(&grown);
	struct sock_filter container[] = {
		NUMBER, REFUSED(SYS_userfaultfd), REFUSED(SYS_process_vm_readv), REFUSED(SYS_process_vm_writev),
		REFUSED(SYS_kcmp), REFUSED(SYS_ptrace), REFUSED(SYS_bpf), REFUSED(SYS_perf_event_open),
		REFUSED(SYS_mount), REFUSED(SYS_unshare), REFUSED(SYS_move_pages), REFUSED(SYS_mbind), ALLOWED,
	};
	struct sock_filter deadly[] = {NUMBER, DEADLY(SYS_socketpair), ALLOWED};
	struct sock_filter harmless[] = {NUMBER, REFUSED(SYS_ptrace), ALLOWED};
	struct sock_filter threads[] = {
		NUMBER, ANSWER(SYS_clone3, SECCOMP_RET_ERRNO | ENOSYS), DEADLY(SYS_unshare),
		BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_clone, 0, 4),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 16), /* flags */
		BPF_JUMP(BPF_JMP | BPF_JEQ, 0x3d0f00, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ, 0x1200011, 1, 0),
		BPF_STMT(BPF_RET, SECCOMP_RET_KILL_PROCESS),
		ALLOWED,
	};
	if (!strcmp(arguments[1], "threads"))
		install(threads, COUNT(threads), 0);
	else if (!strcmp(arguments[1], "harmless"))
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
		{"reads", child_reads}, {"keep", keep}, {"grow", grow}, {"again", again}, {"apart", apart}, {0},
	};
	return serve(actions);
}
