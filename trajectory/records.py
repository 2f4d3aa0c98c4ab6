"""The records that flow between all stages, and their invariants.

Dimension letters used across the project: B batch, T tokens, S steps, G group, K rollouts,
D hidden, V vocabulary.

*Prefix* ``t`` of a trajectory with S steps is the state after step ``t`` and its observations;
prefix 0 is the task prompt alone. Evidence, labels and scores are all indexed by prefix, so each
holds S + 1 entries, ``values[t - 1]`` is the value before step ``t`` and ``values[t]`` the value
after it, and progress ``values[t] - values[t - 1]`` exists for every step.

The unit of scoring is the step (thought + tool calls + observations); where it makes several calls,
each of them is scored beside it. Boundaries are structural: no separator token exists that a tool's
output could forge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"


class StopReason(StrEnum):
    """Why an episode ended."""

    ANSWERED = "answered"
    """The agent gave a final answer; the checker judged it."""
    MALFORMED = "malformed"
    """The last turn held neither a tool call nor an answer; judged wrong."""
    MAX_STEPS = "max_steps"
    """Cut off at the step limit: no answer, hence no verdict."""
    MAX_TOKENS = "max_tokens"
    """Cut off at the token limit of a turn or of the context: no verdict."""
    TOOL_FAILURE = "tool_failure"
    """A tool's infrastructure broke (not the model's mistake): no verdict."""
    ENGINE_FAILURE = "engine_failure"
    """The generation engine broke: no verdict."""

    @property
    def judged(self) -> bool:
        """Whether the checker gave a verdict, so that ``outcome`` is a number."""
        return self in (StopReason.ANSWERED, StopReason.MALFORMED)

    @property
    def truncated(self) -> bool:
        """Whether a limit cut the episode off."""
        return self in (StopReason.MAX_STEPS, StopReason.MAX_TOKENS)

    @property
    def failed(self) -> bool:
        """Whether broken infrastructure ended the episode."""
        return self in (StopReason.TOOL_FAILURE, StopReason.ENGINE_FAILURE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One problem with a checkable answer."""

    task_id: str
    """Durable id: the data set's own id, or a hash of the content."""
    domain: str
    """Name of the task domain whose checker judges it."""
    prompt: str
    """What the agent is asked."""
    answer: str
    """Gold answer in the domain's canonical form; never shown to the agent."""
    meta: Mapping[str, JsonValue] = field(default_factory=dict)
    """Whatever else the domain needs (gold programs, split, difficulty)."""

    def __post_init__(self) -> None:
        if not self.task_id:
            raise ValueError("a task needs a non-empty task_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call as the model wrote it."""

    name: str
    """Tool name; may name no existing tool (then the observation says so)."""
    arguments: str
    """Arguments as the JSON text of an object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What a tool call returned to the model."""

    content: str
    """Text shown to the model."""
    error: str | None = None
    """Error class (``timeout``, ``bad_arguments``, ``ValueError`` ...); None on success."""
    seconds: float = 0.0
    """Wall-clock time of the call, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One assistant turn, its tool calls and their observations."""

    text: str
    """The whole turn as text, thought and calls included, without the end-of-turn token."""
    calls: tuple[ToolCall, ...] = ()
    observations: tuple[Observation, ...] = ()
    """One per call, in call order."""
    token_ids: tuple[int, ...] | None = None
    """Ids as sampled, end-of-turn id included; None when the text came without ids."""
    logprobs: tuple[float, ...] | None = None
    """Natural-log probability of each id of ``token_ids`` under the sampling distribution."""
    observation_ids: tuple[int, ...] | None = None
    """Ids appended after the turn: tool results and the next turn's header; never trained on."""
    perturbation: str | None = None
    """Tag of an injected fault in this step (for example ``wrong_operand``); None if natural."""

    def __post_init__(self) -> None:
        if len(self.calls) != len(self.observations):
            raise ValueError(
                f"a step needs one observation per call: {len(self.calls)} calls, "
                f"{len(self.observations)} observations"
            )
        if self.logprobs is not None and (
            self.token_ids is None or len(self.logprobs) != len(self.token_ids)
        ):
            ids = "no" if self.token_ids is None else str(len(self.token_ids))
            raise ValueError(f"logprobs must align: {len(self.logprobs)} for {ids} token ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a turn is sampled."""

    temperature: float = 1.0
    """Softmax temperature, >= 0; 0 is greedy."""
    max_tokens: int = 512
    """Most new tokens in one turn, >= 1."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 is off."""
    top_k: int = 0
    """Most likely tokens kept; 0 is off."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, not {self.temperature}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, not {self.max_tokens}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, not {self.top_k}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One episode of an agent on one task."""

    trajectory_id: str
    task: Task
    steps: tuple[Step, ...]
    stop: StopReason
    answer: str | None = None
    """Final answer extracted from the last turn; None if there was none."""
    outcome: float | None = None
    """The checker's verdict in [0, 1]; None where the episode was cut off or infrastructure
    failed: truncated is not wrong, and a dead tool is not a bad step."""
    group: str = ""
    """Trajectories with the same group were sampled for one task under one policy."""
    policy: str = ""
    """Name or path of the model that acted; ``demonstrator`` and the like for programs."""
    policy_revision: str = ""
    """Which weights: an RL step or a content hash."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    tools: tuple[str, ...] = ()
    """Names of the tools on offer."""
    tools_hash: str = ""
    """Hash of their schemas."""
    prompt_ids: tuple[int, ...] | None = None
    """Ids the first turn was sampled after; None when the text came without ids."""
    meta: Mapping[str, JsonValue] = field(default_factory=dict)
    """Facts a reader may need later: isolation of the sandbox, data source."""

    def __post_init__(self) -> None:
        if not self.trajectory_id:
            raise ValueError("a trajectory needs a non-empty trajectory_id")
        if self.stop.judged != (self.outcome is not None):
            raise ValueError(
                f"{self.trajectory_id}: stop {self.stop.value!r} does not go with outcome "
                f"{self.outcome}: judged episodes have one, others have None"
            )
        if self.outcome is not None and not 0 <= self.outcome <= 1:
            raise ValueError(f"{self.trajectory_id}: outcome {self.outcome} is not in [0, 1]")

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.steps)

    @property
    def has_ids(self) -> bool:
        """Whether the exact token ids of the whole trajectory are known."""
        return self.prompt_ids is not None and all(s.token_ids is not None for s in self.steps)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens the model wrote; 0 where ids are unknown."""
        return sum(len(s.token_ids or ()) for s in self.steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvidence:
    """Monte-Carlo counts for every prefix of one trajectory: counts, never only a ratio."""

    trajectory_id: str
    rollouts: tuple[int, ...]
    """Continuations run from each prefix 0..S, of any ending."""
    correct: tuple[int, ...]
    """Continuations judged right (outcome >= 0.5)."""
    truncated: tuple[int, ...]
    """Continuations cut off by a limit."""
    failed: tuple[int, ...]
    """Continuations ended by broken infrastructure."""
    completer: str
    """Model that wrote the continuations."""
    sampling: Sampling
    tokens: int
    """Tokens generated for this evidence."""
    reused: tuple[int, ...] = ()
    """How many of the rollouts of each prefix began at an earlier one and came through it; empty
    if none was looked for."""

    def __post_init__(self) -> None:
        if self.reused and len(self.reused) != len(self.rollouts):
            raise ValueError(
                f"{self.trajectory_id}: reused has {len(self.reused)} counts, rollouts "
                f"{len(self.rollouts)}"
            )
        lengths = {len(self.rollouts), len(self.correct), len(self.truncated), len(self.failed)}
        if len(lengths) != 1:
            raise ValueError(f"{self.trajectory_id}: counts of different lengths {lengths}")
        for t, (n, c, u, f) in enumerate(
            zip(self.rollouts, self.correct, self.truncated, self.failed, strict=True)
        ):
            if min(n, c, u, f) < 0 or c + u + f > n:
                raise ValueError(
                    f"{self.trajectory_id}: prefix {t}: correct {c} + truncated {u} + failed {f} "
                    f"exceed rollouts {n}, or a count is negative"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLabels:
    """Estimated value of every prefix of one trajectory, with its interval."""

    trajectory_id: str
    estimator: str
    values: tuple[float | None, ...]
    """Per prefix 0..S, in [0, 1]; None means unknown, never 0."""
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if not len(self.values) == len(self.low) == len(self.high):
            raise ValueError(f"{self.trajectory_id}: values and interval of different lengths")
        for t, (v, lo, hi) in enumerate(zip(self.values, self.low, self.high, strict=True)):
            if (v is None) != (lo is None) or (v is None) != (hi is None):
                raise ValueError(f"{self.trajectory_id}: prefix {t}: value without interval")
            if lo is not None and hi is not None and not 0 <= lo <= hi <= 1:
                raise ValueError(f"{self.trajectory_id}: prefix {t}: interval ({lo}, {hi})")
            if v is not None and not 0 <= v <= 1:
                raise ValueError(f"{self.trajectory_id}: prefix {t}: value {v} not in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepScores:
    """What a PRM says of every prefix of one trajectory, and of every call inside its steps."""

    trajectory_id: str
    checkpoint: str
    """Content hash of the PRM."""
    values: tuple[float, ...]
    """Per prefix 0..S, in [0, 1], order kept."""
    kind: str
    """``value`` (probability of eventual success) or ``correctness`` (of the step itself)."""
    position: str
    """``observation`` (scored after seeing the result) or ``action`` (before)."""
    calls: tuple[tuple[float, ...], ...] = ()
    """Per step 1..S one score per call, in call order, as of the moment when the results of the
    turn's calls up to this one are known; a step's last is its own, ``values[t]``. () for a step
    without calls. Empty in files written before calls were scored."""

    def __post_init__(self) -> None:
        if self.calls and len(self.calls) != len(self.values) - 1:
            raise ValueError(
                f"{self.trajectory_id}: scores of the calls of {len(self.calls)} steps, but "
                f"{len(self.values)} prefixes"
            )
        for t, scores in enumerate(self.calls, start=1):
            if scores and scores[-1] != self.values[t]:
                raise ValueError(
                    f"{self.trajectory_id}: step {t} scores {self.values[t]}, but its last call "
                    f"{scores[-1]}: both are of the state after the step"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledTrajectory:
    """A trajectory with its evidence and its labels: one training row of a PRM."""

    trajectory: Trajectory
    evidence: StepEvidence
    """Counts for prefixes 0..S."""
    labels: StepLabels
    """Estimates from those counts, for prefixes 0..S."""

    def __post_init__(self) -> None:
        name, size = self.trajectory.trajectory_id, self.trajectory.num_steps + 1
        parts = (
            ("evidence", self.evidence.trajectory_id, len(self.evidence.rollouts)),
            ("labels", self.labels.trajectory_id, len(self.labels.values)),
        )
        for part, part_id, length in parts:
            if part_id != name:
                raise ValueError(f"{name}: its {part} belong to {part_id!r}")
            if length != size:
                raise ValueError(
                    f"{name}: {part} for {length} prefixes, but {size - 1} steps have {size}"
                )
