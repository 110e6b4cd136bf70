"""An SQLite database in memory with checks of its own: python tables.py SECONDS ROWS."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import sys
import time


def text(number: int, version: int) -> str:
    """What row `number` must hold in `version`: about 1,000 characters."""
    return hashlib.shake_128(f"{number} {version}".encode()).hexdigest(500)


def main() -> None:
    """Work until the time is over."""
    seconds, rows = float(sys.argv[1]), int(sys.argv[2])
    end = time.monotonic() + seconds
    chance = random.Random(1)
    database = sqlite3.connect(":memory:")
    database.execute(
        "create table item (number integer primary key, version integer, body text, digest text)"
    )
    database.execute("create index by_digest on item (digest)")
    database.executemany("insert into item values (?, 0, ?, ?)", (row(number, 0) for number in range(rows)))
    database.commit()
    print("READY", flush=True)
    checks = writes = 0
    while time.monotonic() < end:
        for _ in range(400):
            number, version = chance.randrange(rows), chance.randrange(3)
            found = database.execute("select version, body from item where number = ?", (number,)).fetchone()
            if found[1] != text(number, found[0]):
                print(f"CORRUPT row {number}", flush=True)
                sys.exit(9)
            body, digest = row(number, version)[1:]
            sql = "update item set version = ?, body = ?, digest = ? where number = ?"
            database.execute(sql, (version, body, digest, number))
            writes += 1
        database.commit()
        verdict = database.execute("pragma integrity_check").fetchall()
        if verdict != [("ok",)]:
            print(f"CORRUPT integrity_check: {verdict[:3]}", flush=True)
            sys.exit(9)
        checks += 1
        time.sleep(0.05)
    for number, version, body in database.execute("select number, version, body from item"):
        if body != text(number, version):
            print(f"CORRUPT row {number}", flush=True)
            sys.exit(9)
    print(f"OK integrity_checks={checks} writes={writes}", flush=True)


def row(number: int, version: int) -> tuple[int, str, str]:
    """A row without its version."""
    body = text(number, version)
    return number, body, hashlib.sha1(body.encode()).hexdigest()


if __name__ == "__main__":
    main()
