/* What workloads that measure themselves have in common: the time, the longest of it, and what is in a page. */
#ifndef COMMON_H
#define COMMON_H

#include <stdint.h>
#include <time.h>

#define PAGE 4096

static inline double now_us(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

/* `longest` becomes what has passed since `began`, if that is more. */
static inline void note(_Atomic long *longest, double began)
{
	double took = now_us() - began;
	if (took > *longest)
		*longest = took;
}

static inline void write_page(uint64_t *page, uint64_t key)
{
	for (int word = 0; word < PAGE / 8; word++)
		page[word] = (key + 1) * 0x9E3779B97F4A7C15 + word;
}

#endif
