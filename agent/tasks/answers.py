r"""Finding a final answer in a text, and comparing plain numbers and plain texts.

Everything here is cheap and total: any string gives an answer or None, never an exception.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_NUMBER_CHARS = 200
"""Longer texts are not read as numbers."""

_BOX = re.compile(r"(?:\\boxed|\\fbox|\bboxed)\s*\{")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_ANSWER = re.compile(r"\banswer\b", re.IGNORECASE)
_ANSWER_IS = re.compile(
    r"answer\b[^\n.:=]{0,60}?(?:\bis\b|:|=)[\s:=]*(?:\*\*)?\s*(\S[^\n]*)", re.IGNORECASE
)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = rf"[-+]?(?:{_DIGITS}(?:\.\d*)?|\.\d+)(?:\s*/\s*{_DIGITS})?"
_WORD = r"[A-Za-z][A-Za-z'-]*"
_PHRASE = re.compile(
    rf"(?:{_WORD}[,:]?\s+)*(?:[A-Za-z]\w*\s*=\s*)?(?P<number>{_NUMBER})(?P<after>(?:\s+{_WORD}[,.]?)*)"
)
_NOT_UNITS = re.compile(
    "pi|sqrt|log|ln|exp|sin|cos|tan|cot|sec|csc|mod|choose|over|plus|minus|times|divided|squared|"
    "cubed|point|half|third|quarter|hundred|thousand|million|billion|trillion|dozen|not|or",
    re.IGNORECASE,
)
"""Words that change a number's value."""
_SHORT_WORDS = re.compile(
    "cm|mm|km|kg|mg|lb|ft|in|oz|mi|hr|ml|am|pm|of|at|to|on|is|an|by|it|we|he|so", re.IGNORECASE
)
"""Words of two letters that are no product of two variables."""
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"))


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete, non-empty ``\boxed{...}``.

    Examples
    --------
    >>> last_boxed(r"\boxed{1}, so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> last_boxed(r"\boxed{\frac{1}{2}") is None
    True
    """
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                content = trim(text[match.end() : end])
                if content:
                    return content
                break
    return None


def after_hashes(text: str) -> str | None:
    r"""Return what follows the last ``####``, unless it is a heading in the middle of a text.

    Examples
    --------
    >>> after_hashes("48 + 24 = 72\n#### 72")
    '72'
    >>> after_hashes("#### Step 1: add\nWe add.") is None
    True
    """
    matches = list(_HASHES.finditer(text))
    if not matches:
        return None
    content = trim(matches[-1][1])
    is_last = not text[matches[-1].end() :].strip()
    return content if content and (is_last or plain_number(content) is not None) else None


def after_answer_is(text: str) -> str | None:
    """Return what follows the last ``answer is`` or ``Answer:``, up to the end of the sentence.

    Examples
    --------
    >>> after_answer_is("**Final answer:** $3.50$. Is there anything else?")
    '3.50'
    """
    for place in reversed([match.start() for match in _ANSWER.finditer(text)]):
        match = _ANSWER_IS.match(text, place)
        if match:
            return trim(re.split(r"[.;](?:\s|$)", match[1], maxsplit=1)[0]) or None
    return None


def trim(text: str) -> str:
    """Strip spaces, emphasis, mathematics delimiters and closing punctuation from both ends.

    Examples
    --------
    >>> trim(" **$5$.** ")
    '5'
    """
    before = None
    while text != before:
        before = text
        text = text.strip().strip("*_").rstrip(".,;:!").strip()
        for left, right in _WRAPPERS:
            inside = text[len(left) : len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and inside and right not in inside:
                text = inside
                break
    return text


def plain_number(text: str) -> tuple[Fraction, bool] | None:
    r"""Read a text that holds one number, with or without unit words.

    Returns
    -------
    tuple of Fraction and bool, or None
        The exact value, and whether a percent sign stood by it; None where the text is more than
        a number and words, so that its value is a matter of mathematics.

    Examples
    --------
    >>> [plain_number(text) for text in (r"\$1,234.50", "x = 3 apples", "12.5\\%", "3x", "2 pi")]
    [(Fraction(2469, 2), False), (Fraction(3, 1), False), (Fraction(25, 2), True), None, None]
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    cleaned = text.replace("\\$", "").replace("**", "")
    cleaned = re.sub(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}\\]*)\}", r" \1 ", cleaned)
    cleaned = re.sub(r"\\[!,;]\s*|(?:\\\s)", "", cleaned).replace("{,}", ",")
    cleaned = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\u00b0", " ", cleaned)
    cleaned = cleaned.replace("\u2212", "-").replace("$", "")
    percent = "%" in cleaned
    cleaned = cleaned.replace("\\%", " ").replace("%", " ")
    match = _PHRASE.fullmatch(trim(cleaned))
    if match is None or not _only_words(match[0][: match.start("number")] + match["after"]):
        return None
    return _fraction(match["number"], percent)


def same_number(gold: str, answer: str) -> bool | None:
    """Compare two plain numbers exactly; None if either text is not one.

    A percentage equals both the number before the sign and its hundredth.

    Examples
    --------
    >>> [same_number("1000", "1,000.0 dollars"), same_number("0.5", "50%"), same_number("5", "6")]
    [True, True, False]
    >>> same_number("5", "x + 5") is None
    True
    """
    left, right = plain_number(gold), plain_number(answer)
    if left is None or right is None:
        return None
    return not _meanings(*left).isdisjoint(_meanings(*right))


def normal_text(text: str) -> str:
    r"""Reduce a text to its lower-case letters, digits and operators, without LaTeX text commands.

    Examples
    --------
    >>> normal_text(r"\text{ (C) }") == normal_text("(c).")
    True
    """
    plain = re.sub(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", trim(text))
    return re.sub(r"\s+", "", trim(plain)).casefold()


def _only_words(text: str) -> bool:
    """Tell whether a text holds only words that do not change a number's value."""
    words = re.findall(_WORD, re.sub(r"[A-Za-z]\w*\s*=", "", text))
    return all(
        not _NOT_UNITS.fullmatch(word) and (len(word) > 2 or _SHORT_WORDS.fullmatch(word))
        for word in words
    )


def _fraction(number: str, percent: bool) -> tuple[Fraction, bool] | None:
    """Turn the text of a number or of a quotient into its value."""
    above, _, below = re.sub(r"[,\s]", "", number).partition("/")
    divisor = Fraction(below or "1")
    return (Fraction(above) / divisor, percent) if divisor else None


def _meanings(value: Fraction, percent: bool) -> set[Fraction]:
    """Return the values a number may stand for."""
    return {value, value / 100} if percent else {value}
