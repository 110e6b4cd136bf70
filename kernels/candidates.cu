/* candidates.cu - from sorted digests to the few pages that may have an equal.

   match_table looks the digests up in the stable tree's sorted column, mark_equal marks
   where a group of equal digests begins and who has an equal neighbour or a match, and
   gather_marked packs those, in order, so that only they are copied back. */
#include "platform.h"

#define MARK_GROUP_START 1u /* the first of its group of equal digests */
#define MARK_EQUAL 2u       /* has an equal neighbour */
#define MARK_MATCHED 4u     /* is in the table */
#define CANDIDATE (MARK_EQUAL | MARK_MATCHED)

/* out[i]: index of the first entry of table (m, ascending) equal to keys[i], else -1. */
KERNEL match_table(GLOBAL const u64 *RESTRICT keys, const u32 n, GLOBAL const u64 *RESTRICT table, const u32 m,
                   GLOBAL i64 *RESTRICT out)
{
  for (u32 i = BID * BLOCK + TID; i < n; i += NBLOCKS * BLOCK) {
    const u64 key = keys[i];
    u32 low = 0, high = m;
    while (low < high) {
      const u32 middle = low + (high - low) / 2u;
      if (table[middle] < key) low = middle + 1u; else high = middle;
    }
    out[i] = low < m && table[low] == key ? (i64)low : (i64)-1;
  }
}

/* One group per BLOCK keys (ascending).  counts[group]: candidates among its keys. */
KERNEL mark_equal(GLOBAL const u64 *RESTRICT keys, GLOBAL const i64 *RESTRICT match, const u32 n,
                  GLOBAL u8 *RESTRICT marks, GLOBAL u32 *RESTRICT counts)
{
  SHARED u32 sums[BLOCK];
  const u32 i = BID * BLOCK + TID;
  u32 mark = 0, total;
  if (i < n) {
    const u64 key = keys[i];
    const int before = i > 0u && keys[i - 1u] == key;
    const int after = i + 1u < n && keys[i + 1u] == key;
    mark = (before ? 0u : MARK_GROUP_START) | (before || after ? MARK_EQUAL : 0u) | (match[i] >= 0 ? MARK_MATCHED : 0u);
    marks[i] = (u8)mark;
  }
  group_scan(sums, mark & CANDIDATE ? 1u : 0u, &total);
  if (TID == 0u) counts[BID] = total;
}

/* One group per BLOCK keys, as in mark_equal; starts: the scanned counts. */
KERNEL gather_marked(GLOBAL const u64 *RESTRICT keys, GLOBAL const u32 *RESTRICT order, GLOBAL const i64 *RESTRICT match,
                     GLOBAL const u8 *RESTRICT marks, const u32 n, GLOBAL const u32 *RESTRICT starts,
                     GLOBAL u64 *RESTRICT keys_out, GLOBAL u32 *RESTRICT order_out,
                     GLOBAL i64 *RESTRICT match_out, GLOBAL u8 *RESTRICT marks_out)
{
  SHARED u32 sums[BLOCK];
  const u32 i = BID * BLOCK + TID;
  const u32 mark = i < n ? marks[i] : 0u;
  u32 total;
  const u32 place = starts[BID] + group_scan(sums, mark & CANDIDATE ? 1u : 0u, &total);
  if (mark & CANDIDATE) {
    keys_out[place] = keys[i];
    order_out[place] = order[i];
    match_out[place] = match[i];
    marks_out[place] = (u8)mark;
  }
}
