/*
 * Memory that devices, or the kernel in their place, write to past the page tables.
 *
 *   pins [reversed] [DEVICE]
 *
 * `ring` registers the middle of `buffer`, `chained` and `zeros` with io_uring, `fixed` has a page of each read
 * from a pipe by that, `unregister` gives them up, `close` the ring.  `submit` begins to read into the middle of `incoming` by
 * direct and asynchronous I/O (io_submit) from DEVICE, which `collect` waits for.  `context` makes room for
 * asynchronous I/O, `direct` opens DEVICE, `poll` starts a thread of the kernel that polls a ring, and `polled` has
 * that read into `plain`.  `chained` is in another order if that is asked for; `late` is filled by `fill`.
 * `grow` unmaps what lies behind the middle of `incoming`, and has that grow in place.
 */
#include "actions.h"
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <sys/uio.h>

#define PAGES 64
#define FIRST 16 /* of the pages that are registered, or read into */
#define COUNT 24

static struct area plain, buffer, chained, zeros, incoming, late;
static const char *device;
static uint64_t next_key = 900000;

struct ring {
	int fd;
	unsigned *tail, *array, *flags, *completed, *seen;
	struct io_uring_sqe *entries;
	struct io_uring_cqe *results;
};
static struct ring registered, polled;
static aio_context_t context;
static struct iocb reads[2];

static struct ring ring_new(unsigned flags)
{
	struct io_uring_params parameters = {.flags = flags, .sq_thread_idle = 50};
	struct ring ring = {.fd = (int)syscall(SYS_io_uring_setup, 1, &parameters)};
	must(ring.fd >= 0);
	size_t bytes = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
	char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_SQ_RING);
	must(at != MAP_FAILED);
	ring.entries = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_SQES);
	must(ring.entries != MAP_FAILED);
	ring.tail = (unsigned *)(at + parameters.sq_off.tail);
	ring.array = (unsigned *)(at + parameters.sq_off.array);
	ring.flags = (unsigned *)(at + parameters.sq_off.flags);
	ring.completed = (unsigned *)(at + parameters.cq_off.tail);
	ring.seen = (unsigned *)(at + parameters.cq_off.head);
	ring.results = (struct io_uring_cqe *)(at + parameters.cq_off.cqes);
	return ring;
}

/* Have `ring` read a page of new content into `page` of `area`, in the registered buffer `index` if not -1. */
static void ring_read(struct ring *ring, struct area *area, size_t page, int index)
{
	static char content[PAGE];
	int pipes[2];
	must(!pipe(pipes));
	fill_page(content, ++next_key);
	must(write(pipes[1], content, PAGE) == (ssize_t)PAGE);
	ring->entries[0] = (struct io_uring_sqe){
		.opcode = index < 0 ? IORING_OP_READ : IORING_OP_READ_FIXED,
		.fd = pipes[0],
		.off = -1,
		.addr = (uintptr_t)(area->at + page * PAGE),
		.len = PAGE,
		.buf_index = index < 0 ? 0 : index,
	};
	ring->array[0] = 0;
	__atomic_add_fetch(ring->tail, 1, __ATOMIC_RELEASE);
	unsigned asleep = __atomic_load_n(ring->flags, __ATOMIC_ACQUIRE) & IORING_SQ_NEED_WAKEUP;
	unsigned how = IORING_ENTER_GETEVENTS | (asleep ? IORING_ENTER_SQ_WAKEUP : 0);
	while (__atomic_load_n(ring->completed, __ATOMIC_ACQUIRE) == *ring->seen)
		must(syscall(SYS_io_uring_enter, ring->fd, 1, 1, how, NULL, 0) >= 0 || errno == EINTR);
	must(ring->results[*ring->seen & 1].res == (int)PAGE);
	__atomic_add_fetch(ring->seen, 1, __ATOMIC_RELEASE);
	area->keys[page] = next_key;
	close(pipes[0]);
	close(pipes[1]);
}

static void register_buffers(void)
{
	struct area *areas[] = {&buffer, &chained, &zeros};
	struct iovec vectors[3];
	registered = ring_new(0);
	for (int i = 0; i < 3; i++)
		vectors[i] = (struct iovec){areas[i]->at + FIRST * PAGE, COUNT * PAGE};
	must(!syscall(SYS_io_uring_register, registered.fd, IORING_REGISTER_BUFFERS, vectors, 3));
	say("OK");
}

static void fixed(void)
{
	struct area *areas[] = {&buffer, &chained, &zeros};
	static size_t page = FIRST;
	for (int i = 0; i < 3; i++)
		ring_read(&registered, areas[i], page, i);
	page++;
	say("OK");
}

static void unregister(void)
{
	must(!syscall(SYS_io_uring_register, registered.fd, IORING_UNREGISTER_BUFFERS, NULL, 0));
	say("OK");
}

static void close_ring(void)
{
	must(!close(registered.fd));
	say("OK");
}

static void poll_ring(void)
{
	polled = ring_new(IORING_SETUP_SQPOLL);
	say("OK");
}

static void read_polled(void)
{
	static size_t page = 0;
	ring_read(&polled, &plain, page++ % PAGES, -1);
	say("OK");
}

static void make_context(void)
{
	must(!syscall(SYS_io_setup, 8, &context));
	say("OK");
}

static void open_direct(void)
{
	must(open(device, O_RDONLY | O_DIRECT) >= 0);
	say("OK");
}

static void submit(void)
{
	int fd = open(device, O_RDONLY | O_DIRECT);
	must(fd >= 0);
	if (!context)
		must(!syscall(SYS_io_setup, 8, &context));
	for (int i = 0; i < 2; i++) {
		struct iocb *each = &reads[i];
		*each = (struct iocb){
			.aio_lio_opcode = IOCB_CMD_PREAD,
			.aio_fildes = fd,
			.aio_buf = (uintptr_t)(incoming.at + (FIRST + i * COUNT / 2) * PAGE),
			.aio_nbytes = COUNT / 2 * PAGE,
			.aio_offset = i * COUNT / 2 * PAGE,
		};
		must(syscall(SYS_io_submit, context, 1, &each) == 1);
	}
	say("OK");
}

static void collect(void)
{
	struct io_event events[2];
	int done = 0;
	while (done < 2) {
		long got = syscall(SYS_io_getevents, context, 1, 2, events, NULL);
		must(got > 0 || errno == EINTR);
		for (long i = 0; i < got; i++)
			must(events[i].res == (long)(COUNT / 2 * PAGE));
		done += got > 0 ? got : 0;
	}
	for (size_t p = 0; p < COUNT; p++)
		incoming.keys[p + (incoming.pages == COUNT ? 0 : FIRST)] = 7000 + p;
	check_all_areas();
	say("OK");
}

static void fill(void)
{
	for (size_t p = 0; p < PAGES; p++)
		area_set(&late, p, 65000 + p);
	say("OK");
}

/* What comes with growth are zeros, if it can grow where it is. */
static void grow(void)
{
	char *middle = incoming.at + FIRST * PAGE;
	size_t bytes = COUNT * PAGE;
	must(!munmap(middle + bytes, (PAGES - FIRST - COUNT) * PAGE));
	incoming.pages = FIRST + COUNT;
	must(!munmap(incoming.at, FIRST * PAGE));
	incoming.at = middle;
	incoming.keys += FIRST;
	incoming.pages = COUNT;
	int grown = mremap(middle, bytes, bytes + 4 * PAGE, 0) == middle;
	must(grown || errno == ENOMEM);
	for (size_t p = 0; grown && p < 4; p++)
		check_page(middle + bytes + p * PAGE, 0, "grown");
	say("OK grown=%d", grown);
}

/* What `submit` reads. */
static void write_device(void)
{
	static char content[PAGE];
	int fd = open(device, O_WRONLY);
	must(fd >= 0);
	for (size_t p = 0; p < COUNT; p++) {
		fill_page(content, 7000 + p);
		must(pwrite(fd, content, PAGE, p * PAGE) == (ssize_t)PAGE);
	}
	must(!fsync(fd));
	close(fd);
}

int main(int argc, char **argv)
{
	victim_start();
	int reversed = argc > 1 && !strcmp(argv[1], "reversed");
	device = argc > 1 + reversed ? argv[1 + reversed] : NULL;
	if (device)
		write_device();
	struct area *areas[] = {&plain, &buffer, &chained, &zeros, &incoming, &late};
	const char *names[] = {"plain", "buffer", "chained", "zeros", "incoming", "late"};
	for (int i = 0; i < 6; i++) {
		*areas[i] = area_new(names[i], PAGES, 60000 + i * 1000, 1);
		area_known(areas[i]);
		/* The kernel holds all of a huge page that it holds a page of. */
		madvise(areas[i]->at, PAGES * PAGE, MADV_NOHUGEPAGE);
	}
	for (size_t p = 0; p < PAGES; p++) {
		area_set(&zeros, p, 0);
		area_set(&chained, p, 50000 + (reversed ? PAGES - p : p + 1));
		area_set(&late, p, next_key++ + ((uint64_t)getpid() << 32));
	}
	say_ready();
	const struct action actions[] = {
		{"ring", register_buffers}, {"fixed", fixed},	   {"unregister", unregister}, {"close", close_ring}, {"poll", poll_ring},
		{"polled", read_polled},    {"context", make_context}, {"direct", open_direct}, {"submit", submit},
		{"grow", grow},		    {"collect", collect},	    {"fill", fill},	   {0},
	};
	return serve(actions);
}
