"""The acceptance script runs through, on a fake GPU with tiny sizes; its figures mean nothing then."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from bench import gpu_acceptance
from gpuksm.hashing import cuda, gpus, tables
from tests import fake_cupy, nvrtc

TINY = gpu_acceptance.Sizes(
    pages=160,
    device_bytes=1 << 20,
    sort_keys=256,
    process_pages=100,
    processes=2,
    job_mb=8,
    repeats=1,
    launches=2,
)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> fake_cupy.FakeCuda:
    nvrtc.library()
    made = fake_cupy.FakeCuda()
    monkeypatch.setitem(sys.modules, "cupy", made.module())
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(gpus, "nvml", lambda: None)
    monkeypatch.setattr(tables.Tables, "_check", lambda _: None)  # seconds each; see test_cuda.py
    monkeypatch.setattr(gpu_acceptance, "scan_jobs", lambda *_given: {"bytes_saved": 1, "seconds": 0.5})
    monkeypatch.setattr(gpu_acceptance.gpu_failures, "run", lambda _case: None)
    return made


def test_all_checks_hold(runtime: fake_cupy.FakeCuda) -> None:
    report = gpu_acceptance.run(TINY)
    assert set(report.checks.values()) == {"ok"}, report.checks
    assert set(report.live) >= {"cpu", "cuda"}
    assert "CPU s saved per GiB" in report.live["cuda"]
    assert all(rate > 0 for rate in report.rates.values())
    assert gpu_acceptance.table_of(report).row_count > 20
    assert not runtime.leaks


def test_a_wrong_kernel_is_told(runtime: fake_cupy.FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuksm.hashing import kernels

    wrong = kernels.source().replace("MARK_EQUAL : 0u)", "0u : 0u)")
    monkeypatch.setattr(kernels, "source", lambda: wrong)
    report = gpu_acceptance.Report()
    device = cuda.open_devices(sys.modules["cupy"], None, None)[0]
    gpu_acceptance.conformance(report, device, TINY)
    device.close()
    assert not report.good
    assert report.checks["match and candidates"].startswith("AssertionError")


def test_the_real_scan_of_jobs(tmp_path: Any) -> None:
    found = gpu_acceptance.scan_jobs("cpu", str(tmp_path), TINY)
    assert found["backend"] == "cpu"
    assert found["bytes_saved"] > 0


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_DRIVER_SIGNS", ())
    with pytest.raises(SystemExit, match="no GPU to accept"):
        gpu_acceptance.main()
