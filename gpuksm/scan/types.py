"""What travels into and out of a scan.  Stdlib only; counts are pages of 4096 bytes where not said else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gpuksm.writers import Allowed


@dataclass(frozen=True)
class TargetRequest:
    """A process to scan; `named` when the user named it, `ranges` (bytes) when only parts are registered."""

    pid: int
    named: bool = True
    ranges: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class ScanOptions:
    """How to scan.

    `threads` 0: one for each usable CPU, up to where more are no use; `device` None: the backend's choice;
    `gpu_memory` bytes per device; without `merge_across_nodes` only pages of one NUMA node are merged with
    each other.
    """

    batch_pages: int = 65536
    passes: int = 2
    settle_seconds: float = 0.2
    backend: str = "auto"
    threads: int = 0
    max_pause_us: int = 5000
    allow_seccomp: bool = False
    allow_direct_io: bool = False
    allow_peer_writes: bool = False
    allow_kvm: bool = False
    device: str | None = None
    gpu_memory: int | None = None
    merge_across_nodes: bool = True

    @property
    def allowed(self) -> Allowed:
        """What would otherwise be a reason to skip a process."""
        return Allowed(self.allow_seccomp, self.allow_direct_io, self.allow_peer_writes, self.allow_kvm)

    @property
    def hashes_anywhere(self) -> bool:
        """Whether this can be done on any machine, as far as hashing goes and telling pages apart."""
        if self.device is not None or self.gpu_memory is not None or not self.merge_across_nodes:
            return False
        return self.backend in ("auto", "cpu")


class Progress(Protocol):
    """Told what is going on; `total` is 0 where it is not known."""

    def update(self, stage: str, done: int, total: int) -> None: ...


class NoProgress:
    """A `Progress` that tells nobody."""

    def update(self, stage: str, done: int, total: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class TargetReport:
    """What happened to one target; `error` says why it was left out, `skipped` counts pages by reason."""

    pid: int
    name: str
    pages_scanned: int
    pages_merged: int
    runs: int
    vmas: int
    skipped: dict[str, int]
    error: str | None


@dataclass(frozen=True)
class ScanResult:
    """What a scan did; counters have the meaning of their namesakes in /sys/kernel/mm/ksm.

    `pages_shared` (slots of the store in use), `pages_sharing` (further mappings
    of them) and `general_profit` describe everything the guard holds merged;
    the rest describes this scan.  `bytes_saved` is measured: the fall of the
    targets' anonymous memory, less the growth of the store and page tables.
    """

    pages_scanned: int
    pages_merged: int
    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    pages_skipped: int
    zero_pages: int
    full_scans: int
    general_profit: int
    bytes_saved: int
    seconds: float
    cpu_seconds: float
    max_pause_ms: float
    backend: str
    backend_reason: str
    skipped: dict[str, int]
    pauses_us: tuple[int, ...]
    targets: tuple[TargetReport, ...]


@dataclass(frozen=True)
class EstimateTarget:
    """What an estimate found in one process; `error` says why it would be left out."""

    pid: int
    name: str
    pages_scanned: int
    pages_mergeable: int
    zero_pages: int
    pages_unshared: int
    runs: int
    vmas: int
    skipped: dict[str, int]
    error: str | None


@dataclass(frozen=True)
class EstimateResult:
    """What a scan would do, had nothing been written meanwhile.

    `pages_shared` slots of the store would back `pages_mergeable` pages (of them
    `pages_sharing` further mappings); `zero_pages` would need none.  `bytes_saved`
    is the sum of what would be freed less the store and page-table overhead.
    `same_layout_pages` would become equal, beyond those that are, if the
    processes had the same address layout; None when not asked for.
    """

    pages_scanned: int
    pages_mergeable: int
    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_skipped: int
    zero_pages: int
    runs: int
    vmas: int
    bytes_saved: int
    same_layout_pages: int | None
    same_layout_bytes: int | None
    seconds: float
    cpu_seconds: float
    backend: str
    backend_reason: str
    skipped: dict[str, int]
    targets: tuple[EstimateTarget, ...]


@dataclass(frozen=True)
class Stage:
    """How quick one stage of a scan is; `amount` of `unit` (bytes, pages, digests) took `seconds`.

    Medians of the repeats, each by itself; `per_second` is the median of amount / seconds.
    """

    stage: str
    what: str
    amount: int
    unit: str
    seconds: float
    per_second: float


@dataclass(frozen=True)
class BenchResult:
    """What the stages of a scan reach on this machine, in helper processes of `bytes_each`."""

    processes: int
    bytes_each: int
    repeats: int
    threads: int
    seconds: float
    backend: str
    backend_reason: str
    stages: tuple[Stage, ...]
