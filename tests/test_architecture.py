"""Who may import whom, as the table in docs/architecture.md says.

Every import statement counts, those inside of functions too; imports under
`if TYPE_CHECKING:` do not, since nothing of them is left when the program runs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpuksm"
MAX_LINES = 480
STDLIB = frozenset(sys.stdlib_module_names)

# unit: (parts of gpuksm it may import, packages from outside it may import).  The
# first matching prefix counts; "" is the package itself.
RULES: list[tuple[str, set[str], set[str]]] = [
    ("gpuksm.errors", set(), set()),
    ("gpuksm.wire", set(), set()),
    ("gpuksm.knobs", {"errors"}, set()),
    ("gpuksm.linux", {"errors", "linux"}, set()),
    ("gpuksm.writers", {"linux", "errors"}, set()),
    ("gpuksm.eligibility", {"linux", "writers", "errors"}, set()),
    ("gpuksm.guard", {"", "guard", "knobs", "linux", "wire", "eligibility", "writers", "errors"}, set()),
    ("gpuksm.starting", set(), set()),
    ("gpuksm.client", {"", "starting", "wire", "errors", "linux"}, set()),
    ("gpuksm.api", {"", "client", "errors", "linux"}, set()),
    ("gpuksm.targets", {"", "client", "eligibility", "writers", "errors", "linux", "scan"}, {"psutil"}),
    (
        "gpuksm.hashing",
        {"", "hashing", "linux", "errors"},
        {"numpy", "numba", "llvmlite", "cupy", "pyopencl"},
    ),
    (
        "gpuksm.scan",
        {"", "scan", "linux", "hashing", "knobs", "client", "wire", "eligibility", "writers", "errors"},
        {"numpy", "numba"},
    ),
    ("gpuksm.report", {"", "report", "knobs", "errors"}, {"rich"}),
    (
        "gpuksm.cli",
        {
            "",
            "api",
            "cli",
            "client",
            "eligibility",
            "errors",
            "hashing",
            "knobs",
            "linux",
            "report",
            "scan",
            "targets",
            "wire",
            "writers",
        },
        {"click", "rich"},
    ),
    ("gpuksm.__main__", {"", "cli", "client"}, set()),
    ("gpuksm", {"api"}, set()),
]
MAY_USE_CTYPES = ("gpuksm.linux", "gpuksm.hashing.gpus")
MAY_PRINT = "gpuksm.cli"

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def _rule(module: str) -> tuple[set[str], set[str]]:
    for prefix, inside, outside in RULES:
        if module == prefix or module.startswith(prefix + "."):
            return inside, outside
    raise AssertionError(f"{module} is in no row of the table in docs/architecture.md")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that is imported when the code runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            # `from gpuksm import errors` imports the module gpuksm.errors.
            yield from (f"{base}.{alias.name}" if base == "gpuksm" else base for alias in node.names)
        elif not _is_type_checking(node):
            yield from _imports(node)


def _part(name: str) -> str:
    """`errors` for gpuksm.errors, `linux` for gpuksm.linux.procfs, "" for names of gpuksm itself."""
    head = name.partition(".")[2].partition(".")[0]
    return head if (PACKAGE / f"{head}.py").is_file() or (PACKAGE / head / "__init__.py").is_file() else ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_stay_within_the_layers(module: str) -> None:
    inside, outside = _rule(module)
    wrong = []
    for name in _imports(ast.parse(MODULES[module].read_text())):
        top = name.split(".")[0]
        if top == "gpuksm":
            allowed = _part(name) in inside
        elif top == "ctypes":
            allowed = module.startswith(MAY_USE_CTYPES)
        else:
            allowed = top in STDLIB or top in outside
        if not allowed:
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module: str) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert module.startswith(MAY_PRINT) or calls == []


@pytest.mark.parametrize("module", MODULES)
def test_each_module_is_short_and_says_what_it_is_for(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)) or not text.strip()


def test_the_table_in_the_docs_names_every_part() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text()
    parts = {_part(name) for name in MODULES if name != "gpuksm"} - {"", "__main__"}
    missing = [
        part
        for part in sorted(parts)
        if f"`gpuksm/{part}/`" not in table and f"`gpuksm/{part}.py`" not in table
    ]
    assert missing == []


GUARD = sorted(name for name in MODULES if name.startswith("gpuksm.guard"))


def test_the_guard_loads_only_the_stdlib() -> None:
    """What is really loaded, transitively, when every module of the guard is imported."""
    code = (
        "import sys, importlib; before = set(sys.modules)\n"
        f"for name in {[*GUARD, 'gpuksm.client']!r}: importlib.import_module(name)\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) - STDLIB == {"gpuksm"}


def test_the_command_line_starts_without_anything_heavy() -> None:
    code = (
        "import sys, importlib, gpuksm.cli\n"
        "for verb in gpuksm.cli.VERBS: importlib.import_module('gpuksm.cli.' + verb)\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"numpy", "numba", "rich", "cupy"}.isdisjoint(done.stdout.split())


def test_nobody_waits_by_select() -> None:
    """It knows no descriptor above 1023: see gpuksm/linux/descriptors.py."""
    for source in PACKAGE.glob("**/*.py"):
        assert "select.select" not in source.read_text(), source
