"""PRM800K phase 1, one row per rated next step, put together to trajectories.

Lightman et al., arXiv:2305.20050. A row holds the steps before (``responses``), one candidate for
the next step and its rating -1, 0 (neutral), 1 or null. The candidates of a problem form a tree;
every leaf gives one trajectory. A step that several trajectories share carries its rating in the
first of them only, so that every rating counts once, as it was given once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from trajectory.records import Task
from trajectory.step_formats.rated import RatedTrajectory, Rating, text_trajectory
from trajectory.step_formats.rows import data_files, problem_id, read_rows, stem

NAME = "prm800k"

_RATINGS: dict[int, Rating] = {-1: 0.0, 0: "neutral", 1: 1.0}


class Row(BaseModel):
    """One rated candidate for a next step."""

    instruction: str
    responses: list[str]
    next_response: str
    rating: Literal[-1, 0, 1] | None


@dataclass(slots=True)
class _Node:
    """One step in the tree of a problem."""

    children: dict[str, _Node] = field(default_factory=dict)
    ratings: set[int] = field(default_factory=set)
    place: str = ""


def read(path: Path) -> Iterator[RatedTrajectory]:
    """Read rows and yield one trajectory per leaf of each problem's tree.

    Leaves without any rating that is not shared with an earlier leaf are left out: nothing new is
    said there. A step that was rated twice and differently has no rating.

    Raises
    ------
    InputError
        If a row is malformed; names file and line.
    """
    for file in data_files(path):
        roots: dict[str, _Node] = {}
        number = 0
        for place, row in read_rows(file, Row):
            node = roots.setdefault(row.instruction, _Node())
            for text in (*row.responses, row.next_response):
                node = node.children.setdefault(text, _Node(place=place))
            if row.rating is not None:
                node.ratings.add(row.rating)
        for problem, root in roots.items():
            task = Task(task_id=problem_id(problem), domain="math", prompt=problem, answer="")
            for leaf in _leaves(root):
                number += 1
                yield _trajectory(f"{stem(file)}/{number}", task, leaf)


def _leaves(root: _Node) -> Iterator[list[tuple[str, _Node, Rating]]]:
    """Yield the paths to leaves: text, node and rating of every step, each rating once."""
    used: set[int] = set()
    stack: list[list[tuple[str, _Node]]] = [[item] for item in reversed(root.children.items())]
    while stack:
        path = stack.pop()
        node = path[-1][1]
        if node.children:
            stack.extend([*path, item] for item in reversed(node.children.items()))
            continue
        rated: list[tuple[str, _Node, Rating]] = []
        for text, step in path:
            rating = None if id(step) in used else _rating(step)
            used.add(id(step))
            rated.append((text, step, rating))
        if any(rating is not None for _, _, rating in rated):
            yield rated


def _rating(node: _Node) -> Rating:
    """Return the rating all raters of a step agree on; None if there is none."""
    return _RATINGS[next(iter(node.ratings))] if len(node.ratings) == 1 else None


def _trajectory(name: str, task: Task, leaf: list[tuple[str, _Node, Rating]]) -> RatedTrajectory:
    """Make the trajectory of one path."""
    return RatedTrajectory(
        trajectory=text_trajectory(
            trajectory_id=name, task=task, steps=[text for text, _, _ in leaf]
        ),
        ratings=tuple(rating for _, _, rating in leaf),
        source=NAME,
        place=leaf[-1][1].place,
    )
