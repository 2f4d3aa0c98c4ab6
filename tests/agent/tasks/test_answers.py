"""Finding and comparing final answers."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tasks.answers import (
    after_answer_is,
    after_hashes,
    last_boxed,
    normal_text,
    plain_number,
    same_number,
    trim,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{a}{b}}", r"\frac{a}{b}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"boxed{7}", "7"),
        (r"$\boxed{5$}", "5$"),
        (r"\boxed{ $5$ }", "5"),
        (r"\boxed{3} and then \boxed{}", "3"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{4", None),
        ("no box", None),
    ],
)
def test_the_last_complete_box_counts(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### 1,200\n", "1,200"),
        ("#### 7\n\nLet me know if you need more.", "7"),
        ("#### Step 2: add\nWe add 3.", None),
        ("#### Done", "Done"),
        ("a #### 5", None),
    ],
)
def test_hashes_mark_an_answer_but_not_a_heading(text, answer):
    assert after_hashes(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("the final answer is: **42**", "42"),
        ("**Answer:** 42", "42"),
        ("**Answer**: $3.50$ per day", "$3.50$ per day"),
        ("Answer: 3.14. Anything else?", "3.14"),
        ("The answer to this problem is $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("The answer is 5? No, the answer is 6.", "6"),
        ("Final Answer:\n\n18 dollars", "18 dollars"),
        ("I cannot answer.", None),
        ("Answer:", None),
    ],
)
def test_the_sentence_after_answer_is_counts(text, answer):
    assert after_answer_is(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("-3.50", Fraction(-7, 2)),
        ("\u22123", -3),
        ("$1,234.50", Fraction(2469, 2)),
        (r"\$32,\!348", 32348),
        ("10{,}080", 10080),
        ("1,2", None),
        ("073", 73),
        ("72.0", 72),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("3/0", None),
        (r"90^\circ", 90),
        (r"168,000 \, \text{\$}", 168000),
        ("a profit of **$10,000** a year", None),
        ("The profit is **$10,000** per year", 10000),
        (r"5.4 \text{ cents}", Fraction(27, 5)),
        ("x = 12", 12),
        ("18 dollars per day", 18),
        ("Natalia sold 72 clips altogether in April and May.", 72),
        ("5 cm", 5),
        ("3x", None),
        ("3 x", None),
        ("3 xy", None),
        ("2 pi", None),
        ("5 million", None),
        ("5 or more", None),
        ("2 and 3", None),
        ("2 + 3", None),
        ("2^3", None),
        ("five", None),
        ("", None),
        ("1" * 201, None),
    ],
)
def test_one_number_among_words_is_read(text, value):
    read = plain_number(text)
    assert (read[0] if read else None) == value


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("18", "18.00", True),
        ("1000", "1,000 dollars", True),
        ("50", "50%", True),
        ("0.5", "50\\%", True),
        ("50%", "0.5", True),
        ("50", "0.5", False),
        ("0.1", "0.10000001", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("5", "x + 5", None),
        ("five", "5", None),
    ],
)
def test_numbers_are_compared_exactly(gold, answer, equal):
    assert same_number(gold, answer) is equal


@given(st.integers(-(10**15), 10**15), st.sampled_from(["{}", "{:,}", "{}.0", "${}", "{} apples"]))
def test_any_way_to_write_an_integer_is_that_integer_and_no_other(number, form):
    written = form.format(number)
    assert same_number(str(number), written) is True
    assert same_number(str(number + 1), written) is False


@given(st.text(max_size=80))
def test_no_text_is_too_odd(text):
    for function in (last_boxed, after_hashes, after_answer_is, trim, plain_number, normal_text):
        found = function(text)
        assert found is None or type(found) in (str, tuple), (function.__name__, found)


def test_texts_are_compared_without_case_spaces_and_wrapping():
    assert normal_text(r"\text{Evelyn}") == normal_text(" $evelyn$. ")
    assert normal_text(r"\text{even}") != normal_text("odd")
