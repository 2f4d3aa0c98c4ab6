import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sandbox.forkjail.seccomp import CLONE_THREAD, SNAPSHOT_FLAGS, build_filter
from agent.sandbox.forkjail.syscalls import CONDITIONAL, HARMLESS, MACHINES, numbers

ALLOWED, ASKED, KILLED = "allowed", "asked", "killed"


def verdict(program, arch, number, arguments=()):
    """Interpret classic BPF as the kernel does."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0, *padded)
    code = [struct.unpack("HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    accumulator = place = 0
    while True:
        operation, if_true, if_false, value = code[place]
        place += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            names = {0x7FFF0000: ALLOWED, 0x7FC00000: ASKED, 0x80000000: KILLED}
            return names.get(value) or errno.errorcode[value & 0xFFFF]
        else:
            holds = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: accumulator & value != 0,
            }[operation]
            place += if_true if holds else if_false


@pytest.fixture(params=sorted(MACHINES))
def machine(request):
    return MACHINES[request.param]


@pytest.fixture(params=[True, False], ids=["own files", "host files"])
def ask(request, machine):
    """Ask the filter of a machine about a call."""
    program = build_filter(machine, own_files=request.param)

    def ask(name, *arguments):
        number = numbers(f"{HARMLESS} {CONDITIONAL}", machine).get(name)
        if number is None:
            pytest.skip(f"{machine.name} has no {name}")
        return verdict(program, machine.audit_arch, number, arguments)

    ask.own_files = request.param
    return ask


def test_every_harmless_call_is_allowed_but_file_attributes_of_the_host(machine):
    attributes = {"chmod", "fchmod", "fchmodat", "utime", "utimes", "utimensat"}
    for own_files in (True, False):
        program = build_filter(machine, own_files=own_files)
        for name, number in numbers(HARMLESS, machine).items():
            expected = ALLOWED if own_files or name not in attributes else "EPERM"
            assert verdict(program, machine.audit_arch, number) == expected, name


@given(number=st.integers(min_value=0, max_value=0x3FFFFFFF))
def test_a_call_that_is_not_listed_is_unknown(number):
    for machine in MACHINES.values():
        listed = numbers(f"{HARMLESS} {CONDITIONAL}", machine).values()
        if number not in listed:
            program = build_filter(machine, own_files=True)
            assert verdict(program, machine.audit_arch, number) == "ENOSYS"


def test_numbers_just_beside_the_list_are_unknown(machine):
    listed = set(numbers(f"{HARMLESS} {CONDITIONAL}", machine).values())
    program = build_filter(machine, own_files=True)
    for number in range(600):
        if number not in listed:
            assert verdict(program, machine.audit_arch, number) == "ENOSYS", number


def test_another_numbering_kills(machine):
    program = build_filter(machine, own_files=True)
    i386 = 0x40000003
    assert verdict(program, i386, 3) == KILLED
    if machine.name == "x86_64":
        assert verdict(program, machine.audit_arch, 0x40000000) == KILLED


@pytest.mark.parametrize("name", ["execve", "execveat", "socket", "kill", "tkill", "tgkill"])
def test_programs_sockets_and_signals_are_refused(ask, name):
    assert ask(name) == "EPERM"


@pytest.mark.parametrize("name", ["fork", "vfork"])
def test_old_forks_are_refused(ask, name):
    assert ask(name) == "EPERM"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (SNAPSHOT_FLAGS, ASKED),
        (17, "EPERM"),
        (SNAPSHOT_FLAGS | 0x100, "EPERM"),
        (CLONE_THREAD | 0x3D0F00, ALLOWED),
        (CLONE_THREAD | 0x10000000, "EPERM"),
        (0x10000000 | SNAPSHOT_FLAGS, "EPERM"),
        (0x80, "EPERM"),
    ],
)
def test_threads_pass_snapshots_are_asked_about_and_other_clones_refused(ask, flags, expected):
    assert ask("clone", flags) == expected
    assert ask("clone3", flags) == "ENOSYS"


@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("socketpair", (1, 1, 0), ALLOWED),
        ("socketpair", (2, 1, 0), "EPERM"),
        ("prctl", (1, 9), ALLOWED),
        ("prctl", (1, 0), "EPERM"),
        ("prctl", (15,), ALLOWED),
        ("prctl", (38, 0), "EPERM"),
        ("prctl", (4, 1), "EPERM"),
        ("ioctl", (0, 0x541B), ALLOWED),
        ("ioctl", (0, 0x5412), "ENOTTY"),
        ("prlimit64", (0, 9, 0, 1), ALLOWED),
        ("prlimit64", (0, 9, 1, 0), "EPERM"),
        ("prlimit64", (0, 9, 1 << 32, 0), "EPERM"),
        ("prlimit64", (1, 9, 0, 1), "EPERM"),
    ],
)
def test_arguments_decide(ask, call, arguments, expected):
    assert ask(call, *arguments) == expected
