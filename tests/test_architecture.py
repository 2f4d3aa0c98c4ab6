"""The shape of the code base: import direction, sizes, and nothing tied to one machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("trajectory", "agent", "labeling", "prm", "policy", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONGER_FILES: dict[str, str] = {}
"""Path to the reason why it is longer."""
LONGER_FUNCTIONS: dict[str, str] = {}
"""``path::function`` to the reason why it is longer."""

# Put together from parts, so that this file does not find itself.
_PATHS = r"(?<![\w.}>$/:-])/(?:" + "|".join(("work", "root", "home", "opt", "mnt", "tmp")) + r")/\w"
_HOSTS = "|".join(("pypi" + r"\.org", "python" + "hosted", "index" + "-url", "find" + "-links"))
_MACHINE = re.compile(f"{_PATHS}|{_HOSTS}")
NOT_TEXT = {".parquet", ".png", ".safetensors", ".db"}


def tracked_files(repository: Path) -> list[Path]:
    """The files of the project: tracked, or new and not ignored."""
    if not (repository / ".git").exists():
        pytest.skip("needs a git checkout to tell the project's files from others")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    paths = [repository / name for name in result.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def python_files(repository: Path) -> list[Path]:
    """The modules of the packages and of the tests."""
    return [p for name in (*PACKAGES, "tests") for p in sorted((repository / name).rglob("*.py"))]


def functions_of(path: Path) -> list[tuple[str, int]]:
    """Name and length in lines of every function; the docstring does not count."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            doc = (first.end_lineno - first.lineno + 1) if documented else 0
            found.append((node.name, node.end_lineno - node.lineno + 1 - doc))
    return found


def test_imports_follow_the_contracts(repository):
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-cache"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_file_is_long(repository):
    sizes = {
        str(path.relative_to(repository)): len(path.read_text().splitlines())
        for path in python_files(repository)
    }
    long = {name for name, lines in sizes.items() if lines > MAX_FILE_LINES}
    assert long == set(LONGER_FILES)


def test_no_function_is_long(repository):
    long = {
        f"{path.relative_to(repository)}::{name}"
        for path in python_files(repository)
        for name, lines in functions_of(path)
        if lines > MAX_FUNCTION_LINES
    }
    assert long == set(LONGER_FUNCTIONS)


def test_nothing_names_a_machine(repository):
    found = [
        f"{path.relative_to(repository)}:{number}: {line.strip()[:80]}"
        for path in tracked_files(repository)
        if path.suffix not in NOT_TEXT
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if _MACHINE.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("line", ["open('/wo" + "rk/x')", "https://py" + "pi.org/simple"])
def test_the_machine_pattern_finds_what_it_should(line):
    assert _MACHINE.search(line)


@pytest.mark.parametrize("line", ["../shared/data", "runs/demo/work/x", "tests/home/x"])
def test_the_machine_pattern_lets_relative_paths_pass(line):
    assert not _MACHINE.search(line)


def test_every_package_is_typed(repository):
    for name in PACKAGES:
        assert (repository / name / "py.typed").is_file()
