"""The settings of ``prm label``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from agent.setup import AgentConfig
from labeling.estimators import ALL_ESTIMATORS, BACKED_UP, STOPPED, Truncated
from labeling.states import SameState
from labeling.stopping import StoppingRule
from labeling.strategies import Adaptive, Bisect, Fixed
from trajectory.errors import InputError

FREE_SETTINGS = ("runner",)
"""Settings that say how a run is carried out, not what comes out: a run that is resumed and parts
that are merged may have others."""


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How rollouts are spread over states; see `labeling.strategies`."""

    strategy: Literal["fixed", "adaptive", "bisect"] = "fixed"
    """fixed: the same number of rollouts for every state. adaptive: where they teach most, until
    the value is known well enough. bisect: search the first step that cannot be recovered from."""
    width: float = 0.0
    """adaptive: a credible interval this narrow decides a state; 0 leaves that to --rollouts."""
    threshold: float | None = None
    """adaptive: an interval that excludes this value decides a state."""
    max_rollouts: int | None = None
    """adaptive: most continuations of one state; twice --rollouts when not given."""
    batch: int | None = None
    """adaptive, bisect: continuations of a state between two decisions; a quarter of --rollouts,
    at most 8, when not given."""
    probe: bool = True
    """bisect: check a state behind the found step, because agents recover."""

    def __post_init__(self) -> None:
        if not 0 <= self.width < 1:
            raise InputError(f"--width must be in [0, 1), not {self.width}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise InputError(f"--threshold must be in (0, 1), not {self.threshold}")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"--batch must be >= 1, not {self.batch}")


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Where episodes run. What comes out is the same, so a resumed run may change all of this."""

    runner: Literal["local", "ray"] = "local"
    """local: in this process. ray: in the workers of a Ray cluster, each with a copy of the policy
    and tools of its own."""
    ray_address: str = "auto-local"
    """auto-local: a cluster on this machine, for as long as the command runs; auto: the one that
    runs here; else HOST:PORT of its head."""
    ray_workers: int | None = None
    """Workers; one per node, or per GPU where they use some, when not given."""
    ray_cpus: float = 1.0
    """CPUs of the cluster that a worker takes."""
    ray_gpus: float | None = None
    """GPUs that a worker takes; when not given, 1 if the engine runs inside the worker
    (transformers, vllm) and the cluster has any, else 0."""
    ray_tasks_per_batch: int = 8
    """Most tasks sent to a worker at a time; it works on two such batches at once."""

    def __post_init__(self) -> None:
        if self.ray_workers is not None and self.ray_workers < 1:
            raise InputError(f"--ray-workers must be >= 1, not {self.ray_workers}")
        if self.ray_tasks_per_batch < 1:
            raise InputError(f"--ray-tasks-per-batch must be >= 1, not {self.ray_tasks_per_batch}")
        if self.ray_cpus <= 0:
            raise InputError(f"--ray-cpus must be > 0, not {self.ray_cpus}")
        if self.ray_gpus is not None and self.ray_gpus < 0:
            raise InputError(f"--ray-gpus must be >= 0, not {self.ray_gpus}")
        if self.runner == "local":
            for setting in fields(self):
                if getattr(self, setting.name) != setting.default:
                    flag = f"--{setting.name.replace('_', '-')}"
                    raise InputError(f"{flag} goes with --runner ray: add that, or leave it out")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Measure the value of every intermediate state of trajectories by Monte-Carlo rollouts."""

    agent: AgentConfig
    """Who samples and continues the trajectories."""
    out: Path
    """Folder for trajectories.jsonl, evidence.jsonl, labels.parquet and manifest.json."""
    plan: StrategyConfig = StrategyConfig()
    """How rollouts are spread over states."""
    rollouts: int = 8
    """Continuations per state: of each (fixed), of one that is as often right as wrong (adaptive;
    others get fewer), failures after which it counts as lost (bisect)."""
    same_state: SameState = "text"
    """When a continuation counts for a later state too: it came through the same turns and
    observations (text), the same calls and observations (calls), or never."""
    max_tokens: int | None = None
    """Begin nothing more once this many tokens were generated."""
    shard: str = "0/1"
    """i/n: take every n-th task from the i-th on, counted from 0; `prm merge` joins the parts."""
    keep_continuations: bool = False
    """Keep the continuations themselves, as trajectories, in continuations.jsonl."""
    samples: int = 1
    """Trajectories sampled per task."""
    trajectories: Path | None = None
    """Label the trajectories of this .jsonl file instead of sampling some."""
    observations: Literal["executed", "recorded"] = "executed"
    """Whether tools that change the world are refused, or answered from the record of
    --trajectories; a rollout that makes a call nobody recorded then counts for nothing."""
    estimator: str = "soft"
    """How counts become values: hard, soft, smoothed, backed_up, ratio or stopped."""
    level: float = 0.9
    """Coverage of the labels' intervals, in [0.5, 1)."""
    truncated: Truncated = "wrong"
    """Whether a rollout cut off by a limit counts as wrong, or not at all."""
    seed: int = 0
    """Makes runs differ; the same seed gives the same rollouts."""
    runner: RunnerConfig = RunnerConfig()
    """Where episodes run."""

    def __post_init__(self) -> None:
        if self.rollouts < 1:
            raise InputError(
                f"--rollouts must be >= 1, not {self.rollouts}: no label without a rollout"
            )
        if self.samples < 1:
            raise InputError(f"--samples must be >= 1, not {self.samples}")
        if not 0.5 <= self.level < 1:
            raise InputError(f"--level must be in [0.5, 1), not {self.level}")
        if self.estimator not in ALL_ESTIMATORS:
            raise InputError(
                f"unknown estimator {self.estimator!r}: choose from {', '.join(ALL_ESTIMATORS)}"
            )
        self._check_plan()
        if self.trajectories is not None and (
            self.samples != 1 or self.agent.num_tasks is not None or self.agent.first_task
        ):
            raise InputError(
                "--trajectories names what to label, so --num-tasks, --first-task and --samples "
                "do not apply: leave them out"
            )

    def _check_plan(self) -> None:
        """Refuse settings that do not go together."""
        most = self.plan.max_rollouts
        if most is not None and most < self.rollouts:
            raise InputError("--max-rollouts must be at least --rollouts")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError("--max-tokens must be >= 1")
        if self.max_tokens is not None and self.runner.runner == "ray":
            raise InputError(
                "--max-tokens is counted in one process, so it does not go with --runner ray: "
                "leave one of them out"
            )
        parse_shard(self.shard)
        if self.estimator == BACKED_UP and self.same_state == "never":
            raise InputError(
                "the estimator 'backed_up' needs rollouts that come through later states: leave "
                "--same-state at text or calls"
            )
        if self.estimator == STOPPED and (self.same_state != "never" or self.truncated != "wrong"):
            raise InputError(
                "the estimator 'stopped' is unbiased only if a state's rollouts stop by their own "
                "results, each of which counts: give --same-state never and --truncated wrong"
            )

    @property
    def stopping_rule(self) -> StoppingRule:
        """Why the rollouts of a state stop, from nothing but their own results."""
        strategy = self.strategy
        if isinstance(strategy, Fixed):
            return StoppingRule(goes_on=lambda n, c: True, ends=frozenset())
        return StoppingRule(goes_on=strategy.goes_on, ends=frozenset(strategy.batch_ends()))

    @property
    def strategy(self) -> Fixed | Adaptive | Bisect:
        """The strategy with its settings."""
        plan = self.plan
        batch = plan.batch or max(1, min(8, self.rollouts // 4))
        if plan.strategy == "fixed":
            return Fixed(rollouts=self.rollouts)
        if plan.strategy == "bisect":
            return Bisect(rollouts=self.rollouts, batch=batch, probe=plan.probe)
        return Adaptive(
            rollouts=self.rollouts,
            most=plan.max_rollouts or 2 * self.rollouts,
            batch=batch,
            width=plan.width,
            threshold=plan.threshold,
            level=self.level,
            backs_up=self.estimator == BACKED_UP,
        )


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``i/n``.

    Raises
    ------
    InputError
        If it is not of that form with 0 <= i < n.

    Examples
    --------
    >>> parse_shard("2/8")
    (2, 8)
    """
    index, slash, parts = text.partition("/")
    if not (slash and index.isdecimal() and parts.isdecimal() and int(index) < int(parts)):
        raise InputError(f"--shard must be i/n with i from 0 to n - 1, such as 0/4, not {text!r}")
    return int(index), int(parts)
