"""Which states are measured next, and when to stop: decisions only, nothing is run here.

A strategy sees a task's states with what was measured so far and says how many rollouts each of
them should have in all. It is asked again once those have ended, until it wants no more. What it
says depends on nothing but what it sees, so an interrupted run makes the same decisions again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from labeling.estimators import JEFFREYS, smoothed


@dataclass(frozen=True, kw_only=True, slots=True)
class StateView:
    """What is known of one state."""

    n: int
    """Usable rollouts: those begun here, and those of earlier states that came through."""
    c: int
    """Right ones among them."""
    own: int
    """Rollouts begun here that are settled, of any ending."""
    parent: int | None
    """Index of the state one step before; None for the task's prompt."""
    reached: int
    """Usable rollouts of earlier states that came through here."""
    tokens: float
    """Expected tokens of a rollout from here, > 0."""
    closed: bool = False
    """Whether the state cannot be restored, so that no rollout may begin here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PathView:
    """One trajectory."""

    states: tuple[int, ...]
    """Indices of its states, from the prompt on, without the end of a finished one."""
    right: bool
    """Whether it ended with the right answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskView:
    """The states of the trajectories of one task."""

    states: tuple[StateView, ...]
    """The prompt first, every state after its parent."""
    paths: tuple[PathView, ...]


class Strategy(Protocol):
    """Decides how many rollouts each state of a task gets."""

    def wanted(self, task: TaskView) -> list[int]:
        """Return, per state, how many rollouts should begin there in all.

        No number is below the state's ``own``; if each equals it, the task is done.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """The same number of rollouts for every state."""

    rollouts: int
    """K, >= 1."""

    def wanted(self, task: TaskView) -> list[int]:
        """Return K for every state that can be restored."""
        return [s.own if s.closed else max(s.own, self.rollouts) for s in task.states]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptive:
    """Spends a task's rollouts where they teach most per token, and stops where enough is known.

    A state is decided when the credible interval of its value (Jeffreys' prior) is at most
    ``width`` wide, when the interval excludes ``threshold``, or at ``most`` rollouts. Of the
    undecided states the better half by *gain per token* gets ``batch`` rollouts more, until the
    task has spent ``rollouts`` per state on average.

    Notes
    -----
    With posterior Beta(a, b) of a state's value and m = a + b, a further batch of k rollouts lowers
    the expected posterior variance ``ab / (m^2 (m + 1))`` by the factor ``m / (m + k)``. A rollout
    that comes through a later state teaches about that one as well, so the gain of a state is its
    own plus that of its successors times the share of rollouts that reached them. Dividing by the
    tokens of a rollout makes the allocation approach the one that minimises the mean squared error
    of a task's labels at given cost, ``n_i ~ sqrt(V_i (1 - V_i) / tokens_i)``.
    """

    rollouts: int
    """Mean budget per state, >= 1."""
    most: int
    """Rollouts of one state, at most."""
    batch: int = 4
    """Rollouts given at a time, >= 1."""
    width: float = 0.2
    """An interval this narrow decides a state; in [0, 1)."""
    threshold: float | None = None
    """An interval that excludes this value decides a state; None: only its width does."""
    level: float = 0.9
    """Credibility of the interval."""
    pooled: bool = True
    """Whether the states of a task share a budget. If not, each goes on until it is decided: then
    its stopping depends on its own rollouts alone, which the ``stopped`` estimator needs."""

    def wanted(self, task: TaskView) -> list[int]:
        """Return what is there, plus a batch for the most instructive undecided states."""
        totals = [state.own for state in task.states]
        left = self.rollouts * len(totals) - sum(totals) if self.pooled else math.inf
        undecided = [i for i, s in enumerate(task.states) if self.undecided(s)]
        if self.pooled:
            gain = self._gains(task.states)
            undecided.sort(key=lambda i: (-gain[i] / task.states[i].tokens, i))
            undecided = undecided[: -(-len(undecided) // 2)]
        for i in undecided:
            more = int(min(self.batch, self.most - totals[i], left))
            totals[i] += more
            left -= more
        return totals

    def undecided(self, state: StateView) -> bool:
        """Tell whether a state needs more rollouts."""
        return not state.closed and state.own < self.most and self.goes_on(state.n, state.c)

    def goes_on(self, n: int, c: int) -> bool:
        """Tell whether ``c`` right ones of ``n`` rollouts leave a state undecided."""
        if n == 0:
            return True
        _, low, high = smoothed(n, c, self.level)
        if high - low <= self.width:
            return False
        return self.threshold is None or low <= self.threshold <= high

    def _gains(self, states: Sequence[StateView]) -> list[float]:
        """Return the expected fall of posterior variance that a batch begun in a state brings."""
        gains = []
        for s in states:
            right, wrong = s.c + JEFFREYS, s.n - s.c + JEFFREYS
            size = right + wrong
            variance = right * wrong / (size * size * (size + 1))
            gains.append(variance * self.batch / (size + self.batch) if self.undecided(s) else 0.0)
        for i in range(len(states) - 1, 0, -1):  # every state stands after its parent
            s = states[i]
            assert s.parent is not None
            share = (s.reached + JEFFREYS) / (states[s.parent].n + 2 * JEFFREYS)
            gains[s.parent] += min(1.0, share) * gains[i]
        return gains


@dataclass(frozen=True, kw_only=True, slots=True)
class Bisect:
    """Searches the first step of each wrong trajectory after which no rollout succeeds.

    A state is *alive* after its first success and *dead* after ``rollouts`` failures. The search
    halves the distance between a state that is alive and one that is dead. That is right if no
    state after a dead one is alive; agents that recover, and rollouts too few to find a rare
    success, break it. With ``probe`` one state behind the found step is measured: if that is
    alive, every state of the trajectory is.

    Notes
    -----
    Sampling ends at a success, so ``c / n`` of a measured state is too high on average: use the
    estimators ``hard`` or ``stopped``. States that were not measured have no value. Trajectories
    that ended right are passed over: every state of theirs is alive, as they show themselves.

    References
    ----------
    .. [1] Luo et al., OmegaPRM, arXiv:2406.06592, section 3.2 (binary search).
    """

    rollouts: int
    """Failures after which a state is dead, >= 1."""
    batch: int = 4
    """Rollouts given at a time, >= 1."""
    probe: bool = True

    def wanted(self, task: TaskView) -> list[int]:
        """Return what is there, plus what each trajectory's search needs next."""
        totals = [state.own for state in task.states]
        for path in task.paths:
            for i in () if path.right else self._next(task.states, path.states):
                state = task.states[i]
                totals[i] = state.own + min(self.batch, self.rollouts - state.n)
        return totals

    def goes_on(self, n: int, c: int) -> bool:
        """Tell whether a state is neither alive nor dead yet."""
        return c == 0 and n < self.rollouts

    def found(self, states: Sequence[StateView], path: Sequence[int]) -> int | None:
        """Return the step after which ``path`` stays dead, counted from 1; None if unknown.

        ``len(path)`` is the last step. Unknown also if the prompt is dead, and if a state that the
        search needs could not be restored.
        """
        low, high = self._bounds(states, path)
        if self._next(states, path) or not states[path[0]].c or high - low > 1:
            return None
        if self._scans(states, path):
            return max(p for p, i in enumerate(path) if states[i].c) + 1
        return high

    def _next(self, states: Sequence[StateView], path: Sequence[int]) -> list[int]:
        """Return the states to measure next; none when the search is over."""
        if self._open(states[path[0]]):
            return [path[0]]
        if not states[path[0]].c:
            return []
        low, high = self._bounds(states, path)
        if high - low > 1:
            return [path[(low + high) // 2]] if self._open(states[path[(low + high) // 2]]) else []
        if not self.probe:
            return []
        probe = self._probe(path, high)
        if probe is None:
            return []
        if self._open(states[probe]):
            return [probe]
        if self._scans(states, path):
            return [i for i in path if self._open(states[i])]
        return []

    def _bounds(self, states: Sequence[StateView], path: Sequence[int]) -> tuple[int, int]:
        """Return the prefixes between which the search stands: alive, dead."""
        low, high = 0, len(path)
        while high - low > 1:
            middle = (low + high) // 2
            state = states[path[middle]]
            if state.c:
                low = middle
            elif self.goes_on(state.n, state.c):
                break
            else:
                high = middle
        return low, high

    def _probe(self, path: Sequence[int], found: int) -> int | None:
        """Return the state halfway between the found step and the end, if there is one."""
        probe = (found + len(path)) // 2
        return path[probe] if found < probe < len(path) else None

    def _scans(self, states: Sequence[StateView], path: Sequence[int]) -> bool:
        """Tell whether the probe has shown that the trajectory came back to life."""
        low, high = self._bounds(states, path)
        probe = self._probe(path, high) if self.probe and high - low == 1 else None
        return probe is not None and states[probe].c > 0

    def _open(self, state: StateView) -> bool:
        """Tell whether a state is neither alive nor dead yet, and can be measured.

        Rollouts that broken tools ended are no failures of the state, but not repeated for ever.
        """
        given_up = state.closed or state.own >= 2 * self.rollouts
        return not given_up and self.goes_on(state.n, state.c)
