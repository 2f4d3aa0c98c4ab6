"""The page of ``prm view``: labelled trajectories as data inside one HTML file.

The page is `templates/view.html` with its style sheet, its script and three blocks of data put in.
Text of trajectories is hostile by default: it appears only inside the data blocks, as JSON in
which nothing can end the block, and the script shows it as text nodes. The page's content security
policy admits that one script and that one style sheet, by their hashes, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import TextIO

from trajectory.records import JsonValue, LabelledTrajectory, Step, StepScores, Trajectory

BINS = 20
"""Bins of the histograms over [0, 1]."""

_DIGITS = 4
"""Decimals of values in the page."""

_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
_MARKER = re.compile(r"@@([A-Z]+)@@")


def embed(value: JsonValue) -> str:
    r"""Write JSON that can stand in a ``<script>`` element, whatever texts it holds.

    ``<``, ``>`` and ``&`` could end the element or begin a comment; U+2028 and U+2029 end lines in
    old scripts; lone surrogates cannot be written as UTF-8. All become ``\uXXXX``, which JSON
    reads as the same text. The result is one line.

    Raises
    ------
    ValueError
        On NaN and infinities, which JSON does not have.

    Examples
    --------
    >>> embed({"x": "</script>"})
    '{"x":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def outcome_of(trajectory: Trajectory) -> str:
    """Return ``right``, ``wrong``, ``cut off`` (by a limit) or ``broken`` (infrastructure)."""
    if trajectory.outcome is None:
        return "cut off" if trajectory.stop.truncated else "broken"
    return "right" if trajectory.outcome >= 0.5 else "wrong"


def index_entry(row: LabelledTrajectory, scores: StepScores | None = None) -> dict[str, JsonValue]:
    """Return what lists, filters and bars need of one trajectory.

    Returns
    -------
    dict
        ``i`` trajectory id, ``k`` task id, ``q`` prompt, ``o`` outcome in words, ``y`` the
        verdict, ``s`` stop reason, ``a`` answer, ``g`` gold answer, ``e`` observations that are
        errors; per prefix 0..S: ``v`` value, ``l`` and ``h`` its interval (null where unknown),
        ``n`` rollouts and among them ``c`` right, ``u`` cut off, ``f`` failed; ``w`` those that
        began at an earlier prefix, ``p`` the reward model's scores, or null. Values are rounded to
        four decimals.
    """
    run, evidence, labels = row.trajectory, row.evidence, row.labels
    return {
        "i": run.trajectory_id,
        "k": run.task.task_id,
        "q": run.task.prompt,
        "o": outcome_of(run),
        "y": run.outcome,
        "s": run.stop.value,
        "a": run.answer,
        "g": run.task.answer,
        "e": sum(o.error is not None for step in run.steps for o in step.observations),
        "v": _rounded(labels.values),
        "l": _rounded(labels.low),
        "h": _rounded(labels.high),
        "n": list(evidence.rollouts),
        "c": list(evidence.correct),
        "u": list(evidence.truncated),
        "f": list(evidence.failed),
        "w": list(evidence.reused) or None,
        "p": None if scores is None else _rounded(scores.values),
    }


def detail_entry(row: LabelledTrajectory, scores: StepScores | None = None) -> dict[str, JsonValue]:
    """Return what is shown of one trajectory only once it is selected.

    Returns
    -------
    dict
        ``s`` steps (``x`` text, ``m`` injected fault, ``c`` calls as name and arguments, ``o``
        observations as content, error and seconds, ``p`` the reward model's score after each
        result where there are several, else null), ``t`` tokens written, ``r`` tokens of its
        rollouts, ``p`` the policy.
    """
    run = row.trajectory
    calls: Sequence[Sequence[float]] = [()] * run.num_steps
    if scores is not None and scores.calls:
        calls = scores.calls
    revision = f" @ {run.policy_revision}" if run.policy_revision else ""
    return {
        "s": [_step(step, s) for step, s in zip(run.steps, calls, strict=True)],
        "t": run.num_generated_tokens,
        "r": row.evidence.tokens,
        "p": f"{run.policy}{revision}",
    }


def summarise(rows: Sequence[LabelledTrajectory]) -> dict[str, JsonValue]:
    """Count over all trajectories what the top of the page shows.

    Returns
    -------
    dict
        ``trajectories``; ``outcomes`` and ``stops`` (name to count); histograms ``values`` and
        ``widths`` (see `histogram`); ``unknown`` states; ``mean_width`` of the known intervals,
        None if there are none.
    """
    widths = [
        [None if lo is None or hi is None else hi - lo for lo, hi in zip(low, high, strict=True)]
        for low, high in ((row.labels.low, row.labels.high) for row in rows)
    ]
    known = [width for one in widths for width in one if width is not None]
    outcomes = Counter(outcome_of(row.trajectory) for row in rows)
    stops = Counter(row.trajectory.stop.value for row in rows)
    return {
        "trajectories": len(rows),
        "outcomes": dict(outcomes.most_common()),
        "stops": dict(stops.most_common()),
        "values": histogram(row.labels.values for row in rows),
        "widths": histogram(widths),
        "unknown": sum(row.labels.values.count(None) for row in rows),
        "mean_width": sum(known) / len(known) if known else None,
    }


def histogram(rows: Iterable[Sequence[float | None]]) -> dict[str, JsonValue]:
    """Count numbers in [0, 1] in `BINS` equal bins, unknown ones left out.

    Parameters
    ----------
    rows : iterable of sequences of float or None
        One number per prefix 0..S.

    Returns
    -------
    dict
        ``before`` for prefixes before the last step, ``end`` for the prefix after it, which is
        most often the verdict itself; 1 belongs to the last bin.

    Examples
    --------
    >>> counts = histogram([(0.5, None, 1.0)])
    >>> counts["before"].index(1), counts["end"].index(1)
    (10, 19)
    """
    before, end = [0] * BINS, [0] * BINS
    for values in rows:
        for prefix, value in enumerate(values):
            if value is not None:
                place = min(int(value * BINS), BINS - 1)
                (end if prefix == len(values) - 1 else before)[place] += 1
    return {"before": [*before], "end": [*end]}


def data_uri(png: bytes) -> str:
    """Return a picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write_page(
    file: TextIO,
    summary: Mapping[str, JsonValue],
    rows: Sequence[LabelledTrajectory],
    scores: Mapping[str, StepScores],
) -> None:
    """Write the page, one trajectory at a time.

    Parameters
    ----------
    file : text file
        Opened as UTF-8 without translation of line ends: the hashes are of these bytes.
    summary : mapping
        As the script reads it: `summarise` and ``folder``, ``made``, ``notes``, ``cost``,
        ``scores``, ``image``.
    rows : sequence of LabelledTrajectory
        Those to list.
    scores : mapping of str to StepScores
        By trajectory id; may lack some.
    """
    templates = files("labeling") / "templates"
    page, style, script = (
        (templates / f"view.{suffix}").read_text("utf-8") for suffix in ("html", "css", "js")
    )
    index = (embed(index_entry(row, scores.get(row.trajectory.trajectory_id))) for row in rows)
    parts: dict[str, Iterable[str]] = {
        "POLICY": [_policy(style, script)],
        "STYLE": [style],
        "SCRIPT": [script],
        "SUMMARY": [embed(dict(summary))],
        "INDEX": _array(index),
        "DETAILS": (
            embed(detail_entry(row, scores.get(row.trajectory.trajectory_id))) + "\n"
            for row in rows
        ),
    }
    # Only the template is searched for markers, so that no trajectory's text can be one.
    for place, piece in enumerate(_MARKER.split(page)):
        if place % 2:
            file.writelines(parts[piece])
        else:
            file.write(piece)


def _array(entries: Iterable[str]) -> Iterator[str]:
    """Yield the text of a JSON array in pieces."""
    yield "["
    for number, entry in enumerate(entries):
        yield f",\n{entry}" if number else entry
    yield "]"


def _policy(style: str, script: str) -> str:
    """Return the page's content security policy."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: str) -> str:
    """Return the source expression that admits exactly this text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _rounded(values: Sequence[float | None]) -> list[JsonValue]:
    """Round what is known."""
    return [None if value is None else round(value, _DIGITS) for value in values]


def _step(step: Step, scores: Sequence[float]) -> dict[str, JsonValue]:
    """Return one step's entry; the score of a single call is the step's own and not said twice."""
    return {
        "x": step.text,
        "m": step.perturbation,
        "c": [[call.name, call.arguments] for call in step.calls],
        "o": [[o.content, o.error, round(o.seconds, 6)] for o in step.observations],
        "p": _rounded(scores) if len(scores) > 1 else None,
    }
