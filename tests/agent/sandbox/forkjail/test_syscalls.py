import re
from pathlib import Path

import pytest

from agent.sandbox.forkjail.syscalls import (
    CONDITIONAL,
    HARMLESS,
    MACHINES,
    TRUSTED,
    check,
    numbers,
    syscall,
)

TABLES = " ".join((HARMLESS, CONDITIONAL, TRUSTED))
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),  # what aarch64 uses
}


def header_numbers(path):
    """Read ``#define __NR_name number``; calls of two sizes stand as ``__NR3264_name``."""
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    named = {name: int(number) for name, number in found}
    if "fstatat" in named:
        named["newfstatat"] = named["fstatat"]
    return named


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_the_numbers_are_those_of_the_kernels_headers(machine):
    path = HEADERS[machine]
    if not path.exists():
        pytest.skip(f"needs the kernel's header {path.name} (package linux-libc-dev)")
    theirs = header_numbers(path)
    ours = numbers(TABLES, MACHINES[machine])
    assert {name: theirs.get(name) for name in ours} == ours


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_a_call_that_a_machine_lacks_is_not_in_its_header(machine):
    path = HEADERS[machine]
    if not path.exists():
        pytest.skip(f"needs the kernel's header {path.name} (package linux-libc-dev)")
    names = {entry.partition("=")[0] for entry in TABLES.split()}
    missing = names - set(numbers(TABLES, MACHINES[machine]))
    assert not missing & set(header_numbers(path))


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_no_number_stands_twice(machine):
    found = [numbers(table, MACHINES[machine]) for table in (HARMLESS, CONDITIONAL, TRUSTED)]
    values = [number for table in found for number in table.values()]
    assert len(values) == len(set(values))


def test_a_refused_call_is_an_error_with_its_number():
    with pytest.raises(OSError, match="pidfd_open") as caught:
        syscall("pidfd_open", -1, 0)
    assert caught.value.errno == 22
    assert check(3, "anything") == 3
