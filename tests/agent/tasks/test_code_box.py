"""What travels between the boxes: values of plain types, and nothing else."""

import json
import math
from collections import Counter, OrderedDict, namedtuple
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tasks.code_box import Unsupported, decode, encode
from agent.tasks.code_tests import checked_reply

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(st.integers() | st.text() | st.tuples(st.booleans(), st.text()))
        | st.frozensets(st.integers() | st.binary())
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=4)
    ),
    max_leaves=12,
)


def types_in(value):
    """The value with the type of each part, so that 1, 1.0 and True differ."""
    if isinstance(value, list | tuple):
        return type(value), [types_in(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), {(type(item), item) for item in value}
    if isinstance(value, dict):
        return type(value), [(types_in(k), types_in(v)) for k, v in value.items()]
    return type(value), value


@given(plain)
def test_any_plain_value_arrives_as_it_was(value):
    text = json.dumps({"value": encode(value)})
    assert text.isascii()
    reply = json.loads(checked_reply(text))
    assert types_in(decode(reply["value"])) == types_in(value)


def test_numbers_that_are_not_finite_arrive():
    arrived = decode(json.loads(json.dumps(encode([math.inf, -math.inf, math.nan]))))
    assert arrived[:2] == [math.inf, -math.inf]
    assert math.isnan(arrived[2])


class Colour(IntEnum):
    RED = 3


class Sly(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    ("value", "arrived"),
    [
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (namedtuple("P", "x y")(1, 2), (1, 2)),
        (Colour.RED, 3),
        (Sly(5), 5),
        (bytearray(b"a"), b"a"),
        (np.int64(5), 5),
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        ([np.int8(1)], [1]),
        ((int, [ValueError]), (int, [ValueError])),
    ],
)
def test_subclasses_and_numpy_scalars_become_plain(value, arrived):
    assert types_in(decode(json.loads(json.dumps(encode(value))))) == types_in(arrived)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "object"),
        (Colour, "EnumType"),
        (len, "builtin_function_or_method"),
        (iter([1]), "list_iterator"),
        ([range(3)], "range"),
        ({"a": Fraction(1, 2)}, "Fraction"),
        (np.array([1]), "ndarray"),
    ],
)
def test_any_other_type_does_not_travel(value, name):
    with pytest.raises(Unsupported, match=name):
        encode(value)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "nonsense",
        "[]",
        "{}",
        '{"value": 1, "raised": []}',
        '{"raised": "ValueError"}',
        '{"raised": [1]}',
        '{"unsupported": "object"}',
        '{"value": {"name": "box"}}',
        '{"value": {"call": ["f", [], {}]}}',
        '{"value": {"tuple": 3}}',
        '{"value": {"bytes": [1]}}',
        '{"value": {"type": ["int"]}}',
        '{"value": {"tuple": [], "set": []}}',
        '{"value": {"tuple": [{"code": "1"}]}}',
        '{"value": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"value": ' + "9" * 100_000 + "}",
    ],
)
def test_what_is_no_reply_of_plain_values_is_refused(text):
    assert checked_reply(text) is None
