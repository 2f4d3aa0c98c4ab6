"""Making and reading the folders of labelling runs."""

import dataclasses
from dataclasses import replace

from labeling.config import LabelConfig, StrategyConfig
from labeling.ledger import Rollout
from tests.labeling.walker import agent_config
from trajectory.records import Trajectory
from trajectory.store import read_jsonl


def config(lab, out, *, agent=None, **changes):
    # The walker says few different things, so most of its states would be shared.
    fields = {
        "agent": agent_config(lab, **(agent or {})),
        "out": out,
        "rollouts": 4,
        "same_state": "never",
    }
    settings = fields | changes
    names = {f.name for f in dataclasses.fields(StrategyConfig)} & settings.keys()
    plan = StrategyConfig(**{name: settings.pop(name) for name in names})
    return LabelConfig(plan=plan, **settings)


def evidence(out):
    return {(r.state, r.rollout, r.attempt): r for r in read_jsonl(out / "evidence.jsonl", Rollout)}


def trajectories(out):
    return {t.trajectory_id: t for t in read_jsonl(out / "trajectories.jsonl", Trajectory)}


def timeless(out):
    """The trajectories without the seconds their calls took."""
    return {
        name: replace(
            trajectory,
            steps=tuple(
                replace(s, observations=tuple(replace(o, seconds=0) for o in s.observations))
                for s in trajectory.steps
            ),
        )
        for name, trajectory in trajectories(out).items()
    }
