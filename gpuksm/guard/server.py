"""The guard's main loop: control socket, events of targets, agents that end, housekeeping.

One thread, one poll.  A client that sends nonsense gets an error or is hung up on;
a slow one is buffered; neither can keep events from being served.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable
from typing import Any

from gpuksm import __version__, errors, wire
from gpuksm.errors import GpuksmError, GuardError, NotPermitted, UsageError
from gpuksm.guard import snapshot
from gpuksm.guard.agent import AgentStuck
from gpuksm.guard.exchange import Exchange
from gpuksm.guard.freeze import FreezeFailed, release_stragglers
from gpuksm.guard.guard import Guard
from gpuksm.guard.keeping import Keeping
from gpuksm.guard.restore import RestoreFailed
from gpuksm.linux import process, procfs

_IDLE_SECONDS = 3.0
_MOST_CALM_US = 1_000_000  # a commit may wait so long for memory to be calm, and others for the commit
_TICK_MS = 500
_BUSY_TICK_MS = 10
_LOOK_SECONDS = 0.001  # between two looks at all that is not a client
_HOUSEKEEPING_SECONDS = 0.02  # may wait so long while threads stop and go on
_COLLECT_SECONDS = 300
_MAX_CLIENTS = 64

Reply = tuple[dict[str, Any], bytes]


class Client:
    """One connection: bytes in, bytes out."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.watching = False

    def receive(self) -> bool:
        """Take what has arrived; False when the client is gone."""
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.inbox += data
        return bool(data)

    def next_request(self) -> tuple[dict[str, Any], bytearray] | None:
        """The next whole frame, or None; WireError for what is no frame."""
        if len(self.inbox) < wire.HEADER.size:
            return None
        text_bytes, payload_bytes = wire.parse_header(bytes(self.inbox[: wire.HEADER.size]))
        start = wire.HEADER.size + text_bytes
        if len(self.inbox) < start + payload_bytes:
            return None
        message = wire.parse_json(self.inbox[wire.HEADER.size : start])
        payload = self.inbox[start : start + payload_bytes]
        del self.inbox[: start + payload_bytes]
        return message, payload

    def flush(self) -> bool:
        """Send what fits; False when the client is gone."""
        try:
            while self.outbox:
                sent = self.sock.send(memoryview(self.outbox)[: 1 << 20])
                del self.outbox[:sent]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


class Server:
    """Runs a guard on a listening socket until there is no reason left."""

    def __init__(self, guard: Guard, listener: socket.socket, keeping: Keeping) -> None:
        self.guard = guard
        self.keeping = keeping
        self.listener = listener
        listener.setblocking(False)
        self.clients: dict[int, Client] = {}
        self.scanner: Client | None = None
        self.exchange = Exchange()
        self.stopping = False
        self._told_to_end = False
        self._idle_since = self._collected = time.monotonic()
        self._looked, self._answered = 0.0, False
        # A socket pair, no pipe: the guard holds no end of anybody's pipe, and can be seen not to.
        self._wake, self._wake_write = socket.socketpair()
        self._wake.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        if not guard.privileged:
            # Only a tether has stops to serve; without, SIGCHLD would just cost time inside freezes.
            signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._terminate)
        self.operations: dict[str, Callable[[Client, dict[str, Any], bytearray], Reply | None]] = {
            "hello": self._hello,
            "attach": self._attach,
            "arm": self._arm,
            "commit": self._commit,
            "slots": self._slots,
            "unmerge": self._unmerge,
            "status": self._status,
            "register": self._register,
            "unregister": self._unregister,
            "registered": self._registered,
            "knobs": self._knobs,
            "watch": self._watch,
            "shutdown": self._shutdown,
        }

    def run(self) -> None:
        """Serve until idle or told to stop."""
        while not self._finished():
            if asking := self._await_clients():
                self._serve_clients(asking)
                continue
            ready = self._await_more_than_stops()
            self.guard.breathe(at_once=True)
            self._serve_clients(ready)
            self._drop_ended(ready)
            self.guard.tick()
            snapshot.renew(self.guard)
            self._collect_garbage()
            self._tend_processes(ready)
            self._looked = time.monotonic()
            if self._told_to_end:
                self._end()
        for target in list(self.guard.targets.values()):
            self.guard.drop(target)  # or its agent would wait for our successor

    def _await_clients(self) -> set[int]:
        """Clients with a request, right after one was answered, as long as all else need not be looked at.

        It mostly has another at once, and looking at hundreds of targets takes longer than many an answer.
        Where nobody asks, events are waited for without delay.
        """
        left = self._looked + _LOOK_SECONDS - time.monotonic()
        answered, self._answered = self._answered, False
        if left <= 0 or not answered:
            return set()
        poll = select.poll()
        for fd in (self._wake.fileno(), *self.clients):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(left * 1000)}
        return set() if self._wake.fileno() in ready else ready

    def _serve_clients(self, ready: set[int]) -> None:
        for fd in ready:
            if fd == self.listener.fileno():
                self._accept()
            elif fd in self.clients:
                self._serve_client(self.clients[fd])
                self._answered = True

    def _await_more_than_stops(self) -> set[int]:
        """Descriptors that are ready, once there is more to do than to let tethered threads go on.

        Each signal of a tethered target stops one: that must not wait for housekeeping.
        """
        due = time.monotonic() + _HOUSEKEEPING_SECONDS
        while True:
            ready = self._poll()
            with contextlib.suppress(BlockingIOError):
                while self._wake.recv(4096):
                    pass
            if ready != {self._wake.fileno()} or self._told_to_end or time.monotonic() > due:
                return ready
            self.guard.tether.serve()
            if self.guard.orphans:
                return ready

    def _poll(self) -> set[int]:
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        for fd, client in self.clients.items():
            poll.register(fd, select.POLLIN | (select.POLLOUT if client.outbox else 0))
        link = self.keeping.link()
        if link is not None:
            poll.register(link, select.POLLIN)
        waiting = bool(self.guard.orphans) or self.guard.tether.restless or not release_stragglers()
        for target in self.guard.targets.values():
            poll.register(target.link.agent.sock, select.POLLIN)
            if target.parked is None:
                poll.register(target.link.uffd_event, select.POLLIN)
            else:
                waiting = True
        return {fd for fd, _ in poll.poll(_BUSY_TICK_MS if waiting else _TICK_MS)}

    def _collect_garbage(self) -> None:
        """Now and then, and nowhere else: nothing is frozen here, and there is hardly any."""
        if time.monotonic() > self._collected + _COLLECT_SECONDS:
            gc.collect()
            self._collected = time.monotonic()

    def _tend_processes(self, ready: set[int]) -> None:
        """Nothing is frozen here, and no agent has anything to do unless its target is parked."""
        link = self.keeping.link()
        if link is not None and link.fileno() in ready:
            self.keeping.lost()
        if all(target.parked is None for target in self.guard.targets.values()):
            self.keeping.tend()
            self.guard.comparers.tend()

    def _finished(self) -> bool:
        if self.stopping:
            return True
        if self.clients or self.guard.busy:
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since > _IDLE_SECONDS

    def _terminate(self, *_: object) -> None:
        self._told_to_end = True

    def _end(self) -> None:
        """After SIGTERM: give every page back, then end; what cannot be given back keeps us alive."""
        self._told_to_end = False
        try:
            failed = self.guard.unmerge(None, 5000)[2]
        except GpuksmError:
            return
        self.stopping = not failed

    def _drop_ended(self, ready: set[int]) -> None:
        """An agent's socket becomes readable outside of a request only when the agent has ended."""
        for target in list(self.guard.targets.values()):
            if (
                target.parked is None
                and target.link.agent.sock.fileno() in ready
                and target.link.agent.ended()
            ):
                self.guard.drop(target)

    # -- clients ---------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        if len(self.clients) >= _MAX_CLIENTS or process.peer_uid(sock) not in (0, os.geteuid()):
            sock.close()
            return
        self.clients[sock.fileno()] = Client(sock)

    def _serve_client(self, client: Client) -> None:
        alive = client.receive()
        try:
            while alive and (request := client.next_request()) is not None:
                reply = self._answer(client, *request)
                if reply is not None:
                    client.outbox += wire.encode(*reply)
        except wire.WireError:
            alive = False
        if not (alive and client.flush()):
            self._hang_up(client)

    def _hang_up(self, client: Client) -> None:
        del self.clients[client.sock.fileno()]
        client.sock.close()
        if self.scanner is client:
            self.scanner = None
            self.exchange.forget()
            self.guard.comparers.dismiss()
            self.guard.release_idle()

    def _answer(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply | None:
        """The reply to a request; None when it comes later (`watch`)."""
        operation = self.operations.get(str(message.get("op")))
        try:
            if operation is None:
                raise UsageError(f"unknown operation {message.get('op')!r}")
            answer = operation(client, message, payload)
        except GpuksmError as error:
            return {"error": type(error).__name__, "message": str(error)}, b""
        except (FreezeFailed, AgentStuck, RestoreFailed) as error:
            return {"error": "GuardError", "message": f"{error}; try again"}, b""
        except OSError as error:
            traceback.print_exc()  # into guard.log
            return {"error": "GuardError", "message": f"{error}; try again"}, b""
        except (KeyError, TypeError, ValueError, struct.error, OverflowError) as error:
            return {"error": "UsageError", "message": f"malformed request: {error!r}"}, b""
        return None if answer is None else ({"ok": True, **answer[0]}, answer[1])

    # -- operations --------------------------------------------------------------

    def _hello(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        return {
            "runs": sum(len(target.runs) for target in self.guard.targets.values()),
            "store_bytes": self.guard.store.used_bytes(),
            "pid": os.getpid(),
            "version": __version__,
            "store_dev": self.guard.store.device,
            "store_ino": self.guard.store.inode,
            "merged_pages": self._merged_pages(),
            "seed": self.guard.seed,
        }, b""

    def _merged_pages(self) -> int:
        return sum(target.runs.pages for target in self.guard.targets.values())

    def _attach(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        if self.scanner not in (None, client):
            raise GuardError("another scan is running; wait for it to end, or stop it")
        self.scanner = client
        options = dict(message.get("options") or {})
        self.guard.comparers.want(int(options.get("comparers", 0)))
        return {
            "tracking": "write-tracking",
            "targets": [self._attach_one(item, options) for item in message["targets"]],
        }, b""

    def _attach_one(self, item: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        pid = int(item["pid"])
        ranges = None if item.get("ranges") is None else [(int(s), int(e)) for s, e in item["ranges"]]
        reply: dict[str, Any] = {"pid": pid, "target": None, "name": _name(pid), "regions": [], "skipped": {}}
        pauses = len(self.guard.pauses_us)
        try:
            target, regions, skipped = self.guard.attach(
                pid, ranges, named=bool(item.get("named")), options=options
            )
        except GpuksmError as error:
            return {**reply, "error": type(error).__name__, "message": str(error), "vma_budget": 0}
        self.guard.breathe()
        return {
            **reply,
            "target": target.id,
            "regions": regions,
            "merged": target.spans,
            "skipped": skipped,
            "pauses_us": self.guard.pauses_us[pauses:],
            "error": None,
            "message": "",
            "vma_budget": self.guard.vma_budget(target),
        }

    def _arm(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        ranges = list(struct.iter_unpack("<QQ", payload)) if message.get("some") else None
        if ranges is not None and any(
            not low < high <= after for (low, high), (after, _) in itertools.pairwise([*ranges, (1 << 63, 0)])
        ):
            raise UsageError("malformed request: ranges must ascend and not overlap")
        calm_seconds = min(_MOST_CALM_US, max(0, int(message.get("calm_us", 0)))) / 1e6
        written, changed = self.guard.arm(self.guard.target(message["target"]), ranges, calm_seconds)
        flat = [address for pair in written for address in pair]
        return {"ranges": len(written), "changed": changed}, struct.pack(f"<{len(flat)}Q", *flat)

    def _commit(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        if self.scanner is not client:
            raise GuardError("commit without attach: another scan has taken over")
        pause = max(100, int(message.get("max_pause_us", 5000)))
        result = self.guard.commit(int(message["extents"]), int(message["records"]), payload, pause)
        outcome = result.outcome
        return {
            "mapped_pages": outcome.mapped_pages,
            "zero_pages": outcome.zero_pages,
            "runs": outcome.runs,
            "vmas": result.vmas,
            "skipped": outcome.skipped,
            "pauses_us": outcome.pauses_us,
        }, result.column

    def _slots(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        generation = self.guard.store.generation
        if message.get("generation") == generation:
            return {"generation": generation, "extents": None}, b""
        owners = self.guard.store.owners()
        body = b"".join(wire.SLOTS_RECORD.pack(start, slots, node) for start, slots, _, node in owners)
        body += b"".join(digests for _, _, digests in self.guard.store.extents())
        return {"generation": generation, "extents": len(owners)}, body

    def _unmerge(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        pids = message.get("pids")
        pause = max(100, int(message.get("max_pause_us", 5000)))
        pages, pauses, failed = self.guard.unmerge(
            None if pids is None else [int(pid) for pid in pids], pause
        )
        muzzled = {target.pid for target in self.guard.targets.values() if target.link.agent.muzzled()}
        lasting = [pid for pid in failed if int(pid) in muzzled]
        return {"pages": pages, "pauses_us": pauses, "failed": failed, "lasting": lasting}, b""

    def _status(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        budgets = message.get("budgets")
        return {
            **self.guard.status(budgets if isinstance(budgets, list) else None),
            "daemon": self.exchange.told()["daemon"],
        }, b""

    def _register(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        pid, ranges = self._own_process(client, message)
        self.guard.registry.add(pid, ranges)
        self._wake_watchers()
        return {}, b""

    def _unregister(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        pid, ranges = self._own_process(client, message)
        self.guard.registry.remove(pid, ranges)
        self._wake_watchers()
        return {}, b""

    def _own_process(
        self, client: Client, message: dict[str, Any]
    ) -> tuple[int, list[tuple[int, int]] | None]:
        pid = int(message["pid"])
        peer = process.peer_uid(client.sock)
        if peer and procfs.status(pid)["Uid"].split()[0] != str(peer):
            raise NotPermitted(
                f"process {pid} belongs to another user; only its owner or root may register it"
            )
        ranges = message.get("ranges")
        if ranges is None:
            return pid, None
        pairs = [(int(start), int(end)) for start, end in ranges]
        if any(not 0 <= start < end < 1 << 63 for start, end in pairs):
            raise UsageError("a range must be START-END with START below END")
        return pid, pairs

    def _registered(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        return {"targets": self.guard.registry.listed()}, b""

    def _knobs(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        if "publish" in message:
            if self.scanner is not client:
                raise GuardError("only the scanner that has attached publishes its numbers")
            return {"wanted": self.exchange.publish(dict(message["publish"]))}, b""
        if "set" in message:
            self.exchange.set(dict(message["set"]), self._merged_pages())
            self._wake_watchers()
        return self.exchange.told(), b""

    def _watch(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply | None:
        if message.get("serial") != self.exchange.serial:
            return {"serial": self.exchange.serial}, b""
        client.watching = True
        return None

    def _wake_watchers(self) -> None:
        self.exchange.serial += 1
        for client in self.clients.values():
            if client.watching:
                client.watching = False
                client.outbox += wire.encode({"ok": True, "serial": self.exchange.serial})
                client.flush()  # one that is gone is hung up on when it is polled

    def _shutdown(self, client: Client, message: dict[str, Any], payload: bytearray) -> Reply:
        merged = self._merged_pages()
        if merged or self.guard.orphans:
            raise GuardError(f"{merged} pages are merged; run `gpuksm unmerge --all` first")
        self.stopping = True
        self.guard.release_idle()
        return {}, b""


def _name(pid: int) -> str:
    try:
        return procfs.stat(pid).comm
    except errors.GpuksmError:
        return ""
