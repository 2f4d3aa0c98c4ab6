"""A program: imports what cells use, jails itself, and forks one box per session.

Started as a fresh interpreter with an empty environment, so neither the trainer's memory nor its
secrets are in it. Ends when its socket closes, and all boxes with it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import shutil
import signal
import site
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from agent.processes import end_descendants
from agent.sandbox.forkjail import landlock, namespaces, seccomp
from agent.sandbox.forkjail.box import SCRATCH_PREFIX, run_box
from agent.sandbox.forkjail.cell import Confinement, clone
from agent.sandbox.forkjail.frames import Frame, Reader, close_all, send
from agent.sandbox.forkjail.syscalls import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_NO_NEW_PRIVS,
    prctl,
    this_machine,
)
from trajectory.codec import from_json

CHILD_SIGNAL = 17
_CODE_FOLDERS = "PYTHONPATH"
GOODBYE_S = 3.0
"""How long a box without namespaces may take to clean up after itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZygoteConfig:
    """What the zygote is told on its command line, as JSON."""

    own_namespaces: bool
    """Tier A; otherwise Landlock and seccomp alone (tier B)."""
    read_only: tuple[str, ...]
    """Files and folders that cells can read."""
    preload: tuple[str, ...]
    """Modules imported once, for all cells."""
    sandbox_uid: int
    """Whom root becomes."""


def preload(modules: tuple[str, ...]) -> None:
    """Import modules and fill the caches of their first use."""
    for name in modules:
        importlib.import_module(name)
    if "sympy" in modules:
        sympy = importlib.import_module("sympy")
        x = sympy.symbols("x")
        sympy.solve(x**2 - 1, x)


def enter_jail(config: ZygoteConfig) -> None:
    """Confine this process as far as all boxes have it in common.

    Raises
    ------
    OSError
        If the machine does not allow it.
    """
    if config.own_namespaces:
        namespaces.enter_zygote_jail(config.read_only, config.sandbox_uid)
        return
    if os.getuid() == 0 and all(map(namespaces.open_to_all, config.read_only)):
        namespaces.become(config.sandbox_uid)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    namespaces.drop_capabilities()  # a root that had to stay root is one in name only
    prctl(PR_SET_NO_NEW_PRIVS, 1)


class Zygote:
    """The loop of the program."""

    def __init__(self, control: socket.socket, config: ZygoteConfig) -> None:
        self._control, self._config = control, config
        self._boxes: set[int] = set()
        with open("/proc/self/statm") as pages:
            self._own_memory = int(pages.read().split()[0]) * resource.getpagesize()

    def loop(self) -> NoReturn:
        """Make boxes until the socket closes, then end them all."""
        signal.signal(signal.SIGCHLD, self._reap)
        reader = Reader()
        send(self._control, {"t": "ready"})
        while reader.receive(self._control):
            for frame, descriptors in reader.frames():
                self._make_box(frame, descriptors[0])
                close_all(descriptors)
        if self._config.own_namespaces:
            self._end_namespaces()
        else:
            self._end_boxes()
        os._exit(0)

    def _end_namespaces(self) -> None:
        """Kill the first process of every box, which takes all others with it."""
        self._signal_boxes(signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    def _end_boxes(self) -> None:
        """Let boxes end their cells and remove their files; do it for those that do not."""
        self._signal_boxes(signal.SIGTERM)
        self._signal_boxes(signal.SIGCONT)
        deadline = time.monotonic() + GOODBYE_S
        while self._boxes and time.monotonic() < deadline:
            time.sleep(0.01)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_descendants()
        for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}{os.getpid()}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _signal_boxes(self, number: int) -> None:
        """Send a signal to every box."""
        for pid in list(self._boxes):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _reap(self, *_: object) -> None:
        """Forget boxes that have ended."""
        while True:
            try:
                pid = os.waitpid(-1, os.WNOHANG)[0]
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._boxes.discard(pid)

    def _make_box(self, frame: Frame, hub: int) -> None:
        """Fork a box that talks over ``hub``."""
        own = self._config.own_namespaces
        jail = partial(
            Confinement,
            read_only=self._config.read_only,
            own_namespaces=own,
            seed=frame["seed"],
            memory_bytes=self._own_memory + frame["memory_mb"] * 2**20,
            cpu_s=frame["cpu_limit_s"],
            file_bytes=frame["file_mb"] * 2**20,
            threads=frame["threads"],
            max_states=frame["max_states"],
        )
        pid = clone((namespaces.BOX_FLAGS if own else 0) | CHILD_SIGNAL)
        if pid > 0:
            self._boxes.add(pid)
        if pid != 0:
            return
        try:
            self._control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            run_box(
                socket.socket(fileno=os.dup(hub)),
                jail,
                own_namespaces=own,
                cpu_s=frame["cpu_s"],
                scratch_mb=frame["scratch_mb"],
            )
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)


def main() -> None:
    """Run the zygote; arguments: descriptor of the control socket, configuration."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    config = from_json(ZygoteConfig, json.loads(sys.argv[2]))
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    try:
        preload(config.preload)
        enter_jail(config)
    except (OSError, ImportError) as error:
        send(control, {"t": "failed", "why": str(error)})
        sys.exit(1)
    ours = set(os.environ.pop(_CODE_FOLDERS, "").split(os.pathsep)) - set(site.getsitepackages())
    sys.path[:] = [p for p in sys.path if p not in ours]
    sys.argv = [""]
    landlock.abi()  # computed once, here, for all boxes
    seccomp.build_filter(this_machine(), own_files=config.own_namespaces)
    gc.collect()
    gc.freeze()
    Zygote(control, config).loop()


if __name__ == "__main__":
    main()
