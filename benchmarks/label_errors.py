"""How often the search for the first error of a trajectory is wrong, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.label_pool import TaskPool
from labeling.strategies import Bisect, Fixed, Strategy

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
