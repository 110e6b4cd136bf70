/*
 * A busy thread whose every register has a known value.
 *
 *   cpustate alone|beside
 *
 * An assembly loop loads all vector registers (as wide as the CPU has them), the
 * x87 and SSE control words, the direction flag, eight general registers and the
 * red zone below the stack pointer, spins, and stores everything again; any
 * difference is CORRUPT.  `alone` it is the only thread, `beside` it has a main
 * thread that waits for commands.  Command: `run report` (how many turns went well).
 */
#include "actions.h"
#include <poll.h>
#include <stdatomic.h>

static struct area around;
static atomic_long turns;

struct vectors {
	uint8_t in[32][64], out[32][64];
} __attribute__((aligned(64)));

static struct vectors vectors;

#define LOAD_YMM(n) "vmovdqu " #n "*64(%0), %%ymm" #n "\n"
#define STORE_YMM(n) "vmovdqu %%ymm" #n ", 2048+" #n "*64(%0)\n"
#define LOAD_ZMM(n) "vmovdqu64 " #n "*64(%0), %%zmm" #n "\n"
#define STORE_ZMM(n) "vmovdqu64 %%zmm" #n ", 2048+" #n "*64(%0)\n"
#define LOW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define HIGH(X) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)

#define COMPARE(value, place) "mov $" value ", %%rdx\n xor " place ", %%rdx\n or %%rdx, %0\n"

/* 0 when r8-r15, the red zone, the carry and the direction flag outlived the spin. */
static long spin_general(void)
{
	long difference, count = 600000;
	/* The compiler may use the red zone itself: work below it.  pushfq goes below the marked one. */
	__asm__ volatile(
		"sub $512, %%rsp\n"
		"mov $0x1111111111111111, %%r8\n mov $0x2222222222222222, %%r9\n"
		"mov $0x3333333333333333, %%r10\n mov $0x4444444444444444, %%r11\n"
		"mov $0x5555555555555555, %%r12\n mov $0x6666666666666666, %%r13\n"
		"mov $0x7777777777777777, %%r14\n mov $0x0888888888888888, %%r15\n"
		"mov %%r8, -8(%%rsp)\n mov %%r9, -64(%%rsp)\n mov %%r10, -128(%%rsp)\n"
		"std\n stc\n"
		"1: lea -1(%1), %1\n jrcxz 2f\n jmp 1b\n"
		"2: mov $0, %0\n adc $-1, %0\n"
		COMPARE("0x1111111111111111", "-8(%%rsp)") COMPARE("0x2222222222222222", "-64(%%rsp)")
		COMPARE("0x3333333333333333", "-128(%%rsp)")
		"sub $256, %%rsp\n pushfq\n pop %%rdx\n add $256, %%rsp\n"
		"cld\n and $0x400, %%rdx\n xor $0x400, %%rdx\n or %%rdx, %0\n"
		COMPARE("0x1111111111111111", "%%r8") COMPARE("0x2222222222222222", "%%r9")
		COMPARE("0x3333333333333333", "%%r10") COMPARE("0x4444444444444444", "%%r11")
		COMPARE("0x5555555555555555", "%%r12") COMPARE("0x6666666666666666", "%%r13")
		COMPARE("0x7777777777777777", "%%r14") COMPARE("0x0888888888888888", "%%r15")
		"add $512, %%rsp\n"
		: "=&a"(difference), "+c"(count)
		:
		: "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
	return difference;
}

static void spin_ymm(void)
{
	long count = 100000;
	struct vectors *place = &vectors;
	__asm__ volatile(LOW(LOAD_YMM) "1: dec %1\n jnz 1b\n" LOW(STORE_YMM) "vzeroupper\n"
			 : "+r"(place), "+r"(count) : : "memory", "cc");
}

/* Bits of the mask registers that did not outlive the spin. */
__attribute__((target("avx512f,avx512bw"))) static long spin_zmm(void)
{
	long count = 100000, mask = 0x0123456789abcdef, first, last;
	struct vectors *place = &vectors;
	__asm__ volatile(LOW(LOAD_ZMM) HIGH(LOAD_ZMM) "kmovq %4, %%k1\n kmovq %4, %%k7\n"
			 "1: dec %1\n jnz 1b\n" LOW(STORE_ZMM) HIGH(STORE_ZMM)
			 "kmovq %%k1, %2\n kmovq %%k7, %3\n vzeroupper\n"
			 : "+r"(place), "+r"(count), "=&r"(first), "=&r"(last) : "r"(mask) : "memory", "cc");
	return (first ^ mask) | (last ^ mask);
}

static int has_zmm(void)
{
	__builtin_cpu_init();
	return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

static void check_vectors(int width, int count)
{
	for (int n = 0; n < count; n++)
		for (int b = 0; b < width; b++)
			if (vectors.out[n][b] != vectors.in[n][b])
				corrupt("vector register %d byte %d is %02x, must be %02x", n, b, vectors.out[n][b], vectors.in[n][b]);
}

static void check_control_words(void)
{
	uint16_t x87;
	uint32_t sse;
	__asm__ volatile("fnstcw %0" : "=m"(x87));
	__asm__ volatile("stmxcsr %0" : "=m"(sse));
	if (x87 != 0x0e7f || (sse & 0xffc0) != 0x7f80)
		corrupt("control words are %04x and %08x", x87, sse);
}

static void one_turn(int wide)
{
	static uint64_t salt;
	salt++;
	for (int i = 0; i < 32 * 64; i++)
		vectors.in[i / 64][i % 64] = (uint8_t)(mix(salt + i / 8) >> (i % 8 * 8));
	memset(vectors.out, 0, sizeof vectors.out);
	long difference = spin_general();
	if (difference)
		corrupt("general registers, flags or red zone differ by %lx", difference);
	difference = 0;
	if (wide)
		difference = spin_zmm();
	else
		spin_ymm();
	if (difference)
		corrupt("mask registers differ by %lx", difference);
	check_vectors(wide ? 64 : 32, wide ? 32 : 16);
	check_control_words();
	turns++;
}

static void load_control_words(void)
{
	uint16_t x87 = 0x0e7f; /* round towards zero, 53 bits */
	uint32_t sse = 0x7f80;
	__asm__ volatile("fldcw %0\n ldmxcsr %1" : : "m"(x87), "m"(sse));
}

/* Other tests run beside this one: about half of the time is theirs. */
static int rests(void)
{
	return turns % 16 == 0;
}

static void *spin(void UNUSED *argument)
{
	int wide = has_zmm();
	load_control_words();
	for (;;) {
		one_turn(wide);
		if (rests())
			usleep(1000);
	}
	return NULL;
}

static void report(void)
{
	long before = turns;
	double start = now_seconds();
	while (turns < before + 2 && now_seconds() < start + 5)
		usleep(1000);
	must(turns >= before + 2);
	area_check(&around);
	say("OK turns=%ld", (long)turns);
}

/* The busy thread is the only one: whoever needs a thread of this process has to take it. */
static int spin_alone(void)
{
	int wide = has_zmm();
	struct pollfd input = {.fd = 0, .events = POLLIN};
	load_control_words();
	for (;;) {
		one_turn(wide);
		if (poll(&input, 1, rests()) != 1)
			continue;
		if (!command())
			return 0;
		area_check(&around);
		say("OK turns=%ld", (long)turns);
	}
}

int main(int count, char **arguments)
{
	victim_start();
	must(count == 2);
	around = area_new("around", 256, 52000, 1);
	area_known(&around);
	say_ready();
	if (!strcmp(arguments[1], "alone"))
		return spin_alone();
	pthread_t thread;
	must(!pthread_create(&thread, NULL, spin, NULL));
	const struct action actions[] = {{"report", report}, {0}};
	return serve(actions);
}
