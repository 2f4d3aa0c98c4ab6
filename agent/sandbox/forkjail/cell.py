"""The process that runs a cell: confines itself, runs the code, and waits as a snapshot.

A state is a process that has run its cell and sleeps. To go on from it, it clones itself: the
clone runs the next cell and the original stays what it was. What a clone needs between two cells
is bound to names of this module when it is loaded, builtins included, so that code which
overwrites builtins or modules does not break its own later turns. It talks to the box by packets
of bytes; the box believes none of them further than that the cell is over.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import random
import sys
import types
from _random import Random as CRandom
from _socket import CMSG_SPACE
from _socket import socket as RawSocket
from array import array
from builtins import BaseException, OSError, int, str  # noqa: UP029  (see above)
from dataclasses import dataclass
from os import _exit, close, read
from os import open as open_file
from typing import Any, NoReturn

from agent.sandbox.forkjail import landlock, namespaces, seccomp
from agent.sandbox.forkjail.syscalls import (
    CONDITIONAL,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    numbers,
    prctl,
    this_machine,
)
from agent.sandbox.runner import (
    MIN_RECURSION_LIMIT,
    fresh_streams,
    get_recursion_limit,
    run_cell,
    set_recursion_limit,
)

READY, PARKED, DIED = b"ready", b"parked", 120
SIGKILL = 9
_SPARES = 6
_WITH_GIL = ctypes.PyDLL(None)  # a clone made without the lock would wait for it for ever
_before_fork = _WITH_GIL.PyOS_BeforeFork
_after_fork_child = _WITH_GIL.PyOS_AfterFork_Child
_after_fork_parent = _WITH_GIL.PyOS_AfterFork_Parent
_call_system = _WITH_GIL.syscall
_prctl = ctypes.CDLL(None).prctl
_send, _receive, _close_socket = RawSocket.send, RawSocket.recvmsg, RawSocket.close
_generator: Any = random._inst
_random_state, _set_random_state = CRandom.getstate, CRandom.setstate
_ROOM = CMSG_SPACE(16 * 4)
_from_bytes = array.frombytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Confinement:
    """What the cells of a box may do."""

    scratch: str
    """Working folder, the only one that can be written."""
    read_only: tuple[str, ...]
    own_namespaces: bool
    """Tier A: whether the box has its own mounts and processes."""
    seed: int
    memory_bytes: int
    """Address space, that of the idle interpreter included."""
    cpu_s: int
    file_bytes: int
    threads: int
    max_states: int
    """Parked processes, which count as threads do."""


def clone(flags: int) -> int:
    """Fork this process by ``clone(2)`` with the given flags; 0 in the child, -1 on failure."""
    _before_fork()
    pid = int(_call_system(_CLONE, flags, 0, 0, 0, 0))
    if pid == 0:
        _after_fork_child()
    else:
        _after_fork_parent()
    return pid


_CLONE = numbers(CONDITIONAL, this_machine())["clone"]


def confine(jail: Confinement, control: RawSocket) -> None:
    """Give up everything a cell must not have, and hand the box the fork gate.

    The order matters: limits and identities first, then no way back to privileges, then files,
    then system calls.
    """
    prctl(PR_SET_DUMPABLE, 1)
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    soft = jail.threads
    namespaces.limit_resources(
        memory_bytes=jail.memory_bytes,
        cpu_s=jail.cpu_s,
        file_bytes=jail.file_bytes,
        processes=(soft, soft + jail.max_states) if jail.own_namespaces else None,
    )
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if landlock.abi() or not jail.own_namespaces:  # without either, files would be open
        landlock.restrict(
            read=(*jail.read_only, "/dev/urandom", "/dev/null"), write=(jail.scratch, "/dev/null")
        )
    program = seccomp.build_filter(this_machine(), own_files=jail.own_namespaces)
    gate = seccomp.install(program)
    fds = array("i", [gate])
    sol_socket, scm_rights = 1, 1
    control.sendmsg([READY], [(sol_socket, scm_rights, fds)])
    close(gate)
    if not control.recv(1):  # a box watches the gate now, or has gone
        _exit(0)


def seed_everything(jail: Confinement) -> None:
    """Make what the cell can know about its surroundings the same in every run."""
    os.environ["HOME"] = os.environ["TMPDIR"] = jail.scratch
    if "tempfile" in sys.modules:
        sys.modules["tempfile"].tempdir = None  # type: ignore[attr-defined]
    random.seed(jail.seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(jail.seed % 2**32)


def run_first(jail: Confinement, control: RawSocket, streams: tuple[int, int], code: str) -> None:
    """Become the first state of a session by running its first cell; never returns."""
    fresh_streams(*streams)
    for fd in streams:
        close(fd)
    confine(jail, control)
    seed_everything(jail)
    notebook = types.ModuleType("__main__")
    sys.modules["__main__"] = notebook
    names = notebook.__dict__
    names["__builtins__"] = builtins
    serve(control, code, 1, names)


def serve(control: RawSocket, code: str, number: int, names: dict[str, object]) -> NoReturn:
    """Run a cell, report, and become one snapshot per request; clones go on with the next cell."""
    while True:
        if get_recursion_limit() < MIN_RECURSION_LIMIT:
            set_recursion_limit(MIN_RECURSION_LIMIT)
        spares = [open_file("/dev/null", 0) for _ in range(_SPARES)]
        status, error = run_cell(code, number, names)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BaseException:  # noqa: S112  (the code closed or replaced the stream)
                continue
        _send(control, f"{status} {error or ''}".encode(errors="replace"))
        control, code, number = _park(control, spares)


def _park(control: RawSocket, spares: list[int]) -> tuple[RawSocket, str, int]:
    """Wait as a snapshot; return only in a clone, with its own socket and its cell."""
    while True:
        while spares:  # room for what comes, where the code has used up all descriptors
            try:
                close(spares.pop())
            except OSError:
                continue
        data, extras, _, _ = _receive(control, 64, _ROOM)
        if not data:
            _exit(0)
        received = array("i")
        for _, _, content in extras:
            _from_bytes(received, content)
        numbers_to_come = _random_state(_generator), _generator.gauss_next
        if clone(seccomp.SNAPSHOT_FLAGS) == 0:
            # `random` seeds itself anew in every fork, but this one is the same episode.
            _set_random_state(_generator, numbers_to_come[0])
            _generator.gauss_next = numbers_to_come[1]
            _prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
            _close_socket(control)
            out, err, sock, source = received
            fresh_streams(out, err)
            mine = RawSocket(fileno=sock)
            _send(mine, READY)
            code = read_text(source)
            for fd in (out, err, source):
                close(fd)
            return mine, code, int(data)
        for fd in received:
            close(fd)
        _send(control, PARKED)  # the box may stop this process now


def read_text(fd: int) -> str:
    """Read a descriptor from its start to its end."""
    parts = []
    while chunk := read(fd, 1 << 20):
        parts.append(chunk)
    return str(b"".join(parts), "utf-8", "surrogatepass")
