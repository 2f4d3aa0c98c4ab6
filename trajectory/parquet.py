"""Labelled trajectories frozen as one Parquet file with an explicit, readable schema.

The schema is a `datasets.Features`, kept in the file, so ``datasets.load_dataset("parquet",
data_files=...)`` gives the same columns. The lists ``rollouts correct truncated failed reused`` and
``values low high`` are indexed by prefix 0..S; ``*_meta`` columns hold JSON text. Every value comes
back exactly, except that lone surrogates, which UTF-8 cannot hold, become U+FFFD.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajectory.atomic import atomic_path
from trajectory.codec import from_json, to_json
from trajectory.errors import InputError
from trajectory.records import JsonValue, LabelledTrajectory

if TYPE_CHECKING:
    from datasets import Features

SCHEMA_VERSION = "1.1"
"""``major.minor``: readers refuse other majors; a minor adds fields that have defaults."""

_VERSION_KEY = b"toolprm.schema_version"
_BATCH_ROWS = 512

_TRAJECTORY_COLUMNS = {
    "trajectory_id": "trajectory_id",
    "steps": "steps",
    "stop": "stop",
    "answer": "answer",
    "outcome": "outcome",
    "group": "group",
    "policy": "policy",
    "policy_revision": "policy_revision",
    "sampling": "sampling",
    "seed": "seed",
    "tools": "tools",
    "tools_hash": "tools_hash",
    "prompt_ids": "prompt_ids",
}
_TASK_COLUMNS = {
    "task_id": "task_id",
    "domain": "domain",
    "prompt": "prompt",
    "gold_answer": "answer",
}
_EVIDENCE_COLUMNS = {
    "rollouts": "rollouts",
    "correct": "correct",
    "truncated": "truncated",
    "failed": "failed",
    "completer": "completer",
    "completer_sampling": "sampling",
    "evidence_tokens": "tokens",
    "reused": "reused",
}
_ADDED = {"reused"}
"""Columns that files of an older minor version lack."""
_LABEL_COLUMNS = {"estimator": "estimator", "values": "values", "low": "low", "high": "high"}


def label_features() -> Features:
    """Return the columns of a labels file.

    Returns
    -------
    datasets.Features
        Column name to type; ``answer`` is the agent's, ``gold_answer`` the task's.
    """
    from datasets import Features, List, Value

    text, integer, number = Value("string"), Value("int64"), Value("float64")
    sampling = {
        "temperature": number,
        "max_tokens": integer,
        "top_p": number,
        "top_k": integer,
    }
    step = {
        "text": text,
        "calls": List({"name": text, "arguments": text}),
        "observations": List({"content": text, "error": text, "seconds": number}),
        "token_ids": List(integer),
        "logprobs": List(number),
        "observation_ids": List(integer),
        "perturbation": text,
    }
    return Features(
        {
            **dict.fromkeys(("trajectory_id", "task_id", "domain", "prompt"), text),
            **dict.fromkeys(("gold_answer", "task_meta", "answer"), text),
            "outcome": number,
            "stop": text,
            "steps": List(step),
            **dict.fromkeys(("group", "policy", "policy_revision"), text),
            "sampling": sampling,
            "seed": integer,
            "tools": List(text),
            "tools_hash": text,
            "prompt_ids": List(integer),
            "trajectory_meta": text,
            **dict.fromkeys(
                ("rollouts", "correct", "truncated", "failed", "reused"), List(integer)
            ),
            "completer": text,
            "completer_sampling": sampling,
            "evidence_tokens": integer,
            "estimator": text,
            **dict.fromkeys(("values", "low", "high"), List(number)),
        }
    )


def write_labels(path: str | Path, rows: Iterable[LabelledTrajectory]) -> int:
    """Freeze labelled trajectories as a Parquet file that replaces ``path`` as a whole.

    Returns
    -------
    int
        Rows written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = label_features().arrow_schema
    schema = schema.with_metadata({**schema.metadata, _VERSION_KEY: SCHEMA_VERSION.encode()})
    count, remaining = 0, iter(rows)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while batch := [_flatten(row) for row in islice(remaining, _BATCH_ROWS)]:
            writer.write_table(_table(pa, batch, schema))
            count += len(batch)
    return count


def _table(pa: Any, batch: list[dict[str, Any]], schema: Any) -> Any:
    """Make an Arrow table, replacing lone surrogates only where there are any."""
    try:
        return pa.Table.from_pylist(batch, schema=schema)
    except UnicodeEncodeError:
        return pa.Table.from_pylist([_utf8(row) for row in batch], schema=schema)


def _utf8(value: Any) -> Any:
    """Replace lone surrogates in every text of a row."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_utf8(v) for v in value]
    if isinstance(value, dict):
        return {k: _utf8(v) for k, v in value.items()}
    return value


def read_labels(path: str | Path) -> list[LabelledTrajectory]:
    """Read a labels file.

    Raises
    ------
    InputError
        If the file is missing, is no labels file, is of another major schema version, or holds a
        row that breaks an invariant (the message has the row number, from 1).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: `prm label --out DIR` writes DIR/labels.parquet")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a Parquet file, or it is damaged: {error}") from error
    rows: list[LabelledTrajectory] = []
    with file:
        _check_schema(path, file.schema_arrow)
        for batch in file.iter_batches(_BATCH_ROWS):
            for flat in batch.to_pylist():
                try:
                    rows.append(_restore(flat))
                except ValueError as error:
                    raise InputError(f"{path}, row {len(rows) + 1}: {error}") from error
    return rows


def _check_schema(path: Path, schema: Any) -> None:
    """Refuse other major versions and other columns."""
    version = (schema.metadata or {}).get(_VERSION_KEY, b"").decode()
    if not version:
        raise InputError(f"{path} is not a labels file: its metadata has no schema version")
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise InputError(
            f"{path} has labels schema {version}, this version reads {SCHEMA_VERSION}: convert it "
            "with the version that wrote it, or label again"
        )
    expected = label_features().arrow_schema
    for name in schema.names:
        if name not in expected.names:
            raise InputError(f"{path}: unknown column {name!r} (schema {version})")
    for name in expected.names:
        if name not in schema.names:
            if name in _ADDED:
                continue
            raise InputError(f"{path}: column {name!r} is missing (schema {version})")
        if schema.field(name).type != expected.field(name).type:
            raise InputError(
                f"{path}: column {name!r} has type {schema.field(name).type}, expected "
                f"{expected.field(name).type}"
            )


def _flatten(row: LabelledTrajectory) -> dict[str, JsonValue]:
    """Turn a labelled trajectory into one flat row."""
    run, evidence, labels = to_json(row.trajectory), to_json(row.evidence), to_json(row.labels)
    task: Any = run["task"]
    return {
        **{column: task[name] for column, name in _TASK_COLUMNS.items()},
        **{column: run[name] for column, name in _TRAJECTORY_COLUMNS.items()},
        **{column: evidence[name] for column, name in _EVIDENCE_COLUMNS.items()},
        **{column: labels[name] for column, name in _LABEL_COLUMNS.items()},
        "task_meta": json.dumps(task["meta"], allow_nan=False),
        "trajectory_meta": json.dumps(run["meta"], allow_nan=False),
    }


def _restore(flat: dict[str, Any]) -> LabelledTrajectory:
    """Turn one flat row back into a labelled trajectory."""
    trajectory_id = flat["trajectory_id"]

    def part(columns: dict[str, str]) -> dict[str, Any]:
        return {name: flat[column] for column, name in columns.items() if column in flat}

    task = {**part(_TASK_COLUMNS), "meta": json.loads(flat["task_meta"])}
    run = {
        **part(_TRAJECTORY_COLUMNS),
        "task": task,
        "meta": json.loads(flat["trajectory_meta"]),
    }
    return from_json(
        LabelledTrajectory,
        {
            "trajectory": run,
            "evidence": {"trajectory_id": trajectory_id, **part(_EVIDENCE_COLUMNS)},
            "labels": {"trajectory_id": trajectory_id, **part(_LABEL_COLUMNS)},
        },
    )
