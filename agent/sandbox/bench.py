"""The command ``bench``: latency and throughput of a sandbox beside plain interpreters and replay.

All in one run, alternating, so that load of the machine meets every row alike; medians.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from agent.processes import CHILD_ENVIRONMENT, descendants
from agent.sandbox import AUTO, build_sandbox
from agent.sandbox.base import Limits, Sandbox, Session
from trajectory.errors import InputError
from trajectory.progress import progress

SMALL = "sum(range(1000))"
SYMPY = "import sympy\nx = sympy.symbols('x')\nsympy.solve(x**2 - 5*x + 6, x)"
TRAJECTORY = (
    "import sympy as sp\nx, y = sp.symbols('x y')\nf = sp.sin(x)**2 * sp.exp(-x)\nsp.diff(f, x)",
    "F = sp.integrate(f, x)\nF",
    "sp.simplify(sp.diff(F, x) - f)",
    "roots = sp.solve(x**3 - 6*x**2 + 11*x - 6, x)\nroots",
    "system = sp.solve([x**2 + y**2 - 25, x - y - 1], [x, y])\nsystem",
    "[sp.N(F.subs(x, r)) for r in roots]",
)
"""A realistic episode of six calls."""
LAST = "sum(roots)"
LIMITS = Limits(cpu_s=10.0, wall_s=60.0)
THROUGHPUT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure a sandbox: latency of calls and branches, calls per second, memory of a state."""

    backend: str = AUTO
    """Sandbox to measure."""
    repeats: int = 30
    """Measurements per row."""
    workers: int = 2
    """Sessions side by side in the rows of throughput."""
    out: Path | None = None
    """Write the figures here as JSON."""
    allow_unsafe_tools: bool = False
    """Accept a backend without isolation."""

    def __post_init__(self) -> None:
        for name in ("repeats", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure."""

    name: str
    value: float
    """Median."""
    unit: str
    low: float
    high: float
    """Tenth and ninetieth percentile."""
    n: int


def bench(config: BenchConfig) -> None:
    """Print the table, and write it if asked to."""
    rows = asyncio.run(_bench(config))
    table = Table("what", "median", "10-90 %", "n")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.value:.3g} {row.unit}",
            f"{row.low:.3g}-{row.high:.3g}",
            str(row.n),
        )
    console = Console()
    console.print(table)
    for line in _ratios({row.name: row.value for row in rows}):
        console.print(line, highlight=False)
    if config.out is not None:
        figures = {"rows": [asdict(row) for row in rows], "load": os.getloadavg()}
        config.out.write_text(json.dumps(figures, indent=2) + "\n")


async def _bench(config: BenchConfig) -> list[Row]:
    """Measure everything."""
    sandbox = build_sandbox(config.backend, allow_unsafe=config.allow_unsafe_tools)
    try:
        warm = await sandbox.open(LIMITS, 0)
        await warm.run(SMALL)
        await warm.close()
        rows = await _latency(sandbox, config.repeats)
        rows += await _throughput(sandbox, config.workers, max(3, config.repeats // 10))
        return rows + await _memory(sandbox)
    finally:
        await sandbox.close()


async def _latency(sandbox: Sandbox, repeats: int) -> list[Row]:
    """Time single calls, round by round."""
    chain = await sandbox.open(LIMITS, 0)
    await chain.run(SMALL)
    trunk = await sandbox.open(LIMITS, 0, retain="all")
    for code in TRAJECTORY:
        await trunk.run(code)
    measured: dict[str, Callable[[], Awaitable[float]]] = {
        "fresh interpreter, small call": lambda: _fresh(SMALL),
        "new session and first call": lambda: _first(sandbox),
        "later call": lambda: _timed(chain, SMALL),
        "branch at call 6 and one call": lambda: _branch(trunk),
        "replay of six calls and one call": lambda: _replay(sandbox),
    }
    times: dict[str, list[float]] = {name: [] for name in measured}
    with progress("latency", repeats * len(measured)) as bar:
        for _ in range(repeats):
            for name, take in measured.items():
                times[name].append(await take() * 1000)
                bar.advance()
    await chain.close()
    await trunk.close()
    return [_row(name, values, "ms") for name, values in times.items()]


async def _throughput(sandbox: Sandbox, workers: int, rounds: int) -> list[Row]:
    """Count calls per second of chains and of fresh interpreters, in turns."""
    measured: dict[str, Callable[[], Awaitable[float]]] = {}
    for label, code in (("small", SMALL), ("sympy", SYMPY)):
        measured[f"fresh interpreter per call, {label}"] = partial(_fresh_rate, workers, code)
        measured[f"chain of calls, {label}"] = partial(_chains, sandbox, workers, code)
    rates: dict[str, list[float]] = {name: [] for name in measured}
    with progress("throughput", rounds * len(measured)) as bar:
        for _ in range(rounds):
            for name, take in measured.items():
                rates[name].append(await take())
                bar.advance()
    return [_row(name, values, "calls/s") for name, values in rates.items()]


async def _memory(sandbox: Sandbox) -> list[Row]:
    """Measure what one more parked state takes, where the backend keeps states in processes."""
    pid = getattr(sandbox, "pid", None)
    if pid is None:
        return []
    session = await sandbox.open(LIMITS, 0, retain="all")
    for number in range(12):
        await session.run(f"x{number} = {number}\n{SMALL}")
    cells = [p for p in descendants(pid) if not descendants(p)]
    sizes = [size for cell in cells if (size := _private_mb(cell)) is not None]
    await session.close()
    return [_row("private memory of a parked state", sizes, "MB")] if sizes else []


async def _fresh(code: str) -> float:
    """Time an interpreter of its own, without isolation, for one call."""
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-s", "-P", "-c", f"print({SMALL})" if code == SMALL else code,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=dict(CHILD_ENVIRONMENT),
    )  # fmt: skip
    await process.communicate()
    return time.perf_counter() - began


async def _timed(session: Session, code: str, *, at: int | None = None) -> float:
    """Time one call, which has to succeed."""
    began = time.perf_counter()
    result = await session.run(code, at=at)
    assert result.status == "ok", result
    return time.perf_counter() - began


async def _first(sandbox: Sandbox) -> float:
    """Time a new session and its first call."""
    began = time.perf_counter()
    session = await sandbox.open(LIMITS, 0)
    await _timed(session, SMALL)
    took = time.perf_counter() - began
    await session.close()
    return took


async def _branch(trunk: Session) -> float:
    """Time a branch of a six-call trajectory and one call in it."""
    began = time.perf_counter()
    session = await trunk.branch(len(TRAJECTORY))
    await _timed(session, LAST)
    took = time.perf_counter() - began
    await session.close()
    return took


async def _replay(sandbox: Sandbox) -> float:
    """Time doing the six calls again in a new session, and one call in it."""
    began = time.perf_counter()
    session = await sandbox.open(LIMITS, 0)
    for code in (*TRAJECTORY, LAST):
        await _timed(session, code)
    took = time.perf_counter() - began
    await session.close()
    return took


async def _fresh_rate(workers: int, code: str) -> float:
    """Return calls per second of an interpreter per call."""
    return await _rate(workers, lambda _: _fresh(code))


async def _chains(sandbox: Sandbox, workers: int, code: str) -> float:
    """Return calls per second of sessions that go on from call to call."""
    sessions = [await sandbox.open(LIMITS, 0) for _ in range(workers)]
    for session in sessions:
        await session.run(code)
    rate = await _rate(workers, lambda worker: _timed(sessions[worker], code))
    for session in sessions:
        await session.close()
    return rate


async def _rate(workers: int, call: Callable[[int], Awaitable[float]]) -> float:
    """Return calls per second of several workers in a loop."""
    began = time.perf_counter()

    async def work(worker: int) -> int:
        done = 0
        while time.perf_counter() - began < THROUGHPUT_S:
            await call(worker)
            done += 1
        return done

    counts = await asyncio.gather(*(work(worker) for worker in range(workers)))
    return sum(counts) / (time.perf_counter() - began)


def _row(name: str, values: list[float], unit: str) -> Row:
    """Summarize measurements."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return Row(
        name=name,
        value=median(ordered),
        unit=unit,
        low=ordered[tenth],
        high=ordered[-1 - tenth],
        n=len(ordered),
    )


def _ratios(value: dict[str, float]) -> list[str]:
    """Put side by side what belongs together."""
    replay, branch = value["replay of six calls and one call"], "branch at call 6 and one call"
    lines = [f"a branch is {replay / value[branch]:.1f} times as fast as replay"]
    for label in ("small", "sympy"):
        ratio = value[f"chain of calls, {label}"] / value[f"fresh interpreter per call, {label}"]
        lines.append(f"a chain of {label} calls is {ratio:.1f} times a fresh interpreter per call")
    return lines


def _private_mb(pid: int) -> float | None:
    """Return the memory that a process shares with no other, MB; None where it may not be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000
