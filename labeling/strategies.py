"""Which states are measured next, and when to stop: decisions only, nothing is run here.

A strategy sees a task's states with what was measured so far and says how many rollouts each of
them should have in all. It is asked again once those have ended, until it wants no more. What it
says depends on nothing but what it sees, so an interrupted run makes the same decisions again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    reached_right: int
    """Right ones among them."""
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
    shares: bool = True
    """Whether rollouts count for later states they come through."""


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
    """Spends rollouts where they teach most per token, and stops where enough is known.

    A state is decided when a further rollout would teach less than the ``rollouts``-th one of a
    state of value 1/2 does, when the credible interval of its value (Jeffreys' prior) is at most
    ``width`` wide or excludes ``threshold``, or at ``most`` rollouts. In each round the better half
    of the undecided states gets a batch of rollouts.

    Notes
    -----
    With posterior Beta(a, b) of a state's value and m = a + b, one more rollout lowers the expected
    posterior variance ``v = ab / (m^2 (m + 1))`` by ``v / (m + 1)``. Stopping where that falls to
    ``1 / (4 K^2)`` gives a state of value V about ``2 K sqrt(V (1 - V))`` rollouts: of all
    allocations of a number of rollouts, the one with the least mean squared error. Where states
    are shared, a rollout also teaches about the later states it comes through: the gain of a state
    is then its own plus that of its successors times the share of rollouts that reached them, and
    it is weighed against the tokens of a rollout from there, relative to the task's mean.
    """

    rollouts: int
    """K: what a state of value 1/2 gets, >= 1; others get fewer."""
    most: int
    """Rollouts of one state, at most."""
    batch: int = 8
    """Rollouts given at a time, >= 1, while a state has few."""
    width: float = 0.0
    """An interval this narrow decides a state; in [0, 1)."""
    threshold: float | None = None
    """An interval that excludes this value decides a state."""
    level: float = 0.9
    """Credibility of the interval."""
    backs_up: bool = False
    """Whether values will be estimated by `labeling.backup`: then what a rollout teaches about a
    state teaches about the earlier ones too."""

    def wanted(self, task: TaskView) -> list[int]:
        """Return what is there, plus a batch for the most instructive undecided states."""
        totals = [state.own for state in task.states]
        gains = self._gains(task)
        undecided = [
            i
            for i, state in enumerate(task.states)
            if not state.closed
            and state.own < self.most
            and not self._known(state.n, state.c)
            and (state.n == 0 or gains[i] >= self._least_gain)
        ]
        undecided.sort(key=lambda i: (-gains[i], i))
        for i in undecided[: -(-len(undecided) // 2)]:
            totals[i] = next(end for end in self.batch_ends() if end > totals[i])
        return totals

    def batch_ends(self) -> Iterator[int]:
        """Yield the numbers of rollouts at which a state is looked at again.

        Batches grow with what is there: fewer rounds, and less of the bias that comes from
        looking often.
        """
        end = 0
        while end < self.most:
            end = min(self.most, end + max(self.batch, end // 2))
            yield end

    def goes_on(self, n: int, c: int) -> bool:
        """Tell whether a state that shares nothing is undecided after ``c`` right ones of ``n``."""
        return n < self.most and not self._known(n, c) and _gain(n, c) >= self._least_gain

    @property
    def _least_gain(self) -> float:
        """What the K-th rollout of a state of value 1/2 teaches."""
        return _gain(self.rollouts, self.rollouts / 2)

    def _known(self, n: int, c: int) -> bool:
        """Tell whether the interval of a value says enough."""
        if n == 0 or (self.width == 0 and self.threshold is None):
            return False
        _, low, high = smoothed(n, c, self.level)
        excluded = self.threshold is not None and not low <= self.threshold <= high
        return high - low <= self.width or excluded

    def _gains(self, task: TaskView) -> list[float]:
        """Return what a rollout begun in each state teaches, at the price of a mean one."""
        states = task.states
        gains = [0.0 if self._known(s.n, s.c) else _gain(s.n, s.c) for s in states]
        if not task.shares:
            return gains
        shares = [_share(states, i) for i in range(len(states))]
        if self.backs_up:
            gains = _gains_of_backup(states, shares)
        for i in range(len(states) - 1, 0, -1):  # every state stands after its parent
            parent = states[i].parent
            assert parent is not None
            gains[parent] += shares[i] * gains[i]
        mean = sum(s.tokens for s in states) / len(states)
        return [gain * mean / s.tokens for gain, s in zip(gains, states, strict=True)]


def _share(states: Sequence[StateView], i: int) -> float:
    """Return the expected share of the parent's rollouts that come through a state."""
    parent = states[i].parent
    if parent is None:
        return 0.0
    return min(1.0, (states[i].reached + JEFFREYS) / (states[parent].n + 2 * JEFFREYS))


def _gains_of_backup(states: Sequence[StateView], shares: Sequence[float]) -> list[float]:
    """Return what a rollout begun in each state, and ending elsewhere, teaches about all values.

    Of a backed-up value the later states' part is known from their own rollouts; what a further
    rollout of the state itself adds is where it goes and what happens elsewhere. That lowers the
    variance of the state, and of every earlier one by the squared share that comes through.
    """
    means = [(s.c + JEFFREYS) / (s.n + 2 * JEFFREYS) for s in states]
    spread = [mean * (1 - mean) for mean in means]  # variance of one outcome
    for i, state in enumerate(states):
        if state.parent is not None:  # within what a child is known to be, outcomes tell nothing
            spread[state.parent] -= shares[i] * means[i] * (1 - means[i])
    weights = [1.0] * len(states)
    for i, state in enumerate(states):
        if state.parent is not None:
            weights[i] += shares[i] ** 2 * weights[state.parent]
    return [
        weight * max(0.0, left) / (s.n + 2) ** 2
        for weight, left, s in zip(weights, spread, states, strict=True)
    ]


def _gain(n: float, c: float) -> float:
    """Return the expected fall of the posterior variance of a value by one more rollout."""
    right, wrong = c + JEFFREYS, n - c + JEFFREYS
    size = right + wrong
    return right * wrong / (size * size * (size + 1) ** 2)


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

    def batch_ends(self) -> Iterator[int]:
        """Yield the numbers of rollouts at which a state is looked at again."""
        yield from range(self.batch, self.rollouts, self.batch)
        yield self.rollouts

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
