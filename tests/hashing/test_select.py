"""Which backend is chosen, and what is said where it cannot be."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from gpuksm.errors import BackendUnavailable, UsageError
from gpuksm.hashing import create, select
from gpuksm.hashing.source import ArraySource


def digest_one(hasher):
    digests, kinds = np.empty(1, np.uint64), np.empty(1, np.uint8)
    hasher.digest(ArraySource(np.arange(4096, dtype=np.uint8)), digests, kinds)
    return int(digests[0])


def missing(_wanted):
    raise BackendUnavailable("no such device here")


def slowed(name, seconds):
    """The CPU backend under another name, which takes longer to digest."""

    def make(wanted):
        from gpuksm.hashing.cpu import CpuHasher

        class Slowed(CpuHasher):
            def digest(self, source, digests, kinds):
                select.time.sleep(seconds)
                super().digest(source, digests, kinds)

        hasher = Slowed(wanted.seed, wanted.threads)
        hasher.name = name
        return hasher

    return make


def test_cpu_by_name():
    hasher, why = create("cpu", seed=5, threads=2)
    assert (hasher.name, hasher.seed, why) == ("cpu", 5, "asked for")
    hasher.close()


def test_auto_gives_a_hasher_that_agrees_with_the_cpu():
    chosen, why = create("auto", seed=5)
    cpu, _ = create("cpu", seed=5)
    assert digest_one(chosen) == digest_one(cpu)
    assert "\n" not in why
    chosen.close()
    cpu.close()


def test_auto_with_one_backend_says_what_the_others_lack(monkeypatch):
    monkeypatch.setitem(select._BACKENDS, "cuda", missing)
    monkeypatch.setitem(select._BACKENDS, "opencl", missing)
    hasher, why = create("auto")
    hasher.close()
    assert hasher.name == "cpu"
    assert why.startswith("only cpu runs here")
    assert "no such device here" in why


def test_auto_takes_the_quicker_one(monkeypatch):
    monkeypatch.setitem(select._BACKENDS, "cuda", slowed("cuda", 0.2))
    monkeypatch.setitem(select._BACKENDS, "opencl", missing)
    hasher, why = create("auto")
    hasher.close()
    assert hasher.name == "cpu"
    assert why.startswith("measured: cpu ")
    assert "; cuda " in why
    assert "CPU s/GiB" in why


def test_auto_with_nothing(monkeypatch):
    for name in select._BACKENDS:
        monkeypatch.setitem(select._BACKENDS, name, missing)
    with pytest.raises(BackendUnavailable, match="cuda: no such device here; opencl: "):
        create("auto")


def measured(name, rate, cost):
    hasher, _ = create("cpu", threads=1)
    hasher.name = name
    hasher.close()
    return select.Measured(hasher, rate, cost)


def test_nearly_as_quick_wins_by_cpu_time():
    assert select.best([measured("a", 10e9, 0.2), measured("b", 9.5e9, 0.1)]).hasher.name == "b"
    assert select.best([measured("a", 10e9, 0.2), measured("b", 5e9, 0.1)]).hasher.name == "a"


@pytest.mark.parametrize("name", ["cuda", "opencl"])
def test_a_gpu_that_is_not_there_is_one_line(name):
    try:
        hasher, _ = create(name)
    except BackendUnavailable:
        with pytest.raises(BackendUnavailable, match=r"\A[^\n]+\Z") as caught:
            create(name)
        assert caught.value.exit_code == 9
    else:
        hasher.close()
        assert hasher.name == name


@pytest.mark.parametrize(
    "arguments",
    [
        {"backend": "gpu"},
        {"seed": -1},
        {"seed": 1 << 64},
        {"threads": -1},
        {"backend": "cpu", "device": "0"},
    ],
)
def test_values_that_make_no_sense(arguments):
    with pytest.raises(UsageError):
        create(**arguments)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, gpuksm.hashing, gpuksm.hashing.sort\n"
        "heavy = {'numba', 'llvmlite', 'cupy', 'pyopencl'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_devices_name_that_no_backend_knows_is_told(monkeypatch):
    def unknown(wanted):
        raise UsageError(f"no device {wanted.device!r}")

    monkeypatch.setitem(select._BACKENDS, "cuda", missing)
    monkeypatch.setitem(select._BACKENDS, "opencl", unknown)
    with pytest.raises(UsageError, match="typo"):
        create("auto", device="typo")
    monkeypatch.setitem(select._BACKENDS, "cuda", slowed("cuda", 0.0))
    hasher, _ = create("auto", device="0")
    hasher.close()


def test_gpu_backends_get_what_was_asked_for(monkeypatch):
    seen = []
    monkeypatch.setitem(select._BACKENDS, "opencl", lambda wanted: seen.append(wanted))
    create("opencl", 5, 2, "name", 1 << 20)
    assert seen == [select.Wanted(5, 2, "name", 1 << 20)]


def test_auto_loads_no_gpu_library_where_no_gpu_can_be():
    code = (
        "import sys\n"
        "from gpuksm.hashing import select\n"
        "select._GPU_SIGNS = ('/nowhere',)\n"
        "_, why = select.create()\n"
        "assert why == 'only cpu runs here (there is no device file of a GPU)', why\n"
        "print(*{'cupy', 'pyopencl', 'gpuksm.hashing.cuda', 'gpuksm.hashing.opencl'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_gpu_is_opened_for_little_work(monkeypatch, tmp_path):
    monkeypatch.setattr(select, "_GPU_SIGNS", (str(tmp_path),))
    opened = []
    monkeypatch.setitem(select._BACKENDS, "cuda", lambda wanted: opened.append(wanted) or missing(wanted))
    monkeypatch.setitem(select._BACKENDS, "opencl", missing)
    hasher, why = create("auto", work_bytes=1 << 20)
    hasher.close()
    assert hasher.name == "cpu"
    assert "less than a GPU takes to start" in why
    assert not opened
    for given in ({"work_bytes": 1 << 50}, {}, {"work_bytes": 1 << 20, "device": "0"}):
        create("auto", **given)[0].close()
    assert len(opened) == 3
    with pytest.raises(BackendUnavailable):
        create("cuda", work_bytes=1 << 20)


def test_a_sign_of_a_gpu_has_both_backends_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(select, "_GPU_SIGNS", (str(tmp_path),))
    tried = []
    monkeypatch.setattr(select.importlib, "import_module", lambda name: tried.append(name) or missing(None))
    hasher, _ = create("auto")
    hasher.close()
    assert tried == ["gpuksm.hashing.cuda", "gpuksm.hashing.opencl"]
