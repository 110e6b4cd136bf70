"""Digests, dicts and forked workers that check themselves: python workers.py SECONDS MIB."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import sys
import time

BLOCK = 1 << 18


def content(number: int, version: int) -> bytes:
    """The bytes that block `number` must have in `version`."""
    return hashlib.shake_128(f"{number} {version}".encode()).digest(BLOCK)


def corrupt(what: str) -> None:
    """The verdict that ends everything."""
    print(f"CORRUPT {what}", flush=True)
    sys.exit(9)


def look(blocks: list[bytearray], digests: list[bytes], number: int) -> None:
    """Compare one block with the digest that was noted when it was made."""
    if hashlib.sha1(blocks[number]).digest() != digests[number]:
        corrupt(f"block {number}")


def child(
    blocks: list[bytearray], digests: list[bytes], table: dict[str, tuple[int, str]], seed: int
) -> None:
    """A forked worker: sees its parent's memory, writes to its own copy, ends."""
    chance = random.Random(seed)
    for _ in range(40):
        number = chance.randrange(len(blocks))
        look(blocks, digests, number)
        blocks[number][:4096] = bytes(4096)
        digests[number] = hashlib.sha1(blocks[number]).digest()
    for number in range(0, len(table), 97):
        if table[f"key {number}"] != (number, f"value of {number}"):
            corrupt(f"table {number} in a child")
    sys.exit(0)


def main() -> None:
    """Work until the time is over."""
    seconds, mib = float(sys.argv[1]), int(sys.argv[2])
    end = time.monotonic() + seconds
    chance = random.Random(1)
    kept = [content(number, 0) for number in range(mib * 4)]
    blocks, digests = [bytearray(each) for each in kept], [hashlib.sha1(each).digest() for each in kept]
    del kept
    table = {f"key {number}": (number, f"value of {number}") for number in range(100_000)}
    print("READY", flush=True)
    fork = multiprocessing.get_context("fork")
    looks = writes = children = 0
    while time.monotonic() < end:
        for turn in range(60):
            number = chance.randrange(len(blocks))
            look(blocks, digests, number)
            looks += 1
            if turn % 12 == 0:
                data = content(number, chance.randrange(3))
                if chance.random() < 0.5:
                    blocks[number] = bytearray(data)
                else:
                    blocks[number][:] = data
                digests[number] = hashlib.sha1(data).digest()
                writes += 1
        for _ in range(2000):
            key = chance.randrange(100_000)
            if table[f"key {key}"] != (key, f"value of {key}"):
                corrupt(f"table {key}")
            table[f"key {key}"] = (key, f"value of {key}")
        time.sleep(0.02)
        if looks % 1800:  # what a child shares is no candidate for merging
            continue
        worker = fork.Process(target=child, args=(blocks, digests, table, looks))
        worker.start()
        worker.join()
        children += 1
        if worker.exitcode:
            corrupt(f"child ended with {worker.exitcode}")
    for number in range(len(blocks)):
        look(blocks, digests, number)
    print(f"OK looks={looks} writes={writes} children={children}", flush=True)


if __name__ == "__main__":
    main()
