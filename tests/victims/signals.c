/*
 * Counts every signal it is sent, in order, while somebody merges it.
 *
 *   signals
 *
 * A child sends numbered real-time signals with sigqueue at about 1 kHz, some to
 * the process and some to one thread (tgkill), while the main thread sits in
 * interrupted and restarted system calls.  `run start` begins, `run stop` waits
 * for the last one and tells the count; a number that is missing, doubled or out
 * of order is CORRUPT.  The handler also checks that it runs with the mask it
 * asked for.
 */
#include "actions.h"
#include <stdatomic.h>

static struct area around;
static atomic_long process_next, thread_next, restarted, interrupted;
static volatile int running;
static pthread_t sleeper;
static pid_t sender, sleeper_tid;
static int go[2];

static void arrived(int number, siginfo_t *info, void UNUSED *context)
{
	atomic_long *next = number == SIGRTMIN ? &process_next : &thread_next;
	long expected = atomic_fetch_add(next, 1);
	if (info->si_value.sival_int != expected)
		corrupt("signal %d: number %d, must be %ld", number, info->si_value.sival_int, expected);
	sigset_t mask;
	pthread_sigmask(SIG_SETMASK, NULL, &mask);
	if (!sigismember(&mask, SIGUSR2) || sigismember(&mask, SIGUSR1))
		corrupt("signal %d runs with the wrong mask", number);
}

/* Sleeps 1 ms at a time and reads an endless pipe: both are interrupted all the time. */
static void *sleep_on(void UNUSED *argument)
{
	/* Signals to the process go to the main thread alone: two threads would not keep their order. */
	sigset_t others;
	sigemptyset(&others);
	sigaddset(&others, SIGRTMIN);
	pthread_sigmask(SIG_BLOCK, &others, NULL);
	sleeper_tid = syscall(SYS_gettid);
	while (running) {
		struct timespec wait = {0, 3000000}, left = {0};
		double start = now_seconds();
		long result = syscall(SYS_nanosleep, &wait, &left);
		double took = now_seconds() - start;
		if (result && errno == EINTR) {
			interrupted++;
			if (took + left.tv_sec + left.tv_nsec * 1e-9 < 0.003 - 1e-4)
				corrupt("nanosleep: took %f, left %f", took, left.tv_sec + left.tv_nsec * 1e-9);
		} else if (result) {
			corrupt("nanosleep returned %ld errno %d", result, errno);
		} else if (took < 0.003 - 1e-6) {
			corrupt("nanosleep returned after %f", took);
		}
		restarted++;
	}
	return NULL;
}

static void send(pid_t parent, int to_thread, int value)
{
	siginfo_t info = {.si_signo = to_thread ? SIGRTMIN + 1 : SIGRTMIN, .si_code = SI_QUEUE};
	info.si_pid = getpid();
	info.si_uid = getuid();
	info.si_value.sival_int = value;
	while ((to_thread ? syscall(SYS_rt_tgsigqueueinfo, parent, sleeper_tid, info.si_signo, &info)
			  : syscall(SYS_rt_sigqueueinfo, parent, info.si_signo, &info)) < 0)
		if (errno != EAGAIN)
			_exit(1);
}

static volatile sig_atomic_t stop_sending;

static void told_to_stop(int UNUSED number)
{
	stop_sending = 1;
}

static void start(void)
{
	running = 1;
	process_next = thread_next = 0;
	sleeper_tid = 0;
	must(!pthread_create(&sleeper, NULL, sleep_on, NULL));
	while (!sleeper_tid)
		usleep(1000);
	must(write(go[1], &sleeper_tid, sizeof sleeper_tid) == sizeof sleeper_tid);
	say("OK");
}

/* The sender is made before there is any memory to merge: pages that a fork shares are left alone. */
static void fork_sender(void)
{
	pid_t parent = getpid();
	must(!pipe(go));
	sender = fork();
	must(sender >= 0);
	if (sender)
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGTERM, told_to_stop);
	if (read(go[0], &sleeper_tid, sizeof sleeper_tid) != sizeof sleeper_tid)
		_exit(1);
	for (int value = 0; !stop_sending; value++) {
		send(parent, 0, value);
		send(parent, 1, value);
		usleep(1000);
	}
	_exit(0);
}

static void stop(void)
{
	kill(sender, SIGTERM);
	must(child_status(sender) == 0);
	double limit = now_seconds() + 5;
	while (process_next != thread_next && now_seconds() < limit)
		usleep(1000);
	usleep(20000);
	if (process_next != thread_next)
		corrupt("%ld signals to the process, %ld to the thread", (long)process_next, (long)thread_next);
	running = 0;
	pthread_join(sleeper, NULL);
	area_check(&around);
	say("OK signals=%ld interrupted=%ld sleeps=%ld", (long)process_next, (long)interrupted, (long)restarted);
}

int main(void)
{
	victim_start();
	fork_sender();
	struct sigaction action = {.sa_sigaction = arrived, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigemptyset(&action.sa_mask);
	sigaddset(&action.sa_mask, SIGUSR2);
	sigaddset(&action.sa_mask, SIGRTMIN);
	sigaddset(&action.sa_mask, SIGRTMIN + 1);
	sigaction(SIGRTMIN, &action, NULL);
	sigaction(SIGRTMIN + 1, &action, NULL);
	around = area_new("around", 1024, 54000, 1);
	area_known(&around);
	say_ready();
	const struct action actions[] = {{"start", start}, {"stop", stop}, {0}};
	return serve(actions);
}
