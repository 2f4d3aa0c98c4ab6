"""The first process of a box: starts, stops, reaps and counts its cells. Runs none of their code.

It is the empty state, from which the first cell is forked; the gate that grants one clone for
every snapshot the session asks for; and the clock that ends a cell at its CPU limit. What it says
about a cell's end (signal, exit code, CPU time) comes from the kernel. A box ends when its socket
closes or its parent dies, and everything in it with it.
"""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import socket
import tempfile
import traceback
from _socket import socket as RawSocket
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NoReturn

from agent.processes import cpu_seconds, end_descendants
from agent.sandbox.forkjail import namespaces
from agent.sandbox.forkjail.cell import DIED, Confinement, read_text, run_first
from agent.sandbox.forkjail.facts import has_died, holds_descriptors, scratch_mark, usage
from agent.sandbox.forkjail.frames import Reader, close_all, receive_from_cell, send
from agent.sandbox.forkjail.gate import answer
from agent.sandbox.forkjail.syscalls import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    prctl,
)

SCRATCH_PREFIX = "forkjail-"
"""Of scratch folders among the machine's temporary files (tier B); the zygote's number follows."""
QUOTA_CHECK_S = 0.05
ASLEEP_S = 1.0
"""How long a snapshot that cloned itself may take to say so before it is given up."""


@dataclass(kw_only=True, slots=True)
class _State:
    """A process that runs a cell or has run one."""

    number: int
    parent: int
    sock: socket.socket
    pid: int = 0
    """0 until the clone has said who it is."""
    started: bool = False
    over: bool = False
    """Whether its cell is over and it waits as a snapshot."""
    forked: bool = False
    """Whether a cell has been run from it."""
    awake: bool = False
    """Whether it was woken to clone itself and has not been stopped again."""
    why: str = ""
    """Why this box killed it."""
    quiet: bool = False
    """Whether nobody wants to hear of its end."""


class BoxInit:
    """The loop of a box's first process.

    Parameters
    ----------
    hub : socket
        Connects to the session outside.
    jail : Confinement
        Of the cells.
    cpu_s : float
        CPU time of a cell; the whole seconds in ``jail`` are the backstop.
    scratch_bytes : int
        Bound on all files together where no tmpfs holds it.
    """

    def __init__(
        self, hub: socket.socket, jail: Confinement, cpu_s: float, scratch_bytes: int
    ) -> None:
        self._hub, self._jail, self._cpu_s, self._quota = hub, jail, cpu_s, scratch_bytes
        self._reader = Reader()
        self._states: dict[int, _State] = {}
        self._by_fd: dict[int, _State] = {}
        self._gates: set[int] = set()
        self._granted: set[int] = set()
        self._poll = select.poll()
        self._seen = self._scratch_mark()

    def loop(self) -> NoReturn:
        """Serve until the socket closes."""
        wake, self._woken = os.pipe()
        for fd in (wake, self._woken):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for fd in (wake, self._hub.fileno()):
            self._poll.register(fd, select.POLLIN)
        send(self._hub, {"t": "hello"})
        while True:
            for fd, event in self._poll.poll(self._patience()):
                if fd == self._hub.fileno():
                    self._take_orders()
                elif fd == wake:
                    self._reap(wake)
                elif fd in self._gates:
                    self._answer(fd, event)
                elif fd in self._by_fd:
                    self._hear(self._by_fd[fd])
            self._enforce()

    # -- orders of the session

    def _take_orders(self) -> None:
        """Act on what the session wants."""
        if not self._reader.receive(self._hub):
            self.end()
        for frame, descriptors in self._reader.frames():
            kind, number = frame["t"], frame["state"]
            if kind == "run":
                self._run(number, frame["parent"], frame["number"], descriptors)
                close_all(descriptors)
            elif kind == "kill":
                self._abandon(number)
            elif kind == "drop" and number in self._states:
                self._states[number].quiet = True
                self._kill(self._states[number])

    def _run(self, number: int, parent: int, cell: int, descriptors: list[int]) -> None:
        """Start a cell from a state (0: the empty one)."""
        origin = self._states.get(parent)
        if parent and (origin is None or (origin.forked and not self._can_clone_again(origin))):
            send(self._hub, {"t": "no_parent", "state": number})
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        ours.setblocking(False)
        state = _State(number=number, parent=parent, sock=ours)
        try:
            if origin is None:
                state.pid = self._fork_first(theirs, descriptors)
            else:
                self._ask_for_clone(origin, cell, theirs, descriptors)
        except OSError as error:
            ours.close()
            send(self._hub, {"t": "no_parent", "state": number, "error": str(error)})
            return
        finally:
            theirs.close()
        self._states[number] = self._by_fd[ours.fileno()] = state
        self._poll.register(ours, select.POLLIN)

    def _can_clone_again(self, origin: _State) -> bool:
        """Tell whether a snapshot sleeps and holds nothing that its clones would share."""
        if origin.awake:  # cloned a moment ago, and closing what was passed to it
            select.select([origin.sock], [], [], ASLEEP_S)
            self._hear(origin)
        return not origin.awake and not holds_descriptors(origin.pid)

    def _fork_first(self, theirs: socket.socket, descriptors: list[int]) -> int:
        """Fork the process of a first cell and return its pid."""
        out, err, source = descriptors
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            control = RawSocket(fileno=os.dup(theirs.fileno()))
            code = read_text(source)
            kept = [2, *sorted((out, err, control.fileno())), 1 << 16]
            for lower, upper in pairwise(kept):
                os.closerange(lower + 1, upper)
            run_first(self._jail, control, (out, err), code)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(DIED)

    def _ask_for_clone(
        self, origin: _State, cell: int, theirs: socket.socket, descriptors: list[int]
    ) -> None:
        """Wake a snapshot and ask it to clone itself."""
        out, err, source = descriptors
        origin.forked = origin.awake = True
        self._granted.add(origin.pid)
        self._allow_processes(origin, self._jail.threads + self._jail.max_states)
        os.kill(origin.pid, signal.SIGCONT)
        passed = [out, err, theirs.fileno(), source]
        socket.send_fds(origin.sock, [str(cell).encode()], passed)

    def _allow_processes(self, state: _State, soft: int) -> None:
        """Set how many threads and states there may be while this one runs."""
        if self._jail.own_namespaces:
            hard = self._jail.threads + self._jail.max_states
            with suppress(ProcessLookupError):
                resource.prlimit(state.pid, resource.RLIMIT_NPROC, (min(soft, hard), hard))

    def _abandon(self, number: int) -> None:
        """End a cell; a snapshot that did not clone itself in time ends with it."""
        state = self._states.get(number)
        if state is None:
            return
        if state.pid:
            self._kill(state)
            return
        origin = self._states.get(state.parent)
        if origin is not None:
            self._granted.discard(origin.pid)
            origin.quiet = True
            self._kill(origin)
        self._forget(state)
        send(self._hub, {"t": "exit", "state": number, "why": "no_clone", "code": 0, "cpu": 0.0})

    # -- what cells do

    def _hear(self, state: _State) -> None:
        """Take a packet from a cell: that it is there, or that it is over."""
        try:
            data, pid, descriptors = receive_from_cell(state.sock)
        except BlockingIOError:
            return
        gates = descriptors[:1] if not state.started and state.parent == 0 else []
        close_all(descriptors[len(gates) :])
        if not data:
            self._poll.unregister(state.sock)
            self._by_fd.pop(state.sock.fileno(), None)
            if state.pid:
                if not has_died(state.pid):  # it has closed its socket and lives on
                    state.why = state.why or "left"
                self._kill(state)
            else:
                self._abandon(state.number)
            return
        if not state.started:
            self._begin(state, pid, gates)
        elif state.over:  # a snapshot that has cloned itself
            self._put_to_sleep(state)
        else:  # whatever it sends: it is stopped, and cannot run on
            state.over = True
            self._put_to_sleep(state)
            self._report(state, data)

    def _begin(self, state: _State, pid: int, gates: list[int]) -> None:
        """Note that a cell's process is there."""
        if not state.pid and any(other.pid == pid for other in self._states.values()):
            self._abandon(state.number)  # not a clone but a thread of the snapshot itself
            return
        state.started = True
        for gate in gates:
            self._gates.add(gate)
            self._poll.register(gate, select.POLLIN)
            with suppress(OSError):  # dead already; the reaper will find it
                state.sock.send(b"1")
        if not state.pid:
            state.pid = pid
        alive = sum(1 for other in self._states.values() if other.pid)
        self._allow_processes(state, self._jail.threads + alive)
        send(self._hub, {"t": "started", "state": state.number})

    def _put_to_sleep(self, state: _State) -> None:
        """Stop a process that has no cell to run, and the threads it left behind."""
        state.awake = False
        with suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGSTOP)

    def _report(self, state: _State, data: bytes) -> None:
        """Pass on what a cell says of its end, with what the kernel knows."""
        status, _, error = data.decode(errors="replace").partition(" ")
        malformed = status not in ("ok", "error") or len(error) > 80
        if malformed or self._over_quota():  # which it may have filled faster than anyone looked
            state.why = "protocol" if malformed else "quota"
            self._kill(state)
            return
        mark = self._scratch_mark()
        changed, self._seen = mark != self._seen, mark
        frame = {"t": "done", "state": state.number, "status": status, "error": error or None}
        send(self._hub, {**frame, "cpu": cpu_seconds(state.pid) or 0.0, "changed": changed})

    def _answer(self, gate: int, event: int) -> None:
        """Let a snapshot clone itself if that was asked for; refuse every other fork."""
        if not answer(gate, self._granted) and event & (select.POLLHUP | select.POLLERR):
            self._poll.unregister(gate)
            self._gates.discard(gate)
            os.close(gate)

    def _reap(self, wake: int) -> None:
        """Take note of the dead."""
        with suppress(BlockingIOError):
            os.read(wake, 4096)
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            state = next((s for s in self._states.values() if s.pid == pid), None)
            if state is None:
                continue
            self._forget(state)
            if not state.quiet:
                cpu = usage.ru_utime + usage.ru_stime
                code = os.waitstatus_to_exitcode(status)
                frame = {"t": "exit", "state": state.number, "code": code, "why": state.why}
                frame["started"] = state.started
                mark = self._scratch_mark()
                changed, self._seen = mark != self._seen, mark
                send(self._hub, {**frame, "cpu": cpu, "changed": changed})

    # -- limits and facts

    def _running(self) -> list[_State]:
        """Return the states whose processes are not asleep."""
        return [s for s in self._states.values() if s.started and (s.awake or not s.over)]

    def _patience(self) -> int | None:
        """Return how long to sleep, milliseconds; None while nothing runs."""
        running = self._running()
        if not running:
            return None
        left = min(self._cpu_s - (cpu_seconds(s.pid) or 0.0) for s in running)
        if not self._jail.own_namespaces:
            left = min(left, QUOTA_CHECK_S)
        return max(2, min(250, int(left * 1000) + 1))

    def _enforce(self) -> None:
        """Kill cells beyond their CPU time, or all of them beyond the quota."""
        for state in self._running():
            if (cpu_seconds(state.pid) or 0.0) >= self._cpu_s:
                state.why = state.why or "cpu"
                state.quiet = state.quiet or state.over
                self._kill(state)
        if self._running() and self._over_quota():
            for state in self._running():
                state.why = state.why or "quota"
                self._kill(state)

    def _over_quota(self) -> bool:
        """Tell whether there are too many bytes in a folder that no kernel bounds."""
        return not self._jail.own_namespaces and usage(self._jail.scratch) > self._quota

    def _kill(self, state: _State) -> None:
        """Kill a state's process."""
        with suppress(ProcessLookupError):  # dead already; the reaper will find it
            if state.pid:
                os.kill(state.pid, signal.SIGKILL)

    def _forget(self, state: _State) -> None:
        """Close what is kept for a state."""
        self._states.pop(state.number, None)
        self._granted.discard(state.pid)
        if self._by_fd.pop(state.sock.fileno(), None) is not None:
            self._poll.unregister(state.sock)
        state.sock.close()

    def _scratch_mark(self) -> tuple[int, ...]:
        """Return what tells whether files have changed."""
        return scratch_mark(self._jail.scratch, own_mount=self._jail.own_namespaces)

    def end(self) -> NoReturn:
        """Kill everything and go; where there is a process namespace, its end is theirs."""
        if not self._jail.own_namespaces:
            end_descendants()
            shutil.rmtree(self._jail.scratch, ignore_errors=True)
        os._exit(0)


def run_box(
    hub: socket.socket,
    jail: partial[Confinement],
    *,
    own_namespaces: bool,
    cpu_s: float,
    scratch_mb: int,
) -> NoReturn:
    """Be the first process of a new box; ``jail`` lacks only the scratch folder."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL if own_namespaces else signal.SIGTERM)
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    if own_namespaces:
        namespaces.enter_box(scratch_mb)
        scratch = namespaces.SCRATCH
    else:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        scratch = tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getppid()}-")
        os.chdir(scratch)
    prctl(PR_SET_DUMPABLE, 0)
    box = BoxInit(hub, jail(scratch=scratch), cpu_s, scratch_mb * 2**20)
    try:
        box.loop()
    except (BrokenPipeError, ConnectionResetError):  # the session left before it was answered
        box.end()
