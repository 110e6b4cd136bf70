"""The kernels are found in a checkout and in an installed package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gpuksm.hashing import kernels

ROOT = Path(__file__).resolve().parents[2]
SHOW = """
import sys
from gpuksm.hashing import kernels
assert not {"numba", "cupy", "pyopencl"} & set(sys.modules)
print(kernels.folder())
sys.stdout.write(kernels.source())
"""


def test_in_a_checkout() -> None:
    assert Path(str(kernels.folder())).resolve() == ROOT / "kernels"
    assert {path.name for path in (ROOT / "kernels").iterdir()} == set(kernels.FILES)
    assert "#include" not in kernels.source()
    assert f"#define SORT_KEYS {kernels.SORT_KEYS}u" in kernels.source()
    assert f"#define RADIX {1 << kernels.DIGIT_BITS}u" in kernels.source()
    assert f"#define LANES {kernels.LANES}u" in kernels.source()


def test_in_an_installed_package(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "gpuksm", tmp_path / "gpuksm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "gpuksm" / "_kernels")
    command = [sys.executable, "-c", SHOW]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    folder, _, source = done.stdout.partition("\n")
    assert Path(folder) == tmp_path / "gpuksm" / "_kernels"
    assert source == kernels.source()


def test_only_platform_h_knows_the_vendor() -> None:
    words = (
        "__global__",
        "__kernel",
        "__shared__",
        "__local",
        "threadIdx",
        "get_local_id",
        "_sync(",
        "__OPENCL",
    )
    for path in (ROOT / "kernels").glob("*.cu"):
        for word in words:
            assert word not in path.read_text(), (path.name, word)
