"""Finding the last expression of a cell."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sandbox.echo import final_expression


def found(code):
    span = final_expression(code)
    return None if span is None else code[slice(*span)]


@pytest.mark.parametrize(
    ("code", "expression"),
    [
        ("x", "x"),
        ("import math; math.pi", "math.pi"),
        ("x;", "x"),
        ("s = '''\nabc; d\n'''\ns  # shown", "s"),
        ("f(\n1,\n)\n\n# end\n", "f(\n1,\n)"),
        ("f(a=1)", "f(a=1)"),
        ("x == 1", "x == 1"),
        ("lambda: 3", "lambda: 3"),
        ("if a:\n    b\nc\r\n", "c"),
        ("é = 1; 'ü'", "'ü'"),
    ],
)
def test_the_last_expression_is_found(code, expression):
    assert found(code) == expression


@pytest.mark.parametrize(
    "code",
    ["", "# only", "x = 1", "x += 1", "if a: b; c", "if a:\n    b", "import a", "x = (", "'''"],
)
def test_a_cell_that_ends_otherwise_has_none(code):
    assert found(code) is None


PIECES = ["x", "x = 1", "f(a=[1, 2])", "'a;b'", "'''\nq\n'''", "pass", "import os", "x < 2", "-x"]
BLOCKS = ["if x: y; z", "for i in x:\n    y\n    z", "def f():\n    return 1\n", "with a:\n  b\n\n"]
lines = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("; ".join),
    st.sampled_from([*BLOCKS, "# note", "", "(\n1,\n# inside\n)"]),
)


@given(st.lists(lines, max_size=5).map("\n".join))
def test_it_is_the_one_that_the_grammar_names(code):
    body = ast.parse(code).body
    last = body[-1] if body else None
    expected = ast.get_source_segment(code, last) if isinstance(last, ast.Expr) else None
    assert found(code) == expected


@given(st.text(alphabet="x=(;)[]'\"\n #:\\\t{}\x00é", max_size=40))
def test_any_text_is_answered_with_a_span_or_none(code):
    span = final_expression(code)
    assert span is None or 0 <= span[0] < span[1] <= len(code)
