"""How often the search for the first error of a trajectory is wrong, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from statistics import fmean

from benchmarks.label_pool import TaskPool
from labeling.strategies import Bisect, Fixed, PathView, StateView, Strategy, TaskView

ALIVE = 0.05
"""A state is alive if its true value is at least this. Rarer successes are not found by a few
rollouts, and a step after which one in fifty agents succeeds is an error for every purpose."""
FAILURES = (4, 8, 16)
"""Failures after which a strategy takes a state for dead."""


def first_errors(pools: Sequence[TaskPool], *, seeds: int) -> list[dict[str, object]]:
    """Compare scan and bisection, with and without the probe, on the wrong trajectories.

    Parameters
    ----------
    pools : sequence of TaskPool
        Trajectories with the true values of their states.
    seeds : int
        Simulated runs.

    Returns
    -------
    list of dict
        Per method and number of failures: ``wrong`` (share of trajectories whose found step is not
        the true one, or that found none), the same among those that recover (``wrong_recovering``,
        None if there are none), ``trajectories``, ``recovering`` and ``tokens`` per trajectory.
        The true step is the one after the last state that is alive.
    """
    rows: list[dict[str, object]] = []
    for failures in FAILURES:
        methods: dict[str, Strategy] = {
            "scan": Fixed(rollouts=failures),
            "bisect without probe": Bisect(rollouts=failures, probe=False),
            "bisect": Bisect(rollouts=failures),
        }
        for name, strategy in methods.items():
            wrong: list[tuple[bool, bool]] = []
            tokens = 0
            for seed in range(seeds):
                for pool in pools:
                    found, spent = _search(pool, strategy, failures, seed)
                    wrong += found
                    tokens += spent
            recovering = [missed for missed, recovers in wrong if recovers]
            rows.append(
                {
                    "method": name,
                    "failures": failures,
                    "wrong": fmean(missed for missed, _ in wrong) if wrong else None,
                    "wrong_recovering": fmean(recovering) if recovering else None,
                    "trajectories": len(wrong) // seeds,
                    "recovering": len(recovering) // seeds,
                    "tokens": tokens / max(1, len(wrong)),
                }
            )
    return rows


def recovery_errors(*, trajectories: int = 500, seed: int = 0) -> list[dict[str, object]]:
    """Compare the same methods on made-up trajectories whose agent may come back to life.

    Each has 12 states. Alive ones succeed with probability 0.7. After the first error, at a random
    step, states are dead; with probability ``recovery`` three states or more later the rest is
    alive again, until a second error. The true step is the last error.

    Returns
    -------
    list of dict
        Per ``recovery`` and method: ``wrong``, and ``states`` measured per trajectory.
    """
    rows: list[dict[str, object]] = []
    for recovery in (0.0, 0.2, 0.5):
        methods: dict[str, Strategy] = {
            "scan": Fixed(rollouts=8),
            "bisect without probe": Bisect(rollouts=8, probe=False),
            "bisect": Bisect(rollouts=8),
        }
        for name, strategy in methods.items():
            rng = Random(seed)  # noqa: S311
            outcomes = [_made_up(strategy, recovery, rng) for _ in range(trajectories)]
            rows.append(
                {
                    "recovery": recovery,
                    "method": name,
                    "wrong": fmean(missed for missed, _ in outcomes),
                    "states": fmean(measured for _, measured in outcomes),
                    "trajectories": trajectories,
                }
            )
    return rows


def _made_up(strategy: Strategy, recovery: float, rng: Random) -> tuple[bool, int]:
    """Search one made-up trajectory; return whether the step is missed, and states measured."""
    size = 12
    error = rng.randrange(1, size + 1)
    values = [0.7] * error + [0.0] * (size - error)
    if rng.random() < recovery and error + 4 < size:
        back = rng.randrange(error + 3, size - 1)
        error = rng.randrange(back + 1, size + 1)
        values[back:error] = [0.7] * (error - back)
    counts = [[0, 0] for _ in values]
    while True:
        view = _chain(counts)
        wanted = strategy.wanted(view)
        if wanted == [n for n, _ in counts]:
            break
        for entry, value, total in zip(counts, values, wanted, strict=True):
            entry[1] += sum(rng.random() < value for _ in range(total - entry[0]))
            entry[0] = total
    path = view.paths[0].states
    if isinstance(strategy, Bisect):
        found = strategy.found(view.states, path)
    else:
        found = max((p for p, (_, c) in enumerate(counts) if c), default=-1) + 1 or None
    return found != error, sum(n > 0 for n, _ in counts)


def _chain(counts: Sequence[Sequence[int]]) -> TaskView:
    """Make the view of one wrong trajectory whose states share nothing."""
    states = tuple(
        StateView(
            n=n, c=c, own=n, parent=i - 1 if i else None, reached=0, reached_right=0, tokens=1.0
        )
        for i, (n, c) in enumerate(counts)
    )
    path = PathView(states=tuple(range(len(states))), right=False)
    return TaskView(states=states, paths=(path,), shares=False)


def _search(
    pool: TaskPool, strategy: Strategy, failures: int, seed: int
) -> tuple[list[tuple[bool, bool]], int]:
    """Search the wrong trajectories of one task; return (missed, recovers) of each, and tokens."""
    work = pool.simulate(strategy, same="never", seed=seed)
    view = work.view(exclude_truncated=False)
    found: list[tuple[bool, bool]] = []
    tokens = 0
    for path_view, path in zip(view.paths, work.paths, strict=True):
        if path_view.right:
            continue
        alive = [pool.truth[work.nodes[i].state].value >= ALIVE for i in path]
        if not alive[0]:
            continue  # a task the policy never solves has no first error
        true_step = max(p for p, lives in enumerate(alive) if lives) + 1
        recovers = not all(alive[:true_step])
        if isinstance(strategy, Bisect):
            step = strategy.found(view.states, path_view.states)
        else:
            living = [p for p, i in enumerate(path) if view.states[i].c]
            step = max(living) + 1 if living else None
        found.append((step != true_step, recovers))
        tokens += sum(work.nodes[i].own.tokens for i in path)
    return found, tokens
