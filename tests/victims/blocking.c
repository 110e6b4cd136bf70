/*
 * One thread that sits in a blocking system call while somebody merges it.
 *
 *   blocking CALL
 *
 * READY, then the call, then `OK ret=.. errno=.. ms=.. detail=..` with exactly
 * what the kernel returned.  What ends the call comes from outside: a line on
 * standard input, a connection to the abstract socket named in READY, SIGUSR1, or
 * time.  Memory around it is checked before and after.
 */
#include "victim.h"
#include <linux/futex.h>
#include <poll.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/un.h>

static volatile sig_atomic_t signals_seen;
static char detail[64] = "-";

static void seen(int UNUSED number)
{
	signals_seen++;
}

static int listener(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int length = snprintf(address.sun_path + 1, 60, "gpuksm-victim-%d", getpid());
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	must(fd >= 0);
	must(!bind(fd, (struct sockaddr *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + length));
	must(!listen(fd, 4));
	return fd;
}

static long remaining_ms(struct timespec left)
{
	return left.tv_sec * 1000 + left.tv_nsec / 1000000;
}

static long call_nanosleep(void)
{
	struct timespec wait = {2, 0}, left = {77, 0};
	long result = syscall(SYS_nanosleep, &wait, &left);
	snprintf(detail, sizeof detail, "%ld", remaining_ms(left));
	return result;
}

static long call_clock_nanosleep(void)
{
	struct timespec until, left = {77, 0};
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += 2;
	return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &until, &left);
}

static long call_futex(void)
{
	static uint32_t word = 5;
	struct timespec wait = {2, 0};
	return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 5, &wait, NULL, 0);
}

static long call_read(void)
{
	char line[16];
	return read(0, line, sizeof line);
}

static long call_poll(void)
{
	struct pollfd watched = {.fd = 0, .events = POLLIN};
	long result = poll(&watched, 1, 20000);
	snprintf(detail, sizeof detail, "%d", watched.revents);
	return result;
}

static long call_poll_timeout(void)
{
	struct pollfd watched = {.fd = 0, .events = POLLIN};
	return poll(&watched, 1, 2000);
}

static long call_select(void)
{
	fd_set readable;
	struct timeval wait = {20, 0};
	FD_ZERO(&readable);
	FD_SET(0, &readable);
	long result = select(1, &readable, NULL, NULL, &wait);
	snprintf(detail, sizeof detail, "%d", FD_ISSET(0, &readable));
	return result;
}

static long call_epoll(void)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0x1234567};
	int fd = epoll_create1(EPOLL_CLOEXEC);
	must(fd >= 0 && !epoll_ctl(fd, EPOLL_CTL_ADD, 0, &event));
	long result = epoll_wait(fd, &event, 1, 20000);
	snprintf(detail, sizeof detail, "%lx", (long)event.data.u64);
	return result;
}

static long call_pause(void)
{
	long result = pause();
	snprintf(detail, sizeof detail, "%d", (int)signals_seen);
	return result;
}

static long call_sigsuspend(void)
{
	sigset_t blocked, none;
	sigemptyset(&none);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	long result = sigsuspend(&none);
	int number = errno;
	sigset_t after;
	sigprocmask(SIG_SETMASK, NULL, &after);
	snprintf(detail, sizeof detail, "%d%d", (int)signals_seen, sigismember(&after, SIGUSR1));
	errno = number;
	return result;
}

static long call_sigwaitinfo(void)
{
	sigset_t awaited;
	siginfo_t info;
	sigemptyset(&awaited);
	sigaddset(&awaited, SIGUSR1);
	sigprocmask(SIG_BLOCK, &awaited, NULL);
	return sigwaitinfo(&awaited, &info);
}

static long call_accept(void)
{
	static int fd;
	if (!fd) { /* first call: before READY */
		fd = listener();
		return 0;
	}
	long result = accept(fd, NULL, NULL);
	return result > 0 ? 1 : result;
}

static long call_wait(void)
{
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		sleep(2);
		_exit(5);
	}
	int status = 0;
	long result = waitpid(child, &status, 0);
	snprintf(detail, sizeof detail, "%d", WEXITSTATUS(status));
	return result == child ? 1 : result;
}

/* A signal with SA_RESTART in the middle: the read goes on afterwards. */
static long call_read_restarted(void)
{
	long result = call_read();
	int number = errno;
	snprintf(detail, sizeof detail, "%d", (int)signals_seen);
	errno = number;
	return result;
}

static long call_eventfd(void)
{
	uint64_t value = 0;
	int fd = eventfd(0, EFD_CLOEXEC);
	must(fd >= 0);
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		sleep(2);
		value = 9;
		_exit(write(fd, &value, 8) != 8);
	}
	long result = read(fd, &value, 8);
	snprintf(detail, sizeof detail, "%lu", value);
	must(child_status(child) == 0);
	return result;
}

static long call_flock(void)
{
	char name[] = "/tmp/gpuksm-victim-XXXXXX";
	int mine = mkstemp(name);
	must(mine >= 0);
	int ready[2];
	must(!pipe(ready));
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		int theirs = open(name, O_RDWR);
		_exit(theirs < 0 || flock(theirs, LOCK_EX) || write(ready[1], "x", 1) != 1 || sleep(2));
	}
	char byte;
	must(read(ready[0], &byte, 1) == 1);
	long result = flock(mine, LOCK_EX);
	unlink(name);
	must(child_status(child) == 0);
	return result;
}

static const struct {
	const char *name;
	long (*call)(void);
	int restart;
} calls[] = {
	{"nanosleep", call_nanosleep, 0}, {"clock_nanosleep", call_clock_nanosleep, 0}, {"futex", call_futex, 0},
	{"read", call_read, 0}, {"read_restarted", call_read_restarted, 1}, {"poll", call_poll, 0},
	{"poll_timeout", call_poll_timeout, 0}, {"select", call_select, 0}, {"epoll", call_epoll, 0},
	{"pause", call_pause, 0}, {"sigsuspend", call_sigsuspend, 0}, {"sigwaitinfo", call_sigwaitinfo, 0},
	{"accept", call_accept, 0}, {"wait", call_wait, 0}, {"eventfd", call_eventfd, 0}, {"flock", call_flock, 0},
};

int main(int count, char **arguments)
{
	victim_start();
	must(count == 2);
	size_t i = 0, known = sizeof calls / sizeof *calls;
	while (i < known && strcmp(arguments[1], calls[i].name))
		i++;
	must(i < known);
	struct sigaction action = {.sa_handler = seen, .sa_flags = calls[i].restart ? SA_RESTART : 0};
	sigaction(SIGUSR1, &action, NULL);
	struct area area = area_new("around", 256, 50000, 1);
	if (calls[i].call == call_accept)
		call_accept();
	say("READY around=%p:256", area.at);
	double start = now_seconds();
	errno = 0;
	long result = calls[i].call();
	int number = result < 0 ? errno : 0;
	area_check(&area);
	say("OK ret=%ld errno=%d ms=%ld detail=%s", result, number, (long)((now_seconds() - start) * 1000), detail);
	while (command())
		say("OK");
	return 0;
}
