"""Results as text: one line per row, columns that line up."""

from hypothesis import given
from hypothesis import strategies as st

from agent.tools.sql_box import StatementResult
from agent.tools.sql_table import MAX_CHARS, cell_text, results_text


def test_a_number_looks_like_one():
    """Hand-computed: 15 significant digits, and .0 where a real has no fraction."""
    values = (0.1 + 0.2, 1e20, -3.0, 1 / 3)
    assert [cell_text(v) for v in values] == ["0.3", "1e+20", "-3.0", "0.333333333333333"]


@given(
    st.lists(
        st.lists(st.text() | st.integers() | st.none(), min_size=2, max_size=2), max_size=30
    ).map(lambda rows: tuple(map(tuple, rows)))
)
def test_a_table_has_one_line_per_row_and_columns_that_line_up(rows):
    result = StatementResult(
        columns=("a", "b"), num_columns=2, rows=rows, num_rows=len(rows), changed=None
    )
    text = results_text([result])
    lines = text.splitlines()
    if len(text) < MAX_CHARS:
        header, rule = lines[:2]
        assert rule.index("+") == header.index("|")
        assert all(line[rule.index("+")] == "|" for line in lines[2:-1])
        shown = len(lines) - 3
        assert shown == len(rows) or f"{len(rows) - shown} of them not shown" in lines[-1]
