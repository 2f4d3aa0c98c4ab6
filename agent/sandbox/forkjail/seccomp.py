"""The seccomp filter of a cell: an allow-list of system calls, assembled as classic BPF.

What is not listed fails with ENOSYS, as on an older kernel. A call of another architecture's
numbering kills the process. New processes are impossible but for one exact ``clone``, the
snapshot of a state, which is put to the box for each single case (user notification); flags are
register values, so nothing can change between the question and the call.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from functools import cache

from agent.sandbox.forkjail.syscalls import (
    CONDITIONAL,
    HARMLESS,
    Machine,
    numbers,
    syscall,
)

CLONE_THREAD = 0x00010000
CLONE_PARENT = 0x00008000
SNAPSHOT_FLAGS = CLONE_PARENT | 17
"""Flag word of the one allowed fork: a sibling of its parent, SIGCHLD at its end."""
_NEW_NAMESPACES = 0x7E020080
_AF_UNIX = 1
_FIONREAD, _FIOCLEX, _FIONCLEX, _FIONBIO, _TCGETS, _TIOCGWINSZ = (
    0x541B, 0x5451, 0x5450, 0x5421, 0x5401, 0x5413,
)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA = 1, 15, 16, 0x53564D41
_SIGKILL = 9

_KILL_PROCESS, _ERRNO, _NOTIFY, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NUMBER, _ARCH = 0, 4
"""Offsets in ``struct seccomp_data``."""

_FILE_ATTRIBUTES = ("chmod", "fchmod", "fchmodat", "utime", "utimes", "utimensat")
"""What Landlock does not mediate: refused where no mount namespace hides foreign files."""


def _argument(index: int) -> int:
    """Return the offset of the low half of an argument (both machines are little-endian)."""
    return 16 + 8 * index


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return one instruction."""
    return struct.pack("HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


def _refuse(error: int) -> bytes:
    """Return the instruction that makes the call fail."""
    return _op(_RETURN, _ERRNO | error)


def _one_of(offset: int, values: tuple[int, ...], otherwise: bytes) -> list[bytes]:
    """Return a body that allows the call if a field has one of the values."""
    tests = [_op(_EQUAL, v, len(values) - i, 0) for i, v in enumerate(values)]
    return [_op(_LOAD, offset), *tests, otherwise, _op(_RETURN, _ALLOW)]


def _bodies() -> dict[str, list[bytes]]:
    """Return what decides each conditional call; every path ends in a verdict."""
    refused, allowed = _refuse(errno.EPERM), _op(_RETURN, _ALLOW)
    only_sigkill = [
        _op(_LOAD, _argument(1)),
        _op(_EQUAL, _SIGKILL, 1, 0),
        refused,
        allowed,
    ]
    return {
        "clone": [
            _op(_LOAD, _argument(0)),
            _op(_EQUAL, SNAPSHOT_FLAGS, 0, 1),
            _op(_RETURN, _NOTIFY),
            _op(_ANY_BIT, _NEW_NAMESPACES, 2, 0),
            _op(_ANY_BIT, CLONE_THREAD, 0, 1),
            allowed,
            refused,
        ],
        "clone3": [_refuse(errno.ENOSYS)],  # its flags are in memory; libraries fall back to clone
        "socketpair": _one_of(_argument(0), (_AF_UNIX,), refused),
        "prctl": [
            _op(_LOAD, _argument(0)),
            _op(_EQUAL, _PR_SET_PDEATHSIG, 0, len(only_sigkill)),
            *only_sigkill,
            *_one_of(_argument(0), (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA), refused),
        ],
        "ioctl": _one_of(
            _argument(1),
            (_FIONREAD, _FIOCLEX, _FIONCLEX, _FIONBIO, _TCGETS, _TIOCGWINSZ),
            _refuse(errno.ENOTTY),
        ),
        "prlimit64": [  # reading one's own limits: pid 0, no new limit
            _op(_LOAD, _argument(0)),
            _op(_EQUAL, 0, 0, 5),
            _op(_LOAD, _argument(2)),
            _op(_EQUAL, 0, 0, 3),
            _op(_LOAD, _argument(2) + 4),
            _op(_EQUAL, 0, 0, 1),
            allowed,
            refused,
        ],
    }


def _search(allowed: list[int]) -> list[bytes]:
    """Return a binary search over sorted call numbers, ending in a verdict."""
    if len(allowed) <= 4:
        tests = [_op(_EQUAL, n, len(allowed) - i, 0) for i, n in enumerate(allowed)]
        return [*tests, _refuse(errno.ENOSYS), _op(_RETURN, _ALLOW)]
    middle = len(allowed) // 2
    lower, upper = _search(allowed[:middle]), _search(allowed[middle:])
    return [_op(_AT_LEAST, allowed[middle], len(lower), 0), *lower, *upper]


@cache
def build_filter(machine: Machine, *, own_files: bool) -> bytes:
    """Assemble the filter.

    Parameters
    ----------
    machine : Machine
        Whose call numbers to use.
    own_files : bool
        Whether a mount namespace shows the cell no file but its own and read-only ones. Without
        one, calls that change file attributes are refused too.

    Returns
    -------
    bytes
        Instructions of eight bytes each.
    """
    program = [
        _op(_LOAD, _ARCH),
        _op(_EQUAL, machine.audit_arch, 1, 0),
        _op(_RETURN, _KILL_PROCESS),
        _op(_LOAD, _NUMBER),
    ]
    if machine.name == "x86_64":  # the x32 numbering shares the architecture value
        program += [_op(_AT_LEAST, 0x40000000, 0, 1), _op(_RETURN, _KILL_PROCESS)]
    bodies, harmless = _bodies(), dict(numbers(HARMLESS, machine))
    for name, number in numbers(CONDITIONAL, machine).items():
        body = bodies.get(name, [_refuse(errno.EPERM)])
        program += [_op(_EQUAL, number, 0, len(body)), *body]
    if not own_files:
        for name in _FILE_ATTRIBUTES:
            if name in harmless:
                program += [_op(_EQUAL, harmless.pop(name), 0, 1), _refuse(errno.EPERM)]
    program += _search(sorted(harmless.values()))
    return b"".join(program)


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(program: bytes) -> int:
    """Confine this process, for good, and return the descriptor of its questions.

    ``no_new_privs`` must be set.

    Raises
    ------
    OSError
        If the kernel lacks seccomp user notification.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    described = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    set_mode_filter, new_listener = 1, 8
    return syscall("seccomp", set_mode_filter, new_listener, ctypes.byref(described))
