"""Each mechanism that protects targets is taken out, one at a time, and a test must fail.

    python -m tests.campaign.removals [--only NAME]

The source is copied and changed in the copy; the tests run there, on real processes.  A
mechanism without which its tests still pass is WRONG.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_SECONDS = 900
_ASSEMBLED = "gpuksm/guard/arch/x86_64.S"


class Removal(NamedTuple):
    """What is changed, text by text, in which file, and where that must be noticed."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: str


REMOVALS = (
    Removal(
        "zeros before a REMOVE event is read",
        "gpuksm/guard/events.py",
        (
            (
                "    for start, end in callers.discarded(target.pid, (number, arguments)):\n"
                "        zero(host, target, start, end)\n",
                "",
            ),
            (
                "            for start, end in callers.discarded(target.pid, call):\n"
                "                zero(host, target, start, end)\n",
                "            pass\n",
            ),
        ),
        "tests/safety/test_purge.py",
    ),
    Removal(
        "validation before mapping",
        "gpuksm/guard/commit.py",
        (
            (
                "        return [(low, high) for low, high, _ in calm]\n",
                "        return [(start, end)]\n",
            ),
        ),
        "tests/safety/test_wrong_plans.py::test_pages_written_between_arm_and_commit_stay",
    ),
    Removal(
        "what is given back together has one protection",
        "gpuksm/guard/restore.py",
        (
            (
                "if after is None or after.inode != vma.inode or protection(after) != protection(vma):",
                "if after is None or after.inode != vma.inode:",
            ),
        ),
        "tests/safety/test_stretches.py",
    ),
    Removal(
        "what is locked is given back by itself",
        "gpuksm/guard/restore.py",
        (("stop = min(end, vma.end) if any_locked else", "stop ="),),
        "tests/safety/test_stretches.py",
    ),
    Removal(
        "a comparer sheds what the guard holds",
        "gpuksm/guard/comparer.py",
        (("        _shed(sock, store)\n", ""),),
        "tests/guard/test_comparers.py",
    ),
    Removal(
        "a guard waits until a comparer has shed what it holds",
        "gpuksm/guard/comparers.py",
        (
            (
                "ready = bool(await_readable([ours.fileno()], _START_SECONDS)) and ours",
                "ready = True or ours",
            ),
        ),
        "tests/guard/test_comparers.py",
    ),
    Removal(
        "memory that children miss stays so when it is merged",
        "gpuksm/guard/target.py",
        (("        if self.advice.at(start) & DONTFORK:\n", "        if False:\n"),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "memory that children miss stays so when it is discarded",
        "gpuksm/guard/events.py",
        (("    for call in calls_for(target.advice.at(start)):\n", "    for call in ():\n"),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "memory that children miss stays so when it is given back",
        "gpuksm/guard/restore.py",
        (("        _advise(target, fresh, size, target.advice.at(start))\n", ""),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "memory is given back by what was said of it",
        "gpuksm/guard/restore.py",
        (("            stop = min(stop, target.advice.until(start))\n", ""),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "runs of one group are alike for children",
        "gpuksm/guard/batch.py",
        ((" and advice.at(before.addr) == advice.at(piece.addr)\n", "\n"),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "scattered memory that children miss stays so",
        "gpuksm/guard/chain_commit.py",
        (("                target.add_unforked(prepared.table, start, size)\n", ""),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "advice moves along",
        "gpuksm/guard/events.py",
        (("    target.note_advice(host.journal, target.advice.moved(moved, delta))\n", ""),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "what was said of merged memory is kept",
        "gpuksm/guard/target.py",
        (("*self.advice.within(merged)", ""),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "a successor knows the advice",
        "gpuksm/guard/recovery.py",
        (("[*orphans[record.target].advice, advised] if record.b else []", "[]"),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "memory marked for devices is left alone where they are let in",
        "gpuksm/eligibility.py",
        ((" or (allowed.kvm and is_virtual_machine(pid))\n", " or True\n"),),
        "tests/safety/test_advice.py",
    ),
    Removal(
        "threads of the kernel are not borrowed",
        "gpuksm/guard/attach.py",
        (("    if procfs.stat(tid).flags & procfs.PF_USER_WORKER:\n", "    if False:\n"),),
        "tests/safety/test_virtual_machines.py",
    ),
    Removal(
        "what a comparer has not answered is compared by the guard",
        "gpuksm/guard/comparers.py",
        (("            job.state = _OPEN\n", "            job.done({})\n"),),
        "tests/guard/test_comparers.py",
    ),
    Removal(
        "loose ends get a border page when a plan is done",
        "gpuksm/guard/plan.py",
        (("        _settle(host, commits.spans)\n", "        pass\n"),),
        "tests/safety/test_loose_ends.py",
    ),
    Removal(
        "another look at what is mapped in a takeover's freeze",
        "gpuksm/guard/children.py",
        (("    inventory.refresh()\n", ""),),
        "tests/guard/test_adoption.py",
    ),
    Removal(
        "a process leaves although its device hangs",
        "gpuksm/linux/leaving.py",
        (("library.on_exit(library._exit, None)", "pass"),),
        "tests/hashing/test_hung.py",
    ),
    Removal(
        "leaving a process alone between pauses",
        "gpuksm/guard/turns.py",
        (("        rest(max(rested[number], idle_until) - now, breathe)\n", ""),),
        "tests/guard/test_turns.py",
    ),
    Removal(
        "another look at what was prepared",
        "gpuksm/guard/chain_commit.py",
        (
            (
                "        return intersect(wanted, self.by_piece.calm(target, start, end)) == wanted\n",
                "        return True\n",
            ),
        ),
        "tests/safety/test_prepared.py",
    ),
    Removal(
        "another look at each mapping that was prepared for",
        "gpuksm/guard/chain_commit.py",
        (("in prepared.plain.stretches:\n", "in prepared.plain.stretches[:1]:\n"),),
        "tests/safety/test_prepared.py",
    ),
    Removal(
        "comparing each page of a chain",
        "gpuksm/guard/chains.py",
        (("        if equal(theirs, other, got * PAGE_SIZE):\n", "        if True:\n"),),
        "tests/safety/test_wrong_plans.py",
    ),
    Removal(
        "chains of one user only",
        "gpuksm/guard/chains.py",
        (("        if store.user_of(slots[at]) == user:\n", "        if True:\n"),),
        "tests/guard/test_chains.py",
    ),
    Removal(
        "border pages of chains",
        "gpuksm/guard/chain_commit.py",
        (
            (
                "            border = self.by_piece.needs_border(target, part.last(), part.behind)\n",
                "            border = False\n",
            ),
            (
                "        if borders != prepared.borders:\n",
                "        if False:\n",
            ),
        ),
        "tests/safety/test_prepared.py",
    ),
    Removal(
        "claim words",
        _ASSEMBLED,
        (
            (
                "    cmp $8, %rax\n    jne done\nalive:\n",
                "alive:\n",
            ),
        ),
        "tests/safety/test_groups.py",
    ),
    Removal(
        "the agent's look at its socket",
        _ASSEMBLED,
        (
            (
                "    test %rax, %rax\n    jnz perform\n    testl $1, 4(%rbx)\n",
                "    jmp perform\n    testl $1, 4(%rbx)\n",
            ),
        ),
        "tests/safety/test_groups.py",
    ),
    Removal(
        "holes behind extents",
        "gpuksm/guard/store.py",
        (
            ("_FAR_HOLE = 1 << 28", "_FAR_HOLE = 0"),
            ("_NEAR_HOLE = 1 << 18", "_NEAR_HOLE = 0"),
        ),
        "tests/safety/test_growth.py",
    ),
    Removal(
        "verification in the guard",
        "gpuksm/guard/verify.py",
        (
            (
                "        same = first_difference(mine + behind, other + behind, piece.pages - done)\n",
                "        same = piece.pages - done\n",
            ),
        ),
        "tests/safety/test_wrong_plans.py",
    ),
    Removal(
        "seals and mode of the store",
        "gpuksm/guard/store.py",
        (
            (
                "        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)\n"
                "        os.fchmod(fd, 0o400)\n",
                "",
            ),
        ),
        "tests/security/test_store.py",
    ),
    Removal(
        "the budget of mappings",
        "gpuksm/guard/commit.py",
        (("    return limit // 2 - census.count_vmas(pid)\n", "    return limit * 1000\n"),),
        "tests/end_to_end/test_scan.py",
    ),
    Removal(
        "border pages",
        "gpuksm/guard/target.py",  # the last look for loose ends makes up for those that a slice leaves out
        (
            (
                "        return address in self.borders or self.runs.at(address) is not None\n",
                "        return True\n",
            ),
        ),
        "tests/safety/test_growth.py",
    ),
    Removal(
        "an agent that outlives guard and keeper",
        "gpuksm/guard/guard.py",
        (("            target.link.stay(target.id)\n", "            pass\n"),),
        "tests/stress/test_both_killed.py",
    ),
    Removal(
        "a look for filters while an agent is being equipped",
        "gpuksm/guard/attach.py",
        (("        agent.count_filters()\n", ""),),
        "tests/guard/test_equipment.py",
    ),
    Removal(
        "room for a long status",
        "gpuksm/guard/agent.py",
        (("_STATUS = bytearray(1 << 20)", "_STATUS = bytearray(4096)"),),
        "tests/safety/test_seccomp.py",
    ),
    Removal(
        "no verdict on an agent that does not stop",
        "gpuksm/guard/sandbox.py",
        (
            (
                "            if time.monotonic_ns() > deadline:\n                return None\n",
                "            if time.monotonic_ns() > deadline:\n                return False\n",
            ),
        ),
        "tests/guard/test_agent.py",
    ),
    Removal(
        "nothing is merged before it was calm for as long as was said",
        "gpuksm/guard/plan.py",
        (("breathe, due=due)", "breathe)"),),
        "tests/safety/test_wrong_plans.py",
    ),
    Removal(
        "a guard that is forked has nothing of its keeper's",
        "gpuksm/guard/keeper.py",
        (
            (
                '        for fd in {int(name) for name in os.listdir("/proc/self/fd")} - kept:\n',
                "        for fd in set[int]() - kept:\n",
            ),
        ),
        "tests/guard/test_keeper.py",
    ),
    Removal(
        "what a guard is, loaded before there is need of one",
        "gpuksm/guard/keeper.py",
        (("        importlib.import_module(_GUARD)\n        arch.current()\n", "        arch.current()\n"),),
        "tests/test_client.py",
    ),
    Removal(
        "what a failed adoption had made is undone",
        "gpuksm/guard/adoption.py",
        (("            _undo(guard, orphan)\n", ""),),
        "tests/guard/test_adoption.py",
    ),
    Removal(
        "zeros where none can be mapped after a move",
        "gpuksm/guard/events.py",
        (("        _cover_with_zeros(target, failed)\n", "        pass\n"),),
        "tests/safety/test_seccomp.py",
    ),
    Removal(
        "what is mapped is looked at for who holds it",
        "gpuksm/guard/comparing.py",
        (
            (
                "        if target is not None and target.references is not None:\n",
                "        if target is None:\n",
            ),
        ),
        "tests/safety/test_pinned.py",
    ),
    Removal(
        "scattered pages are looked at for who holds them",
        "gpuksm/guard/comparing.py",
        (
            (
                "free_pages(target, chain.addr, len(chain.slots), numbers, slots, outcome.skip)",
                "(numbers, slots)",
            ),
        ),
        "tests/safety/test_pinned.py",
    ),
    Removal(
        "what a slot is filled from is looked at for who holds it",
        "gpuksm/guard/plan.py",
        (
            (
                "                mine = free_parts(target, whole, outcome.skip)  # before it is read\n",
                "                mine = [whole]\n",
            ),
        ),
        "tests/safety/test_pinned.py",
    ),
    Removal(
        "what is given back is looked at for who holds it",
        "gpuksm/guard/restore.py",
        (("    _check_not_held(target, start, size)\n", ""),),
        "tests/safety/test_pinned.py",
    ),
    Removal(
        "what is held is passed over when all is given back",
        "gpuksm/guard/restore.py",
        (
            (
                "                self.held, self._at = self.held or error, error.end\n",
                "                raise\n",
            ),
        ),
        "tests/safety/test_pinned.py",
    ),
    Removal(
        "what lies behind a held page that stays merged is watched",
        "gpuksm/guard/restore.py",
        (("        border = self._is_behind_held(low)\n", "        border = False\n"),),
        "tests/safety/test_pinned.py",
    ),
    Removal(
        "an inaccessible page behind a run is unwatched before it is unmapped",
        "gpuksm/guard/restore.py",
        (
            (
                "            target.add_unregister(table, page, PAGE_SIZE)  # or the agent",
                "            # or the agent",
            ),
            (
                "PAGE_SIZE, after_success=True)\n            target.link",
                "PAGE_SIZE)\n            target.link",
            ),
        ),
        "tests/safety/test_pinned.py",
    ),
    Removal(
        "who cannot look whether a copy is held leaves it where it is",
        "gpuksm/guard/pins.py",
        (("            target.references = ANY_COPY\n", "            pass\n"),),
        "tests/safety/test_pinned.py",
    ),
    Removal(
        "a process that begins direct I/O after a plan has begun is left alone",
        "gpuksm/guard/plan.py",
        ((" and target.id not in self.looked_at:", " and False:"),),
        "tests/guard/test_pins.py",
    ),
    Removal(
        "pages that a device has are looked at for the kernel's count of references",
        "gpuksm/linux/page_references.py",
        (('    code.jump_if_register(R3, "!=", R4, "found")\n    code.set', "    code.set"),),
        "tests/linux/test_page_references.py",
    ),
    Removal(
        "letting go of what was behind ends that are gone",
        "gpuksm/guard/events.py",
        (("        _let_go_of_ends(target, zeroed)\n", ""),),
        "tests/safety/test_loose_ends.py",
    ),
    Removal(
        "only of those that are gone",
        "gpuksm/guard/events.py",
        (
            (
                "    for page in {piece.end for piece in zeroed} & target.borders:\n"
                "        if page not in target.placeholders and target.runs.at(page - PAGE_SIZE) is None:\n",
                "    for page in list(target.borders):\n        if page not in target.placeholders:\n",
            ),
        ),
        "tests/safety/test_loose_ends.py",
    ),
    Removal(
        "letting the thread that forks have the processor",
        "gpuksm/guard/children.py",
        (("        time.sleep(_NAP_SECONDS)\n    return None\n", "    return None\n"),),
        "tests/guard/test_children.py",
    ),
    Removal(
        "slots that a ledger has are kept",
        "gpuksm/guard/reclaim.py",
        (("    pieces = list(held)\n", "    pieces: list[tuple[int, int]] = []\n"),),
        "tests/guard/test_reclaim.py",
    ),
    Removal(
        "a mapping that has grown is told once",
        "gpuksm/linux/mappings.py",
        (("        _cut_off(result, vma.start)\n", ""),),
        "tests/linux/test_procfs.py",
    ),
    Removal(
        "what is told of a place to which merged memory has moved",
        "gpuksm/guard/target.py",
        (("*outside(told, merged)", "*told"),),
        "tests/guard/test_advice.py",
    ),
    Removal(
        "what is said while slots are freed",
        "gpuksm/guard/reclaim.py",
        (
            ("            self._due = None  # who is served meanwhile may say `soon`\n", ""),
            (
                "            if reclaim(self._store, born, ledger, breathe) is None:\n"
                "                self._due = now + _AGAIN_SECONDS\n",
                "            waits = reclaim(self._store, born, ledger, breathe) is None\n"
                "            self._due = now + _AGAIN_SECONDS if waits else None\n",
            ),
        ),
        "tests/guard/test_reclaim.py",
    ),
    Removal(
        "arming in strides",
        "gpuksm/guard/tracking.py",
        (("        pagemap.Stride(),\n", "        None,\n"),),
        "tests/guard/test_tracked.py",
    ),
    Removal(
        "what was armed before a hole",
        "gpuksm/guard/tracking.py",
        (
            ("                written += found\n", "                armed += found\n"),
            (
                "        try:\n            for found in _arming",
                "        armed: list[Range] = []\n        try:\n            for found in _arming",
            ),
            (
                "            changed = True\n    return",
                "            changed = True\n        else:\n            written += armed\n    return",
            ),
        ),
        "tests/guard/test_tracked.py",
    ),
    Removal(
        "serving others between strides",
        "gpuksm/guard/tracking.py",
        (("                _serve_others(target, breathe)\n", ""),),
        "tests/guard/test_tracked.py",
    ),
)


def _interpreter(copy: Path) -> str:
    """An interpreter that finds `copy` before what is installed: the guard takes no PYTHONPATH."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy / ".venv"], check=True)
    (packages,) = (copy / ".venv" / "lib").glob("python*/site-packages")
    (packages / "copy.pth").write_text(f"{copy}\n{site.getsitepackages()[0]}\n")
    return str(copy / ".venv" / "bin" / "python")


def perform(removal: Removal) -> list[str]:
    """The tests that fail without the mechanism."""
    with tempfile.TemporaryDirectory(prefix="gpuksm-removal-") as folder:
        copy = Path(folder)
        copy.chmod(0o755)  # tests run as another user, too
        for part in ("gpuksm", "kernels", "tests", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / part)
        path = copy / removal.file
        text = path.read_text()
        for old, new in removal.changes:
            assert text.count(old) == 1, f"{removal.name}: no longer fits {removal.file}: {old!r}"
            text = text.replace(old, new)
        path.write_text(text)
        python = _interpreter(copy)
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        if removal.file == _ASSEMBLED:
            assemble = [python, "-m", "gpuksm.guard.arch.assemble"]
            subprocess.run(assemble, cwd=copy, env=environment, check=True)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *removal.tests.split()]
        done = subprocess.run(
            command, cwd=copy, env=environment, stdout=subprocess.PIPE, text=True, timeout=_SECONDS
        )
        return re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)


def main() -> int:
    """Print a table; 1 when a mechanism was not missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="removals whose name contains this")
    only = parser.parse_args().only or ""
    print("| taken out | failed of its tests | seconds |\n|---|---|---|", flush=True)
    missed = 0
    for removal in REMOVALS:
        if only not in removal.name:
            continue
        began = time.monotonic()
        failed = perform(removal)
        missed += not failed
        shown = ", ".join(f"`{name}`" for name in failed) or "WRONG: none"
        print(f"| {removal.name} | {shown} | {time.monotonic() - began:.0f} |", flush=True)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
