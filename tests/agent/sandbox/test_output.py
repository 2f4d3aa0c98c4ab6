"""Collecting output in bounded memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sandbox.output import Capture, show_controls


@given(st.text(alphabet="ab\u20ac\n", max_size=60), st.integers(2, 20), st.integers(1, 7))
def test_any_chunking_keeps_head_and_tail_and_counts_the_rest(text, max_chars, size):
    capture, data = Capture(max_chars), text.encode()
    for start in range(0, len(data), size):
        capture.feed(data[start : start + size])
    half = max_chars // 2
    if len(text) <= 2 * half:
        assert capture.text() == text
    else:
        cut = len(text) - 2 * half
        assert capture.text() == (f"{text[:half]}\n... [{cut} characters cut] ...\n{text[-half:]}")


def test_invalid_utf8_becomes_escapes():
    capture = Capture(100)
    capture.feed(b"a\xff\xe2\x82")
    assert capture.text() == "a\\xff\\xe2\\x82"


def test_what_could_hide_text_is_shown_as_escapes():
    assert show_controls("tab\tline\n\r\x1b[0m\u200b\u2066") == (
        "tab\tline\n\\r\\x1b[0m\\u200b\\u2066"
    )


def test_a_capture_needs_room():
    with pytest.raises(ValueError, match="max_chars"):
        Capture(1)
