"""Virtual machines that check their memory: python machines.py SECONDS.

Each is qemu and runs guest.c, which needs no operating system: two without KVM, two with it where there is
one, of which the guests have less memory, as KVM may emulate them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_LAYOUT = "-Wl,--section-start=.multiboot=0x100000,-Ttext=0x101000,--build-id=none,-z,max-page-size=4096"
_BUILD = f"gcc -m32 -O2 -ffreestanding -fno-pic -no-pie -nostdlib -fno-asynchronous-unwind-tables {_LAYOUT}"
_MACHINE = "qemu-system-x86_64 -m 128 -display none -monitor none -no-reboot -net none"
_PAGES = {"tcg": 20480, "kvm": 256}


def main() -> int:
    """Print the verdict."""
    seconds = float(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="gpuksm-machines-") as name:
        folder = Path(name)
        source = Path(__file__).with_name("guest.c")
        consoles, machines = [], []
        for accelerator in _accelerators():
            guest = folder / accelerator
            pages = f"-DPAGES={_PAGES[accelerator]}u"
            subprocess.run([*_BUILD.split(), pages, "-o", str(guest), str(source)], check=True)
            for number in range(2):
                consoles.append(folder / f"console-{accelerator}-{number}")
                words = ["-accel", accelerator, "-serial", f"file:{consoles[-1]}", "-kernel", str(guest)]
                machines.append(subprocess.Popen([*_MACHINE.split(), *words], stdin=subprocess.DEVNULL))
        try:
            return _watch(machines, consoles, seconds)
        finally:
            for machine in machines:
                machine.kill()
                machine.wait()


def _accelerators() -> list[str]:
    return ["tcg", "kvm"] if os.access("/dev/kvm", os.R_OK | os.W_OK) else ["tcg"]


def _watch(machines: list[subprocess.Popen[bytes]], consoles: list[Path], seconds: float) -> int:
    said = False
    end = time.monotonic() + seconds
    while time.monotonic() < end or not said:
        time.sleep(0.2)
        rounds = [console.read_text() if console.exists() else "" for console in consoles]
        if any("X" in each for each in rounds):
            print(f"CORRUPT a guest read a wrong word after {rounds} rounds", flush=True)
            return 9
        if any(machine.poll() is not None for machine in machines):
            print("CORRUPT a machine has ended", flush=True)
            return 9
        if not said and all(rounds):
            said = True
            print("READY", flush=True)
    # A last whole round of each guest, all of which began after everything else was done.
    goal = [len(console.read_text()) + 2 for console in consoles]
    deadline = time.monotonic() + 120
    while any(len(console.read_text()) < least for console, least in zip(consoles, goal, strict=True)):
        if time.monotonic() > deadline or any("X" in console.read_text() for console in consoles):
            print("CORRUPT a guest does not go on, or read a wrong word", flush=True)
            return 9
        time.sleep(0.2)
    print(f"OK rounds={sum(len(console.read_text()) for console in consoles)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
