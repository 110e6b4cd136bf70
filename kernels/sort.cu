/* sort.cu - stable radix sort of (u64 key, u32 value) pairs, four bits a pass.

   A tile is BLOCK x SORT_KEYS consecutive pairs and belongs to one group; a thread owns
   SORT_KEYS consecutive ones, which makes the order of equal keys that of the threads:
   stable.  A pass is three launches: sort_count (how many of each digit in each tile),
   scan_counts (where each tile's digits begin), sort_scatter.  Counts are laid out by
   digit first, tile second, so that one exclusive scan gives the places. */
#include "platform.h"

#define SORT_KEYS 16u
#define RADIX 16u
#define BINS (RADIX * BLOCK)

/* Exclusive scan over the group of one value a thread; sums: BLOCK words of scratch.
   Returns the sum of the values of lower threads, *total is the sum of all. */
DEVFN u32 group_scan(SHAREDPTR u32 *sums, u32 value, u32 *total)
{
  BARRIER(); /* what the last call left in sums has been read */
  sums[TID] = value;
  BARRIER();
  for (u32 step = 1; step < BLOCK; step <<= 1) {
    const u32 below = TID >= step ? sums[TID - step] : 0u;
    BARRIER();
    sums[TID] += below;
    BARRIER();
  }
  *total = sums[BLOCK - 1u];
  return sums[TID] - value;
}

/* bins[digit * BLOCK + thread]: how many keys of its tile come before that thread's keys
   of that digit, all keys of lower digits included. */
DEVFN void rank_tile(SHAREDPTR u32 *bins, SHAREDPTR u32 *sums, GLOBAL const u64 *RESTRICT keys, u32 n, u32 shift)
{
  const u32 first = (BID * BLOCK + TID) * SORT_KEYS;
  u32 run = 0, total;
  for (u32 digit = 0; digit < RADIX; digit++) bins[digit * BLOCK + TID] = 0;
  for (u32 i = first; i < first + SORT_KEYS && i < n; i++)
    bins[(u32)(keys[i] >> shift & (RADIX - 1u)) * BLOCK + TID]++;
  BARRIER();
  for (u32 i = TID * RADIX; i < (TID + 1u) * RADIX; i++) run += bins[i];
  run = group_scan(sums, run, &total);
  for (u32 i = TID * RADIX; i < (TID + 1u) * RADIX; i++) {
    const u32 count = bins[i];
    bins[i] = run;
    run += count;
  }
  BARRIER();
}

/* values[i] = i, the order before the first pass. */
KERNEL number_pages(GLOBAL u32 *RESTRICT values, const u32 n)
{
  for (u32 i = BID * BLOCK + TID; i < n; i += NBLOCKS * BLOCK) values[i] = i;
}

/* One group per tile.  counts[digit * NBLOCKS + tile]: keys of that digit in that tile. */
KERNEL sort_count(GLOBAL const u64 *RESTRICT keys, const u32 n, const u32 shift, GLOBAL u32 *RESTRICT counts)
{
  SHARED u32 bins[BINS], sums[BLOCK];
  const u32 tile = BLOCK * SORT_KEYS;
  rank_tile(bins, sums, keys, n, shift);
  if (TID < RADIX) {
    const u32 left = n - BID * tile;
    const u32 keys_here = left < tile ? left : tile;
    const u32 end = TID + 1u < RADIX ? bins[(TID + 1u) * BLOCK] : keys_here;
    counts[TID * NBLOCKS + BID] = end - bins[TID * BLOCK];
  }
}

/* One group per tile, as in sort_count; starts: the scanned counts. */
KERNEL sort_scatter(GLOBAL const u64 *RESTRICT keys, GLOBAL const u32 *RESTRICT values, const u32 n, const u32 shift,
                    GLOBAL const u32 *RESTRICT starts, GLOBAL u64 *RESTRICT keys_out, GLOBAL u32 *RESTRICT values_out)
{
  SHARED u32 bins[BINS], sums[BLOCK], offsets[RADIX];
  const u32 first = (BID * BLOCK + TID) * SORT_KEYS;
  rank_tile(bins, sums, keys, n, shift);
  /* Wraps around where the tile's own start is larger; the sum below wraps back. */
  if (TID < RADIX) offsets[TID] = starts[TID * NBLOCKS + BID] - bins[TID * BLOCK];
  BARRIER();
  for (u32 i = first; i < first + SORT_KEYS && i < n; i++) {
    const u64 key = keys[i];
    const u32 digit = (u32)(key >> shift & (RADIX - 1u));
    const u32 place = offsets[digit] + bins[digit * BLOCK + TID]++;
    keys_out[place] = key;
    values_out[place] = values[i];
  }
}

/* Exclusive scan of counts in place, by ONE group; *total becomes their sum. */
KERNEL scan_counts(GLOBAL u32 *RESTRICT counts, const u32 n, GLOBAL u32 *RESTRICT total)
{
  SHARED u32 sums[BLOCK];
  u32 carry = 0, all;
  for (u32 base = 0; base < n; base += BLOCK * SORT_KEYS) {
    const u32 first = base + TID * SORT_KEYS;
    u32 run = 0;
    for (u32 i = first; i < first + SORT_KEYS && i < n; i++) run += counts[i];
    run = carry + group_scan(sums, run, &all);
    for (u32 i = first; i < first + SORT_KEYS && i < n; i++) {
      const u32 count = counts[i];
      counts[i] = run;
      run += count;
    }
    carry += all;
  }
  if (TID == 0u) *total = carry;
}
