/*
 * A guest for qemu without an operating system: fills its memory, checks and rewrites it for ever.
 *
 * Loaded by `qemu-system-x86_64 -kernel` (Multiboot 1, 32-bit, flat).  It writes one dot to the first
 * serial port for each round in which all pages were right, and X, then nothing more, for a wrong word.
 */
typedef unsigned int u32;

#define FIRST 0x1000000u /* 16 MiB */
#ifndef PAGES
#define PAGES 20480u /* 80 MiB */
#endif

__attribute__((section(".multiboot"), used)) static const u32 header[] = {0x1BADB002, 0, -0x1BADB002u};
static unsigned char versions[PAGES];

static inline void out(unsigned short port, unsigned char value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static u32 word(u32 page, u32 version, u32 w)
{
	return (page * 8191u + version * 131u + 1u) * 2654435761u + w * 40503u;
}

static void fill(u32 page)
{
	volatile u32 *at = (volatile u32 *)(FIRST + page * 4096u);
	for (u32 w = 0; w < 1024; w++)
		at[w] = word(page, versions[page], w);
}

static int right(u32 page)
{
	volatile u32 *at = (volatile u32 *)(FIRST + page * 4096u);
	for (u32 w = 0; w < 1024; w++)
		if (at[w] != word(page, versions[page], w))
			return 0;
	return 1;
}

void run(void)
{
	u32 state = 1;
	for (u32 page = 0; page < PAGES; page++)
		fill(page);
	for (;;) {
		for (u32 page = 0; page < PAGES; page++) {
			if (!right(page)) {
				out(0x3f8, 'X');
				for (;;)
					__asm__ volatile("hlt");
			}
			state = state * 1103515245u + 12345u;
			if ((state >> 16) % 24 == 0) {
				versions[page] = (state >> 24) % 3;
				fill(page);
			}
		}
		out(0x3f8, '.');
	}
}

__asm__(".global _start\n_start:\n\tmov $0x8ff000, %esp\n\tcall run\n");
