"""`prm serve` under many clients, beside scoring the same trajectories in process.

Both run in turns on the same machine, and every answer is compared with the one in process, so a
lost, swapped or wrong answer fails the benchmark. A client asks, waits for its answer and asks
again: the number of clients is the number of requests in flight. Beside the rate by the clock
stands the ratio of processor time, in process to all of the server, which hardly depends on the
neighbours.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import urllib3

from benchmarks.throughput import machine_facts
from benchmarks.tool_episodes import read_episodes
from prm.score import Scorer
from trajectory.atomic import atomic_path
from trajectory.codec import to_json
from trajectory.errors import InputError
from trajectory.records import Trajectory

Report = dict[str, Any]

_TOLERANCE = 1e-4
"""Largest difference that another batch may make to a score in float32."""


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Load `prm serve` and compare it with scoring in process."""

    prm: Path
    """Folder that `prm train` wrote."""
    runs: Path
    """InterCode's sql_runs.jsonl.gz."""
    trajectories: int = 512
    """Scored in each run."""
    clients: int = 64
    """Requests in flight."""
    per_request: int = 1
    """Trajectories of one request."""
    repeats: int = 3
    """Runs of both ways, taken in turns; medians count."""
    seed: int = 0
    out: Path | None = None
    """Write the report to this JSON file too."""

    def __post_init__(self) -> None:
        if min(self.trajectories, self.clients, self.per_request, self.repeats) < 1:
            raise InputError("--trajectories, --clients, --per-request and --repeats start at 1")


def compare(config: ServingConfig) -> Report:
    """Measure, check every answer, print and write the report.

    Raises
    ------
    InputError
        If an answer is lost, swapped or wrong.
    """
    scorer = Scorer.load(config.prm, device="cpu")
    drawn = read_episodes(config.runs, config.trajectories, seed=config.seed)
    rows = [row for row, fits in zip(drawn, scorer.fits(drawn), strict=True) if fits]
    scorer.score(rows[:4])  # the first forward is slower
    direct, served, latencies, shares, efforts = [], [], [], [], []
    with serving(config.prm) as url:
        load(url, rows[:4], config)
        for _ in range(config.repeats):
            started, worked = time.perf_counter(), time.process_time()
            expected = [s.values for s in scorer.score(rows)]
            direct.append(len(rows) / (time.perf_counter() - started))
            worked = time.process_time() - worked
            before = _meters(url)
            started = time.perf_counter()
            answers, waits = load(url, rows, config)
            seconds = time.perf_counter() - started
            after = _meters(url)
            served.append(len(rows) / seconds)
            busy, cpu = (b - a for a, b in zip(before, after, strict=True))
            shares.append(busy / seconds)
            efforts.append(worked / cpu)
            latencies += waits
            check(rows, expected, answers)
    report: Report = {
        "machine": machine_facts(),
        "trajectories": len(rows),
        "tokens": sum(len(r.input_ids) for r in scorer.render(rows)),
        "clients": config.clients,
        "per_request": config.per_request,
        "in_process_per_s": statistics.median(direct),
        "served_per_s": statistics.median(served),
        "ratio": statistics.median(s / d for s, d in zip(served, direct, strict=True)),
        "all_in_process": direct,
        "all_served": served,
        "cpu_ratio": statistics.median(efforts),
        "share_of_time_spent_scoring": statistics.median(shares),
        "latency_s": {f"p{p}": float(np.percentile(latencies, p)) for p in (50, 90, 99)},
        "answers_checked": len(rows) * config.repeats,
    }
    _print(report)
    if config.out is not None:
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report


@contextmanager
def serving(prm: Path) -> Iterator[str]:
    """Run `prm serve` in a process of its own; gives its address."""
    command = [sys.executable, "-m", "prm.cli", "serve", "--prm", str(prm), "--port", "0"]
    process = subprocess.Popen(  # noqa: S603
        [*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise InputError(f"the server did not start: {line}{process.stderr.read()}")
        yield found.group()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        process.stderr.close()


def load(
    url: str, rows: Sequence[Trajectory], config: ServingConfig
) -> tuple[list[list[Report]], list[float]]:
    """Have every client ask until all trajectories are scored.

    Returns
    -------
    tuple of (list of list of dict, list of float)
        The scores each request was answered with, in the order of the requests, and the seconds
        each took.
    """
    pool = urllib3.PoolManager(maxsize=config.clients, retries=False, timeout=600)
    size = config.per_request
    bodies = [
        json.dumps({"trajectories": [to_json(t) for t in rows[i : i + size]]}).encode()
        for i in range(0, len(rows), size)
    ]
    headers = {"Content-Type": "application/json"}

    def ask(body: bytes) -> tuple[list[Report], float]:
        started = time.perf_counter()
        answer = pool.request("POST", f"{url}/score", body=body, headers=headers)
        waited = time.perf_counter() - started
        if answer.status != 200:
            raise InputError(f"the server answered {answer.status}: {answer.data[:200]!r}")
        return answer.json()["scores"], waited

    with ThreadPoolExecutor(config.clients) as clients:
        answers = list(clients.map(ask, bodies))
    return [scores for scores, _ in answers], [waited for _, waited in answers]


def check(
    rows: Sequence[Trajectory],
    expected: Sequence[Sequence[float]],
    answers: Sequence[Sequence[Report]],
) -> None:
    """Compare every answer with the scores in process.

    Raises
    ------
    InputError
        Naming the first one that is lost, swapped or wrong.
    """
    found = [scores for answer in answers for scores in answer]
    if len(found) != len(rows):
        raise InputError(f"{len(rows)} trajectories were sent, {len(found)} scores came back")
    for row, values, scores in zip(rows, expected, found, strict=True):
        if scores["trajectory_id"] != row.trajectory_id:
            raise InputError(f"{row.trajectory_id} was answered with {scores['trajectory_id']}")
        if len(scores["values"]) != len(values):
            raise InputError(f"{row.trajectory_id} has {len(values)} scores, not all came back")
        difference = float(np.max(np.abs(np.subtract(scores["values"], values))))
        if not difference <= _TOLERANCE:
            raise InputError(f"{row.trajectory_id} was scored differently, by {difference:.2g}")


def _meters(url: str) -> tuple[float, float]:
    """Read how long the server has been scoring, and its processor time, seconds."""
    text = urllib3.request("GET", f"{url}/metrics").data.decode()
    busy, cpu = (
        float(line.split()[1])
        for name in ("prm_scoring_seconds_total ", "process_cpu_seconds_total ")
        for line in text.splitlines()
        if line.startswith(name)
    )
    return busy, cpu


def _print(report: Report) -> None:
    """Print the figures."""
    latency = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report["latency_s"].items())
    print(
        f"{report['trajectories']} trajectories, {report['tokens']} tokens, {report['clients']} "
        f"clients\n  in process {report['in_process_per_s']:.2f} a second, served "
        f"{report['served_per_s']:.2f}: ratio {report['ratio']:.3f}, of processor time "
        f"{report['cpu_ratio']:.3f}\n  latency {latency}; the "
        f"scoring thread was busy {report['share_of_time_spent_scoring']:.1%} of the time\n  "
        f"{report['answers_checked']} answers checked, none lost, swapped or wrong"
    )
    print("machine:", ", ".join(f"{key} {value}" for key, value in report["machine"].items()))
