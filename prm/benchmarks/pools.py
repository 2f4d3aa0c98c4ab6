"""Candidate pools: many solutions of each problem with their answers and correctness."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field

from trajectory.errors import InputError
from trajectory.records import Task, Trajectory
from trajectory.step_formats.rated import text_trajectory
from trajectory.step_formats.rows import problem_id, read_rows

_REWRITES = (
    (re.compile(r"\\left|\\right|\\[!,;]|\\?\$|\s|\^\\circ|\^\{\\circ\}|\.$"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\sqrt(\d)"), r"\\sqrt{\1}"),
)
"""Ways of writing that say nothing, and what stands for them."""

_UNIT = re.compile(r"\\(?:text|mathrm)\{[^{}]*\}|\\?%")


class CandidateRow(BaseModel):
    """One solution; ``matches_answer`` is preferred where both verdicts are there."""

    candidate_index: int
    steps: list[str]
    extracted_answer: str | None
    is_correct: bool | None = None
    matches_answer: bool | None = None


class PoolRow(BaseModel):
    """One problem with its solutions."""

    problem_id: str
    problem: str
    answer: str
    candidates: list[CandidateRow] = Field(min_length=1)


class ScoreRow(BaseModel):
    """Stored step scores of one solution, with the verdict they were stored with."""

    problem_id: str
    candidate_index: int
    step_scores: list[float]
    is_correct: bool | None = None
    matches_answer: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """The solutions of one problem."""

    name: str
    """The data set's own id."""
    problem: str
    answer: str
    """Gold answer."""
    answers: tuple[str | None, ...]
    """Of each solution, in the form that equal answers share; None if it gave none."""
    raw_answers: tuple[str | None, ...]
    """As they were extracted."""
    correct: tuple[float, ...]
    """1.0 right, 0.0 wrong."""
    steps: tuple[tuple[str, ...], ...]

    def trajectories(self) -> list[Trajectory]:
        """Return the solutions as trajectories, in order."""
        task = Task(
            task_id=problem_id(self.problem), domain="math", prompt=self.problem, answer=self.answer
        )
        return [
            text_trajectory(trajectory_id=f"{self.name}/{n}", task=task, steps=steps)
            for n, steps in enumerate(self.steps)
        ]


def canonical_answer(answer: str) -> str:
    r"""Return the text that equal answers share: numbers by value, the rest without layout.

    Units after a number play no part.

    Examples
    --------
    >>> {canonical_answer(text) for text in ("1,000.0", r"\$1000", r"1000 \text{ m}")}
    {'1000.0'}
    >>> canonical_answer(r"\left( \dfrac12, \pi \right)")
    '(\\frac{1}{2},\\pi)'
    """
    for pattern, written in _REWRITES:
        answer = pattern.sub(written, answer)
    try:
        return repr(float(_UNIT.sub("", answer).replace(",", "")))
    except ValueError:
        return answer.casefold()


def read_pools(path: Path) -> Iterator[Pool]:
    """Read the problems of a candidate file.

    Raises
    ------
    InputError
        If a row is malformed or a solution has no verdict; names file and line.
    """
    for place, row in read_rows(path, PoolRow):
        verdicts = [_verdict(c.matches_answer, c.is_correct) for c in row.candidates]
        if None in verdicts:
            raise InputError(f"{place}: candidate {verdicts.index(None)} has no verdict")
        raw = tuple(c.extracted_answer or None for c in row.candidates)
        yield Pool(
            name=row.problem_id,
            problem=row.problem,
            answer=row.answer,
            answers=tuple(None if a is None else canonical_answer(a) for a in raw),
            raw_answers=raw,
            correct=tuple(float(v or 0.0) for v in verdicts),
            steps=tuple(tuple(c.steps) for c in row.candidates),
        )


def read_scores(path: Path) -> dict[tuple[str, int], ScoreRow]:
    """Read stored step scores by problem and candidate.

    Raises
    ------
    InputError
        If a row is malformed or repeated; names file and line.
    """
    scores: dict[tuple[str, int], ScoreRow] = {}
    for place, row in read_rows(path, ScoreRow):
        key = (row.problem_id, row.candidate_index)
        if key in scores:
            raise InputError(f"{place}: candidate {key} was scored before")
        scores[key] = row
    return scores


def _verdict(preferred: bool | None, other: bool | None) -> bool | None:
    """Return the first verdict that is there."""
    return other if preferred is None else preferred


def stored_verdict(row: ScoreRow) -> bool | None:
    """Return the verdict a score row was stored with."""
    return _verdict(row.matches_answer, row.is_correct)
