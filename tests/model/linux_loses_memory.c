/*
 * Shows, without gpuksm, that Linux 6.17 and later lose memory in a move of several mappings:
 *
 *     cc -O2 tests/model/linux_loses_memory.c -o /tmp/loses && /tmp/loses
 *
 * A move by MREMAP_FIXED goes on over several mappings since 6.17.  For each it first asks
 * KSM to break what is merged there, and where that mapping is MADV_MERGEABLE this gives
 * -ERESTARTSYS when a signal is pending (unmerge_ksm_pages in mm/ksm.c).  The mappings before
 * it have moved by then, and the kernel begins the whole call again: with MREMAP_DONTUNMAP
 * it moves the emptied old place over what it had moved.  Zeros in both places, and success.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/time.h>

#define PAGE 4096ul

static void tick(int number)
{
	(void)number;
}

int main(void)
{
	struct sigaction action = {.sa_handler = tick, .sa_flags = SA_RESTART};
	struct itimerval timer = {.it_interval.tv_usec = 100, .it_value.tv_usec = 100};
	char *base = (char *)0x200000000000ul;
	long moves, lost = 0, failed = 0;
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
	for (moves = 0; moves < 100000; moves++) {
		char *old = mmap(base, 3 * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		for (int page = 0; page < 3; page++)
			old[page * PAGE] = page + 1;
		if (old == MAP_FAILED || madvise(old + 2 * PAGE, PAGE, MADV_MERGEABLE)) {
			perror("no memory, or no KSM");
			return 1;
		}
		char *new = mremap(old, 3 * PAGE, 3 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | 4, base + 64 * PAGE);
		if (new == MAP_FAILED)
			failed++;
		else
			lost += new[0] != 1 || new[PAGE] != 2 || new[2 * PAGE] != 3;
	}
	printf("%ld moves, %ld of them lost memory, %ld failed\n", moves, lost, failed);
	return 0;
}
