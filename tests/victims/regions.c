/*
 * SHARED_PAGES identical to every sibling, OWN_PAGES unlike anybody's, in two mappings.
 *
 *   regions SHARED_PAGES OWN_PAGES SEED ORDER [FIRST_KEY]
 *
 * ORDER `straight` lays the shared content out in the same order everywhere;
 * `permuted` in an order that depends on SEED, so that hardly two pages that
 * follow each other here follow each other in a sibling; `constant` gives all
 * shared pages one content; `zero` leaves them zero but present.
 * Commands: `verify` (every byte), `write PERCENT SALT` (new content for a random
 * part of both, verified before and after), `rewrite` (the first content again),
 * `view` (the victim's own idea of what it uses).
 */
#include "victim.h"

enum order { STRAIGHT, PERMUTED, CONSTANT, ZERO };

static enum order order_named(const char *name)
{
	const char *names[] = {"straight", "permuted", "constant", "zero"};
	for (int i = 0; i < 4; i++)
		if (!strcmp(name, names[i]))
			return i;
	failed("order %s", name);
}

static void plan_shared(uint64_t *keys, size_t pages, uint64_t first_key, uint64_t seed, enum order order)
{
	for (size_t p = 0; p < pages; p++)
		keys[p] = order == ZERO ? 0 : order == CONSTANT ? first_key : first_key + p;
	if (order != PERMUTED)
		return;
	uint64_t state = seed * 1000003;
	for (size_t p = pages; p > 1; p--) { /* Fisher-Yates */
		size_t other = random_next(&state) % p;
		uint64_t key = keys[p - 1];
		keys[p - 1] = keys[other];
		keys[other] = key;
	}
}

static void view(void)
{
	FILE *file = fopen("/proc/self/smaps_rollup", "r");
	must(file);
	char line[256];
	unsigned long pss = 0, anonymous = 0, value;
	while (fgets(line, sizeof line, file)) {
		if (sscanf(line, "Pss: %lu", &value) == 1)
			pss = value;
		if (sscanf(line, "Anonymous: %lu", &value) == 1)
			anonymous = value;
	}
	fclose(file);
	say("OK pss_kb=%lu anonymous_kb=%lu", pss, anonymous);
}

static size_t rewrite_some(struct area *area, unsigned percent, uint64_t salt)
{
	size_t written = 0;
	uint64_t state = salt * 7919 + area->pages;
	for (size_t p = 0; p < area->pages; p++) {
		if (random_next(&state) % 100 >= percent)
			continue;
		check_page(area->at + p * PAGE, area->keys[p], area->name);
		area_set(area, p, mix(salt) + p);
		written++;
	}
	return written;
}

int main(int count, char **arguments)
{
	victim_start();
	must(count >= 5);
	size_t shared_pages = strtoul(arguments[1], 0, 0), own_pages = strtoul(arguments[2], 0, 0);
	uint64_t seed = strtoul(arguments[3], 0, 0);
	enum order order = order_named(arguments[4]);
	uint64_t first_key = count > 5 ? strtoul(arguments[5], 0, 0) : 1000;

	struct area shared = area_new("shared", shared_pages, 1, 1);
	plan_shared(shared.keys, shared_pages, first_key, seed, order);
	uint64_t *first_keys = map_knowledge(shared_pages * 8 + 8);
	memcpy(first_keys, shared.keys, shared_pages * 8);
	for (size_t p = 0; p < shared_pages; p++)
		area_set(&shared, p, shared.keys[p]);
	struct area own = area_new("own", own_pages, mix(seed), 1);
	say("READY shared=%p shared_pages=%zu own=%p own_pages=%zu", shared.at, shared.pages, own.at, own.pages);

	for (char *line; (line = command());) {
		unsigned percent;
		unsigned long salt;
		if (!strcmp(line, "verify")) {
			area_check(&shared);
			area_check(&own);
			say("OK pages=%zu", shared.pages + own.pages);
		} else if (sscanf(line, "write %u %lu", &percent, &salt) == 2) {
			size_t written = rewrite_some(&shared, percent, salt) + rewrite_some(&own, percent, salt + 1);
			area_check(&shared);
			area_check(&own);
			say("OK written=%zu", written);
		} else if (!strcmp(line, "rewrite")) {
			for (size_t p = 0; p < shared.pages; p++)
				area_set(&shared, p, first_keys[p]);
			area_check(&shared);
			say("OK written=%zu", shared.pages);
		} else if (!strcmp(line, "view")) {
			view();
		} else {
			failed("unknown command %s", line);
		}
	}
	return 0;
}
