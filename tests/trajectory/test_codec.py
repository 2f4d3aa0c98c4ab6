"""Records to JSON and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import given

from tests.examples import labelled, make_trajectory
from trajectory.codec import from_json, to_json
from trajectory.records import LabelledTrajectory, Sampling, StepScores, ToolCall, Trajectory


@dataclass(frozen=True, kw_only=True)
class Everything:
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    rows: tuple[tuple[float, ...], ...] = ()


@given(labelled())
def test_round_trip_through_json_text_is_exact(row):
    assert from_json(LabelledTrajectory, json.loads(json.dumps(to_json(row)))) == row


def test_round_trip_of_every_supported_field_type():
    record = Everything(kind="b", flag=True, counts={"x": 3}, rows=((0.1,), (), (1.0, 2.0)))
    assert from_json(Everything, to_json(record)) == record


def test_encoding_yields_plain_json_values():
    obj = to_json(make_trajectory())
    assert type(obj["stop"]) is str
    assert obj["stop"] == "answered"
    assert obj["steps"][0]["calls"] == [
        {"name": "calculator", "arguments": '{"expression": "1+1"}'}
    ]


def test_a_field_with_a_default_may_be_missing():
    assert from_json(Sampling, {"temperature": 0.5}) == Sampling(temperature=0.5)


def test_scores_written_before_calls_were_scored_still_load():
    old = (
        '{"trajectory_id": "a", "checkpoint": "c0ffee", "values": [0.5, 0.25], '
        '"kind": "value", "position": "observation"}'
    )
    scores = from_json(StepScores, json.loads(old))
    assert (scores.values, scores.calls) == ((0.5, 0.25), ())
    with_calls = replace(scores, calls=((0.75, 0.25),))
    assert from_json(StepScores, json.loads(json.dumps(to_json(with_calls)))) == with_calls


def test_an_integer_is_accepted_for_a_float():
    value = from_json(Sampling, {"temperature": 1}).temperature
    assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize(
    ("cls", "obj", "message"),
    [
        (ToolCall, {"name": "c", "arguments": "{}", "id": 1}, "unknown field 'id' of ToolCall"),
        (ToolCall, {"name": "c"}, "missing field arguments of ToolCall"),
        (ToolCall, ["c"], "expected an object"),
        (ToolCall, {"name": 3, "arguments": "{}"}, "name: expected str, got int 3"),
        (Sampling, {"top_k": True}, "top_k: expected int, got bool True"),
        (Sampling, {"top_k": 1.0}, "top_k: expected int, got float"),
        (Sampling, {"temperature": "hot"}, "temperature: expected a finite number"),
        (Sampling, {"temperature": float("nan")}, "temperature: expected a finite number"),
        (Sampling, {"temperature": False}, "temperature: expected a finite number"),
        (Sampling, {"max_tokens": 0}, "max_tokens must be >= 1"),
        (Everything, {"kind": "c"}, "kind: expected one of 'a', 'b', got 'c'"),
        (Everything, {"counts": {"x": "1"}}, "counts.x: expected int"),
        (Everything, {"counts": [1]}, "counts: expected an object"),
        (Everything, {"rows": [[1.0], [None]]}, r"rows\[1\]\[0\]: expected a finite number"),
        (StepScores, {"values": "0.5"}, "values: expected a list"),
    ],
)
def test_decoding_names_what_is_wrong_and_where(cls, obj, message):
    with pytest.raises(ValueError, match=message):
        from_json(cls, obj)


def test_decoding_names_the_place_in_nested_records():
    obj = to_json(make_trajectory())
    obj["steps"][0]["calls"][0]["name"] = None
    with pytest.raises(ValueError, match=r"^steps\[0\]\.calls\[0\]\.name: expected str"):
        from_json(Trajectory, obj)


def test_decoding_names_the_valid_stops():
    obj = to_json(make_trajectory()) | {"stop": "tired"}
    with pytest.raises(ValueError, match="stop: expected one of answered, malformed"):
        from_json(Trajectory, obj)


def test_unsupported_field_types_are_refused():
    @dataclass
    class Bad:
        values: set[int]

    with pytest.raises(TypeError, match="cannot hold fields of type set"):
        from_json(Bad, {"values": []})
