"""The states of one task's trajectories, and what is known of each: counts, decisions, evidence.

A state stands once however many trajectories pass through it (`labeling.states`); the first of
them owns its rollouts. A rollout counts for the state it began in and for every later state of the
task that it came through: from there on it is a rollout of that state too, drawn by the same
policy, so the counts stay unbiased.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from agent.episode import Prefix
from labeling.evidence import Counts, open_prefixes, terminal_counts
from labeling.ledger import ATTEMPTS, Rollout, State
from labeling.states import SameState, state_digests
from labeling.strategies import PathView, StateView, Strategy, TaskView
from trajectory.errors import InputError
from trajectory.records import Sampling, StepEvidence, Task, Trajectory


@dataclass(kw_only=True, slots=True)
class Node:
    """One state and its counts."""

    state: State
    start: Prefix | None
    """What to continue; None for the task's prompt."""
    parent: int | None
    tokens_ahead: int
    """Tokens that the trajectory itself went on for: the first guess at a rollout's cost."""
    own: Counts = field(default_factory=Counts)
    """Rollouts that began here."""
    reused: Counts = field(default_factory=Counts)
    """Rollouts that came through here."""
    abandoned: bool = False
    """Whether the state could not be restored as it was recorded."""

    @property
    def counts(self) -> Counts:
        """All evidence of this state.

        Of a state that could not be restored, the rollouts that began in it are none: those that
        needed the tool failed, and the rest are a choice of those that did without.
        """
        return self.reused if self.abandoned else self.own + self.reused


class TaskWork:
    """Everything that is measured for one task.

    Parameters
    ----------
    task : Task
        The task.
    trajectories : sequence of Trajectory
        Its trajectories in a fixed order; those that broken infrastructure ended are counted and
        left out.
    max_steps : int
        Step limit of the continuing agent.
    same : SameState
        What makes two states one.
    """

    def __init__(
        self, task: Task, trajectories: Sequence[Trajectory], *, max_steps: int, same: SameState
    ) -> None:
        self.task = task
        self._same = same
        self.trajectories = tuple(t for t in trajectories if not t.stop.failed)
        self.num_failed = len(trajectories) - len(self.trajectories)
        first = self.trajectories[0].num_generated_tokens if self.trajectories else 0
        self.nodes = [Node(state=(task.task_id, 0), start=None, parent=None, tokens_ahead=first)]
        self.paths: list[list[int]] = []
        self._by_digest: dict[str, int] = {}
        self._by_state: dict[State, int] = {self.nodes[0].state: 0}
        for trajectory in self.trajectories:
            self._add(trajectory, max_steps)

    def _add(self, trajectory: Trajectory, max_steps: int) -> None:
        """Add the states of one trajectory that are not there yet."""
        path = [0]
        digests = state_digests(self.task.task_id, trajectory.steps, self._same)
        for prefix in open_prefixes(trajectory, max_steps):
            digest = digests[prefix - 1] if digests else None
            index = self._by_digest.get(digest) if digest is not None else None
            if index is None:
                index = len(self.nodes)
                ahead = sum(len(s.token_ids or ()) for s in trajectory.steps[prefix:])
                node = Node(
                    state=(trajectory.trajectory_id, prefix),
                    start=Prefix(trajectory=trajectory, steps=prefix),
                    parent=path[-1],
                    tokens_ahead=ahead,
                )
                self.nodes.append(node)
                self._by_state[node.state] = index
                if digest is not None:
                    self._by_digest[digest] = index
            path.append(index)
        self.paths.append(path)

    def path(self, trajectory: Trajectory) -> list[int]:
        """Return the indices of a trajectory's states, from the prompt on, its end left out."""
        names = [t.trajectory_id for t in self.trajectories]
        return self.paths[names.index(trajectory.trajectory_id)]

    def count(self, rollout: Rollout) -> None:
        """Count a rollout for its state and for those it came through.

        Raises
        ------
        InputError
            If it began in a state that none of the trajectories has.
        """
        place = self._by_state.get(rollout.state)
        if place is None:
            owner, prefix = rollout.state
            raise InputError(
                f"a rollout is recorded of {owner!r} after step {prefix}, a state that no recorded "
                "trajectory has: evidence and trajectories are not of one run"
            )
        node = self.nodes[place]
        node.own.add(rollout)
        node.abandoned |= rollout.abandons
        if not rollout.settled or rollout.stop.failed:
            return
        for digest in rollout.reached:
            index = self._by_digest.get(digest)
            if index is not None:
                self.nodes[index].reused.add_passing(rollout)

    def view(self, *, exclude_truncated: bool) -> TaskView:
        """Return what a strategy sees."""
        states = []
        for node in self.nodes:
            n, c = node.counts.usable(exclude_truncated=exclude_truncated)
            own = node.own
            # One rollout's worth of the trajectory's own length steadies the mean at the start.
            tokens = (own.tokens + node.tokens_ahead) / (own.rollouts + 1)
            states.append(
                StateView(
                    n=n,
                    c=c,
                    own=own.rollouts,
                    parent=node.parent,
                    reached=node.reused.usable(exclude_truncated=exclude_truncated)[0],
                    reached_right=node.reused.correct,
                    tokens=max(1.0, tokens),
                    closed=node.abandoned,
                )
            )
        paths = [
            PathView(states=tuple(path), right=_is_right(trajectory))
            for path, trajectory in zip(self.paths, self.trajectories, strict=True)
        ]
        return TaskView(states=tuple(states), paths=tuple(paths), shares=self._same != "never")

    def evidence(
        self,
        trajectory: Trajectory,
        *,
        rollouts: int,
        completer: str,
        sampling: Sampling,
    ) -> StepEvidence:
        """Return the counts of every prefix 0..S of one of the trajectories.

        Parameters
        ----------
        trajectory : Trajectory
            One of those given.
        rollouts : int
            K: what the end of a trajectory, its own continuation, counts for.
        completer : str
            Who wrote the rollouts.
        sampling : Sampling
            How.

        Returns
        -------
        StepEvidence
            ``tokens`` holds all tokens its counts cost, those of shared states included, so summed
            over the trajectories of a task it counts these more than once.
        """
        path = self.path(trajectory)
        counts = [self.nodes[i].counts for i in path]
        reused = [self.nodes[i].reused.rollouts for i in path]
        if len(counts) == trajectory.num_steps:
            counts.append(terminal_counts(trajectory, rollouts))
            reused.append(0)
        return StepEvidence(
            trajectory_id=trajectory.trajectory_id,
            rollouts=tuple(c.rollouts for c in counts),
            correct=tuple(c.correct for c in counts),
            truncated=tuple(c.truncated for c in counts),
            failed=tuple(c.failed for c in counts),
            completer=completer,
            sampling=sampling,
            tokens=sum(self.nodes[i].own.tokens for i in path),
            reused=tuple(reused),
        )


class Rounds:
    """Runs a strategy over one task: rollouts are asked for in rounds, until it wants no more.

    A round ends when all its rollouts have. What a round asks for therefore depends on the
    rollouts of earlier rounds alone, never on which ended first, and a resumed run, which finds
    some of them recorded, asks for the same ones. Attempts that are repeated play no part in it:
    when they are recorded is a matter of chance.

    Parameters
    ----------
    work : TaskWork
        Nothing counted yet.
    strategy : Strategy
        Decides.
    recorded : iterable of Rollout
        Those of the task that an earlier start wrote.
    exclude_truncated : bool
        Whether a rollout that a limit cut off is left out of what the strategy sees.
    """

    def __init__(
        self,
        work: TaskWork,
        strategy: Strategy,
        recorded: Iterable[Rollout],
        *,
        exclude_truncated: bool,
    ) -> None:
        self.work = work
        self._strategy = strategy
        self._exclude_truncated = exclude_truncated
        self._recorded: dict[tuple[State, int], list[Rollout]] = {}
        for rollout in recorded:
            self._recorded.setdefault((rollout.state, rollout.rollout), []).append(rollout)
        self._running: set[tuple[State, int]] = set()
        self._ended: list[Rollout] = []

    def next_round(self) -> list[tuple[Node, int, int]]:
        """Return the (state, index, attempt) of the rollouts to run; empty when all is done."""
        if self._running:
            return []
        while True:
            asked = list(self._asked())
            if not asked:
                return []
            missing = []
            for node, index in asked:
                lines = self._recorded.pop((node.state, index), [])
                settled = [line for line in lines if line.settled]
                self._ended += settled
                if not settled:
                    missing.append((node, index, min(len(lines), ATTEMPTS - 1)))
            if missing:
                self._running = {(node.state, index) for node, index, _ in missing}
                return missing
            self._count()

    def ended(self, rollout: Rollout) -> bool:
        """Take a rollout; return whether it was the last of its round."""
        if not rollout.settled:
            return False
        self._ended.append(rollout)
        self._running.discard((rollout.state, rollout.rollout))
        if self._running:
            return False
        self._count()
        return True

    def _asked(self) -> Iterator[tuple[Node, int]]:
        """Yield what the strategy wants beyond what is counted, short prefixes first."""
        view = self.work.view(exclude_truncated=self._exclude_truncated)
        wanted = self._strategy.wanted(view)
        for node, total in zip(self.work.nodes, wanted, strict=True):
            for index in range(node.own.rollouts, total):
                yield node, index

    def _count(self) -> None:
        """Count the rollouts of a finished round, in the order of their keys."""
        for rollout in self._ended:
            self.work.count(rollout)
        self._ended.clear()


def _is_right(trajectory: Trajectory) -> bool:
    """Tell whether a trajectory ended with the right answer."""
    return trajectory.outcome is not None and trajectory.outcome >= 0.5
