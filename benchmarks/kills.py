"""``python -m benchmarks kills``: labelling killed at random moments, resumed, and compared."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from rich.console import Console

from labeling.ledger import Rollout
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.store import read_jsonl

_KILLS = 3
"""Times a run is killed before it may end."""


@dataclass(frozen=True, kw_only=True)
class KillsConfig:
    """Kill `prm label` with SIGKILL at random moments, resume it, and compare what it collected."""

    policy: Path
    """Embedded policy, for example that of the demo."""
    runs: int = 30
    """Runs to kill; half of them with each strategy, fixed and adaptive."""
    num_tasks: int = 60
    """Arithmetic tasks of a run."""
    rollouts: int = 8
    """Rollouts per state."""
    seed: int = 0
    """Fixes the moments."""
    out: Path | None = None
    """JSON file for the numbers."""

    def __post_init__(self) -> None:
        if min(self.runs, self.num_tasks, self.rollouts) < 1:
            raise InputError("--runs, --num-tasks and --rollouts must be >= 1")


def kills(config: KillsConfig) -> dict[str, object]:
    """Do the runs and print what differed.

    Returns
    -------
    dict
        ``runs``, ``kills`` (that hit a live process), ``lines_lost`` and ``lines_doubled`` over
        all runs, ``runs_that_differ`` (in keys, seeds, outcomes or tokens) and
        ``lines_at_kill`` (how far each run was).

    Raises
    ------
    InputError
        If the command fails by itself.
    """
    rng = Random(config.seed)  # noqa: S311
    report: Counter[str] = Counter()
    lines_at_kill: list[int] = []
    with TemporaryDirectory() as folder, progress("runs", config.runs + 2) as bar:
        whole, seconds = {}, {}
        for strategy in ("fixed", "adaptive"):
            out = Path(folder) / f"whole-{strategy}"
            started = time.monotonic()
            _finish(_start(config, strategy, out))
            seconds[strategy] = time.monotonic() - started
            whole[strategy] = _lines(out)
            bar.advance()
        for run in range(config.runs):
            strategy = "fixed" if run % 2 else "adaptive"
            out = Path(folder) / f"run{run}"
            for _ in range(_KILLS):
                process = _start(config, strategy, out)
                try:
                    process.wait(rng.uniform(0.4, 1.0) * seconds[strategy])
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    report["kills"] += 1
                    lines_at_kill.append(len(_lines(out)))
            _finish(_start(config, strategy, out))
            found, expected = _lines(out), whole[strategy]
            report["lines_lost"] += len(expected.keys() - found.keys())
            report["lines_doubled"] += sum(found.values()) - len(found)
            report["runs_that_differ"] += found.keys() != expected.keys()
            bar.advance(kills=report["kills"], differ=report["runs_that_differ"])
    result: dict[str, object] = {"runs": config.runs, **report, "lines_at_kill": lines_at_kill}
    Console().print(result)
    if config.out is not None:
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(result) + "\n")
    return result


def _start(config: KillsConfig, strategy: str, out: Path) -> subprocess.Popen[bytes]:
    """Start a labelling run in a process of its own."""
    flags = f"--tasks arithmetic --num-tasks {config.num_tasks} --rollouts {config.rollouts}"
    return subprocess.Popen(  # noqa: S603
        [
            *(sys.executable, "-m", "prm.cli", "label", *flags.split()),
            *("--policy", str(config.policy), "--strategy", strategy, "--max-context", "512"),
            *("--out", str(out)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that is meant to end well."""
    _, errors = process.communicate()
    if process.returncode:
        raise InputError(f"prm label failed: {errors.decode(errors='replace')[-500:]}")


def _lines(out: Path) -> Counter[tuple[object, ...]]:
    """Count the rollouts on disk by everything that must not change; a cut line is none yet."""
    path = out / "evidence.jsonl"
    if not path.exists():
        return Counter()
    return Counter(
        (r.state, r.rollout, r.attempt, r.seed, r.outcome, r.tokens, r.reached)
        for r in read_jsonl(path, Rollout, tail="drop")
    )
