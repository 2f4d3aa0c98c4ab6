"""``prm evaluate --benchmark NAME --data PATH``: a reward model on a public benchmark.

Problems that the reward model was trained on are left out and counted; a problem is known by its
text across data sets. Trajectories that do not fit the model are left out and counted too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from prm.benchmarks import runs, steps
from prm.benchmarks.arms import (
    EXECUTION,
    POSITION,
    PRM,
    SHUFFLED,
    Case,
    StepScores,
    execution_arm,
    labelled_items,
    position_arm,
    score_steps,
)
from prm.benchmarks.pools import read_pools
from prm.benchmarks.steps import Bootstrap
from prm.checkpoint import load_metadata, load_tasks
from prm.metrics import Estimate, estimate_difference, show_estimate
from prm.model import Device
from prm.reliability import draw_reliability
from prm.score import Scorer
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.records import JsonValue, StopReason
from trajectory.run import config_dict, open_run
from trajectory.seeds import derive_seed
from trajectory.step_formats import read_ratings
from trajectory.step_formats.rows import data_files

Name = Literal["processbench", "agentprocessbench", "prmbench", "intercode", "best_of_n"]


@dataclass(frozen=True, kw_only=True)
class PublicBenchmark:
    """A public benchmark to measure on, instead of labels of `prm label`."""

    benchmark: Name | None = None
    """processbench (F1), agentprocessbench (StepAcc, FirstErrAcc), prmbench (PRMScore), intercode
    (AUROC of success by action), or best_of_n (candidate pools)."""
    data: Path | None = None
    """Its file, or the folder of its files."""
    shuffled_prm: Path | None = None
    """A reward model trained with --shuffle-labels, to stand beside."""
    problems: int | None = None
    """Measure on this many problems, drawn at random, as many from each subset as it has; all when
    not given."""

    def __post_init__(self) -> None:
        if (self.benchmark is None) != (self.data is None):
            raise InputError("--benchmark and --data go together: give both, or --labels")
        if self.benchmark is None and (self.shuffled_prm or self.problems):
            raise InputError("--shuffled-prm and --problems belong to --benchmark")
        if self.problems is not None and self.problems < 2:
            raise InputError("--problems must be at least 2")


class EvaluateSettings(Protocol):
    """What `prm evaluate` says beside the benchmark."""

    @property
    def prm(self) -> Path: ...  # noqa: D102
    @property
    def public(self) -> PublicBenchmark: ...  # noqa: D102
    @property
    def out(self) -> Path | None: ...  # noqa: D102
    @property
    def calibrated(self) -> bool: ...  # noqa: D102
    @property
    def resamples(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> Device: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A benchmark's cases, and for pools and runs the answers that votes count."""

    cases: list[Case]
    answers: list[str | None]


Measure = Callable[[Sequence[Case], Sequence[StepScores], Bootstrap], dict[str, Estimate]]

MEASURES: dict[str, Measure] = {
    "processbench": steps.processbench,
    "agentprocessbench": steps.agentprocessbench,
    "prmbench": steps.prmbench,
    "intercode": runs.intercode,
}
"""Benchmark to its own figures of one arm; `best_of_n` chooses only."""


def evaluate_public(settings: EvaluateSettings) -> dict[str, JsonValue]:
    """Measure a reward model and its baselines on a public benchmark.

    Without an output folder the report goes to PRM-BENCHMARK beside the reward model's own.

    Returns
    -------
    dict
        The content of ``metrics.json``: counts, and per arm every figure with its interval.

    Raises
    ------
    InputError
        If an input is unusable, or nothing is left to measure on.
    """
    public = settings.public
    assert public.benchmark is not None
    assert public.data is not None
    loaded = load_cases(public.benchmark, public.data)
    scorers = {PRM: Scorer.load(settings.prm, device=settings.device)}
    if public.shuffled_prm is not None:
        if not load_metadata(public.shuffled_prm).provenance.shuffled_labels:
            raise InputError(
                f"{public.shuffled_prm} was not trained with --shuffle-labels: as a control it "
                "must be"
            )
        scorers[SHUFFLED] = Scorer.load(public.shuffled_prm, device=settings.device)
    folders = [settings.prm, *([public.shuffled_prm] if public.shuffled_prm else [])]
    loaded, counts = select(loaded, public, scorers.values(), folders, seed=settings.seed)
    out = settings.out or settings.prm.with_name(f"{settings.prm.name}-{public.benchmark}")
    parents = [*data_files(public.data), *(folder / "prm.json" for folder in folders)]
    with open_run(out, kind="evaluate", config=config_dict(settings), parents=parents) as run:
        arms = _score(loaded.cases, scorers, calibrated=settings.calibrated)
        bootstrap = Bootstrap(resamples=settings.resamples, seed=settings.seed)
        report = _report(public.benchmark, loaded, arms, bootstrap)
        report |= {
            "benchmark": public.benchmark,
            "data": str(public.data),
            "prm": str(settings.prm),
            "checkpoint": scorers[PRM].checkpoint_hash,
            "kind": scorers[PRM].kind,
            "aggregation": scorers[PRM].metadata.aggregation,
            "calibrated": settings.calibrated,
            "counts": dict(counts),
        }
        with atomic_path(out / "metrics.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        draw_reliability(
            out / "reliability.png",
            {name: labelled_items(loaded.cases, scores) for name, scores in arms.items()},
            resamples=settings.resamples,
            seed=settings.seed,
        )
        _print(report, out)
        run.finish(counts)
    return report


def load_cases(benchmark: Name, data: Path) -> Loaded:
    """Read a benchmark's trajectories with what it says of their steps.

    Raises
    ------
    InputError
        If a row is malformed; names file and line.
    """
    if benchmark == "best_of_n":
        return _load_pools(data)
    cases: list[Case] = []
    for row in read_ratings(f"{benchmark}:{data}"):
        if row.trajectory.meta.get("repeated") is True:
            continue
        targets = tuple(None if r == "neutral" else r for r in row.ratings)
        if benchmark == "intercode":
            targets = (row.trajectory.outcome,) * row.trajectory.num_steps
        cases.append(Case(trajectory=row.trajectory, targets=targets))
    if benchmark == "intercode":
        return Loaded(cases=cases, answers=runs.run_answers(cases))
    return Loaded(cases=cases, answers=[None for _ in cases])


def _load_pools(data: Path) -> Loaded:
    """Read candidate pools; a solution's verdict is its outcome and every step's target."""
    cases: list[Case] = []
    answers: list[str | None] = []
    for file in data_files(data):
        for pool in read_pools(file):
            trajectories = pool.trajectories()
            for trajectory, right in zip(trajectories, pool.correct, strict=True):
                judged = replace(trajectory, outcome=right, stop=StopReason.ANSWERED)
                cases.append(Case(trajectory=judged, targets=(right,) * judged.num_steps))
            answers += pool.answers
    return Loaded(cases=cases, answers=answers)


def select(
    loaded: Loaded,
    public: PublicBenchmark,
    scorers: Iterable[Scorer],
    folders: Sequence[Path],
    *,
    seed: int,
) -> tuple[Loaded, dict[str, int]]:
    """Leave out problems that were trained on, problems not drawn, and what does not fit."""
    seen = {task for folder in folders for task in load_tasks(folder).train}
    problems = sorted({case.problem for case in loaded.cases})
    free = [problem for problem in problems if problem not in seen]
    if not free:
        raise InputError(
            f"{public.data}: the reward model was trained on all {len(problems)} problems: "
            "measure on others"
        )
    drawn = free
    if public.problems is not None and public.problems < len(free):
        subsets = {c.problem: str(c.trajectory.meta.get("subset", "")) for c in loaded.cases}
        drawn = draw_problems({p: subsets[p] for p in free}, public.problems, seed=seed)
    kept = set(drawn)
    chosen = [n for n, case in enumerate(loaded.cases) if case.problem in kept]
    fits = [True] * len(chosen)
    for scorer in scorers:
        found = scorer.fits([loaded.cases[n].trajectory for n in chosen])
        fits = [a and b for a, b in zip(fits, found, strict=True)]
    short = [n for n, fit in zip(chosen, fits, strict=True) if fit]
    if not short:
        raise InputError(f"{public.data}: no trajectory is short enough for the reward model")
    cases = [loaded.cases[n] for n in short]
    counts = {
        "problems": len({case.problem for case in cases}),
        "trajectories": len(cases),
        "steps": sum(len(case.targets) for case in cases),
        "excluded_training_problems": len(problems) - len(free),
        "problems_not_drawn": len(free) - len(drawn),
        "dropped_long": len(chosen) - len(short),
    }
    return Loaded(cases=cases, answers=[loaded.answers[n] for n in short]), counts


def draw_problems(subsets: Mapping[str, str], count: int, *, seed: int) -> list[str]:
    """Draw problems at random, as many from every subset as far as it has them.

    A figure that is a plain mean over subsets is as uncertain as its smallest subset.

    Parameters
    ----------
    subsets : mapping of str to str
        Problem to the subset it belongs to.
    count : int
        At most as many as there are problems.
    seed : int
        The same seed draws the same.

    Examples
    --------
    >>> drawn = draw_problems({"a": "x", "b": "y", "c": "y", "d": "y"}, 3, seed=0)
    >>> len(drawn), "a" in drawn
    (3, True)
    """
    rng = random.Random(derive_seed("benchmark-problems", seed))  # noqa: S311 - not security
    members: dict[str, list[str]] = {}
    for problem in sorted(subsets):
        members.setdefault(subsets[problem], []).append(problem)
    drawn: list[str] = []
    smallest_first = sorted(members.values(), key=len)
    for number, problems in enumerate(smallest_first):
        share = (count - len(drawn)) // (len(smallest_first) - number)
        drawn += rng.sample(problems, min(share, len(problems)))
    return drawn


def _score(
    cases: Sequence[Case], scorers: Mapping[str, Scorer], *, calibrated: bool
) -> dict[str, list[StepScores]]:
    """Score the cases with every arm."""
    arms = {
        name: score_steps(scorer, cases, calibrated=calibrated) for name, scorer in scorers.items()
    }
    arms[POSITION] = position_arm(cases)
    execution = execution_arm(cases)
    if execution is not None:
        arms[EXECUTION] = execution
    return arms


def _report(
    benchmark: Name, loaded: Loaded, arms: Mapping[str, list[StepScores]], bootstrap: Bootstrap
) -> dict[str, JsonValue]:
    """Compute every figure of every arm."""
    choosing = benchmark in ("intercode", "best_of_n")
    figures: dict[str, JsonValue] = {}
    for name, scores in arms.items():
        found = steps.common(loaded.cases, scores, bootstrap)
        if benchmark in MEASURES:
            found = MEASURES[benchmark](loaded.cases, scores, bootstrap) | found
        if choosing:
            found |= runs.choose(loaded.cases, scores, loaded.answers, bootstrap)
        figures[name] = {figure: asdict(value) for figure, value in found.items()}
    report: dict[str, JsonValue] = {"arms": figures}
    report["step_auroc_above"] = {
        name: asdict(
            estimate_difference(
                "auroc",
                labelled_items(loaded.cases, arms[PRM]),
                labelled_items(loaded.cases, scores),
                resamples=bootstrap.resamples,
                seed=bootstrap.seed,
            )
        )
        for name, scores in arms.items()
        if name != PRM
    }
    if choosing:
        without = runs.choose_without_scores(loaded.cases, loaded.answers, bootstrap)
        report["choices"] = {name: asdict(value) for name, value in without.items()}
    known = [t for case in loaded.cases for t in case.targets if t is not None]
    report["labelled_steps"] = len(known)
    report["rate_of_right_steps"] = float(np.mean(known)) if known else None
    return report


def _print(report: Mapping[str, JsonValue], out: Path) -> None:
    """Print every figure, one column per arm."""
    arms, counts = report["arms"], report["counts"]
    assert isinstance(arms, dict)
    assert isinstance(counts, dict)
    console = Console(highlight=False)
    table = Table(title=f"{report['benchmark']}: {counts['problems']} problems")
    table.add_column("figure")
    for arm in arms:
        table.add_column(arm)
    first = next(iter(arms.values()))
    assert isinstance(first, dict)
    for figure in first:
        cells = [arm.get(figure) if isinstance(arm, dict) else None for arm in arms.values()]
        table.add_row(figure.replace("_", " "), *(show_estimate(cell) for cell in cells))
    table.add_section()
    above = report["step_auroc_above"]
    assert isinstance(above, dict)
    differences = [show_estimate(above[arm]) if arm in above else "" for arm in arms]
    table.add_row("PRM's step auroc above it", *differences)
    choices = report.get("choices")
    if isinstance(choices, dict):
        table.add_section()
        for name, value in choices.items():
            table.add_row(name, show_estimate(value))
    console.print(table)
    facts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
    console.print(facts, soft_wrap=True)
    console.print(f"{out / 'metrics.json'}, {out / 'reliability.png'}", soft_wrap=True)
