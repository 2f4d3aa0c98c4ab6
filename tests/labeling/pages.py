"""Labelled folders for the page of `prm view`, and the page read back as a browser would."""

import hashlib
import json
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser

from tests.examples import make_labelled, make_scores, make_step
from trajectory.records import Observation, Step, StopReason, Task, ToolCall
from trajectory.store import write_jsonl, write_labels

HOSTILE = (
    "</script><script>window.pwned = 1</script>"
    "<img src=x onerror='window.pwned = 2'><!--<script>-->"
    "&lt;b&gt; \u2028 \u2029 ]]> @@SCRIPT@@ ${window.pwned = 3} \"'`\\ \x00 é 語 😀"
)
"""What a tool or a web page could make an agent's trajectory hold."""


def hostile_row():
    """A row with hostile text wherever a text can be."""
    call = ToolCall(name=HOSTILE, arguments=json.dumps({HOSTILE: HOSTILE}))
    step = Step(
        text=HOSTILE,
        calls=(call,),
        observations=(Observation(content=HOSTILE, error=HOSTILE, seconds=0.5),),
        perturbation=HOSTILE,
    )
    task = Task(task_id=HOSTILE, domain=HOSTILE, prompt=HOSTILE, answer=HOSTILE)
    row = make_labelled(2, trajectory_id=HOSTILE, task=task, policy=HOSTILE, answer=HOSTILE)
    return replace(
        row,
        trajectory=replace(row.trajectory, steps=(step, Step(text=HOSTILE))),
        evidence=replace(row.evidence, completer=HOSTILE),
        labels=replace(row.labels, estimator=HOSTILE),
    )


def row_with(name, values, **changes):
    """A row with these values; intervals reach a tenth to both sides."""
    size = len(values)
    steps = tuple(make_step(n) for n in range(1, size))
    task = Task(task_id=name, domain="arithmetic", prompt=f"What is the sum of {name}?", answer="3")
    fields = {"trajectory_id": f"{name}/0", "task": task, "steps": steps} | changes
    row = make_labelled(size - 1, **fields)
    low, high = (
        tuple(None if v is None else min(1.0, max(0.0, v + by)) for v in values)
        for by in (-0.1, 0.1)
    )
    usable = [0 if v is None else round(4 * v) for v in values]
    return replace(
        row,
        evidence=replace(
            row.evidence,
            correct=tuple(usable),
            failed=tuple(4 if v is None else 0 for v in values),
        ),
        labels=replace(row.labels, values=tuple(values), low=low, high=high),
    )


def small_rows():
    """Four trajectories that the filters and orders tell apart."""
    broken = make_step(
        1, observations=(Observation(content="Traceback\n" * 40, error="ValueError"),)
    )
    wide = row_with("task-10", (0.5, 0.75, 1.0))
    wide = replace(wide, labels=replace(wide.labels, low=(0.0, 0.7, 0.9)))
    cut = {"stop": StopReason.MAX_STEPS, "outcome": None, "answer": None}
    return [
        row_with("task-2", (0.25, 0.75, 0.25, 0.5)),
        wide,
        row_with("task-1", (0.5, 0.0), steps=(broken,), outcome=0.0, answer="5"),
        row_with("task-3", (None, 0.5), **cut),
    ]


def folder_of(path, rows):
    """A labelled folder without a manifest."""
    path.mkdir(exist_ok=True)
    write_labels(path / "labels.parquet", rows)
    return path


class Page(HTMLParser):
    """Elements of a page, its scripts and styles with their texts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.scripts, self.styles, self.policy = [], {}, [], ""
        self._into = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("script", "style"):
            self._into = (tag, attributes.get("id", "program"))
        if tag == "script":
            self.scripts[self._into[1]] = ""
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self._into = None

    def handle_data(self, data):
        if self._into and self._into[0] == "script":
            self.scripts[self._into[1]] += data
        elif self._into:
            self.styles.append(data)

    @property
    def summary(self):
        return json.loads(self.scripts["data-summary"])

    @property
    def index(self):
        return json.loads(self.scripts["data-index"])

    @property
    def details(self):
        return [json.loads(line) for line in self.scripts["data-details"].split("\n") if line]


def admitted(text):
    """The source expression of a policy that admits an inline text."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def several_calls(folder):
    """`small_rows` with a second call in step 2 of the first, and its scores in scores.jsonl."""
    row, *others = small_rows()
    steps = [*row.trajectory.steps]
    call, observation = steps[1].calls[0], steps[1].observations[0]
    failed = replace(observation, content="no such table", error="SQLError")
    steps[1] = replace(steps[1], calls=(call, call), observations=(observation, failed))
    row = replace(row, trajectory=replace(row.trajectory, steps=tuple(steps)))
    scores = make_scores(row.trajectory)
    scores = replace(scores, calls=((0.25,), (0.654321, 0.5), (0.75,)))
    write_jsonl(folder / "scores.jsonl", [scores])
    return folder_of(folder / "labels", [row, *others]), scores
