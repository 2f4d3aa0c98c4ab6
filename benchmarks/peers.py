"""Training and scoring beside what people used before, on the same episodes, in one run.

Training stands beside TRL 1.13's PRMTrainer, the last release that had one (another environment,
named with ``--trl-python``); scoring beside one forward per prefix, the recipe of TRL's old
documentation. Machines are shared, so ratios are of *processor* time, measured alternately.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.throughput import machine_facts
from benchmarks.tool_episodes import read_episodes
from prm.calibrate import Calibration
from prm.checkpoint import Checkpoint, Metadata, Provenance, vocabulary_of
from prm.heads import get_head
from prm.incremental import EpisodeScorer
from prm.model import new_model, open_tokenizer, quiet_transformers
from prm.rendering import render
from prm.score import Scorer
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.records import Trajectory

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """Compare training and scoring with TRL's."""

    model: str
    """Base: folder or hub id of a causal language model."""
    runs: Path
    """InterCode's sql_runs.jsonl.gz."""
    trl_python: Path | None = None
    """Interpreter of an environment with TRL 1.13; None leaves training out."""
    steps: int = 4
    """Optimizer steps of a training run."""
    rows_per_step: int = 4
    """Episodes of one optimizer step; TRL pads them all to the longest, about 1 MB a token."""
    batch_tokens: int = 1024
    """Padded tokens of our forward passes: a step is cut into as many as that takes, which does not
    change its gradient; TRL pads all rows of a step."""
    max_chars: int = 3000
    """Longer episodes are left out of training, for memory's sake (9 % of InterCode-SQL)."""
    episodes: int = 8
    """Episodes of 6 turns that are scored in each way; 0 leaves scoring out."""
    repeats: int = 3
    """Runs of every side, taken in turns; medians count."""
    seed: int = 0
    out: Path | None = None
    """Write the report to this JSON file too."""

    def __post_init__(self) -> None:
        sizes = (self.steps, self.rows_per_step, self.batch_tokens, self.repeats)
        if min(*sizes, self.episodes + 1) < 1:
            raise InputError(
                "--steps, --rows-per-step, --batch-tokens and --repeats start at 1, --episodes at 0"
            )
        if self.episodes == 0 and self.trl_python is None:
            raise InputError("nothing to compare: give --trl-python, or --episodes of at least 1")
        if self.trl_python is not None and not self.trl_python.exists():
            raise InputError(f"--trl-python {self.trl_python} does not exist")


def compare(config: PeersConfig) -> Report:
    """Measure, print and write the report."""
    facts = {**machine_facts(), "model": Path(config.model).name}
    report: Report = {"machine": facts}
    if config.episodes:
        report["scoring"] = compare_scoring(config)
    if config.trl_python is not None:
        report["training"] = compare_training(config)
    _print(report)
    if config.out is not None:
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report


def untrained_scorer(model: str) -> Scorer:
    """Make a scorer whose head is random: speed does not depend on what was learned."""
    head, tokenizer = get_head("value"), open_tokenizer(model)
    network = new_model(model, head, base_rate=0.5, seed=0)
    network.train(False)
    nothing = Provenance(labels="none", parents={}, estimators=(), completers=())
    metadata = Metadata(
        head=head.name,
        kind=head.kind,
        position="observation",
        aggregation=head.aggregation,
        calibration=Calibration(),
        base_model=model,
        vocabulary=vocabulary_of(tokenizer),
        provenance=nothing,
        training={},
    )
    checkpoint = Checkpoint(
        model=network, tokenizer=tokenizer, metadata=metadata, head=head, hash="untrained"
    )
    return Scorer(checkpoint, torch.device("cpu"))


def compare_scoring(config: PeersConfig) -> Report:
    """Score episodes of 6 turns in one forward, as they grow, and prefix by prefix."""
    scorer = untrained_scorer(config.model)
    growing = EpisodeScorer(scorer)

    def prefixes(episode: Trajectory) -> list[Trajectory]:
        return [replace(episode, steps=episode.steps[:k]) for k in range(episode.num_steps + 1)]

    def whole(episode: Trajectory) -> Sequence[float]:
        return scorer.score([episode])[0].values

    def grow(episode: Trajectory) -> Sequence[float]:
        state = growing.begin()
        return [state.extend(prefix) for prefix in prefixes(episode)][-1].values

    def each(episode: Trajectory) -> Sequence[float]:
        return [scorer.score([prefix])[0].values[-1] for prefix in prefixes(episode)]

    ways: dict[str, Callable[[Trajectory], Sequence[float]]] = {
        "one_forward": whole,
        "incremental": grow,
        "forward_per_prefix": each,
    }
    rows = []
    for episode in read_episodes(config.runs, config.episodes, seed=config.seed, turns=6):
        times: dict[str, list[float]] = {name: [] for name in ways}
        values: dict[str, Sequence[float]] = {}
        for _ in range(config.repeats):
            for name, way in ways.items():
                started = time.process_time()
                values[name] = way(episode)
                times[name].append(time.process_time() - started)
        exact = values["one_forward"]
        row = {name: statistics.median(seconds) for name, seconds in times.items()}
        row["tokens"] = len(scorer.render([episode])[0].input_ids)
        row["largest_difference"] = max(
            float(np.max(np.abs(np.subtract(v, exact)))) for v in values.values()
        )
        rows.append(row)
    return {
        "episodes": rows,
        "turns": 6,
        "per_prefix_ratio": _spread([r["forward_per_prefix"] / r["one_forward"] for r in rows]),
        "incremental_ratio": _spread([r["incremental"] / r["one_forward"] for r in rows]),
        "incremental_ratio_of_totals": sum(r["incremental"] for r in rows)
        / sum(r["one_forward"] for r in rows),
        "per_prefix_ratio_of_totals": sum(r["forward_per_prefix"] for r in rows)
        / sum(r["one_forward"] for r in rows),
        "largest_difference": max(r["largest_difference"] for r in rows),
    }


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def compare_training(config: PeersConfig) -> Report:
    """Train with both sides in turns, each run in a process of its own."""
    assert config.trl_python is not None
    count = config.steps * config.rows_per_step
    episodes = read_episodes(config.runs, count, seed=config.seed, max_chars=config.max_chars)
    tokenizer = open_tokenizer(config.model)
    rendered = render(episodes, tokenizer)
    rows = [
        {
            "input_ids": row.input_ids,
            "positions": row.positions,
            "labels": [episode.outcome] * len(row.positions),
        }
        for row, episode in zip(rendered, episodes, strict=True)
    ]
    lengths = [len(row.input_ids) for row in rendered]
    sides = {"ours": sys.executable, "trl": str(config.trl_python)}
    runs: dict[str, list[Report]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        with quiet_transformers():
            new_model(config.model, get_head("binary"), base_rate=0.5, seed=0).save_pretrained(base)
            tokenizer.save_pretrained(base)
        job = {
            "model": str(base),
            "rows": rows,
            "rows_per_step": config.rows_per_step,
            "batch_tokens": config.batch_tokens,
            "learning_rate": 2e-5,
        }
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        for _ in range(config.repeats):
            for side, python in sides.items():
                runs[side].append(_train(side, python, path))
    return _training_report(runs, lengths, config)


def _padded(lengths: Sequence[int], size: int) -> int:
    """Count the tokens of rows that are padded to the longest of their step."""
    steps = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return sum(max(step) * len(step) for step in steps)


def _train(side: str, python: str, job: Path) -> Report:
    """Run one side."""
    command = [python, "-m", "benchmarks.peer_training", side, str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        raise InputError(
            f"the {side} side of the training comparison failed (exit {done.returncode}; -9 is out "
            f"of memory: lower --rows-per-step):\n{done.stderr[-2000:]}"
        )
    report: Report = json.loads(lines[-1].removeprefix("RESULT "))
    return report


def _training_report(
    runs: dict[str, list[Report]], lengths: Sequence[int], config: PeersConfig
) -> Report:
    """Lay out speed, memory and loss curves."""
    tokens = sum(lengths)
    speeds = {
        side: [tokens / sum(s["cpu_seconds"] for s in run["steps"]) for run in found]
        for side, found in runs.items()
    }
    curves = {side: [s["loss"] for s in found[0]["steps"]] for side, found in runs.items()}
    return {
        "rows": len(lengths),
        "longest": max(lengths),
        "useful_tokens": tokens,
        "tokens_of_trl_with_padding": _padded(lengths, config.rows_per_step),
        "useful_tokens_per_cpu_second": {
            side: statistics.median(found) for side, found in speeds.items()
        },
        "all_runs": speeds,
        "ratio": statistics.median(speeds["ours"]) / statistics.median(speeds["trl"]),
        "peak_mb": {
            side: statistics.median(run["peak_mb"] for run in found) for side, found in runs.items()
        },
        "ratio_of_steps": [
            theirs["cpu_seconds"] / mine["cpu_seconds"]
            for mine_run, their_run in zip(runs["ours"], runs["trl"], strict=True)
            for mine, theirs in zip(mine_run["steps"], their_run["steps"], strict=True)
        ],
        "loss": curves,
        "largest_loss_difference": float(
            np.max(np.abs(np.subtract(curves["ours"], curves["trl"])))
        ),
    }


def _print(report: Report) -> None:
    """Print the figures."""
    if "scoring" in report:
        _print_scoring(report["scoring"])
    if "training" in report:
        _print_training(report["training"])
    print("machine:", ", ".join(f"{key} {value}" for key, value in report["machine"].items()))


def _print_scoring(scoring: Report) -> None:
    """Print the scoring comparison."""
    print(f"scoring, {len(scoring['episodes'])} episodes of {scoring['turns']} turns, CPU time")
    for name in ("per_prefix_ratio", "incremental_ratio"):
        ratio = scoring[name]
        print(
            f"  {name:<18} median {ratio['median']:.2f} "
            f"[{ratio['least']:.2f}, {ratio['most']:.2f}], of totals "
            f"{scoring[f'{name}_of_totals']:.2f}"
        )
    print(f"  largest difference of a score {scoring['largest_difference']:.1e}")


def _print_training(training: Report) -> None:
    """Print the training comparison."""
    print(f"training, {training['rows']} episodes, {training['useful_tokens']} useful tokens")
    for side in ("ours", "trl"):
        losses = " ".join(f"{x:.4f}" for x in training["loss"][side])
        print(
            f"  {side:<5} {training['useful_tokens_per_cpu_second'][side]:.1f} useful tokens "
            f"per CPU second, peak {training['peak_mb'][side]:.0f} MB, loss {losses}"
        )
    print(
        f"  ratio {training['ratio']:.2f}, largest difference of a loss "
        f"{training['largest_loss_difference']:.1e}"
    )
