/* pages.cu - XXH3_64bits_withSeed of 4096-byte pages, and what kind of page each is.

   Eight lanes work on a page, each with one of the eight 64-bit accumulators of XXH3;
   a warp holds four pages.  A lane reads every eighth word, so that the eight lanes
   read 64 consecutive bytes.  XXH3 adds each word to the *neighbour's* accumulator
   (lane ^ 1): addition commutes, so the words of a 1 KiB block are summed up and cross
   over in one shuffle at its end instead of sixteen.  The secret is derived from the
   seed once per thread and stays in registers.  Pages are read once: the test for
   zero and constant pages sees the same words.  Specification: docs/hash_spec.md. */
#include "platform.h"

#define PAGE_WORDS 512u
#define LANES 8u
#define STRIPES 16u /* of 64 bytes, in a block of 1 KiB */

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87ull
#define PRIME64_2 0xC2B2AE3D27D4EB4Full
#define PRIME64_3 0x165667B19E3779F9ull
#define PRIME64_4 0x85EBCA77C2B2AE63ull
#define PRIME64_5 0x27D4EB2F165667C5ull
#define PRIME_MX1 0x165667919E3779F9ull

#define KIND_NORMAL 0
#define KIND_ZERO 1
#define KIND_CONSTANT 2

DEVCONST u64 SECRET[24] = {
  0xBE4BA423396CFEB8ull, 0x1CAD21F72C81017Cull, 0xDB979083E96DD4DEull, 0x1F67B3B7A4A44072ull,
  0x78E5C0CC4EE679CBull, 0x2172FFCC7DD05A82ull, 0x8E2443F7744608B8ull, 0x4C263A81E69035E0ull,
  0xCB00C391BB52283Cull, 0xA32E531B8B65D088ull, 0x4EF90DA297486471ull, 0xD8ACDEA946EF1938ull,
  0x3F349CE33F76FAA8ull, 0x1D4F0BC7C7BBDCF9ull, 0x3159B4CD4BE0518Aull, 0x647378D9C97E9FC8ull,
  0xC3EBD33483ACC5EAull, 0xEB6313FAFFA081C5ull, 0x49DAF0B751DD0D17ull, 0x9E68D429265516D3ull,
  0xFCA1477D58BE162Bull, 0xCE31D07AD1B8F88Full, 0x280416958F3ACB45ull, 0x7E404BBBCAFBD7AFull
};
DEVCONST u64 INIT[8] = { PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1 };

/* Word k of the secret that XXH3 derives from a seed. */
DEVFN u64 secret_word(u32 k, u64 seed) { return (k & 1u) ? SECRET[k] - seed : SECRET[k] + seed; }

/* pages: n x 512 words; digests: n; kinds: n.  Any grid; a block takes BLOCK / 8 pages a turn. */
KERNEL hash_pages(GLOBAL const u64 *RESTRICT pages, const u64 seed, const u32 n,
                  GLOBAL u64 *RESTRICT digests, GLOBAL u8 *RESTRICT kinds)
{
  LANES_DECL
  const u32 lane = TID & (LANES - 1u);
  const u32 block_pages = BLOCK / LANES;
  u64 key[STRIPES];
  UNROLL
  for (u32 i = 0; i < STRIPES; i++) key[i] = secret_word(lane + i, seed);
  /* The last stripe and the merge use the secret at byte offsets 121 and 11, between words. */
  const u64 key_scramble = secret_word(16u + lane, seed);
  const u64 key_last = secret_word(15u + lane, seed) >> 8 | secret_word(16u + lane, seed) << 56;
  const u64 key_merge = secret_word(1u + lane, seed) >> 24 | secret_word(2u + lane, seed) << 40;

  /* Threads beyond the last page repeat it, so that whole warps reach every shuffle. */
  for (u32 base = BID * block_pages; base < n; base += NBLOCKS * block_pages) {
    const u32 wanted = base + TID / LANES;
    const u32 page = wanted < n ? wanted : n - 1u;
    GLOBAL const u64 *words = pages + (u64)page * PAGE_WORDS;
    const u64 first = words[0];
    u64 acc = INIT[lane], sum, differs = 0;
    words += lane;
    for (u32 block = 0; block < 3u; block++) {
      sum = 0;
      UNROLL
      for (u32 i = 0; i < STRIPES; i++) {
        const u64 word = words[i * LANES], mixed = word ^ key[i];
        differs |= word ^ first;
        sum += word;
        acc += (mixed & 0xffffffffu) * (mixed >> 32);
      }
      acc += SHFL_XOR(sum, 1);
      acc ^= acc >> 47;
      acc ^= key_scramble;
      acc *= PRIME32_1;
      words += STRIPES * LANES;
    }
    /* The fourth block is not scrambled, and its last stripe has its own key. */
    sum = 0;
    UNROLL
    for (u32 i = 0; i < STRIPES; i++) {
      const u64 word = words[i * LANES], mixed = word ^ (i < STRIPES - 1u ? key[i] : key_last);
      differs |= word ^ first;
      sum += word;
      acc += (mixed & 0xffffffffu) * (mixed >> 32);
    }
    acc += SHFL_XOR(sum, 1);

    const u64 mine = acc ^ key_merge;
    const u64 other = SHFL_XOR(mine, 1);
    u64 digest = (mine * other) ^ MULHI64(mine, other);
    digest += SHFL_XOR(digest, 2);
    digest += SHFL_XOR(digest, 4);
    digest += PAGE_WORDS * 8u * PRIME64_1;
    digest ^= digest >> 37;
    digest *= PRIME_MX1;
    digest ^= digest >> 32;

    const int varied = ANY8(differs) != 0;
    if (lane == 0u && wanted < n) {
      digests[wanted] = digest;
      kinds[wanted] = varied ? KIND_NORMAL : first ? KIND_CONSTANT : KIND_ZERO;
    }
  }
}
