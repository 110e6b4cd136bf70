/*
 * Memory that vhost writes to: frames that come in at a tap are put there by a thread of the kernel.
 *
 *   vhost
 *
 * `receive` has a frame sent to the tap and awaits it in the next page of `frames`; what lies behind it in the page
 * must be as it was.  `stream` does that again and again, on a thread of its own, until `still`.
 */
#include "actions.h"
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/vhost.h>
#include <linux/virtio_ring.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define PAGES 64
#define HEADER 10 /* struct virtio_net_hdr, all zeros */
#define FRAME 1400

static struct area frames, plain;
static struct vring ring;
static int packets, kicked, called;
static struct sockaddr_ll there = {.sll_family = AF_PACKET};
static uint64_t next_key = 800000;
static uint16_t taken;
static volatile int streaming;
static pthread_t streamer;

static void make_tap(int *tap)
{
	struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
	*tap = open("/dev/net/tun", O_RDWR);
	must(*tap >= 0);
	must(!ioctl(*tap, TUNSETIFF, &request));
	packets = socket(AF_PACKET, SOCK_RAW, 0);
	must(packets >= 0);
	must(!ioctl(packets, SIOCGIFFLAGS, &request));
	request.ifr_flags |= IFF_UP;
	must(!ioctl(packets, SIOCSIFFLAGS, &request));
	must(!ioctl(packets, SIOCGIFINDEX, &request));
	there.sll_ifindex = request.ifr_ifindex;
	there.sll_halen = 6;
	memset(there.sll_addr, 0xff, 6);
}

static void make_vhost(int tap)
{
	int vhost = open("/dev/vhost-net", O_RDWR);
	must(vhost >= 0);
	must(!ioctl(vhost, VHOST_SET_OWNER));
	uint64_t features = 0;
	must(!ioctl(vhost, VHOST_SET_FEATURES, &features));
	struct {
		struct vhost_memory head;
		struct vhost_memory_region region;
	} table = {.head = {.nregions = 1}};
	table.region.guest_phys_addr = table.region.userspace_addr = (uintptr_t)frames.at;
	table.region.memory_size = PAGES * PAGE;
	must(!ioctl(vhost, VHOST_SET_MEM_TABLE, &table));
	char *at = map_anonymous(4 * PAGE, PROT_READ | PROT_WRITE);
	vring_init(&ring, PAGES, at, PAGE);
	for (unsigned i = 0; i < PAGES; i++) {
		ring.desc[i] = (struct vring_desc){.addr = (uintptr_t)frames.at + i * PAGE, .len = PAGE, .flags = VRING_DESC_F_WRITE};
		ring.avail->ring[i] = i;
	}
	kicked = eventfd(0, 0);
	called = eventfd(0, 0);
	struct vhost_vring_state number = {.num = PAGES}, base = {0};
	struct vhost_vring_addr address = {
		.desc_user_addr = (uintptr_t)ring.desc,
		.avail_user_addr = (uintptr_t)ring.avail,
		.used_user_addr = (uintptr_t)ring.used,
	};
	struct vhost_vring_file kick = {.fd = kicked}, call = {.fd = called}, backend = {.fd = tap};
	must(!ioctl(vhost, VHOST_SET_VRING_NUM, &number));
	must(!ioctl(vhost, VHOST_SET_VRING_BASE, &base));
	must(!ioctl(vhost, VHOST_SET_VRING_ADDR, &address));
	must(!ioctl(vhost, VHOST_SET_VRING_KICK, &kick));
	must(!ioctl(vhost, VHOST_SET_VRING_CALL, &call));
	must(!ioctl(vhost, VHOST_NET_SET_BACKEND, &backend));
}

static uint16_t used_index(void)
{
	return __atomic_load_n(&ring.used->idx, __ATOMIC_ACQUIRE);
}

/* A frame to everybody that tells its key. */
static void make_frame(unsigned char *frame, uint64_t key)
{
	memset(frame, 0xff, 6);
	frame[12] = 0x88;
	frame[13] = 0xb5; /* for experiments */
	memcpy(frame + 14, &key, 8);
	for (size_t i = 22; i < FRAME; i++)
		frame[i] = mix(key + i);
}

/* What has come into a page, which is then filled anew: the key of a frame of ours, or 0 (the kernel sends some). */
static uint64_t take(void)
{
	static unsigned char frame[FRAME];
	size_t page = taken % PAGES;
	unsigned char *at = (unsigned char *)frames.at + page * PAGE;
	const struct vring_used_elem *done = &ring.used->ring[taken % PAGES];
	must(done->id == page && done->len <= PAGE);
	uint64_t key = 0;
	if (done->len == HEADER + FRAME && at[HEADER + 12] == 0x88 && at[HEADER + 13] == 0xb5) {
		memcpy(&key, at + HEADER + 14, 8);
		make_frame(frame, key);
		if (memcmp(at + HEADER, frame, 6) || memcmp(at + HEADER + 12, frame + 12, FRAME - 12))
			corrupt("frame %u in page %zu", taken, page);
	}
	for (size_t i = (done->len + 7) / 8; i < WORDS; i++)
		if (((uint64_t *)at)[i] != pattern(frames.keys[page], i))
			corrupt("behind frame %u, page %zu word %zu is %016lx", taken, page, i, ((uint64_t *)at)[i]);
	taken++;
	fill_page(at, frames.keys[page]);
	return key;
}

static void receive_one(void)
{
	static unsigned char frame[FRAME];
	uint64_t key = next_key++;
	double until = now_seconds() + 30;
	make_frame(frame, key);
	must(sendto(packets, frame, FRAME, 0, (struct sockaddr *)&there, sizeof there) == FRAME);
	do {
		__atomic_store_n(&ring.avail->idx, taken + 1, __ATOMIC_RELEASE);
		must(eventfd_write(kicked, 1) == 0);
		while (used_index() == taken) {
			struct pollfd wait = {.fd = called, .events = POLLIN};
			poll(&wait, 1, 20);
			if (now_seconds() > until)
				failed("no frame %u", taken);
		}
	} while (take() != key);
}

static void receive(void)
{
	for (int i = 0; i < 5; i++)
		receive_one();
	say("OK");
}

static void *receive_all(void *unused)
{
	(void)unused;
	while (streaming) {
		receive_one();
		usleep(10000); /* so that a page stays calm for long enough to be merged */
	}
	return NULL;
}

static void stream(void)
{
	streaming = 1;
	must(!pthread_create(&streamer, NULL, receive_all, NULL));
	say("OK");
}

static void still(void)
{
	uint16_t before = taken;
	streaming = 0;
	must(!pthread_join(streamer, NULL));
	say("OK frames=%u", before);
}

int main(void)
{
	victim_start();
	int tap;
	make_tap(&tap);
	frames = area_new("frames", PAGES, 60000, 1);
	plain = area_new("plain", PAGES, 70000, 1);
	area_known(&plain);
	must(!madvise(frames.at, PAGES * PAGE, MADV_NOHUGEPAGE));
	make_vhost(tap);
	printf("READY frames=%p:%u plain=%p:%u\n", frames.at, PAGES, plain.at, PAGES);
	fflush(stdout);
	const struct action actions[] = {{"receive", receive}, {"stream", stream}, {"still", still}, {0}};
	return serve(actions);
}
