"""Records for tests: one ordinary example of each, and hypothesis strategies for all of them."""

from typing import Any

from hypothesis import strategies as st

from trajectory.records import (
    LabelledTrajectory,
    Observation,
    Sampling,
    Step,
    StepEvidence,
    StepLabels,
    StepScores,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
)


def make_step(number: int = 1, **changes: Any) -> Step:
    """A step that calls the calculator once."""
    call = ToolCall(name="calculator", arguments=f'{{"expression": "{number}+1"}}')
    written = f'{{"name": "calculator", "arguments": {call.arguments}}}'
    fields: dict[str, Any] = {
        "text": f"Add one.\n<tool_call>\n{written}\n</tool_call>",
        "calls": (call,),
        "observations": (Observation(content=str(number + 1), seconds=0.25),),
        "token_ids": (5, 6, 7),
        "logprobs": (-0.1, -0.25, -1 / 3),
        "observation_ids": (8, 9),
    }
    return Step(**(fields | changes))


def make_trajectory(num_steps: int = 2, **changes: Any) -> Trajectory:
    """A judged trajectory whose last step is the answer."""
    last = Step(text="The answer is 3.", token_ids=(1, 2), logprobs=(-0.5, 0.0))
    steps = (*(make_step(n + 1) for n in range(num_steps - 1)), last)[:num_steps]
    fields: dict[str, Any] = {
        "trajectory_id": "run-1/task-7/0",
        "task": Task(
            task_id="task-7",
            domain="arithmetic",
            prompt="What is 1 + 1 + 1?",
            answer="3",
            meta={"split": "train", "program": [1, {"op": "+", "slip": None}]},
        ),
        "steps": steps,
        "stop": StopReason.ANSWERED,
        "answer": "3",
        "outcome": 1.0,
        "group": "run-1/task-7",
        "policy": "tiny",
        "policy_revision": "step-3",
        "seed": 2**62 + 1,
        "tools": ("calculator",),
        "tools_hash": "ab12",
        "prompt_ids": (1, 2, 3),
        "meta": {"isolation": "none"},
    }
    return Trajectory(**(fields | changes))


def make_labelled(num_steps: int = 2, **changes: Any) -> LabelledTrajectory:
    """A trajectory with evidence from four rollouts per prefix; the first prefix is unknown."""
    trajectory = make_trajectory(num_steps, **changes)
    name, size = trajectory.trajectory_id, num_steps + 1
    evidence = StepEvidence(
        trajectory_id=name,
        rollouts=(4,) * size,
        correct=(0,) + (3,) * num_steps,
        truncated=(0,) * size,
        failed=(4,) + (0,) * num_steps,
        completer="tiny@step-3",
        sampling=Sampling(temperature=0.7),
        tokens=1234,
    )
    labels = StepLabels(
        trajectory_id=name,
        estimator="soft",
        values=(None,) + (0.75,) * num_steps,
        low=(None,) + (0.1 + 0.2,) * num_steps,
        high=(None,) + (1.0,) * num_steps,
    )
    return LabelledTrajectory(trajectory=trajectory, evidence=evidence, labels=labels)


def make_scores(trajectory: Trajectory) -> StepScores:
    """Scores that rise with every step."""
    size = trajectory.num_steps + 1
    return StepScores(
        trajectory_id=trajectory.trajectory_id,
        checkpoint="c0ffee",
        values=tuple(t / size for t in range(size)),
        kind="value",
        position="observation",
    )


texts = st.text(max_size=30)
"""Any text that UTF-8 can hold."""
_numbers = st.floats(allow_nan=False, allow_infinity=False)
_unit = st.floats(0, 1)
_ids = st.lists(st.integers(0, 2**31), max_size=4).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | _numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
_meta = st.dictionaries(texts, json_values, max_size=2)
tasks = st.builds(
    Task, task_id=st.text(min_size=1, max_size=9), domain=texts, prompt=texts, answer=texts,
    meta=_meta,
)  # fmt: skip
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 5),
    max_tokens=st.integers(1, 9999),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 100),
)


@st.composite
def steps(draw: Any) -> Step:
    """Any step."""
    calls = draw(st.lists(st.builds(ToolCall, name=texts, arguments=texts), max_size=2))
    observation = st.builds(
        Observation, content=texts, error=st.none() | texts, seconds=st.floats(0, 1e6)
    )
    ids = draw(st.none() | _ids)
    scored = ids is not None and draw(st.booleans())
    return Step(
        text=draw(texts),
        calls=tuple(calls),
        observations=tuple(draw(observation) for _ in calls),
        token_ids=ids,
        logprobs=tuple(draw(_numbers) for _ in ids) if scored else None,
        observation_ids=draw(st.none() | _ids),
        perturbation=draw(st.none() | texts),
    )


@st.composite
def trajectories(draw: Any) -> Trajectory:
    """Any trajectory."""
    stop = draw(st.sampled_from(StopReason))
    return Trajectory(
        trajectory_id=draw(st.text(min_size=1, max_size=9)),
        task=draw(tasks),
        steps=tuple(draw(st.lists(steps(), max_size=3))),
        stop=stop,
        answer=draw(st.none() | texts),
        outcome=draw(_unit) if stop.judged else None,
        group=draw(texts),
        policy=draw(texts),
        sampling=draw(samplings),
        seed=draw(st.integers(0, 2**63 - 1)),
        tools=tuple(draw(st.lists(texts, max_size=2))),
        prompt_ids=draw(st.none() | _ids),
        meta=draw(_meta),
    )


@st.composite
def labelled(draw: Any) -> LabelledTrajectory:
    """Any labelled trajectory."""
    trajectory = draw(trajectories())
    prefixes = range(trajectory.num_steps + 1)
    counts = [draw(st.tuples(*[st.integers(0, 9)] * 4)) for _ in prefixes]
    intervals = [draw(st.none() | st.tuples(_unit, _unit, _unit).map(sorted)) for _ in prefixes]
    name = trajectory.trajectory_id
    low, values, high = (
        tuple(None if i is None else i[part] for i in intervals) for part in range(3)
    )
    return LabelledTrajectory(
        trajectory=trajectory,
        evidence=StepEvidence(
            trajectory_id=name,
            rollouts=tuple(sum(c) for c in counts),
            correct=tuple(c[0] for c in counts),
            truncated=tuple(c[1] for c in counts),
            failed=tuple(c[2] for c in counts),
            completer=draw(texts),
            sampling=draw(samplings),
            tokens=draw(st.integers(0, 10**12)),
        ),
        labels=StepLabels(
            trajectory_id=name, estimator=draw(texts), values=values, low=low, high=high
        ),
    )
