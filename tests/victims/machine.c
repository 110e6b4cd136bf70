/*
 * A virtual machine without firmware, that checks its memory: KVM with one processor.
 *
 *   machine
 *
 * As in QEMU, the guest's memory is marked MADV_DONTFORK.  The guest looks at each fourth word of `memory` in
 * each round (KVM may emulate it, which takes its time) and then, unless told not to, writes one page anew; a
 * wrong word ends it.  What the monitor does to the guest's memory it does between two rounds, on the
 * processor's thread.
 */
#include "actions.h"
#include <linux/kvm.h>
#include <sys/ioctl.h>

#define PAGES 64
#define DATA 0x10000ul
#define CODE 0x1000ul
#define BYTES (DATA + PAGES * PAGE)
#define ZEROS 255 /* the version of a page that was given back */

/* At 0x2000 of the guest: versions of the pages, the page that was written last, whether to write. */
struct mailbox {
	unsigned char versions[256];
	uint32_t last, writes;
};

extern const char guest[], guest_end[];
__asm__(".pushsection .rodata\n"
	".code32\n"
	"guest:\n"
	"	xor %ebx, %ebx\n"
	"1:	call begin\n"
	"2:	cmp %eax, (%edi)\n"
	"	jne wrong\n"
	"	add $16, %edi\n"
	"	add %esi, %eax\n"
	"	dec %edx\n"
	"	jnz 2b\n"
	"	inc %ebx\n"
	"	cmp $64, %ebx\n"
	"	jb 1b\n"
	"	cmpl $0, 0x2104\n"
	"	je 4f\n"
	"	mov 0x2100, %ebx\n"
	"	inc %ebx\n"
	"	and $63, %ebx\n"
	"	mov %ebx, 0x2100\n"
	"	incb 0x2000(%ebx)\n"
	"	andb $3, 0x2000(%ebx)\n"
	"	call begin\n"
	"3:	mov %eax, (%edi)\n"
	"	add $16, %edi\n"
	"	add %esi, %eax\n"
	"	dec %edx\n"
	"	jnz 3b\n"
	"4:	mov $'.', %al\n"
	"	out %al, $0xe9\n"
	"	jmp guest\n"
	"wrong:	mov $'X', %al\n"
	"	out %al, $0xe9\n"
	"	hlt\n"
	/* edi: where page ebx lies; eax: its first word; esi: by how much each is more; edx: how many */
	"begin:	movzbl 0x2000(%ebx), %ecx\n"
	"	mov %ebx, %edi\n"
	"	shl $12, %edi\n"
	"	add $0x10000, %edi\n"
	"	imul $8191, %ebx, %eax\n"
	"	imul $131, %ecx, %edx\n"
	"	lea 1(%eax,%edx), %eax\n"
	"	imul $0x9E3779B1, %eax, %eax\n"
	"	mov $40503, %esi\n"
	"	mov $256, %edx\n"
	"	cmp $255, %ecx\n"
	"	jne 5f\n"
	"	xor %eax, %eax\n"
	"	xor %esi, %esi\n"
	"5:	ret\n"
	"guest_end:\n"
	".code64\n"
	".popsection\n");

static char *ram;
static struct mailbox *mailbox;
static int processor;
static struct kvm_run *state;
static volatile long rounds;
static pthread_mutex_t between = PTHREAD_MUTEX_INITIALIZER;

/* As the guest's `begin` has it. */
static void fill(int page)
{
	uint32_t word = (page * 8191u + mailbox->versions[page] * 131u + 1u) * 0x9E3779B1u;
	uint32_t *at = (uint32_t *)(ram + DATA + page * PAGE);
	for (int w = 0; w < 256; w++)
		at[4 * w] = word + w * 40503u;
}

static void *run(void UNUSED *argument)
{
	for (;;) {
		if (ioctl(processor, KVM_RUN, 0) < 0) {
			must(errno == EINTR || errno == EAGAIN);
			continue;
		}
		if (state->exit_reason != KVM_EXIT_IO || state->io.port != 0xe9)
			failed("the machine stopped for reason %d", state->exit_reason);
		if (*((char *)state + state->io.data_offset) != '.')
			corrupt("the guest read a wrong word after %ld rounds", rounds);
		rounds++;
		pthread_mutex_unlock(&between);
		usleep(1000);
		pthread_mutex_lock(&between);
	}
}

static void start(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	must(kvm >= 0);
	int machine = ioctl(kvm, KVM_CREATE_VM, 0);
	must(machine >= 0);
	struct kvm_userspace_memory_region region = {.memory_size = BYTES, .userspace_addr = (uintptr_t)ram};
	must(!ioctl(machine, KVM_SET_USER_MEMORY_REGION, &region));
	ioctl(machine, KVM_SET_TSS_ADDR, 0xfffbd000ul);
	must((processor = ioctl(machine, KVM_CREATE_VCPU, 0)) >= 0);
	state = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, processor, 0);
	must(state != MAP_FAILED);
	struct kvm_sregs special;
	must(!ioctl(processor, KVM_GET_SREGS, &special));
	struct kvm_segment flat = {.limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
	special.ds = special.es = special.fs = special.gs = special.ss = flat;
	flat.type = 11;
	flat.selector = 8;
	special.cs = flat;
	special.cr0 |= 1; /* protected mode */
	must(!ioctl(processor, KVM_SET_SREGS, &special));
	struct kvm_regs registers = {.rip = CODE, .rsp = 0x8000, .rflags = 2};
	must(!ioctl(processor, KVM_SET_REGS, &registers));
}

/* A whole round of the guest that began after everything else was done. */
static void verify(void)
{
	for (long goal = rounds + 2; rounds < goal;)
		usleep(1000);
	say("OK rounds=%ld", rounds);
}

static void let_write(void)
{
	pthread_mutex_lock(&between);
	mailbox->writes = 1;
	pthread_mutex_unlock(&between);
	verify();
}

static void let_rest(void)
{
	pthread_mutex_lock(&between);
	mailbox->writes = 0;
	pthread_mutex_unlock(&between);
	verify();
}

/* What a balloon does. */
static void discard(void)
{
	pthread_mutex_lock(&between);
	must(!madvise(ram + DATA + 9 * PAGE, 13 * PAGE, MADV_DONTNEED));
	memset(mailbox->versions + 9, ZEROS, 13);
	pthread_mutex_unlock(&between);
	verify();
}

static void child(void)
{
	pid_t child = fork();
	must(child >= 0);
	if (!child) {
		char value;
		for (int p = 0; p < PAGES; p++)
			must(try_access(ram + DATA + p * PAGE, 0, &value) == SIGSEGV);
		_exit(0);
	}
	must(!child_status(child));
	verify();
}

int main(void)
{
	victim_start();
	/* 2 MiB of address space of its own, as QEMU aligns it. */
	ram = map_anonymous(4ul << 20, PROT_NONE);
	ram = (char *)(((uintptr_t)ram + (2ul << 20) - 1) & ~((2ul << 20) - 1));
	must(!mprotect(ram, BYTES, PROT_READ | PROT_WRITE));
	must(!madvise(ram, BYTES, MADV_DONTFORK));
	madvise(ram, BYTES, MADV_MERGEABLE);
	mailbox = (struct mailbox *)(ram + 0x2000);
	memcpy(ram + CODE, guest, guest_end - guest);
	for (int page = 0; page < PAGES; page++)
		fill(page);
	start();
	pthread_t thread;
	pthread_mutex_lock(&between);
	must(!pthread_create(&thread, NULL, run, NULL));
	say("READY memory=%p:%d", ram + DATA, PAGES);
	const struct action actions[] = {
		{"write", let_write}, {"rest", let_rest}, {"discard", discard}, {"child", child}, {0},
	};
	for (char *line; (line = command());) {
		if (!strcmp(line, "verify"))
			verify();
		else
			perform(actions, line);
	}
	return 0;
}
