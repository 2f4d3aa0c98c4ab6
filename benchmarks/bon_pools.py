"""``python -m benchmarks bon-pools``: best-of-N from published step scores of other PRMs.

Checks the best-of-N code on real data: the stored correctness of every candidate is computed anew
from its answer, and must agree between candidates and scores. Then every aggregation of every
reward model chooses among the candidates, beside majority vote, votes weighted by score, an oracle
and a random choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prm.benchmarks.metrics import estimate_from_sums, last_is_lowest, rate
from prm.benchmarks.pools import (
    Pool,
    ScoreRow,
    canonical_answer,
    read_pools,
    read_scores,
    stored_verdict,
)
from prm.benchmarks.selection import (
    as_columns,
    at_random,
    by_score,
    by_score_of,
    by_vote,
    oracle,
)
from prm.metrics import show_estimate
from prm.score import AGGREGATIONS
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.records import JsonValue

SIZES = (1, 2, 4, 8, 16, 32)
"""Sizes of the pools that are drawn from the whole one."""


@dataclass(frozen=True, kw_only=True)
class BonPoolsConfig:
    """Choose among stored candidates by stored step scores."""

    pools: Path
    """Folder with SET_candidates.jsonl.gz and SET_scores_MODEL.jsonl.gz."""
    out: Path | None = None
    """JSON file for the numbers."""
    resamples: int = 2000
    """Bootstrap resamples of problems behind the 95 % intervals."""
    seed: int = 0


def compare(config: BonPoolsConfig) -> dict[str, JsonValue]:
    """Check the stored correctness and compare all choosers, for every set in the folder.

    Returns
    -------
    dict
        Per set: the checks, and accuracies with intervals.
    """
    files = sorted(config.pools.glob("*_candidates.jsonl.gz"))
    if not files:
        raise InputError(f"{config.pools} holds no SET_candidates.jsonl.gz")
    report: dict[str, JsonValue] = {}
    for file in files:
        name = file.name.removesuffix("_candidates.jsonl.gz")
        pools = list(read_pools(file))
        scored = {
            path.name.removesuffix(".jsonl.gz").removeprefix(f"{name}_scores_"): read_scores(path)
            for path in sorted(config.pools.glob(f"{name}_scores_*.jsonl.gz"))
        }
        report[name] = {
            "problems": len(pools),
            "candidates": sum(len(p.correct) for p in pools),
            "checks": {m: _check(pools, rows) for m, rows in scored.items()},
            "answers_judged_anew": _judge_anew(pools),
            "accuracy": _accuracies(pools, scored, config),
        }
        _print(name, report[name])
    if config.out is not None:
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def _check(pools: Sequence[Pool], scores: Mapping[tuple[str, int], ScoreRow]) -> JsonValue:
    """Count the candidates whose stored facts disagree between the two files."""
    different, lengths, missing = 0, 0, 0
    for pool in pools:
        for number, (right, steps) in enumerate(zip(pool.correct, pool.steps, strict=True)):
            row = scores.get((pool.name, number))
            if row is None:
                missing += 1
                continue
            different += stored_verdict(row) != bool(right)
            lengths += len(row.step_scores) != len(steps)
    return {
        "other_correctness": different,
        "other_number_of_steps": lengths,
        "without_scores": missing,
        "scores_of_no_candidate": len(scores) - sum(len(p.correct) for p in pools) + missing,
    }


def _judge_anew(pools: Sequence[Pool]) -> JsonValue:
    """Compare the stored correctness with that of the answers themselves."""
    agree, stored_only, answer_only = 0, 0, 0
    for pool in pools:
        gold = canonical_answer(pool.answer)
        for answer, right in zip(pool.answers, pool.correct, strict=True):
            equal = answer == gold
            agree += equal == bool(right)
            stored_only += bool(right) and not equal
            answer_only += equal and not right
    return {"agree": agree, "only_stored_says_right": stored_only, "only_answer_says": answer_only}


def _accuracies(
    pools: Sequence[Pool],
    scored: Mapping[str, Mapping[tuple[str, int], ScoreRow]],
    config: BonPoolsConfig,
) -> JsonValue:
    """Compute every chooser's accuracy with its interval."""
    problems = [p.name for p in pools]

    def measure(values: Sequence[float]) -> JsonValue:
        found = estimate_from_sums(
            as_columns(values), problems, rate, resamples=config.resamples, seed=config.seed
        )
        return asdict(found)

    majority = [by_vote(p.answers, p.correct) for p in pools]
    table: dict[str, JsonValue] = {
        "random": measure([at_random(p.correct) for p in pools]),
        "majority": measure(majority),
        "oracle": measure([oracle(p.correct) for p in pools]),
        "fewest steps": measure([by_score([-len(s) for s in p.steps], p.correct) for p in pools]),
    }
    for model, rows in scored.items():
        steps = [[rows[p.name, n].step_scores for n in range(len(p.correct))] for p in pools]
        lowest = [float(last_is_lowest(scores)) for own in steps for scores in own]
        entry: dict[str, JsonValue] = {"lowest_is_last": sum(lowest) / len(lowest)}
        for name, aggregation in AGGREGATIONS.items():
            values = [[aggregation(scores) for scores in own] for own in steps]
            pairs = list(zip(values, pools, strict=True))
            best = [by_score(v, p.correct) for v, p in pairs]
            entry[name] = {
                "best": measure(best),
                "best_minus_majority": measure(
                    [b - m for b, m in zip(best, majority, strict=True)]
                ),
                "weighted_vote": measure([by_vote(p.answers, p.correct, v) for v, p in pairs]),
                "best_by_size": {
                    str(size): sum(by_score_of(v, p.correct, size) for v, p in pairs) / len(pools)
                    for size in SIZES
                    if all(size <= len(p.correct) for p in pools)
                },
            }
        table[model] = entry
    return table


def _print(name: str, entry: JsonValue) -> None:
    """Print one set's accuracies."""
    assert isinstance(entry, dict)
    accuracy = entry["accuracy"]
    assert isinstance(accuracy, dict)
    console = Console()
    console.print(f"{name}: {entry['problems']} problems, {entry['candidates']} candidates")
    console.print_json(data={k: entry[k] for k in ("checks", "answers_judged_anew")})
    table = Table(title=f"{name}: accuracy of the chosen candidate")
    for column in ("chooser", "aggregation", "best score", "minus majority", "weighted vote"):
        table.add_column(column)
    for chooser, row in accuracy.items():
        assert isinstance(row, dict)
        if "value" in row:
            table.add_row(chooser, "", show_estimate(row), "", "")
            continue
        console.print(f"{chooser}: the last step is the lowest in {row['lowest_is_last']:.3f}")
        for number, aggregation in enumerate(AGGREGATIONS):
            cell = row[aggregation]
            assert isinstance(cell, dict)
            shown = [
                show_estimate(cell[n]) for n in ("best", "best_minus_majority", "weighted_vote")
            ]
            table.add_row("" if number else chooser, aggregation, *shown)
    console.print(table)
