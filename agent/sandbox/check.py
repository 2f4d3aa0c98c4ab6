"""The command ``check``: runs hostile inputs side by side with harmless ones and counts the harm.

Every case has to end as expected, every harmless session beside them has to give its own numbers,
and nothing may be left behind: no process, no zombie, no descriptor, no file.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from agent.processes import descendants
from agent.sandbox import AUTO, build_sandbox
from agent.sandbox.base import Limits, Sandbox, SandboxError
from agent.sandbox.cases import LIMITS, Case, Verdict, canaries, read_cases, run_case
from trajectory.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Run hostile inputs against a backend; ends with exit code 1 if any does harm."""

    cases: Positional[Path]
    """A .jsonl file of cases."""
    backend: str = AUTO
    """Sandbox under test."""
    only: str = ""
    """Run the cases whose id or category contains this."""
    runs: int = 1
    """How often to run all of them, each time in a new sandbox."""
    side_by_side: int = 4
    """Cases in flight."""
    allow_unsafe_tools: bool = False
    """Accept a backend without isolation."""

    def __post_init__(self) -> None:
        if self.runs < 1 or self.side_by_side < 1:
            raise InputError("--runs and --side-by-side must be >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What a run of all cases came to."""

    verdicts: Sequence[Verdict]
    beside: Counter[bool]
    """Calls of harmless sessions that gave the right answer (True) and that did not."""
    left: Sequence[str]
    """Processes, descriptors and files that are still there after the sandbox was closed."""

    @property
    def clean(self) -> bool:
        """Whether all was as expected."""
        return not (any(v.problem for v in self.verdicts) or self.beside[False] or self.left)

    def summary(self) -> str:
        """Return the counts in a line.

        Examples
        --------
        >>> Checked(verdicts=[], beside=Counter({True: 5}), left=[]).summary()
        '0 of 0 as expected; 5 of 5 harmless calls beside them right; left behind: nothing'
        """
        good = sum(1 for verdict in self.verdicts if not verdict.problem)
        return (
            f"{good} of {len(self.verdicts)} as expected; {self.beside[True]} of "
            f"{self.beside.total()} harmless calls beside them right; left behind: "
            f"{', '.join(self.left) or 'nothing'}"
        )


def check(config: CheckConfig) -> None:
    """Run the cases, print one line each and the counts.

    Raises
    ------
    InputError
        If the file or the backend cannot be had, or no case is chosen.
    SystemExit
        With code 1, if a case did not end as expected or something else was harmed.
    """
    chosen = [c for c in read_cases(config.cases) if config.only in f"{c.id} {c.category}"]
    if not chosen:
        raise InputError(f"no case of {config.cases} has {config.only!r} in its id or category")
    console, clean = Console(), True
    for number in range(1, config.runs + 1):
        sandbox = build_sandbox(config.backend, allow_unsafe=config.allow_unsafe_tools)
        console.print(
            f"run {number} of {config.runs}: backend {sandbox.name}, isolation "
            f"{sandbox.isolation}, uid {os.getuid()}",
            highlight=False,
        )
        fitting = [c for c in chosen if c.category != "sql" or sandbox.capabilities.cpython]
        if len(fitting) < len(chosen):
            console.print(f"{len(chosen) - len(fitting)} sql cases left out: they need CPython")
        found = asyncio.run(run_all(sandbox, fitting, config.side_by_side, show=_show(console)))
        console.print(found.summary(), highlight=False, soft_wrap=True)
        clean &= found.clean
    if not clean:
        raise SystemExit(1)


async def run_all(
    sandbox: Sandbox,
    cases: Sequence[Case],
    side_by_side: int,
    *,
    limits: Limits = LIMITS,
    show: Callable[[Verdict], None] | None = None,
) -> Checked:
    """Run cases with a harmless session beside them, close the sandbox, and look what is left.

    Parameters
    ----------
    sandbox : Sandbox
        Closed at the end.
    cases : sequence of Case
    side_by_side : int
        Cases in flight, >= 1.
    limits : Limits, optional
        Bounds of every call.
    show : callable, optional
        Gets every verdict as it falls.
    """
    # The event loop of this call keeps three descriptors of its own, open before and after.
    before, children = _descriptors(), set(descendants(os.getpid()))
    places, verdicts = asyncio.Semaphore(side_by_side), list[Verdict]()

    async def one(case: Case, secret: str) -> None:
        async with places:
            try:
                verdict = await run_case(sandbox, case, secret=secret, limits=limits)
            except SandboxError as error:
                problem = f"the sandbox broke: {error}"
                verdict = Verdict(case=case, ended="broken", problem=problem, seconds=0.0)
        verdicts.append(verdict)
        if show is not None:
            show(verdict)

    over, beside = asyncio.Event(), Counter[bool]()
    harmless = asyncio.create_task(_harmless(sandbox, over, beside))
    try:
        with canaries() as secret:
            await asyncio.gather(*(one(case, secret) for case in cases))
        over.set()
        await harmless
        below = set(descendants(os.getpid())) - children
    finally:
        harmless.cancel()
        await sandbox.close()
    left = [f"process {pid}" for pid in sorted(below) if Path(f"/proc/{pid}").exists()]
    extra = _descriptors() - before
    left += [f"{extra} descriptors"] if extra > 0 else []
    files = (f"forkjail-{pid}-*" for pid in below)
    left += [str(file) for name in files for file in Path(tempfile.gettempdir()).glob(name)]
    return Checked(verdicts=verdicts, beside=beside, left=left)


async def _harmless(sandbox: Sandbox, over: asyncio.Event, beside: Counter[bool]) -> None:
    """Open sessions that count, one after the other, until the cases are over."""
    while not over.is_set():
        session = await sandbox.open(LIMITS, 0)
        for number in range(1, 6):
            code = f"x = {number} + (x if {number} > 1 else 0)\nx"
            result = await session.run(code)
            beside[result.stdout == f"{number * (number + 1) // 2}\n"] += 1
        await session.close()
        await asyncio.sleep(0.05)


def _descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def _show(console: Console) -> Callable[[Verdict], None]:
    """Return what prints a verdict."""

    def show(verdict: Verdict) -> None:
        case = verdict.case
        mark = "ok  " if not verdict.problem else "FAIL"
        problem = f"  {verdict.problem}: {case.reason}" if verdict.problem else ""
        line = f"{mark} {case.id:<36} {verdict.ended:<8} {verdict.seconds:6.2f} s{problem}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return show
