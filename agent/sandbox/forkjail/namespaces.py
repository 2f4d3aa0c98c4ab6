"""Namespaces, mounts and identities: what a jail can see and who it is there."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Sequence
from pathlib import Path

from agent.sandbox.forkjail.syscalls import (
    LIBC,
    PR_CAPBSET_DROP,
    PR_SET_DUMPABLE,
    check,
    prctl,
    syscall,
)

NEW_MOUNTS, NEW_HOSTNAME, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USERS, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
BOX_FLAGS = NEW_USERS | NEW_PROCESSES | NEW_MOUNTS | NEW_IPC
"""Namespaces of one box; network and host name are the zygote's."""
_ZYGOTE_FLAGS = NEW_USERS | NEW_MOUNTS | NEW_NETWORK | NEW_IPC | NEW_HOSTNAME
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_DETACH = 2
SCRATCH = "/scratch"
"""Working folder of the cells of a box with its own mounts."""
MAX_INODES = 1024
DEVICES = ("null", "zero", "urandom", "random")
BOX_UID = 1000


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Call ``mount(2)``.

    Raises
    ------
    OSError
        If the kernel refuses.
    """
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    result = LIBC.mount(*encoded, ctypes.c_ulong(flags), data.encode())
    check(result, f"mount {source} on {target}")


class _MountAttributes(ctypes.Structure):
    """``struct mount_attr``."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "users"))


def _make_read_only(path: str) -> None:
    """Make a mount and those below it read-only, without devices and set-user-id files."""
    attributes = _MountAttributes(_RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    at_cwd, recursive = -100, 0x8000
    size = ctypes.sizeof(attributes)
    syscall("mount_setattr", at_cwd, path.encode(), recursive, ctypes.byref(attributes), size)


def unshare(flags: int) -> None:
    """Leave namespaces for new ones.

    Raises
    ------
    OSError
        If the kernel or a security module refuses.
    """
    check(LIBC.unshare(ctypes.c_int(flags)), "unshare")


def map_identity(inside: int, outside_uid: int, outside_gid: int) -> None:
    """Be ``inside`` in this process's user namespace, the given user outside of it."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{inside} {outside_uid} 1")
    Path("/proc/self/gid_map").write_text(f"{inside} {outside_gid} 1")


def become(uid: int) -> None:
    """Give up root for an ordinary user, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    prctl(PR_SET_DUMPABLE, 1)  # or /proc/self would stay root's


def open_to_all(path: str) -> bool:
    """Tell whether any user can read a file or folder, its parents' permissions included."""
    real = Path(path).resolve()
    if not real.exists():
        return True
    if not real.stat().st_mode & 0o004:
        return False
    return all(folder.stat().st_mode & 0o001 for folder in real.parents)


def drop_capabilities() -> None:
    """Give up every capability of this process and of its descendants."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # past the last one, or none held
            break
    version_3 = 0x20080522
    header, none = struct.pack("Ii", version_3, 0), bytes(24)
    check(LIBC.capset(ctypes.c_char_p(header), ctypes.c_char_p(none)), "capset")


def enter_zygote_jail(read_only: Sequence[str], sandbox_uid: int) -> None:
    """Move this process into new namespaces whose root shows the given paths and nothing else.

    Parameters
    ----------
    read_only : sequence of str
        Files and folders shown, at their own places.
    sandbox_uid : int
        Whom root becomes; other users stay themselves.

    Raises
    ------
    OSError
        If the machine does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:  # the tree is built as root, who can read every path; then root is given up
        unshare(NEW_MOUNTS)
        _build_root(read_only)
        become(sandbox_uid)
        unshare(_ZYGOTE_FLAGS)
        map_identity(0, sandbox_uid, sandbox_uid)
    else:
        unshare(_ZYGOTE_FLAGS)
        map_identity(0, uid, gid)
        _build_root(read_only)
    check(LIBC.sethostname(b"sandbox", 7), "sethostname")


def _build_root(read_only: Sequence[str]) -> None:
    """Pivot into an empty tmpfs, then fill a second one from the old root and pivot into that."""
    mount(None, "/", None, _REC | _PRIVATE)
    stage = "/tmp"  # noqa: S108  (exists everywhere; what it holds is still there under /old)
    mount("tmpfs", stage, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(f"{stage}/new")
    os.mkdir(f"{stage}/old")
    os.chdir(stage)
    syscall("pivot_root", b".", b"old")
    os.chdir("/")
    mount("tmpfs", "/new", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in read_only:
        _show(path)
    for folder in ("dev", "proc", "scratch"):
        os.makedirs(f"/new/{folder}", exist_ok=True)
    for device in DEVICES:
        Path(f"/new/dev/{device}").touch()
        mount(f"/old/dev/{device}", f"/new/dev/{device}", None, _BIND)
    if not os.path.lexists("/new/tmp"):
        os.symlink(SCRATCH, "/new/tmp")
    mount("/old/proc", "/new/proc", None, _BIND | _REC)
    os.chdir("/new")
    syscall("pivot_root", b".", b".")
    check(LIBC.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")
    mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _show(path: str) -> None:
    """Bind one path of the old root read-only into the new one; links are copied."""
    old, new = "/old" + path, "/new" + path
    if not os.path.lexists(old) or os.path.lexists(new):
        return
    os.makedirs(os.path.dirname(new), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), new)
        return
    if os.path.isdir(old):
        os.makedirs(new)
    else:
        Path(new).touch()
    mount(old, new, None, _BIND | _REC)
    _make_read_only(new)


def enter_box(scratch_mb: int) -> None:
    """Set up a box in its fresh namespaces: a private scratch folder, no /proc, no capabilities."""
    map_identity(BOX_UID, 0, 0)
    flags = _NOSUID | _NODEV | _NOEXEC
    options = f"size={scratch_mb}m,nr_inodes={MAX_INODES},mode=700"
    mount("tmpfs", SCRATCH, "tmpfs", flags, options)
    mount("tmpfs", "/proc", "tmpfs", flags | _RDONLY, "size=4k,nr_inodes=1")
    os.chdir(SCRATCH)
    drop_capabilities()


def limit_resources(
    *, memory_bytes: int, cpu_s: int, file_bytes: int, processes: tuple[int, int] | None
) -> None:
    """Set the limits of this process and its forks.

    Parameters
    ----------
    memory_bytes : int
        Address space.
    cpu_s : int
        CPU time of one process; every fork starts from zero. Death comes a second later.
    file_bytes : int
        Largest file.
    processes : (int, int) or None
        Soft and hard bound on threads and parked states; None where they would count per user
        of the whole machine.
    """
    limits = [
        (resource.RLIMIT_AS, (memory_bytes, memory_bytes)),
        (resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
        (resource.RLIMIT_NOFILE, (64, 64)),
        (resource.RLIMIT_CORE, (0, 0)),
        (resource.RLIMIT_MEMLOCK, (0, 0)),
        (resource.RLIMIT_CPU, (cpu_s, cpu_s + 1)),
    ]
    if processes is not None:
        limits.append((resource.RLIMIT_NPROC, processes))
    for name, (soft, hard) in limits:
        bound = resource.getrlimit(name)[1]
        if bound != resource.RLIM_INFINITY:
            soft, hard = min(soft, bound), min(hard, bound)
        resource.setrlimit(name, (soft, hard))
