"""The fork gate: decides, for each single question of the kernel, whether a process may clone."""

from __future__ import annotations

import errno
import fcntl
import struct
from contextlib import suppress

from agent.sandbox.forkjail.seccomp import SNAPSHOT_FLAGS
from agent.sandbox.forkjail.syscalls import CONDITIONAL, numbers, this_machine

_NOTIFICATION = struct.Struct("<QIIiIQQQQQQQ")
_ANSWER = struct.Struct("<QqiI")
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_CLONE = numbers(CONDITIONAL, this_machine())["clone"]


def answer(listener: int, granted: set[int]) -> bool:
    """Take one question and let the call go on if its process was granted a clone.

    Parameters
    ----------
    listener : int
        Descriptor that the filter's installation returned.
    granted : set of int
        Processes that may make one snapshot each; the one that does is taken out. A question
        names the thread that asks, so only the main thread of a snapshot has its number.

    Returns
    -------
    bool
        False if there was no question.
    """
    question = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, question)
    except OSError:
        return False
    values = _NOTIFICATION.unpack(question)
    identity, pid, call, flags = values[0], values[1], values[3], values[6]
    allowed = call == _CLONE and flags == SNAPSHOT_FLAGS and pid in granted
    granted.discard(pid)
    verdict = (0, _CONTINUE) if allowed else (-errno.EPERM, 0)
    with suppress(OSError):  # it died meanwhile
        fcntl.ioctl(listener, _SEND, _ANSWER.pack(identity, 0, *verdict))
    return True
