"""Landlock: an allow-list of files a process may touch, besides its mount namespace."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from functools import cache

from agent.sandbox.forkjail.syscalls import syscall

_EXECUTE, _WRITE, _READ, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_FILE, _MAKE_SYMLINK = 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_ON_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL_DEVICE
READ_ONLY = _READ | _READ_DIR
SCRATCH = (
    READ_ONLY
    | _WRITE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_FILE | _MAKE_SYMLINK
    | _REFER | _TRUNCATE
)  # fmt: skip
"""All but devices, sockets and pipes."""


class _Ruleset(ctypes.Structure):
    """``struct landlock_ruleset_attr``."""

    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Path(ctypes.Structure):
    """``struct landlock_path_beneath_attr``."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32))


@cache
def abi() -> int:
    """Return the version of Landlock in this kernel, 0 for none."""
    version_flag = 1
    try:
        return syscall("landlock_create_ruleset", None, 0, version_flag)
    except OSError:
        return 0


def _handled(version: int) -> int:
    """Return every file right that a version knows, so that all of them are denied by default."""
    rights = (1 << 13) - 1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEVICE)):
        if version >= since:
            rights |= right
    return rights


def restrict(*, read: Iterable[str], write: Iterable[str]) -> None:
    """Allow this process the named files and folders and nothing else, for good.

    TCP, and signals and abstract sockets to processes outside, are denied where the kernel's
    version can (4 and 6). ``no_new_privs`` must be set. Paths that do not exist are passed over.

    Raises
    ------
    OSError
        If the kernel has no Landlock.
    """
    version = abi()
    handled = _handled(version)
    both = 3  # bind and connect; abstract sockets and signals
    rules = _Ruleset(handled, both if version >= 4 else 0, both if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = syscall("landlock_create_ruleset", ctypes.byref(rules), size, 0)
    path_beneath = 1
    for paths, rights in ((read, READ_ONLY), (write, SCRATCH)):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            allowed = rights & handled
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                allowed &= _ON_FILES
            rule = _Path(allowed, fd)
            syscall("landlock_add_rule", ruleset, path_beneath, ctypes.byref(rule), 0)
            os.close(fd)
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)
