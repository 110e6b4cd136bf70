/*
 * malloc, calloc, realloc and free by threads that know what every block must contain.
 *
 *   churn SECONDS MIB THREADS
 *
 * Sizes from 16 bytes to 2 MiB, so that whole spans are given back and handed out
 * again: what calloc returns must be zero, whatever the allocator had dropped there.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct block {
	uint64_t *at;
	size_t words;
	uint64_t key;
};

static double seconds;
static size_t bytes_each;
static atomic_long looks, writes, zeroed;

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static uint64_t mix(uint64_t x)
{
	x += 0x9E3779B97F4A7C15ull;
	x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
	x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
	return x ^ (x >> 31);
}

static void corrupt(const char *what, const struct block *block, size_t word)
{
	printf("CORRUPT %s: word %zu of %zu is %016lx\n", what, word, block->words, (unsigned long)block->at[word]);
	fflush(stdout);
	_exit(9);
}

static void fill(struct block *block, size_t from)
{
	for (size_t w = from; w < block->words; w++)
		block->at[w] = mix(block->key) + w * 0xD6E8FEB86659FD93ull;
	writes++;
}

static void check(const struct block *block, size_t words)
{
	for (size_t w = 0; w < words; w++)
		if (block->at[w] != mix(block->key) + w * 0xD6E8FEB86659FD93ull)
			corrupt("block", block, w);
	looks++;
}

static size_t some_words(uint64_t *state)
{
	uint64_t draw = mix((*state)++);
	if (draw % 64 == 0)
		return 262144;
	if (draw % 8 == 0)
		return 512 + draw / 64 % 16384;
	return 2 + draw / 64 % 500;
}

static void replace(struct block *block, uint64_t *state)
{
	uint64_t draw = mix((*state)++);
	size_t words = some_words(state);
	if (block->at)
		check(block, block->words);
	if (block->at && draw % 4 == 0) {
		size_t kept = words < block->words ? words : block->words;
		block->at = realloc(block->at, words * 8);
		block->words = words;
		check(block, kept);
	} else {
		free(block->at);
		block->words = words;
		block->at = draw % 4 == 1 ? malloc(words * 8) : calloc(words, 8);
		if (draw % 4 != 1) {
			for (size_t w = 0; w < words; w++)
				if (block->at[w])
					corrupt("calloc", block, w);
			zeroed++;
		}
	}
	block->key = draw / 4 % 3 + words;
	fill(block, 0);
}

static void *churn(void *argument)
{
	uint64_t state = (uint64_t)(size_t)argument * 1000003;
	double end = now() + seconds;
	size_t count = bytes_each / 40000;
	struct block *blocks = calloc(count, sizeof *blocks);
	for (size_t i = 0; i < count; i++)
		replace(&blocks[i], &state);
	while (now() < end) {
		for (int n = 0; n < 50; n++)
			replace(&blocks[mix(state++) % (count / 8 + 1)], &state);
		for (int n = 0; n < 200; n++) {
			struct block *block = &blocks[mix(state++) % count];
			check(block, block->words);
		}
		if (mix(state++) % 64 == 0) /* everything given back at once, as between two requests */
			for (size_t i = count / 2; i < count; i++) {
				check(&blocks[i], blocks[i].words);
				free(blocks[i].at);
				blocks[i].at = NULL;
				replace(&blocks[i], &state);
			}
		usleep(5000);
	}
	for (size_t i = 0; i < count; i++)
		check(&blocks[i], blocks[i].words);
	return NULL;
}

int main(int count, char **arguments)
{
	if (count != 4)
		return 2;
	seconds = atof(arguments[1]);
	size_t threads = strtoul(arguments[3], 0, 0);
	bytes_each = (strtoul(arguments[2], 0, 0) << 20) / threads;
	pthread_t handles[16];
	printf("READY\n");
	fflush(stdout);
	for (size_t t = 0; t < threads && t < 16; t++)
		pthread_create(&handles[t], NULL, churn, (void *)(t + 1));
	for (size_t t = 0; t < threads && t < 16; t++)
		pthread_join(handles[t], NULL);
	printf("OK looks=%ld writes=%ld zeroed=%ld\n", (long)looks, (long)writes, (long)zeroed);
	return 0;
}
