"""The command ``soak``: many mixed calls, some hostile, some with a process killed under them.

Every harmless call carries a count that the state of its session must give, so a call that is
lost, done twice or answered from another session shows as a wrong number.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console

from agent.processes import descendants
from agent.sandbox import AUTO, build_sandbox
from agent.sandbox.base import Limits, Sandbox
from trajectory.errors import InputError
from trajectory.progress import Progress, progress

LIMITS = Limits(cpu_s=0.3, wall_s=20.0, memory_mb=256, scratch_mb=4, file_mb=2, output_chars=400)
HARMLESS = (
    "n += 1\nn",
    "import math\nn += 1\nmath.comb(10, 3)\nn",
    "n += 1\nsorted(range(1000), key=lambda i: -i)[0]\nn",
    "n += 1\nprint(n)",
    "n += 1\nopen('note', 'w').write(str(n))\nint(open('note').read())",
    "n += 1\ntry: 1/0\nexcept ZeroDivisionError: pass\nn",
)
"""Each prints how many harmless calls its session has seen."""
HOSTILE = (
    "while True: pass",
    "import os\nos._exit(0)",
    "x = bytearray(10**9)",
    "import os\nos.fork()",
    "while True: print('x' * 10_000)",
    # Removes its files at the end: a session whose disk is full cannot keep a harmless note.
    "import glob, os\ni = 0\ntry:\n    while i < 99:\n        with open(f'f{i}', 'wb') as f:\n"
    "            f.write(b'x' * 10**6)\n        i += 1\nfinally:\n"
    "    for name in glob.glob('f*'): os.remove(name)",
    "import ctypes\nctypes.string_at(0)",
    "import socket\nsocket.create_connection(('127.0.0.1', 1))",
    "import sys\nsys.setrecursionlimit(10**6)\ndef f(): f()\nf()",
    "from threading import Thread\nimport time\n"
    "for _ in range(99): Thread(target=time.sleep, args=(9,)).start()",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Run many mixed calls and count what was lost; ends with exit code 1 if anything was."""

    calls: int = 20_000
    """Calls in all."""
    hostile: float = 0.02
    """Share of them that are hostile."""
    kills: int = 5
    """How often the process that all sessions hang on is killed meanwhile."""
    sessions: int = 8
    """Sessions alive at a time."""
    backend: str = AUTO
    """Sandbox to soak."""
    seed: int = 0
    """Fixes the mixture."""
    allow_unsafe_tools: bool = False
    """Accept a backend without isolation."""

    def __post_init__(self) -> None:
        if min(self.calls, self.sessions) < 1 or self.kills < 0:
            raise InputError("--calls and --sessions must be >= 1, --kills >= 0")
        if not 0 <= self.hostile < 1:
            raise InputError(f"--hostile must be in [0, 1), not {self.hostile}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Soaked:
    """What a soak came to."""

    counts: Counter[str]
    """Calls by outcome; ``wrong`` ones were lost, doubled or mixed up."""
    seconds: float
    memory_mb: tuple[float, ...]
    """Memory of this process and of the backend's own at each tenth, in MB."""
    left: int
    """Descendants of the backend that outlived it."""
    descriptors: int
    """Descriptors of this process that were left open."""

    @property
    def clean(self) -> bool:
        """Whether nothing was lost or left behind."""
        return not self.counts["wrong"] and not self.left and not self.descriptors


def soak(config: SoakConfig) -> None:
    """Run the soak and print what came of it.

    Raises
    ------
    SystemExit
        With code 1, if a call was lost or something was left behind.
    """
    found = asyncio.run(run_soak(config))
    console = Console()
    for name, count in sorted(found.counts.items()):
        console.print(f"{name:<12} {count}", highlight=False)
    console.print(
        f"{sum(found.counts.values())} calls in {found.seconds:.0f} s; memory at each tenth, MB: "
        + " ".join(f"{size:.0f}" for size in found.memory_mb),
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"wrong answers {found.counts['wrong']}, processes left {found.left}, "
        f"descriptors left {found.descriptors}",
        highlight=False,
    )
    if not found.clean:
        raise SystemExit(1)


async def run_soak(config: SoakConfig) -> Soaked:
    """Run the soak.

    Raises
    ------
    SandboxError
        If the backend does not recover from a kill.
    """
    sandbox = build_sandbox(config.backend, allow_unsafe=config.allow_unsafe_tools)
    open_before = _descriptors()
    counts: Counter[str] = Counter()
    memory: list[float] = []
    began = time.monotonic()
    pids: set[int] = set()
    try:
        with progress("calls", config.calls) as bar:
            run = _Run(config, sandbox, counts, bar, memory, pids)
            await asyncio.gather(*(run.work(worker) for worker in range(config.sessions)))
    finally:
        pids |= {pid for pid in (getattr(sandbox, "pid", None),) if pid}
        below = [child for pid in pids for child in descendants(pid)]
        await sandbox.close()
    await asyncio.sleep(0.5)
    return Soaked(
        counts=counts,
        seconds=time.monotonic() - began,
        memory_mb=tuple(memory),
        left=sum(1 for pid in {*pids, *below} if Path(f"/proc/{pid}").exists()),
        descriptors=max(0, _descriptors() - open_before),
    )


@dataclass(slots=True)
class _Run:
    """What the workers of a soak share."""

    config: SoakConfig
    sandbox: Sandbox
    counts: Counter[str]
    bar: Progress
    memory: list[float]
    pids: set[int]
    """Processes that were killed."""
    begun: int = 0

    async def work(self, worker: int) -> None:
        """Open sessions and make calls in them until enough calls were made."""
        rng = Random(self.config.seed * 1000 + worker)  # noqa: S311
        while self.begun < self.config.calls:
            session = await self.sandbox.open(LIMITS, rng.randrange(100))
            await session.run("n = 0")
            seen = 0
            for _ in range(rng.randrange(1, 20)):
                if self.begun >= self.config.calls:
                    break
                self._count_one()
                if rng.random() < self.config.hostile:
                    result = await session.run(rng.choice(HOSTILE))
                    self.counts[f"hostile {result.status}"] += 1
                    continue
                seen += 1
                result = await session.run(rng.choice(HARMLESS))
                right = result.stdout.splitlines()[-1:] == [str(seen)]
                self.counts["right" if right else "wrong"] += 1
            await session.close()

    def _count_one(self) -> None:
        """Count a call, look at the memory, and kill the backend's process where one is due."""
        self.begun += 1
        self.bar.advance(wrong=self.counts["wrong"])
        pid = getattr(self.sandbox, "pid", None)
        tenth = max(1, self.config.calls // 10)
        if self.begun % tenth == 0:
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            self.memory.append(own + (resident_mb(pid) if pid else 0.0))
        due = self.config.kills and self.begun % max(
            1, self.config.calls // (self.config.kills + 1)
        )
        if pid and self.config.kills and due == 0 and self.begun < self.config.calls:
            self.pids.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process, MB; 0 where it cannot be read."""
    with suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
    return 0.0


def _descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
