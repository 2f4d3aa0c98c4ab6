"""``python -m benchmarks public-split``: part the rows of a public data set by problem."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.seeds import derive_seed
from trajectory.step_formats.rows import data_files, problem_id


@dataclass(frozen=True, kw_only=True)
class PublicSplitConfig:
    """Write train.jsonl and test.jsonl that share no problem."""

    data: Path
    """.jsonl or .jsonl.gz file."""
    key: str
    """Field that names a row's problem: its id or its text."""
    out: Path
    """Folder of the two files."""
    train_share: float = 0.8
    """Share of the problems to train on."""
    train_rows: int | None = None
    """Most rows of train.jsonl, drawn at random; all when not given."""
    train_problems: int | None = None
    """Most problems of train.jsonl, drawn at random, with all their rows; all when not given."""
    without: str | None = None
    """FIELD=VALUE: rows to leave out of train.jsonl, such as model=gpt-4."""
    exclude: Path | None = None
    """File or folder of another data set, whose problems are left out of both files."""
    exclude_key: str = "problem"
    """Field that holds a problem's text there."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.train_share <= 1:
            raise InputError("--train-share must be above 0 and at most 1")
        if self.without is not None and "=" not in self.without:
            raise InputError(f"--without {self.without}: give FIELD=VALUE")


def split(config: PublicSplitConfig) -> dict[str, int]:
    """Part the rows by problem and write both files.

    Returns
    -------
    dict
        Rows and problems of both sides, and what was left out.
    """
    excluded = set()
    if config.exclude is not None:
        for file in data_files(config.exclude):
            excluded |= {problem_id(str(row[config.exclude_key])) for _, row in _rows(file)}
    sides: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    left_out, overlapping = 0, set()
    for line, row in _rows(config.data):
        if config.key not in row:
            raise InputError(f"{config.data}: a row has no field {config.key!r}")
        problem = problem_id(str(row[config.key]))
        if problem in excluded:
            overlapping.add(problem)
            left_out += 1
            continue
        draw = derive_seed("public-split", config.seed, problem) / 2**63
        side = "train" if draw < config.train_share else "test"
        if side == "train" and config.without is not None:
            name, _, value = config.without.partition("=")
            if str(row.get(name)) == value:
                continue
        sides[side].append((problem, line))
    sides["train"] = _draw(sides["train"], config)
    counts = {"overlapping_problems": len(overlapping), "overlapping_rows": left_out}
    for side, rows in sides.items():
        with atomic_path(config.out / f"{side}.jsonl") as temporary:
            temporary.write_text("".join(line for _, line in rows))
        counts[f"{side}_rows"] = len(rows)
        counts[f"{side}_problems"] = len({problem for problem, _ in rows})
    Console(highlight=False).print(json.dumps(counts), soft_wrap=True)
    return counts


def _draw(rows: list[tuple[str, str]], config: PublicSplitConfig) -> list[tuple[str, str]]:
    """Keep as many problems and rows as were asked for."""
    if config.train_problems is not None:
        problems = sorted({problem for problem, _ in rows})
        rng = random.Random(derive_seed("public-split-problems", config.seed))  # noqa: S311
        kept = set(rng.sample(problems, min(config.train_problems, len(problems))))
        rows = [row for row in rows if row[0] in kept]
    if config.train_rows is not None and len(rows) > config.train_rows:
        rng = random.Random(derive_seed("public-split-rows", config.seed))  # noqa: S311
        rows = rng.sample(rows, config.train_rows)
    return rows


def _rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the lines of a file with the objects in them."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            if line.strip():
                yield line, json.loads(line)
