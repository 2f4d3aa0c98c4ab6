"""What a box can see of its cells without asking them: their files and open descriptors."""

from __future__ import annotations

import errno
import os
import stat
import time

from agent.sandbox.forkjail.namespaces import MAX_INODES
from agent.sandbox.forkjail.syscalls import syscall

MAX_DESCRIPTORS = 64
TOO_MUCH = 1 << 60


def scratch_mark(folder: str, *, own_mount: bool) -> tuple[int, ...]:
    """Return a value that differs once a file has been made or removed or has grown.

    Making any file changes the change time of the folder, which nobody can set back. Writing into
    a file that was there before may leave the mark as it is.
    """
    changed = os.stat(folder).st_ctime_ns
    if not own_mount:
        return changed, usage(folder)
    room = os.statvfs(folder)
    return changed, room.f_bfree, room.f_ffree


def usage(folder: str) -> int:
    """Return the bytes of all files in a folder; too many files count as too many bytes."""
    total = count = 0
    for place, _, files in os.walk(folder):
        for name in files:
            count += 1
            if count > MAX_INODES:
                return TOO_MUCH
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                continue
    return total


def has_died(pid: int) -> bool:
    """Tell whether a child whose socket has closed is dead; a dying one is given a moment."""
    for _ in range(20):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.01)
    return False


def holds_descriptors(pid: int) -> bool:
    """Tell whether a snapshot holds open files, which all its clones would share.

    Two clones would move the same file offset and read from the same pipe. Its own socket and
    /dev/null are not counted; where the kernel does not let us look, the answer is yes.
    """
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return True
    null, sockets = os.stat("/dev/null").st_rdev, 0
    try:
        for number in range(3, MAX_DESCRIPTORS):
            try:
                copy = syscall("pidfd_getfd", process, number, 0)
            except OSError as error:
                if error.errno == errno.EBADF:
                    continue
                return True
            found = os.fstat(copy)
            os.close(copy)
            is_socket = stat.S_ISSOCK(found.st_mode)
            sockets += is_socket
            if not is_socket and found.st_rdev != null:
                return True
    finally:
        os.close(process)
    return sockets > 1
